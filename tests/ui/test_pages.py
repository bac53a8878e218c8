"""The handlers of the pages, called with the values that the browser sends."""

import re
from dataclasses import replace
from pathlib import Path

import hub_server
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.config import TrainConfig  # noqa: E402
from lorakit.core.errors import LorakitError  # noqa: E402
from lorakit.data import photo_folder  # noqa: E402
from lorakit.runs import quickstart  # noqa: E402
from lorakit.runs.run_folder import RunFolder, read  # noqa: E402
from lorakit.ui import app, commands, language, texts  # noqa: E402
from lorakit.ui.pages.adapter import AdapterPage  # noqa: E402
from lorakit.ui.pages.compare import ComparePage, _photos_of, export_step  # noqa: E402
from lorakit.ui.pages.photos import PAGE, PhotosPage  # noqa: E402
from lorakit.ui.pages.runs import _samples  # noqa: E402
from lorakit.ui.pages.train import TrainPage  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402

SAY = texts.sayer("en")
T = language.Translations()


@pytest.fixture
def workspace(tmp_path: Path, tiny_sd1: Path) -> Workspace:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((90, 64), 50 + 20 * number).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    return Workspace(tmp_path / "runs", [tmp_path / "photos", tiny_sd1])


@pytest.fixture
def train(workspace: Workspace) -> TrainPage:
    with gr.Blocks():
        return TrainPage(workspace, T, gr.BrowserState())


def answered(train: TrainPage, base: Path, **more: object) -> tuple[list[object], dict[str, object]]:
    """Return the values of all widgets and the marks of the page after a user has answered the questions."""
    marks = dict(train.marks.value)
    fields = {key: marks["values"][key] for key in train.keys} | {
        quickstart.PHOTOS: str(train.workspace.roots.paths[0]),
        quickstart.NAME: "sks toy",
        quickstart.BASE: str(base),
    }
    fields |= {key.replace("__", "."): value for key, value in more.items()}
    return [fields[key] for key in train.keys], marks


def test_the_complete_page_is_built(workspace: Workspace):
    page = app.build(workspace, T)
    assert page.enable_queue


def answer(train: TrainPage, marks: dict[str, object], values: list[object]) -> tuple[object, ...]:
    """Return (plan, changed, start, marks, draft, option -> update of its widget) after an answer."""
    plan, changed, start, _, marks, draft, *updates = train.answer("balanced", marks, values, SAY)
    return plan, changed, start, marks, draft, dict(zip(train.keys, updates, strict=True))


def test_answers_lead_to_a_plan(train: TrainPage, tiny_sd1: Path):
    values, marks = answered(train, tiny_sd1)
    *_, start, marks, draft, updates = answer(train, marks, values)
    assert start["interactive"] is False
    plan, start = train.plan([draft["values"][key] for key in train.keys], SAY)
    assert "The plan" in plan and "3 photos" in plan and start["interactive"] is True
    # The base belongs to another family, so all options have changed to its preset.
    assert marks["values"]["data.resolution"] == 512
    assert updates["data.resolution"]["value"] == 512
    # The check of the photos has ended. The page keeps the plan until the next one is ready.
    assert answer(train, marks, [draft["values"][key] for key in train.keys])[0] == gr.skip()


@pytest.mark.slow
def test_the_page_refuses_what_a_run_refuses(train: TrainPage, tiny_sd1: Path):
    values, _ = answered(train, tiny_sd1, adapter__method="dora", output__formats=["diffusers", "peft"])
    plan, start = train.plan(values, SAY)
    assert plan.count("format cannot carry this DoRA") == 2 and start["interactive"] is False
    message, name = train.begin(values, SAY)
    assert message.count("format cannot carry this DoRA") == 2 and name is None and not train.workspace.queue.jobs()
    assert "裝不下這個 DoRA" in train.plan(values, texts.sayer("zh-Hant"))[0]
    # A format that some program cannot read does not prevent training.
    values, _ = answered(train, tiny_sd1, adapter__method="dora")
    plan, start = train.plan(values, SAY)
    assert "dora in the kohya format is honoured by" in plan and start["interactive"] is True


def test_options_that_the_user_changed_stay(train: TrainPage, tiny_sd1: Path):
    values, marks = answered(train, tiny_sd1, data__resolution=128.0, train__steps="7")
    _, changed, _, marks, draft, updates = answer(train, marks, values)
    assert "value" not in updates["data.resolution"] and "Changed from the preset" in updates["data.resolution"]["info"]
    assert "Resolution: 512 → 128" in changed
    # A user's own length replaces the preset's. If the user removes it, the preset's length returns.
    before = marks["values"]["train.steps_per_image"]
    assert before and updates["train.steps_per_image"]["value"] == ""
    fields = draft["values"] | {"train.steps": ""}
    *_, updates = answer(train, marks, [fields[key] for key in train.keys])
    assert updates["train.steps_per_image"]["value"] == before


def test_options_of_the_prior_are_reset_without_it(train: TrainPage):
    values, marks = answered(train, Path("pocket"))
    fields = dict(zip(train.keys, values, strict=True)) | {quickstart.BASE: "pocket", "train.prior": "none"}
    *_, draft, updates = answer(train, marks, [fields[key] for key in train.keys])
    # The preset's number of class images would be an error without the prior, so it is reset.
    assert updates["train.class_images"]["value"] == TrainConfig.class_images
    plan, start = train.plan([draft["values"][key] for key in train.keys], SAY)
    assert "The plan" in plan and start["interactive"] is True


def test_a_wrong_value_is_reported_at_its_field_and_above(train: TrainPage, tiny_sd1: Path):
    values, marks = answered(train, tiny_sd1, adapter__rank=0.0)
    plan, _, _, _, draft, updates = answer(train, marks, values)
    assert "“Rank” = 0: must be between 1 and 1024" in plan
    assert updates["adapter.rank"]["info"].startswith("✕ “Rank” = 0: must be between 1 and 1024")
    problems, start = train.plan([draft["values"][key] for key in train.keys], SAY)
    assert problems == plan and start["interactive"] is False


def test_a_base_outside_of_the_roots_is_not_looked_at(train: TrainPage):
    values, marks = answered(train, Path("/etc"))
    plan, _, start, *_ = answer(train, marks, values)
    assert "/etc is outside of" in plan and start["interactive"] is False
    assert "is outside of" in train.difference_of("", "balanced", values, SAY)
    message, name = train.begin(values, SAY)
    assert name is None and "is outside of" in message


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub for this process and for processes that it starts."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    for name, value in {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "home"


@pytest.mark.slow
def test_a_base_on_the_hub_is_fetched_only_on_request(
    train: TrainPage, tiny_sd1: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    requests: list[str] = []
    values, marks = answered(train, Path("org/tiny"))
    with hub_server.serve(tiny_sd1, requests) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        # The user's own HF_HUB_OFFLINE also applies to a download that the user requests.
        monkeypatch.setattr(commands, "USERS", "1")
        reply = train.fetch_base(values, SAY)
        assert "base org/tiny is not in the cache and HF_HUB_OFFLINE is set" in reply and "lk-problem" in reply
        monkeypatch.setattr(commands, "USERS", "0")
        plan, _, start, fetch, marks, draft, *updates = train.answer("balanced", marks, values, SAY)
        notice = "org/tiny is not a path on this machine, and no hub model of this name is downloaded yet."
        assert notice in plan and fetch["visible"] is True and start["interactive"] is False
        assert dict(zip(train.keys, updates, strict=True))[quickstart.BASE]["info"].startswith(f"✕ {notice}")
        assert notice in train.plan(values, SAY)[0]
        message, name = train.begin(values, SAY)
        assert notice in message and name is None and not train.workspace.queue.jobs()
        assert requests == [], "typing, planning and starting ask nothing of the network"
        assert "org/tiny is downloaded" in train.fetch_base(values, SAY)
        assert requests
    # The hub is offline now, and the base is in the cache.
    plan, _, _, fetch, _, draft, *_ = train.answer("balanced", marks, values, SAY)
    assert fetch["visible"] is False
    plan, start = train.plan([draft["values"][key] for key in train.keys], SAY)
    assert "from the hub: org/tiny@" in plan and start["interactive"] is True
    # The download of another base fails with its reason.
    values, _ = answered(train, Path("org/other"))
    reply = train.fetch_base(values, SAY)
    assert "base org/other is not in the cache and cannot be fetched from" in reply and "lk-problem" in reply
    assert "無法從" in train.fetch_base(values, texts.sayer("zh-Hant"))


def test_a_path_that_looks_like_a_hub_id_is_a_path(train: TrainPage, tiny_sd1: Path, hub_cache: Path):
    place = train.workspace.roots.paths[0] / "mine"
    (place).mkdir()
    (place / "model").symlink_to(tiny_sd1)
    values, _ = answered(train, Path("mine/model"))
    state = train.form_values(values)
    assert train.lacking(state) is None and train.fetch_base(values, SAY) == ""
    config, _ = train.read(state, SAY)
    assert config is not None and quickstart.describe(config.model.base).path == tiny_sd1


def test_a_vae_on_the_hub_is_lacking_until_it_is_in_the_cache(train: TrainPage, tiny_sd1: Path, hub_cache: Path):
    place = train.workspace.roots.paths[0] / "base"
    place.symlink_to(tiny_sd1)
    values, _ = answered(train, Path("base"))
    state = train.form_values(values) | {quickstart.VAE: "org/vae"}
    assert train.lacking(state) == (quickstart.VAE, "org/vae")
    _, problems = train.read(state, SAY)
    assert "org/vae is not a path on this machine" in problems[quickstart.VAE][0] and quickstart.BASE not in problems
    cache = hub_cache / "hub" / "models--org--vae"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123")
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / "0123").symlink_to(tiny_sd1 / "vae")
    assert train.lacking(state) is None
    config, problems = train.read(state, SAY)
    assert problems == {} and config is not None and config.model.vae == "org/vae"


def test_photos_are_shown_with_any_base(workspace: Workspace, train: TrainPage, hub_cache: Path):
    with gr.Blocks():
        photos = PhotosPage(workspace, T)
    folder = str(workspace.roots.paths[0])
    for base in ("org/tiny", "no/such/base", "/etc"):
        values, _ = answered(train, Path(base))
        summary, cards = photos.checked(folder, 0, train.config_of_photos(train.form_values(values)), SAY)
        assert "3 photos" in summary and cards.count('<li class="lk-card') == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", [{}, None, [], {"values": 3}, {"values": {"no.such": 1}, "quality": "?", "preset": "?"}]
)
def test_any_value_in_the_browsers_storage_is_accepted(train: TrainPage, value: object):
    assert len(train.restore(value)) == 4 + len(train.keys)


def test_a_page_of_photos(workspace: Workspace, train: TrainPage, tiny_sd1: Path):
    for number in range(3, PAGE + 2):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(workspace.roots.paths[0] / f"{number:03d}.png")
    with gr.Blocks():
        photos = PhotosPage(workspace, T)
    values, _ = answered(train, tiny_sd1, data__resolution=64.0)
    config = train.config_of_photos(train.form_values(values))
    folder = str(workspace.roots.paths[0])
    summary, cards, pager, previous, _, following, _, first, _ = photos.show(folder, 0, config, SAY)
    assert cards.count('<li class="lk-card') == PAGE and first == 0 and pager["visible"]
    assert "Checking the photos" in summary and "trained at" not in cards
    assert not previous["interactive"] and following["interactive"]
    summary, cards = photos.checked(folder, 0, config, SAY)
    assert cards.count('<li class="lk-card') == PAGE and "trained at 64 × 64" in cards
    assert "lk-crop" in cards, "a photo of 90 x 64 is cropped, and it is shown where"
    # The next call returns the results of the check at once.
    assert photos.show(folder, 0, config, SAY)[:2] == [summary, cards]
    _, cards, _, previous, _, following, _, first, _ = photos.show(folder, 10 * PAGE, config, SAY)
    assert first == PAGE and cards.count('<li class="lk-card') == 2
    assert previous["interactive"] and not following["interactive"]


def test_the_text_of_a_photo_is_shown_once_it_has_a_name(workspace: Workspace, train: TrainPage, tiny_sd1: Path):
    with gr.Blocks():
        photos = PhotosPage(workspace, T)
    for name, has_text in (("", False), ("sks toy", True)):
        values, _ = answered(train, tiny_sd1, data__name=name)
        config = train.config_of_photos(train.form_values(values))
        summary, cards = photos.checked(str(workspace.roots.paths[0]), 0, config, SAY)
        assert ("is trained as" in summary) == ("No caption. Trained with:" in cards) == has_text
        assert "3 photos" in summary


def test_no_folder_is_no_error(workspace: Workspace, train: TrainPage):
    with gr.Blocks():
        photos = PhotosPage(workspace, T)
    assert "No photos yet" in photos.show("", 0, None, SAY)[0]
    assert photos.checked("", 0, None, SAY) == [gr.skip(), gr.skip()]


@pytest.mark.slow
def test_grids_that_are_drawn_are_followed(workspace: Workspace):
    with gr.Blocks():
        page = ComparePage(workspace, T)
    assert page.grid_status(None, SAY)[2].active is False
    run = workspace.runs / "one"
    job = workspace.queue.command(["sample", "nothing"], run / "compare" / "grid")
    message, count, timer = page.grid_status("one", SAY)
    assert "Drawing … (waiting)" in message and count == "<!-- one 0 -->" and timer.active is True
    workspace.queue.work()
    message, _, timer = page.grid_status("one", SAY)
    assert workspace.why(job.number) in message and "lk-problem" in message and timer.active is False


@pytest.mark.parametrize("strengths", ["abc", "0, abc", "1e5", "nan", "0.5x"])
def test_a_strength_that_is_no_number_is_named_and_nothing_is_drawn(workspace: Workspace, strengths: str):
    with gr.Blocks():
        page = ComparePage(workspace, T)
    (workspace.runs / "run").mkdir()
    message, _ = page.draw_grids("run", ["x.safetensors"], "a photo", strengths, SAY)
    assert strengths.split()[-1] in message and "lk-problem" in message and workspace.queue.jobs() == []


def test_only_checkpoints_that_have_a_file_are_offered(workspace: Workspace, tiny_sd1: Path):
    with gr.Blocks():
        page = ComparePage(workspace, T)
    answers = {quickstart.PHOTOS: str(workspace.roots.paths[0]), quickstart.BASE: str(tiny_sd1)}
    place = workspace.runs / "one"
    config = quickstart.config_for_answers(answers | {quickstart.NAME: "sks toy"}, "quick")
    run = RunFolder.create(replace(config, output=replace(config.output, folder=str(place))))
    for step in (0, 5, 10, 15):
        run.save_samples(step, [Image.new("RGB", (64, 64))], ["a toy"])
    (place / "toy.safetensors").write_bytes(b"adapter")
    (run.checkpoints / "step-000010").mkdir()
    (run.checkpoints / "step-000010" / "complete").touch()
    run.update(state="done", step=15, steps=15, adapter="toy.safetensors")
    run.unlock()
    # The run deleted the checkpoint of step 5, which the user had marked before.
    (place / "choice.json").write_text('{"step": 5}')
    table, _, steps, *_ = page.show("one", SAY)
    assert [step for _, step in steps["choices"]] == [10, 15] and steps["value"] == 15
    assert table.count("no file: the run keeps") == 1 and "step 5" in table and "marked as best" in table
    assert "no longer has its own file" in page.mark_best("one", 5, SAY)
    assert "Step 10 is marked" in page.mark_best("one", 10, SAY) and page.show("one", SAY)[2]["value"] == 10
    # The page of runs offers the same files beside their pictures, and also a checkpoint without pictures.
    (run.checkpoints / "step-000012").mkdir()
    (run.checkpoints / "step-000012" / "complete").touch()
    samples = _samples(workspace, run, read(place), SAY)
    assert re.findall(r"data-take=(\d+)", samples) == ["15", "12", "10"] and "no file: the run keeps" in samples
    message, file = export_step(workspace, "one", 15, "", SAY)
    assert "Exported: toy.safetensors" in message and Path(file["value"][0]).read_bytes() == b"adapter"
    # The user deletes the file of the last step.
    (place / "toy.safetensors").unlink()
    assert [step for _, step in page.show("one", SAY)[2]["choices"]] == [10]
    assert "no longer has its own file" in export_step(page.workspace, "one", 15, "kohya", SAY)[0]


def test_a_run_that_was_deleted_while_its_page_was_open_is_reported(workspace: Workspace):
    with gr.Blocks():
        page = ComparePage(workspace, T)
    gone = "no longer exists"
    assert gone in page.show("gone", SAY)[0] and gone in page.mark_best("gone", 2, SAY)
    assert "is not a run folder" in export_step(page.workspace, "gone", 2, "kohya", SAY)[0]
    assert "lk-problem" in page.draw_grids("gone", ["a.safetensors"], "", "1", SAY)[0]
    assert not (workspace.runs / "gone").exists()
    for text in ("abc", "0, x", "1;2", "nan"):
        assert "is not a strength. Enter numbers" in page.draw_grids("gone", ["a.safetensors"], "", text, SAY)[0]
    # No run is chosen.
    for message in (
        export_step(page.workspace, None, None, "kohya", SAY)[0],
        page.draw_grids(None, [], "", "1", SAY)[0],
    ):
        assert "lk-problem" in message and "No pictures yet" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x80\x02}q\x00.", "pickle"), (b"PK\x03\x04", "pickle"), (b"", "empty"), (b"hello world", "not a safetensors")],
)
def test_no_pickle_is_opened(workspace: Workspace, content: bytes, message: str):
    with gr.Blocks():
        page = AdapterPage(workspace, T)
    file = workspace.runs / "adapter.safetensors"
    file.write_bytes(content)
    report, inspected, *_ = page.look(str(file), None, SAY)
    assert message in report and inspected == ""
    report, *_ = page.look("", str(file), SAY)
    assert message in report and str(workspace.runs) not in report, "where an upload lies is not told"


def test_a_base_is_described(workspace: Workspace, tiny_sd1: Path):
    with gr.Blocks():
        page = AdapterPage(workspace, T)
    report, inspected, convertible, *_ = page.look(str(tiny_sd1), None, SAY)
    assert inspected == str(tiny_sd1) and convertible["visible"] is False
    assert "lk-panel" in report


def test_a_run_name_is_not_a_path(workspace: Workspace):
    with pytest.raises(LorakitError, match="is no run"):
        workspace.run("../photos")


def test_a_photo_is_left_out_and_brought_back(workspace: Workspace, train: TrainPage, tiny_sd1: Path):
    folder = workspace.roots.paths[0]
    (folder / "1.png").write_bytes(b"broken")
    with gr.Blocks():
        page = PhotosPage(workspace, T)
    values, _ = answered(train, tiny_sd1)
    plan, start = train.plan(values, SAY)
    assert start["interactive"] is False
    assert "press “Leave out” below each of them on the page “Photos”" in plan
    assert "在「照片」頁按每張照片下方的「不使用」" in train.plan(values, texts.sayer("zh-Hant"))[0]
    lines = page.exclude(str(folder), "old/*", "1.png")
    assert lines == "old/*\n1.png"
    values, _ = answered(train, tiny_sd1, data__exclude=lines)
    plan, start = train.plan(values, SAY)
    assert "2 photos" in plan and start["interactive"] is True
    config = train.config_of_photos(train.form_values(values))
    html = page.checked(str(folder), 0, config, SAY)[1]
    assert html.count(">Leave out<") == 2 and html.count(">Bring back<") == 1 and html.count("lk-left-out") == 1
    assert "left out by “Exclude”: 1.png" in page.checked(str(folder), 0, config, SAY)[0]
    assert page.exclude(str(folder), lines, "1.png") == "old/*"
    assert page.exclude(str(folder), "?.png", "1.png") == "", "a pattern goes with the photo that is brought back"


def test_an_unanswered_question_is_no_error_yet(train: TrainPage):
    values, marks = answered(train, Path("pocket"))
    fields = dict(zip(train.keys, values, strict=True))
    fields |= {quickstart.PHOTOS: None, quickstart.NAME: "", quickstart.BASE: "pocket"}
    plan, _, start, *_, updates = answer(train, marks, [fields[key] for key in train.keys])
    assert "Required." in plan and "lk-errors" not in plan and start["interactive"] is False
    assert not [update for update in updates.values() if update != gr.skip() and "lk-wrong" in str(update)]


def test_a_draft_of_another_program_is_left_out(train: TrainPage):
    start = train.restore({"values": {}})
    hostile = {quickstart.BASE: {"a": 1}, "adapter.rank": "x", "data.flip": 3, "output.formats": "kohya"}
    restored = dict(zip(train.keys, train.restore({"values": hostile, "moved": [], "quality": 7})[4:], strict=True))
    assert restored == dict(zip(train.keys, start[4:], strict=True))


def test_only_photos_of_the_run_are_shown_with_it(workspace: Workspace, tmp_path: Path):
    config = quickstart.config_for_answers({quickstart.PHOTOS: str(tmp_path / "photos"), quickstart.NAME: "x"}, "quick")
    run = RunFolder.create(replace(config, output=replace(config.output, folder=str(workspace.runs / "one"))))
    run.unlock()
    photos = photo_folder.scan(tmp_path / "photos").photos
    run.write_plan({"files": photo_folder.versions(photos)})
    Image.effect_noise((90, 64), 9).convert("RGB").save(tmp_path / "photos" / "later.png")
    Image.effect_noise((80, 64), 9).convert("RGB").save(tmp_path / "photos" / "1.png")
    assert [path.name for path, _ in _photos_of(run, workspace)] == ["0.png", "2.png"]
    run.write_plan({})  # a plan without a list of photos
    assert len(_photos_of(run, workspace)) == 4


def test_presets_of_the_user_are_written_applied_and_read(train: TrainPage, tmp_path: Path):
    values, marks = answered(train, Path("pocket"), adapter__rank=3.0)
    fields = dict(zip(train.keys, values, strict=True)) | {quickstart.BASE: "pocket", quickstart.NAME: ""}
    message, update = train.keep_preset("My small one!", [fields[key] for key in train.keys], SAY)
    path = update["value"]
    assert "my-small-one" in message.lower() and ("★ " + Path(path).stem, path) in update["choices"]
    assert train.restore({"values": {}, "preset": path})[3] == path
    text = Path(path).read_text()
    assert "rank = 3" in text and str(tmp_path / "photos") not in text, "photos are no part of a preset"
    # The page shows what the preset changes, and applies it.
    others = answered(train, Path("pocket"))[0]
    assert "Rank" in train.difference_of(path, "balanced", others, SAY)
    updates = dict(zip(train.keys, train.apply_preset(path, "balanced", marks, others)[1:], strict=True))
    assert updates["adapter.rank"]["value"] == 3
    assert train.export_of(path)["visible"] and not train.export_of("/etc/passwd")["visible"]
    # A preset is not overwritten. A file with a wrong value is refused.
    values = [fields[key] for key in train.keys]
    assert "already exists. Enter another name" in train.keep_preset("my small one", values, SAY)[0]
    assert "Enter a name for the preset" in train.keep_preset(" ", values, SAY)[0]
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[adapter]\nrank = 0\n")
    message, update = train.take_preset(str(wrong), SAY)
    assert "“Rank” = 0: must be between" in message and update == gr.skip()
    wrong.write_text("[adapter]\nrank = 5\n[train]\nsteps = 4\n")
    assert "wrong is saved" in train.take_preset(str(wrong), SAY)[0] and len(train.own_presets()) == 2


def test_a_form_with_a_wrong_value_is_no_preset(train: TrainPage):
    values, _ = answered(train, Path("pocket"), adapter__rank=0.0)
    message, update = train.keep_preset("x", values, SAY)
    assert "“Rank” = 0: must be between" in message and update == gr.skip() and not train.own_presets()
