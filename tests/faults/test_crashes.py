"""Tests of kills and full disks at every file operation: readers find the old or the new content, and the next process
can continue."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import crash
import kills
import pytest
import torch
from PIL import Image

from lorakit import config
from lorakit.core import atomic, image_grid, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.data import latents
from lorakit.formats import files
from lorakit.runs import run_folder
from lorakit.runs.queue import Queue
from lorakit.runs.run_folder import RunFolder
from lorakit.training import checkpoint

KINDS = ("kill", "torn", "full")
KEEP = 2


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def quietly(work: Any, *arguments: object) -> None:
    """A full disk raises lorakit's own error, or the system's where lorakit adds no message."""
    try:
        work(*arguments)
    except LorakitError as error:
        assert "\n" not in str(error)
    except OSError as error:
        assert error.errno


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_has_its_old_or_its_new_content(tmp_path, kind):
    count = 0
    for place, point in crash.points(
        tmp_path,
        lambda place: atomic.write(place / "x", "old"),
        lambda place: quietly(atomic.write, place / "x", "new"),
        kind,
    ):
        assert (place / "x").read_text() == "old", point
        atomic.sweep(place, 0)
        atomic.write(place / "x", "later")
        assert names(place) == ["x"], point
        count += 1
    assert count == 2  # writing the temporary file, and renaming it


def save(folder: Path, step: int) -> None:
    adapter = {"a.down": torch.full((2, 2), float(step)), "a.up": torch.full((2, 2), float(step))}
    checkpoint.save(folder / "checkpoints", step, adapter, {"state": {0: {"exp_avg": torch.ones(2)}}}, {"due": []})
    checkpoint.rotate(folder / "checkpoints", KEEP)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [3, 4])  # step 3 exists already, step 4 is new
def test_a_complete_checkpoint_exists_after_every_kill(tmp_path, kind, step):
    def prepare(place: Path) -> None:
        for number in (2, 3):
            save(place, number)

    count = 0
    for place, point in crash.points(tmp_path, prepare, lambda place: quietly(save, place, step), kind):
        messages: list[str] = []
        newest = checkpoint.newest_complete(place / "checkpoints", messages.append)
        assert newest is not None and checkpoint.step_of(newest) in (3, step) and not messages, point
        assert float(checkpoint.load(newest).adapter["a.up"][0, 0]) == checkpoint.step_of(newest), point
        save(place, step)
        complete_names = {path.name for path in checkpoint.complete(place / "checkpoints")}
        assert complete_names == {p.name for p in (place / "checkpoints").iterdir()} and len(complete_names) == KEEP, (
            point
        )
        count += 1
    assert count > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_again_or_resumes_after_every_kill(tmp_path, kind):
    def begin(place: Path) -> None:
        settings = {"train.steps": 2, "output.folder": str(place / "run"), "data.name": "sks toy", "data.folder": "x"}
        run = RunFolder.create(config.load(None, settings))
        try:
            run.update(state="running", step=1)
            run.write_plan({"steps": 2})
            run.save_samples(1, [Image.new("RGB", (8, 8))], ["x"])
            run.update(state="done", step=2)
        finally:
            run.unlock()

    ways = set()
    for place, point in crash.points(tmp_path, lambda place: None, lambda place: quietly(begin, place), kind):
        folder = place / "run"
        if (folder / "config.toml").is_file():
            before = run_folder._read_or_guess(folder)
            run = RunFolder(folder)
            run._state = replace(before, message="")
            run.lock()
            run.begin(0)
            run.unlock()
            assert run_folder.read(folder).state == "preparing", point
            ways.add("resumed")
        else:
            assert run_folder.output_problem(folder) is None, point
            begin(place)
            assert run_folder.read(folder).step == 2, point
            ways.add("started again")
        assert not [name for name in names(folder) if atomic.TEMPORARY.fullmatch(name)], point
    assert ways == {"resumed", "started again"}


@pytest.mark.parametrize("kind", KINDS)
def test_exports_and_caches_are_complete_or_absent(tmp_path, kind):
    tensor = torch.arange(8.0).reshape(2, 2, 2)

    def write(place: Path) -> None:
        quietly(files.write_safetensors, place / "out" / "x.safetensors", {"a": tensor}, {"k": "v"})
        quietly(latents._save, place / "latents" / "ab" / "abc.safetensors", tensor, tensor + 1)
        quietly(image_grid.save, Image.new("RGB", (8, 8)), place / "x.png")

    for place, point in crash.points(tmp_path, lambda place: None, write, kind):
        for file in place.rglob("*"):
            if file.suffix == ".safetensors":
                assert all(value.numel() for value in safetensors_header.load(safetensors_header.read(file)).values())
            elif file.suffix == ".png":
                image_grid.read(file)
            else:
                assert file.is_dir() or atomic.TEMPORARY.fullmatch(file.name), point


@pytest.mark.parametrize("kind", KINDS)
def test_the_queue_loses_at_most_the_job_being_added(tmp_path, kind):
    def prepare(place: Path) -> None:
        Queue(place).command(["doctor"], place / "a")

    for place, point in crash.points(
        tmp_path, prepare, lambda place: quietly(Queue(place).command, ["doctor"], place / "b"), kind
    ):
        assert [job.folder for job in Queue(place).jobs()][:1] == [str(place / "a")], point
        assert Queue(place).command(["doctor"], place / "c").number > 1, point


@pytest.mark.slow
def test_runs_killed_by_sigkill_end_with_the_same_bits(tmp_path, monkeypatch):
    """Each kill is a SIGKILL in a training run, which is then resumed. Set `LORAKIT_KILLS=300` for a long test."""
    count = int(os.environ.get("LORAKIT_KILLS", "4"))
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    if torch.cuda.is_available():  # CUDA's threads would be missing in a fork of this process
        command = [sys.executable, kills.__file__, str(tmp_path), str(count)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60 + 60 * count, check=True)
        counts = json.loads(process.stdout.splitlines()[-1])
    else:
        counts = kills.main(tmp_path, count)
    assert counts["kills"] >= count and counts["different"] == counts["lost"] == 0, counts
