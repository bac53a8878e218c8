"""Pictures in the viewer, on the compare page and on the page that tries adapters."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from run_with_pictures import run_with_pictures  # noqa: E402

from lorakit.core import image_grid  # noqa: E402
from lorakit.runs.queue import Queue  # noqa: E402
from lorakit.runs.run_folder import RunFolder  # noqa: E402
from lorakit.ui import commands, language, texts  # noqa: E402
from lorakit.ui.pages import viewer  # noqa: E402
from lorakit.ui.pages.compare import ComparePage  # noqa: E402
from lorakit.ui.pages.try_it import TryPage  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402

SAY = texts.sayer("en")
T = language.Translations()


def picture(prompt: str, seed: int) -> Image.Image:
    image = Image.new("RGB", (40, 30), (seed, 0, 0))
    image.info |= {"lorakit": json.dumps({"prompt": prompt, "seed": seed}), "parameters": f"{prompt}\nSeed: {seed}"}
    return image


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(Queue, "start", lambda queue: None)
    return Workspace(tmp_path / "runs", [])


@pytest.fixture
def run(workspace: Workspace) -> RunFolder:
    samples = {step: [picture("a <toy>", step), picture("b", step + 1)] for step in (0, 2, 4)}
    return run_with_pictures(workspace, workspace.runs, samples, ["a <toy>", "b"])


def test_the_viewer_returns_a_picture_unchanged(workspace: Workspace, run: RunFolder):
    answer = viewer.original(workspace, "one/samples/step-000002/02.png", SAY)
    content = base64.b64decode(answer["address"].removeprefix("data:image/png;base64,"))
    assert content == (run.samples / "step-000002" / "02.png").read_bytes()
    assert Image.open(io.BytesIO(content)).info["parameters"] == answer["recipe"] == "b\nSeed: 3"
    assert answer["text"] == "b · step-000002 · 02" and answer["name"] == "one-step-000002-02.png"
    assert answer["save"] == "Save" and viewer.original(workspace, "", texts.sayer("zh-Hant"))["save"] == "儲存"


@pytest.mark.parametrize(
    "name",
    ["", "../x.png", "/etc/passwd", "one/config.toml", "one/samples/no.png", ".queue/a.png", {"a": 1}, None, 7],
)
def test_only_pictures_below_the_runs_are_given(workspace: Workspace, run: RunFolder, name: object):
    (workspace.runs.parent / "x.png").write_bytes((run.samples / "step-000002.png").read_bytes())
    answer = viewer.original(workspace, name, SAY)
    assert answer["address"] == "" and answer["text"]


def test_compare_has_a_table_of_pictures_and_takes_the_files(workspace: Workspace, run: RunFolder):
    with gr.Blocks():
        table = ComparePage(workspace, T).table_of("one", SAY)
    places = [f'data-row="{row}" data-column="{column}"' for row in range(3) for column in range(2)]
    assert all(place in table for place in places) and "data-pictures" in table
    assert "<button type=button data-take=4>" in table and "data-take=2" not in table and "data-take=0" not in table
    assert "no file: the run keeps only its newest checkpoints (1)" in table


@pytest.fixture
def page(workspace: Workspace) -> TryPage:
    with gr.Blocks():
        return TryPage(workspace, T)


def test_the_newest_adapter_is_chosen_unless_there_is_another(page: TryPage, run: RunFolder):
    assert page.choices(None)["value"] == "one/sks-toy.safetensors"
    assert page.choices("one/checkpoints/step-000004")["value"] == "one/checkpoints/step-000004"


def test_a_set_of_pictures_says_when_and_with_which_adapter(page: TryPage):
    folder = page.workspace.unused("tries")
    folder.mkdir(parents=True)
    image = Image.new("RGB", (8, 8))
    image.info["lorakit"] = json.dumps({"prompt": "a <toy>", "adapter": "sks-toy"})
    for name in ("01-strength-1", "grid"):
        image_grid.save(image, folder / f"{name}.png")
    text = page.drawings(SAY)
    assert re.search(r"<h2>sks-toy · \d{4}-\d\d-\d\d \d\d:\d\d:\d\d</h2>", text) and "a &lt;toy&gt;" in text


def test_trying_an_adapter_queues_a_job_with_all_settings(page: TryPage, run: RunFolder):
    assert page.adapters() == ["one/sks-toy.safetensors", "one/checkpoints/step-000004"]
    settings = {"sample.seed": 1234567890, "sample.steps": 0}
    assert page.start("one/sks-toy.safetensors", "a toy\n\n --x", "", [0.0, 0.75], settings, SAY) == ""
    (job,) = page.workspace.queue.jobs()
    assert job.arguments[:2] == ("sample", str(run.path / "sks-toy.safetensors"))
    assert job.arguments[4:] == (
        "--strength=0,0.75", "--prompt=a toy", "--prompt=--x", "--base", "pocket", "--set=sample.seed=1234567890",
    )  # fmt: skip
    assert "waiting" in page.status(SAY)[0] and page.status(SAY)[1]


def test_a_checkpoint_is_exported_before_it_is_tried(page: TryPage, run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    exported = []
    monkeypatch.setattr(commands, "export", lambda *arguments, **more: exported.append(arguments) or [run.path / "x"])
    page.start("one/checkpoints/step-000004", "a", "", [1.0], {}, SAY)
    assert exported[0][0] == run.checkpoints / "step-000004" and exported[0][2] == run.path / "exports" / "step-000004"
    assert page.workspace.queue.jobs()[0].arguments[1] == str(run.path / "x")


@pytest.mark.parametrize(
    ("name", "prompts", "base", "line"),
    [
        ("", "a", "", "Choose a file first."),
        ("one/sks-toy.safetensors", " \n", "", "Enter a prompt first"),
        ("/etc/passwd", "a", "", "/etc/passwd is outside of"),
        ("one/none.safetensors", "a", "", "one/none.safetensors: there is no such file"),
        ("one/sks-toy.safetensors", "a", "/etc", "/etc is outside of"),
    ],
)
def test_a_failed_drawing_states_its_reason(
    page: TryPage, run: RunFolder, name: str, prompts: str, base: str, line: str
):
    assert line in page.start(name, prompts, base, [1.0], {}, SAY) and not page.workspace.queue.jobs()


def test_the_page_shows_which_run_the_job_waits_for_and_why_it_failed(page: TryPage, run: RunFolder):
    queue = page.workspace.queue
    queue.command(["train"], page.workspace.runs / "night")
    page.start("one/sks-toy.safetensors", "a", "", [1.0], {}, SAY)
    assert "Waiting for: night" in page.status(SAY)[0]
    first, job = queue.jobs()
    queue._write(replace(first, state="done"))
    queue._write(replace(job, state="failed"))
    queue._file(job.number, "log").write_text("lorakit: it was made for sd\n")
    line, going = page.status(SAY)
    assert "it was made for sd" in line and not going


def test_pictures_are_rows_of_strengths(page: TryPage, run: RunFolder):
    folder = page.workspace.runs / "tries" / "2026"
    folder.mkdir(parents=True)
    for strength in ("0.8", "0", "-0.5"):
        for number in (1, 2):
            image_grid.save(picture("p", number), folder / f"{number:02d}-strength-{strength}.png")
    image_grid.save(picture("p", 1), folder / "grid.png")
    text = page.drawings(SAY)
    heads = [text.index(word) for word in ("strength -0.5", "base model", "strength 0.8")]
    assert heads == sorted(heads) and text.count("data-picture=") == 6
    assert text.count("<th scope=col>p</th>") == 2, "the prompt of each column"
    assert [name for name, _ in page.workspace.runs_and_jobs()] == ["one"], "what is tried is no run"
