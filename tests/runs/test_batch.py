"""Tests of a batch: its rows, the remaining work of each, and the results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from short_run import noise

from lorakit import config
from lorakit.cli import main as cli
from lorakit.core.errors import ConfigError, LorakitError
from lorakit.runs import batch, run_folder
from lorakit.runs.queue import Queue
from lorakit.runs.results import Results
from lorakit.runs.run_folder import RunFolder

SHARED = {"train.steps": 10, "model.base": "pocket", "memory.device": "cpu"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two folders of photos."""
    for name, count in (("Anna", 1), ("ben", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        noise(tmp_path / "photos" / name, count)
    return tmp_path / "photos"


def rows(tmp_path: Path, text: str) -> list[batch.Row]:
    file = tmp_path / "jobs.toml"
    file.write_text(text, encoding="utf-8")
    return batch.read(file, None, SHARED, tmp_path / "runs")


def test_a_row_is_a_run_and_lists_are_a_grid(tmp_path: Path, photos: Path) -> None:
    text = """
    [options]
    sample.prompts = ["a photo of sks toy"]
    [[run]]
    data.folder = "photos/Anna"
    data.name = "sks woman"
    adapter.rank = [4, 8]
    optimizer.learning_rate = [1e-4, 2e-4]
    [[run]]
    name = "the second"
    preset = "style-pocket"
    data = { folder = "photos/ben", name = "sks style" }
    output.formats = [["kohya"], ["kohya", "peft"]]
    """
    result = {row.name: row.config for row in rows(tmp_path, text)}
    grid = [(each.adapter.rank, each.optimizer.learning_rate) for each in list(result.values())[:4]]
    assert grid == [(4, 1e-4), (4, 2e-4), (8, 1e-4), (8, 2e-4)]
    assert len(result) == 6 and all(each.train.steps == 10 for each in result.values())
    assert {each.sample.prompts for each in result.values()} == {("a photo of sks toy",)}
    assert result["anna-rank-4-learning-rate-0-0001"].data.folder == str(photos / "Anna")
    last = list(result.values())[-1]
    assert last.output.formats == ("kohya", "peft") and last.data.kind == "style"
    assert Path(last.output.folder).parent == tmp_path / "runs"


def test_a_folder_of_folders_is_a_batch(tmp_path: Path, photos: Path) -> None:
    result = batch.read(photos, None, SHARED | {"data.name": "sks {folder}"}, tmp_path / "runs")
    assert [(row.name, row.config.data.name) for row in result] == [("anna", "sks Anna"), ("ben", "sks ben")]
    (photos / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: 0 images in "):
        batch.read(photos, None, SHARED | {"data.name": "sks toy"}, tmp_path / "runs")
    with pytest.raises(ConfigError, match="there is no run in it: batch takes a folder of folders of photos"):
        batch.read(photos / "Anna", None, SHARED, tmp_path / "runs")


def test_each_listed_folder_is_a_run(tmp_path: Path, photos: Path) -> None:
    text = "[[run]]\ndata.folder = ['photos/Anna', 'photos/ben']\ndata.name = 'sks {folder}'\nadapter.rank = [4, 8]"
    result = [(row.name, row.config.data.name, Path(row.config.data.folder).name) for row in rows(tmp_path, text)]
    assert [name for name, *_ in result] == ["anna-rank-4", "anna-rank-8", "ben-rank-4", "ben-rank-8"]
    assert result[0][1:] == ("sks Anna", "Anna") and result[3][1:] == ("sks ben", "ben")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[run]", "jobs.toml: "),
        ("[[runs]]\nx = 1", "runs: a batch has preset, [options], and [[run]] for each run"),
        ("preset = 'subject-pocket'", "there is no run in it"),
        ("[[run]]\nname = 'a'\ndata.folder = 'nowhere'", "a: "),
        (
            "[[run]]\nname = 'a'\ndata.folder = 'photos/ben'\nadapter.rnk = 3",
            "a: unknown option adapter.rnk (did you mean adapter.rank?)",
        ),
        ("run = [1, 2]", "run: a batch has preset, [options], and [[run]] for each run"),
        ("options = 3", "options: a batch has preset, [options], and [[run]] for each run"),
        ("[[run]]\nname = 'a'\ndata.folder = 'photos/ben'\nadapter.rank = []", "a: a list of values has none in it"),
        ("[[run]]\nname = 'a'\ndata.folder = 'photos/ben'\noutput.folder = 'b'", "a: output.folder is where the batch"),
        ("[[run]]\nname = 'a'\ndata.folder = 'photos/ben'\nadapter.rank = [4, 'x']", "a-rank-x: adapter.rank = 'x'"),
        ("[[run]]\ndata.name = 'sks toy'", "1: no folder of photos: name one"),
        ("[[run]]\nname = 'a'\ndata.folder = 'photos/ben'\n" * 2, "a: two rows have this name"),
    ],
)
def test_a_wrong_row_is_refused_with_its_number(tmp_path: Path, photos: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rows(tmp_path, text)
    assert problem in str(caught.value)


def test_a_batch_starts_continues_and_reports_its_results(tmp_path, photos, monkeypatch, capsys) -> None:
    """The same command queues only unfinished rows; this test trains nothing."""
    monkeypatch.setattr(Queue, "start", lambda self: None)
    runs = tmp_path / "runs"
    command = ["batch", str(photos), "--output", str(runs), "--subject", "sks {folder}", "--base", "pocket"]
    assert cli.main(command) == 0
    assert "runs in the queue: 2; see: lorakit batch status " in capsys.readouterr().out
    queue = Queue(runs)
    assert [(job.verb, Path(job.folder).name) for job in queue.jobs()] == [("train", "anna"), ("train", "ben")]
    assert config.load(runs / "anna.toml").data.name == "sks Anna"
    # Both jobs are already in the queue.
    assert cli.main(command) == 0 and len(queue.jobs()) == 2
    for job in queue.jobs():
        queue.cancel(job.number)
    for name, state in (("anna", "done"), ("ben", "stopped")):
        folder = RunFolder.create(replace(config.load(runs / f"{name}.toml")))
        folder.event("validation", step=5, mse=0.5, prior_drift=0.1, source="held-out photos")
        folder.event("validation", step=9, mse=0.75, prior_drift=0.2, source="held-out photos")
        folder.update(state=state, step=9, steps=10)
        folder.write_report([{"name": "x", "passed": name == "anna", "detail": ""}])
        folder.unlock()
    assert batch.command(runs, "anna") is None and batch.command(runs, "ben") == ("resume", str(runs / "ben"))
    capsys.readouterr()
    assert cli.main(["batch", "status", str(runs), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["runs"]
    assert (first["state"], first["lowest_step"], first["lowest_mse"], first["prior_drift"]) == ("done", 5, 0.5, 0.2)
    assert (first["passed"], second["passed"], second["state"]) == (True, False, "stopped")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["batch", "status", "runs"]) == 0
    out = capsys.readouterr().out
    assert f"report: {runs / 'report.html'}" in out
    assert "0.5000 at 5 (held-out photos)" in out and "20.00%" in out and "FAILED" in out
    assert 'href="anna/report.html"' in (runs / "report.html").read_text(encoding="utf-8")


def test_results_go_to_any_url_of_fsspec_without_checkpoints(tmp_path, photos, monkeypatch, capsys) -> None:
    """Finished runs are copied, with the log and the report of the whole batch; checkpoints are not copied."""
    monkeypatch.setattr(Queue, "start", lambda self: None)
    runs = tmp_path / "runs"
    command = ["batch", str(photos), "--output", str(runs), "--subject", "sks {folder}", "--base", "pocket"]
    assert cli.main([*command, "--results", "memory://june"]) == 2
    assert "give --wait or --ray too" in capsys.readouterr().err
    for url, problem in (("nowhere://june", "Protocol not known: nowhere"), (str(photos / "Anna" / "0.png"), "exists")):
        assert cli.main([*command, "--wait", "--results", url]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"lorakit: --results {url}: ") and problem in line
    assert not runs.exists()
    assert cli.main(command) == 0
    for job in Queue(runs).jobs():
        Queue(runs).cancel(job.number)
    for name in ("anna", "ben"):
        folder = RunFolder.create(config.load(runs / f"{name}.toml"))
        folder.update(state="done")
        (folder.path / "checkpoints").mkdir(exist_ok=True)
        (folder.path / "checkpoints" / "state").write_text("")
        (folder.path / "sks.safetensors").write_text(name)
        (runs / f"{name}.log").write_text("printed")
        folder.unlock()
    for url in ("memory://june", f"file://{tmp_path / 'results'}"):
        assert cli.main([*command, "--wait", "--results", url]) == 0
    june = fsspec.filesystem("memory")
    assert june.cat("/june/ben/sks.safetensors") == b"ben" and june.cat("/june/ben.log") == b"printed"
    names = {
        str(file.relative_to(tmp_path / "results")) for file in (tmp_path / "results").rglob("*") if file.is_file()
    }
    assert names == {name.removeprefix("/june/") for name in june.find("/june")}
    assert {"batch.json", "report.html", "anna/config.toml", "anna/log.jsonl"} < names
    assert not any("checkpoint" in name or name.endswith(".lock") for name in names)


def test_a_result_that_cannot_be_copied_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "b").write_text("")
    results = Results(str(tmp_path / "results"))
    (tmp_path / "results" / "a").write_text("in the way")
    with pytest.raises(LorakitError, match=r"^a: cannot be copied to .*results \(.+\); it stays in .*runs$"):
        results.send(tmp_path / "runs", "a")


def test_a_folder_without_a_batch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LorakitError, match="has no batch: begin one with lorakit batch JOBS --output"):
        batch.status(tmp_path)
    assert cli.main(["batch", "status"]) == 2
    assert "name the folder of the batch: lorakit batch status RUNS" in capsys.readouterr().err


def test_a_run_on_another_machine_is_alive_while_it_writes(tmp_path: Path, photos: Path) -> None:
    settings = config.load(None, SHARED | {"data.folder": str(photos / "ben"), "output.folder": str(tmp_path / "run")})
    folder = RunFolder.create(settings)
    values = json.loads(folder.state_file.read_text(encoding="utf-8")) | {"host": "elsewhere", "pid": 1}
    folder.state_file.write_text(json.dumps(values), encoding="utf-8")
    assert run_folder.read(folder.path).state == "preparing"
    folder.state_file.write_text(json.dumps(values | {"updated": values["updated"] - 1000}), encoding="utf-8")
    assert run_folder.read(folder.path).state == "interrupted"
    folder.unlock()
    RunFolder.open(folder.path).unlock()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LorakitError, match=r"cannot write to .*; give another --output"):
        batch.write_manifest(tmp_path / "file" / "runs", [])
