"""Tests of the run folder: claimed once, never overwritten, always readable, and right about a killed process."""

import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from lorakit import config
from lorakit.core import atomic, image_grid, names
from lorakit.core.errors import LorakitError
from lorakit.core.events import Events
from lorakit.runs import run_folder
from lorakit.runs.run_folder import RunFolder

DEAD = 2**22 + 1  # larger than Linux's largest process id


def settings(folder: Path | str = "", name: str = "sks toy") -> config.Config:
    return config.load(None, {"train.steps": 10, "data.name": name, "output.folder": str(folder)})


def test_a_new_run_can_be_read_at_once(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    state = run_folder.read(run.path)
    assert (state.state, state.step, state.pid) == ("preparing", 0, os.getpid())
    assert config.load(run.config_file) == settings(tmp_path / "run")
    assert run.checkpoints.is_dir() and run.samples.is_dir()
    assert [event["event"] for event in run.events()] == ["start"]


def test_default_folder_is_named_by_time_and_name_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [RunFolder.create(settings(name="Sks  toy/../Ünïcode 雞!")).path for _ in range(3)]
    assert len(set(paths)) == 3
    for path in paths:
        assert path.parent == Path("runs")
        stamp, name = path.name[:17], path.name[18:]
        assert time.strptime(stamp, "%Y-%m-%d-%H%M%S")
        assert name.startswith("sks-toy-ünïcode-雞")


@pytest.mark.parametrize(
    "text, name",
    [
        ("sks toy", "sks-toy"),
        ("../../etc", "etc"),
        ("a_b  C", "a-b-c"),
        ("***", ""),
        ("x" * 99, "x" * 40),
        ("CON", ""),
        ("com1!", ""),
        ("Lpt\u00b9", ""),
        ("con dog", "con-dog"),
        ("com", "com"),
    ],
)
def test_a_name_becomes_a_file_name(text, name):
    assert names.slug(text) == name


@pytest.mark.parametrize("name, stem", [("sks toy", "sks-toy"), ("", "photos")])
def test_the_adapter_is_named_after_the_subject(tmp_path, name, stem):
    settings = config.load(
        None, {"train.steps": 1, "data.name": name, "data.folder": "/x/photos", "output.folder": str(tmp_path / "r")}
    )
    assert RunFolder.create(settings).adapter_name == stem


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(LorakitError, match=r"is not empty and nothing in it is overwritten; give another --output$"):
        RunFolder.create(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_run_is_not_started_over_another_run(tmp_path):
    RunFolder.create(settings(tmp_path / "run"))
    with pytest.raises(LorakitError, match="or go on with: lorakit resume"):
        RunFolder.create(settings(tmp_path / "run"))


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(LorakitError, match="run is a file; give --output a folder"):
        RunFolder.create(settings(tmp_path / "run"))
    with pytest.raises(LorakitError, match=r"cannot write to .*inside.*; give another --output"):
        RunFolder.create(settings(tmp_path / "run" / "inside"))


def test_state_changes_are_written_at_once_and_progress_at_intervals(tmp_path, monkeypatch):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.update(state="running", steps=10)
    assert run_folder.read(run.path).state == "running"
    run.update(step=3, loss=0.5)
    monkeypatch.setattr(run_folder, "PROGRESS_EVERY", 0)
    run.update(learning_rate=1e-4)
    state = run_folder.read(run.path)
    assert (state.step, state.steps, state.loss, state.learning_rate) == (3, 10, 0.5, 1e-4)
    with pytest.raises(TypeError):
        run.update(stpe=4)


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.update(state="running", loss=math.nan)
    run.event("step", step=1, loss=math.inf, file=tmp_path / "private" / "x.png")
    assert "NaN" not in run.state_file.read_text() and run_folder.read(run.path).loss is None
    last = list(run.events("step"))[-1]
    assert last["loss"] is None and last["file"] == "x.png"


@pytest.mark.parametrize("state", ["preparing", "running"])
def test_a_run_without_its_process_is_interrupted(tmp_path, state):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.update(state=state, step=7)
    assert run_folder.status(run.path) == state
    change_state(run, pid=DEAD)
    assert run_folder.status(run.path) == "interrupted"
    assert run_folder.read(run.path).step == 7


def test_a_reused_process_id_does_not_count_as_the_run(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.update(state="running")
    change_state(run, pid_start=run_folder.read(run.path).pid_start - 1000)
    assert run_folder.status(run.path) == "interrupted"


@pytest.mark.parametrize("state", ["done", "failed", "stopped"])
def test_a_run_that_ended_needs_no_process(tmp_path, state):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.update(state=state)
    change_state(run, pid=DEAD)
    assert run_folder.status(run.path) == state


CHILD = """
import sys, time
from lorakit import config
from lorakit.runs import run_folder
run = run_folder.RunFolder.create(config.load(None, {"train.steps": 9, "output.folder": sys.argv[1]}))
run_folder.PROGRESS_EVERY = 0
run.update(state="running")
step = 0
while True:
    step += 1
    run.event("step", step=step, loss=1.0, text="x" * 2000)
    run.update(step=step, message="y" * 4000)
    if step == 5:
        print("ready", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
def test_a_kill_leaves_a_readable_folder_that_says_interrupted(tmp_path):
    for attempt in range(5):
        path = tmp_path / f"run{attempt}"
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        assert run_folder.status(path) == "running"
        time.sleep(0.003 * attempt)
        child.send_signal(signal.SIGKILL)
        # The child is a zombie until `wait`, and a zombie does not count as running.
        while run_folder.status(path) != "interrupted":
            time.sleep(0.01)
        child.wait()
        assert run_folder.read(path).step >= 4
        steps = [event["step"] for event in RunFolder(path).events("step")]
        assert steps == list(range(1, len(steps) + 1))
        child.stdout.close()


def test_open_claims_a_run_and_clears_its_stop_request(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.update(state="stopped", step=4, message="stopped after step 4")
    run.request_stop()
    change_state(run, pid=DEAD)
    before = run.state_file.read_bytes()
    resumed = RunFolder.open(run.path)
    assert run.state_file.read_bytes() == before and run.stop_requested
    resumed.begin(4)
    assert not resumed.stop_requested
    state = run_folder.read(run.path)
    assert (state.state, state.step, state.message, state.pid) == ("preparing", 4, "", os.getpid())
    assert [event["resumed"] for event in run.events("start")] == [False, True]


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.update(state="running")
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        import psutil

        change_state(run, pid=sleeper.pid, pid_start=psutil.Process(sleeper.pid).create_time())
        with pytest.raises(LorakitError, match=f"is being trained by process {sleeper.pid}; stop that first"):
            RunFolder.open(run.path)
    finally:
        sleeper.communicate()


def test_a_lock_excludes_others_until_it_is_released(tmp_path):
    """A second thread replaces a second process: the system treats their locks alike."""
    run = RunFolder.create(settings(tmp_path / "run"))
    run.update(state="stopped")
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(LorakitError, match=f"is being trained by process {os.getpid()}; stop that first"):
            other.submit(RunFolder.open, run.path).result()
        run.unlock()
        other.submit(RunFolder.open, run.path).result()


@pytest.mark.parametrize("state", [None, "", '{"state": "runn', "[]"])
def test_a_run_without_a_readable_state_is_opened(tmp_path, state):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.unlock()
    if state is None:
        run.state_file.unlink()
    else:
        run.state_file.write_text(state)
    resumed = RunFolder.open(run.path)
    resumed.begin(7)
    assert (run_folder.read(run.path).state, run_folder.read(run.path).step) == ("preparing", 7)


def test_a_folder_of_a_run_killed_at_its_start_can_be_used(tmp_path):
    path = tmp_path / "run"
    for folder in (path / "checkpoints", path / "samples"):
        folder.mkdir(parents=True)
    (path / ".lock").touch()
    atomic.temporary_path(path / "config.toml").write_text("[mod")
    assert RunFolder.create(settings(path)).config_file.is_file()


def test_relative_paths_are_written_as_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    values = {"train.steps": 1, "data.name": "sks", "data.folder": "photos", "output.folder": str(tmp_path / "run")}
    run = RunFolder.create(config.load(None, values))
    monkeypatch.chdir("/")
    loaded = config.load(run.config_file)
    assert loaded.data.folder == str(tmp_path / "photos") and loaded.model.base == "pocket"
    run.config_file.write_text(config.to_toml(config.load(None, values)))  # the form that earlier versions wrote
    assert config.load(run.config_file).data.folder == str(tmp_path / "photos")


def test_an_unwritable_state_or_log_is_reported_once(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.log_file.unlink()
    run.log_file.mkdir()
    lines = []
    events = Events(run.record, lambda event: lines.append(event.facts.get("message", event.kind)))
    events.emit("step", 1, loss=0.5)
    events.emit("step", 2, loss=0.5)
    assert lines[1:] == ["step", "step"] and "cannot be written" in lines[0]
    shutil.rmtree(run.path)
    run.update(state="running")
    events.emit("step", 3, loss=0.5)
    assert sum("a log of the run cannot be written" in line for line in lines) == 1


def test_other_folders_than_run_folders_are_refused(tmp_path):
    with pytest.raises(LorakitError, match=r"gone is not a run folder: there is no such folder"):
        RunFolder.open(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(LorakitError, match=r"file is not a run folder: it is a file"):
        RunFolder.open(tmp_path / "file")
    with pytest.raises(LorakitError, match=r"is not a run folder: it has no config.toml"):
        RunFolder.open(tmp_path)
    with pytest.raises(LorakitError, match=r"is not a run folder: it has no state.json"):
        run_folder.read(tmp_path)
    (tmp_path / "state.json").write_text('{"state": "runn')
    with pytest.raises(LorakitError, match=r"state.json is damaged; the checkpoints"):
        run_folder.read(tmp_path)


def test_an_incomplete_line_is_skipped_and_the_next_one_separate(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.event("step", step=1)
    run.update(state="stopped")
    with run.log_file.open("a", encoding="utf-8") as log:
        log.write('{"event": "step", "st')
    assert [event["step"] for event in run.events("step")] == [1]
    resumed = RunFolder.open(run.path)
    resumed.begin(1)
    resumed.event("step", step=2)
    assert [event["step"] for event in run.events("step")] == [1, 2]


def test_any_process_can_request_a_stop(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    assert not run.stop_requested
    RunFolder(run.path).request_stop()
    assert run.stop_requested


def test_runs_are_listed_by_last_change(tmp_path):
    for name in ("a", "b", "c"):
        RunFolder.create(settings(tmp_path / name)).update(state="done")
    RunFolder(tmp_path / "a")  # opening a folder does not change its time
    change_state(RunFolder(tmp_path / "b"), updated=time.time() + 60)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("")
    (tmp_path / "note.txt").write_text("")
    assert [path.name for path, _ in run_folder.list_runs(tmp_path)] == ["b", "c", "a"]
    assert run_folder.list_runs(tmp_path / "nowhere") == []


def test_plan_and_report_are_saved(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    run.write_plan({"steps": 10, "modules": {"unet": (1, 2)}})
    assert json.loads(run.plan_file.read_text()) == {"steps": 10, "modules": {"unet": [1, 2]}}
    finding = {"name": "kohya", "passed": True, "detail": "ok"}
    run.write_report([finding])
    assert json.loads(run.report_file.read_text()) == {"passed": True, "findings": [finding], "lessons": []}
    run.write_report([finding, finding | {"passed": False}])
    assert json.loads(run.report_file.read_text())["passed"] is False


def test_samples_are_saved_one_by_one_and_as_a_grid(tmp_path):
    run = RunFolder.create(settings(tmp_path / "run"))
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    images[1].info["lorakit"] = '{"prompt": "雞"}'
    grid = run.save_samples(100, images, ["one", "two"])
    assert grid == run.samples / "step-000100.png" and run.sample_grids() == {100: grid}
    files = run.sample_pictures(100)
    assert [file.name for file in files] == ["01.png", "02.png"]
    with Image.open(files[1]) as image:
        assert image.getpixel((5, 5)) == (0, 0, 255) and image.info["lorakit"] == '{"prompt": "雞"}'


def test_a_grid_has_each_picture_at_its_position():
    colours = ["red", "lime", "blue", "black"]
    images = [Image.new("RGB", (200, 200), colour) for colour in colours]
    grid = image_grid.grid(images, ["above", "below"], ["left", "right"])
    left = grid.width - 2 * (200 + image_grid.GAP)
    for number, image in enumerate(images):
        row, column = divmod(number, 2)
        at = (left + column * (200 + image_grid.GAP) + 100, image_grid.GAP + row * (200 + image_grid.GAP) + 100)
        assert grid.getpixel(at) == image.getpixel((0, 0))
    with pytest.raises(ValueError, match="the number of pictures, 3, does not fill 2 rows and 2 columns"):
        image_grid.grid(images[:3], ["above", "below"], ["left", "right"])


def test_small_pictures_are_enlarged_pixel_by_pixel():
    image = Image.new("RGB", (64, 64), "white")
    image.putpixel((0, 0), (255, 0, 0))
    grid = image_grid.grid([image, None], ["r"], ["a", "b"])
    assert sum(grid.getpixel((x, y)) == (255, 0, 0) for x in range(grid.width) for y in range(grid.height)) == 3 * 3


def test_an_interrupted_write_keeps_the_former_file(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    atomic.write(file, "before")

    def fail(handle: int) -> None:
        raise OSError("the power is gone")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError, match="the power is gone"):
        atomic.write(file, "after")
    assert file.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_run_folder_is_read_without_torch():
    code = "import sys, lorakit.runs.run_folder, lorakit.core.image_grid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def change_state(run: RunFolder, **changes: object) -> None:
    """Change entries of state.json as another process would."""
    state = json.loads(run.state_file.read_text(encoding="utf-8"))
    run.state_file.write_text(json.dumps(state | changes), encoding="utf-8")


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a user's folders private by itself")
def test_a_new_run_folder_is_private(tmp_path: Path) -> None:
    run = RunFolder.create(settings(tmp_path / "above" / "run"))
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
