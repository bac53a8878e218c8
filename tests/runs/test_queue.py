import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import wait_for

from lorakit import config
from lorakit.core.errors import LorakitError
from lorakit.runs import nvidia, run_folder
from lorakit.runs.queue import Queue


def ended(queue: Queue) -> bool:
    return all(job.state not in ("waiting", "running") for job in queue.jobs())


@pytest.mark.slow
def test_a_failed_job_does_not_stop_the_others(tmp_path: Path):
    queue = Queue(tmp_path / "runs")
    for arguments in (["options"], ["export", str(tmp_path / "no.safetensors"), "--to", "peft"], ["options", "--json"]):
        queue.command(arguments, tmp_path)
    assert [job.state for job in queue.jobs()] == ["waiting"] * 3
    queue.start()
    wait_for(lambda: ended(queue))
    assert [(job.state, job.code) for job in queue.jobs()] == [("done", 0), ("failed", 1), ("done", 0)]
    assert "lorakit: " in queue.log(2) and "no.safetensors" in queue.log(2)
    assert "adapter.rank" in queue.log(1)
    wait_for(lambda: not queue.is_working())


def test_a_cancelled_job_is_not_run(tmp_path: Path):
    queue = Queue(tmp_path)
    job = queue.command(["options"], tmp_path)
    assert queue.cancel(job.number)
    assert not queue.cancel(job.number)
    queue.work()
    assert [job.state for job in queue.jobs()] == ["cancelled"]
    assert queue.log(job.number) == ""


def test_a_queued_run_gets_a_name_and_a_config_file(tmp_path: Path):
    queue = Queue(tmp_path)
    settings = config.load("subject-pocket", {"data.folder": "photos", "data.name": "sks dog"})
    one, two = queue.train(settings), queue.train(settings)
    assert one.folder != two.folder and one.number == 1 and two.number == 2
    assert Path(one.folder).parent == tmp_path and Path(one.folder).name.endswith("-sks-dog")
    assert config.load(one.arguments[2]) == settings
    assert one.arguments[3:] == ("--output", one.folder)


def test_a_run_is_queued_for_resume_once(tmp_path: Path):
    queue = Queue(tmp_path)
    queue.resume(tmp_path / "run")
    with pytest.raises(LorakitError, match="run is in the queue already"):
        queue.resume(tmp_path / "run")


@pytest.mark.slow
def test_a_killed_worker_and_run_leave_an_interrupted_job(tmp_path: Path):
    """Worker and run are killed. The queue marks the job as interrupted, and the next worker continues."""
    queue = Queue(tmp_path)
    photos = tmp_path / "pipe"
    os.mkfifo(photos)
    # A pipe without a writer never ends, so the command runs until it is killed.
    queue.command(["inspect", str(photos)], tmp_path / "nothing")
    queue.command(["options"], tmp_path)
    worker = subprocess.Popen([sys.executable, "-m", "lorakit.runs.queue", str(tmp_path)])
    wait_for(lambda: queue.jobs()[0].state == "running")
    assert queue.is_working()
    job = queue.jobs()[0]
    worker.kill()
    worker.wait()
    assert run_folder.alive(job.pid, job.pid_start), "the run outlives its worker"
    assert queue.jobs()[0].state == "running"
    psutil.Process(job.pid).kill()
    wait_for(lambda: queue.jobs()[0].state == "interrupted")
    assert not queue.is_working()
    queue.work()
    assert [job.state for job in queue.jobs()] == ["interrupted", "done"]


def test_incomplete_job_files_are_skipped(tmp_path: Path):
    queue = Queue(tmp_path)
    queue.command(["options"], tmp_path)
    (queue.folder / "000002.json").write_text('{"number": 2')
    (queue.folder / "000003.json").write_text('{"other": 1}')
    assert [job.number for job in queue.jobs()] == [1]
    assert queue.command(["options"], tmp_path).number > 1


def test_a_resume_waits_for_its_run_even_with_a_free_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program, log = tmp_path / "program", tmp_path / "log"
    program.write_text(f"#!/bin/sh\necho begin $3 >> {log}; sleep 0.3; echo end $3 >> {log}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(nvidia, "cards", lambda: [nvidia.Card("A card", "580.1")] * 2)
    queue = Queue(tmp_path / "runs")
    for name, folder in (("first", "a"), ("resume", "a"), ("other", "b")):
        queue.command([name], tmp_path / folder)
    queue.work()
    assert [job.state for job in queue.jobs()] == ["done"] * 3
    lines = log.read_text().splitlines()
    assert lines.index("begin resume") > lines.index("end first")
    assert lines.index("begin other") < lines.index("end first")


def test_each_gpu_has_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two GPUs are visible. A script replaces lorakit and logs its start, its end and its GPUs."""
    program, log = tmp_path / "program", tmp_path / "log"
    script = f"echo begin $(basename $5 .toml) $CUDA_VISIBLE_DEVICES >> {log}; sleep 0.3; echo end >> {log}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(nvidia, "cards", lambda: [nvidia.Card("A card", "580.1")] * 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    queue = Queue(tmp_path / "runs")
    for device in ("cuda:1", "cuda:1", "auto", "cpu"):
        options = {"data.folder": "photos", "data.name": "sks dog", "memory.device": device}
        queue.train(config.load("subject-pocket", options))
    queue.work()
    assert [job.state for job in queue.jobs()] == ["done"] * 4
    lines = log.read_text().splitlines()
    # Two jobs need the second visible GPU, so one of them waits; the third job starts on the first GPU.
    assert {"begin 000001 2,0", "begin 000002 2,0", "begin 000003 2"} < set(lines)
    counts = [lines[: place + 1].count("end") for place, line in enumerate(lines) if line.startswith("begin")]
    assert counts[:2] == [0, 0] and counts[2] >= 1 and counts[3] >= 1, lines
    assert not any("begin 000001" in line for line in lines[lines.index("begin 000002 2,0") :])
