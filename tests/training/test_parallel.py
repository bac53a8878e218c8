"""Tests of one run in several processes: it trains as one process does, and all processes end together."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import program
import psutil
import pytest
import two_processes
from accelerate import PartialState
from hypothesis import given, strategies
from safetensors.torch import load_file
from short_run import copy_modules, noise, run_config, unchecked
from waiting import SECONDS

from lorakit import config
from lorakit.cli import main as cli
from lorakit.core.errors import LorakitError
from lorakit.runs import launch, run_folder
from lorakit.training import checkpoint, parallel, run
from lorakit.training.parallel import processes

KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    return dict(zip(KEYS, map(str, (rank, rank, count, "localhost", port)), strict=True))


def fork(job: Callable[[], int], rank: int, port: int, log: Path) -> program.Fork:
    """Fork one of two processes; a new interpreter would take seven seconds to import."""

    def begin() -> int:
        os.environ.update(environment(rank, 2, port))
        PartialState._reset_state()  # state that another test may have left
        return job()

    return program.Fork(begin, log)


def end(*processes: program.Fork) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def pair(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Run `two_processes.py` in two processes; return their folder and their results."""
    folder, port = tmp_path_factory.mktemp("pair"), free_port()
    (folder / "sd1").symlink_to(tiny_sd1)
    (folder / "photos").mkdir()
    noise(folder / "photos", 3)

    def train() -> int:
        sys.argv, os.environ["LORAKIT_CACHE"] = ["two_processes", str(folder)], str(folder / "cache")
        copy_modules(pytest.MonkeyPatch())
        two_processes.main(folder)
        return 0

    processes = [fork(train, rank, port, folder / f"{rank}.log") for rank in range(2)]
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        end(*processes)
    assert codes == [0, 0], [(folder / f"{rank}.log").read_text() for rank in range(2)]
    return folder, [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_accumulation(pair):
    _, (first, second) = pair
    differences = first["differences"] | second["differences"]
    assert len(differences) >= 7 and max(differences.values()) < 1e-5, differences


@pytest.mark.slow
def test_photos_class_images_and_samples_are_divided_and_bit_equal(pair):
    """A run has three photos, 19 class images in batches of eight, and three samples before the first step."""
    folder, (first, second) = pair
    assert first["shared"]["encode"] > 8 and second["shared"]["encode"] > 8, (first["shared"], second["shared"])
    for kind, batches in (("draw class images", 3), ("draw samples", 3)):
        assert (first["shared"][kind], second["shared"][kind]) == (batches - 1, 1)
    caches = [contents(folder / f"cache of {name}") for name in ("shared", "alone")]
    assert caches[0] == caches[1] and len([name for name in caches[0] if name.endswith(".png")]) == 19
    grids = [contents(folder / name / "samples") for name in ("shared", "alone")]
    assert grids[0] == grids[1] and len(grids[0]) == 4, grids[0].keys()


@pytest.mark.slow
def test_another_processs_error_ends_all_and_names_its_rank(pair):
    _, (first, second) = pair
    problems = ["LorakitError: process 1: no", "OutOfMemoryError: process 1: full"]
    assert first["tasks"] == ["returned NoneType", *problems]
    assert second["tasks"] == [
        "returned NoneType",
        *(f"EndedElsewhere: {each.partition(': ')[2]}" for each in problems),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_all_processes_end_together_and_the_first_gives_the_reason(pair):
    folder, (first, second) = pair
    assert first["stop"].startswith("Stopped: stopped after step 1; ") and second["stop"].startswith("StopRequested")
    assert run_folder.status(folder / "stopped") == "stopped"
    assert first["rollback"] == second["rollback"] == "returned Result"
    messages = [event["message"] for event in run_folder.RunFolder(folder / "rollback").events("warning")]
    assert any("step 3: the loss is not finite" in line and "going back to step-000002" in line for line in messages)
    assert "has lorakit 0.1, and process 0 on" in first["versions"] and "install the same versions" in first["versions"]
    words = re.escape(str(folder))
    assert re.search(
        rf"process 1 on .+ was started with '{words} --steps=1', and process 0 on .+ with '{words} --steps=0': give",
        first["arguments"],
    )
    assert first["arguments"] == second["arguments"]
    assert first["base"].startswith("LorakitError: process 1 on ")
    assert ": sd1: there is no such folder; there is no checkpoint yet, continue with: lorakit resume" in first["base"]
    assert run_folder.read(folder / "base").message == first["base"].removeprefix("LorakitError: ")


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two(pair, tmp_path, monkeypatch):
    """The run's config has the batches of both processes, so one process trains all of them."""
    unchecked(monkeypatch)
    folder, _ = pair
    options = {"train__validate_every": 2, "train__save_every": 2}
    straight = run_config(
        folder / "sd1", folder / "photos", tmp_path / "run", 4, train__gradient_accumulation_steps=2, **options
    )
    assert config.load(folder / "stopped" / "config.toml").train == straight.train
    results = run.resume(folder / "stopped"), run.train(straight)
    mine, other = (load_file(result.adapter) for result in results)
    assert max(float((mine[key] - other[key]).abs().max()) for key in other) < 1e-5
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(
        LorakitError, match="a step of this run has 2 batches of 2, which 3 processes cannot share evenly"
    ):
        run.resume(folder / "stopped", overrides={"train.steps": 6})


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_one_line(tiny_sd1, tmp_path):
    """With `--gpus` on a CPU, one error names the lost process and the last checkpoint."""
    (tmp_path / "photos").mkdir()
    folder, photos = tmp_path / "run", noise(tmp_path / "photos", 3)
    preset = tmp_path / "preset.toml"
    settings = run_config(tiny_sd1, photos, folder, 10000, train__validate_every=10000, train__save_every=1)
    preset.write_text(config.to_toml(settings), encoding="utf-8")
    with lorakit("train", "--preset", str(preset), "--gpus", "2") as process:
        while run_folder.RunFolder(folder).path.exists() is False or not list(folder.glob("checkpoints/*/complete")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        victim = next(child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1")
        victim.send_signal(signal.SIGKILL)
        # if no process noticed the loss, the others would wait for days
        _, errors = process.communicate(timeout=SECONDS)
    lines = [line for line in errors.splitlines() if line.startswith("lorakit: ")]
    assert process.returncode == 1 and len(lines) == 1, errors
    assert "process 1 of 2 was lost" in lines[0] and "is intact, continue with: lorakit resume" in lines[0]
    assert run_folder.status(folder) == "failed"


@pytest.mark.slow
def test_the_others_end_if_the_first_process_is_killed(tiny_sd1, tmp_path, monkeypatch):
    """The first process gets SIGKILL, and no launcher ends the second one."""
    unchecked(monkeypatch)
    (tmp_path / "photos").mkdir()
    folder, photos, preset = tmp_path / "run", noise(tmp_path / "photos", 3), tmp_path / "preset.toml"
    settings = run_config(tiny_sd1, photos, folder, 10000, train__validate_every=10000, train__save_every=1)
    preset.write_text(config.to_toml(settings), encoding="utf-8")
    port = free_port()

    def train() -> int:
        return cli.main(["train", "--preset", str(preset)])

    first, second = (fork(train, rank, port, tmp_path / f"{rank}.log") for rank in range(2))
    try:
        while not list(folder.glob("checkpoints/*/complete")):
            assert first.poll() is None and second.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        assert second.wait(SECONDS) == 1
    finally:
        end(first, second)
    assert first.wait() == -signal.SIGKILL and run_folder.status(folder) == "interrupted"
    newest = checkpoint.newest_complete(folder / "checkpoints", print)
    assert newest
    steps = checkpoint.step_of(newest) + 1
    assert run.resume(folder, overrides={"train.steps": steps}).steps == steps


@contextmanager
def lorakit(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start `lorakit`, and kill it and its children if the test fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()


# -- without processes ------------------------------------------------------------------------------------------------


@given(strategies.integers(1, 8), strategies.integers(1, 6), strategies.integers(0, 5))
def test_processes_divide_the_batches_evenly_and_completely(count: int, own: int, step: int) -> None:
    """A step is a run of consecutive batches of the plan, whatever the photos' sizes. Every process has the same number
    of passes and of sums over the processes."""
    parts = own * count
    shares = [parallel.share(parts, rank, count) for rank in range(count)]
    assert {len(share) for share in shares} == {own}
    batches = sorted(step * parts + part for share in shares for part in share)
    assert batches == list(range(step * parts, (step + 1) * parts))


def test_a_port_in_use_is_named(monkeypatch):
    PartialState._reset_state()  # state that another test may have left
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        for name, value in environment(0, 2, other.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        port = other.getsockname()[1]
        with (
            pytest.raises(LorakitError, match=f"the port of localhost:{port} is taken.*--master-port"),
            parallel.join(),
        ):
            pass


def test_without_nccl_or_its_own_gpu_a_process_is_refused():
    world = launch.World(rank=5, local_rank=2, count=6)
    assert "several CUDA cards need NCCL" in parallel.card_problem(world, 4, has_nccl=False)
    assert "process 5 on" in parallel.card_problem(world, 2, has_nccl=True)
    assert "there are 2 cards, start as many there" in parallel.card_problem(world, 2, has_nccl=True)
    assert not parallel.card_problem(world, 3, has_nccl=True)


def test_a_failed_connection_names_its_address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "4711")
    with pytest.raises(LorakitError) as refusal:
        processes._refuse(RuntimeError("The client socket has timed out\nat some place"))
    line = "the processes cannot connect at node7:4711 (The client socket has timed out): see docs/scale.md"
    assert str(refusal.value) == line
