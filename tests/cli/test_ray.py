"""A batch on a Ray cluster: a lost worker or machine does not change the results."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from short_run import noise

from lorakit import config
from lorakit.cli import main as cli, ray_tasks
from lorakit.core.errors import LorakitError
from lorakit.runs import batch, run_folder

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(HAS_RAY, reason="ray is installed")
def test_without_ray_the_extra_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    noise(tmp_path / "photos" / "a", 1)
    command = ["batch", str(tmp_path / "photos"), "--output", str(tmp_path / "runs"), "--base", "pocket"]
    assert cli.main([*command, "--subject", "sks toy", "--ray", "auto"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--ray needs ray; install it with: " in line and "ray>=" in line


def test_a_machine_without_the_shared_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"does not exist on .+: all machines need the shared folder"):
        ray_tasks.work(str(tmp_path), "anna")


class Lost(Exception):
    """A stand-in for Ray's error of a lost task."""


def test_errors_of_ray_become_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Ray has a task that ends with an exit code and a lost task, so that the test runs without Ray."""

    def init(address: str, log_to_driver: bool) -> None:
        if address != "local":
            raise ConnectionError("Could not find any running Ray instance.\nMore")

    def get(task: str) -> int:
        if task == "ben":
            raise Lost
        return 3

    task = SimpleNamespace(remote=lambda runs, name: name)
    stand_in = SimpleNamespace(
        is_initialized=lambda: False,
        init=init,
        remote=lambda **options: lambda work: SimpleNamespace(options=lambda **options: task),
        wait=lambda tasks: (tasks[:1], tasks[1:]),
        get=get,
        exceptions=SimpleNamespace(RayError=Lost),
    )
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setattr(ray_tasks, "find_spec", lambda name: True)
    rows = [batch.Row(name, config.load("subject-pocket")) for name in ("anna", "ben")]
    with pytest.raises(LorakitError) as refusal:
        ray_tasks.run(tmp_path, rows, "node7:6379", print)
    assert str(refusal.value) == (
        "--ray node7:6379: no cluster answers there (Could not find any running Ray instance.); "
        "start one with: ray start"
    )
    lines: list[str] = []
    names: list[str] = []
    ray_tasks.run(tmp_path, rows, "local", lines.append, names.append)
    assert names == ["anna", "ben"]
    assert lines == ["anna: ended with code 3, see anna.log; 1 left", "ben: lost, tries: 6 (Lost); 0 left"]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="ray is not installed (the extra `ray`)")
def test_a_killed_worker_and_a_lost_machine_change_no_bit(tmp_path: Path, tiny_sd1: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    # Six runs with the same photos must give the adapter of one run without interruption.
    for number in range(6):
        (tmp_path / "photos" / f"p{number}").mkdir(parents=True)
        noise(tmp_path / "photos" / f"p{number}", 3)
    options = {
        "data.name": "sks toy",
        "data.resolution": 64,
        "model.base": str(tiny_sd1),
        "memory.device": "cpu",
        "train.steps": 24,
        "train.save_every": 1,
        "train.validate_every": 24,
        "train.batch_size": 2,
        "sample.at_start": False,
        "sample.at_end": False,
        "sample.every": 24,
    }
    runs, alone = tmp_path / "runs", tmp_path / "alone"
    for folder in (runs, alone):
        rows = batch.read(tmp_path / "photos", None, options, folder)
        batch.write_manifest(folder, rows)
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  else they starve on a busy machine
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    ray.init(address=cluster.address, log_to_driver=False)
    lines: list[str] = []
    rows = batch.read(tmp_path / "photos", None, options, runs)
    job = threading.Thread(target=ray_tasks.run, args=(runs, rows, cluster.address, lines.append))
    job.start()
    try:
        os.kill(_training(runs, cluster.head_node), signal.SIGKILL)
        _training(runs, second)
        cluster.remove_node(second, allow_graceful=False)
        job.join(timeout=1200)
        assert not job.is_alive() and len(lines) == 6, lines
    finally:
        ray.shutdown()
        cluster.shutdown()
    outcomes = batch.status(runs)
    assert {each.state for each in outcomes} == {"done"} and all(each.passed for each in outcomes), outcomes
    resumed = [
        each.name
        for each in outcomes
        if any(e["resumed"] for e in run_folder.RunFolder(runs / each.name).events("start"))
    ]
    assert len(resumed) >= 2
    assert cli.main(batch.command(alone, "p0")) == 0
    files = [*alone.glob("p0/*.safetensors"), *runs.glob("*/*.safetensors")]
    assert len(files) == 7 and len({_tensors(file.read_bytes()) for file in files}) == 1


def _tensors(file: bytes) -> bytes:
    """Return the bytes of a safetensors file after its header, because the header contains times."""
    return file[8 + int.from_bytes(file[:8], "little") :]


def _training(runs: Path, node: Any) -> int:
    """Return the process id of a run on this node that has saved a checkpoint and has not ended."""
    parent = node.all_processes["raylet"][0].process.pid
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for folder, state in run_folder.list_runs(runs):
            if (
                state.state == "running"
                and list(folder.glob("checkpoints/*/complete"))
                and psutil.pid_exists(state.pid)
                and psutil.Process(state.pid).ppid() == parent
            ):
                return state.pid
        time.sleep(0.05)
    raise AssertionError("no run is being trained")
