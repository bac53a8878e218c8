"""Run jobs one after the other on each card, in a small process that outlives the front end. All state is in files:

    <runs>/.queue/000001.json   a job: its command, the folder it writes to, its state
    <runs>/.queue/000001.toml   the config of a training job
    <runs>/.queue/000001.log    the job's output
    <runs>/.queue/worker.lock   lock of the worker process

A failed job does not stop the next one. Nothing is deleted; a job that is no longer wanted is marked as cancelled.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from lorakit.config import Config, to_toml
from lorakit.core import atomic, foreign_json
from lorakit.core.errors import LorakitError
from lorakit.core.messages import KEYS, from_lines
from lorakit.runs import nvidia, results, run_folder

# A worker that finds the lock taken waits this long (seconds): the other may be about to leave.
PATIENCE = 5.0
# Seconds between two looks at what runs and what waits.
LOOK_EVERY = 0.5
ENDED = {0: "done", 130: "stopped"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command of the queue.

    Attributes:
        arguments: of `python -m lorakit`.
        folder: the run folder it makes or goes on with, or where its pictures go.
        state: waiting, running, done, stopped, failed, interrupted or cancelled.
        pid, pid_start: its process, as in `run_folder.State`.
        code: its exit code.
        added, ended: seconds since the epoch.
        rank: those with the least begin first, of one rank the oldest.
    """

    number: int
    arguments: tuple[str, ...]
    folder: str
    state: str = "waiting"
    pid: int = 0
    pid_start: float = 0.0
    code: int | None = None
    added: float = 0.0
    ended: float = 0.0
    rank: int = 0

    @property
    def verb(self) -> str:
        """train, resume, sample ..."""
        return self.arguments[0]


class Queue:
    """The jobs of one folder of runs. Making the object touches nothing."""

    def __init__(self, runs: Path):
        self.runs = runs
        self.folder = runs / ".queue"
        self._at_work = False

    # -- for the front end ----------------------------------------------------------------------------------------

    def train(self, config: Config) -> Job:
        """Add a training run; the run itself makes its folder."""
        folder = self.new_folder(config)
        return self._add(
            lambda toml: ("train", "--preset", str(toml), "--output", str(folder)), folder, to_toml(config)
        )

    def new_folder(self, config: Config) -> Path:
        """A run folder that no run and no job has."""
        folders = {Path(job.folder) for job in self.jobs()}
        first = self.runs / f"{datetime.now():%Y-%m-%d-%H%M%S}-{run_folder.name_of(config)}"
        folder, number = first, 1
        while folder in folders or folder.exists():
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
        return folder

    def resume(self, folder: Path, steps: int = 0) -> Job:
        """Add the continuation of a run, with a total of `steps` unless 0.

        A run that has just ended, or was asked to, waits for its process, which may take some seconds.

        Raises:
            LorakitError: it is running, or waits in the queue already.
        """
        states = {job.state for job in self.jobs() if Path(job.folder) == folder}
        if "waiting" in states or ("running" in states and not self._ends(folder)):
            raise LorakitError("{name} is in the queue already", folder.name)
        more = ("--steps", str(steps)) if steps else ()
        return self._add(lambda _: ("resume", str(folder), *more), folder)

    @staticmethod
    def _ends(folder: Path) -> bool:
        try:
            ends = run_folder.RunFolder(folder).stop_requested
            return ends or run_folder.read(folder).state not in run_folder.LIVE
        except LorakitError:  # its folder does not exist yet
            return False

    def command(self, arguments: Sequence[str], folder: Path) -> Job:
        """Add any other command of lorakit, which writes to `folder`."""
        return self._add(lambda _: tuple(arguments), folder)

    def cancel(self, number: int) -> bool:
        """Remove a job that has not begun; False if it has begun."""
        job = self.job(number)
        if job is None or job.state != "waiting":
            return False
        self._write(replace(job, state="cancelled", ended=time.time()))
        return True

    def jobs(self) -> list[Job]:
        """All jobs, in order. A job whose process and worker are both gone has the state in which it ended."""
        jobs = [self._read(file) for file in sorted(self.folder.glob("??????.json"))]
        return [self._corrected(job) for job in jobs if job is not None]

    def job(self, number: int) -> Job | None:
        """The job with this number, or None if there is none."""
        job = self._read(self._file(number, "json"))
        return self._corrected(job) if job else None

    def log(self, number: int) -> str:
        """The job's output so far."""
        try:
            return self._file(number, "log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def pictures(self, number: int) -> tuple[int, int]:
        """How many pictures a job that draws has drawn, and of how many; (0, 0) before the first."""
        lines = re.findall(r"^picture (\d+) of (\d+)$", self.log(number), re.MULTILINE)
        return (int(lines[-1][0]), int(lines[-1][1])) if lines else (0, 0)

    def waiting(self) -> list[Job]:
        """Jobs that have not begun, next one first."""
        jobs = [job for job in self.jobs() if job.state == "waiting"]
        return sorted(jobs, key=lambda job: (job.rank, job.number))

    def move(self, number: int, places: int) -> bool:
        """Move a waiting job so many places back in the queue, or forward if negative; False if it has begun."""
        waiting = self.waiting()
        job = next((job for job in waiting if job.number == number), None)
        if job is None:
            return False
        place = max(0, waiting.index(job) + places)
        others = [other for other in waiting if other is not job]
        order = [*others[:place], job, *others[place:]]
        for rank, each in enumerate(order, -len(order)):  # below 0: a new job comes last
            now = self._read(self._file(each.number, "json"))
            if now is not None and now.state == "waiting" and now.rank != rank:
                self._write(replace(now, rank=rank))
        return True

    def is_working(self) -> bool:
        """Whether a worker is there."""
        if not self.folder.is_dir():
            return False
        lock = self._lock()
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True

    def start(self) -> None:
        """Start a worker that is detached from this process. If there is one already, the new one ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "worker.log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "lorakit.runs.queue", str(self.runs.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **_detached(),
            )

    # -- for the worker -------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Run all waiting jobs, one at a time on each card. Return at once if another worker exists."""
        try:
            with self._lock().acquire(timeout=PATIENCE):
                self._at_work = True
                self._wait_for_orphans()
                self._work(nvidia.visible())
        except Timeout:
            return

    def _work(self, cards: Sequence[str]) -> None:
        """See `work`. A run has one card, with `memory.device = "cuda:N"` that one; no cards: one run at a time."""
        running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
        while True:
            free = [place for place in range(max(1, len(cards))) if place not in running]
            for job in self.waiting() if free else []:
                if any(job.folder == other.folder for other, _ in running.values()):
                    continue  # a run goes on when its process has ended
                _, _, number = _option(job, "memory", "device").partition("cuda:")
                place = int(number) % max(1, len(cards)) if number.isdecimal() else free[0] if free else -1
                if place in free:
                    free.remove(place)
                    card = {} if number or len(cards) < 2 else {"CUDA_VISIBLE_DEVICES": cards[place]}
                    running[place] = self._begin(job, card)
            if not running:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(iter(running.values()))[1].wait(LOOK_EVERY)
            for place, (job, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    state = ENDED.get(code, "failed" if code >= 0 else "interrupted")
                    self._write(replace(job, state=state, code=code, ended=time.time()))
                    self._notify(job, state)
                    del running[place]

    def _notify(self, job: Job, state: str) -> None:
        """Notify of a run that ended before it began, or was killed; all others do it themselves."""
        target, folder = _option(job, "output", "notify"), Path(job.folder)
        try:
            now = run_folder.read(folder)
        except LorakitError:  # it has not created a folder
            now = run_folder.State()
        if not target or (now.updated > job.pid_start and now.state != "interrupted"):
            return
        if now.updated <= job.pid_start:
            lines = from_lines(self.log(job.number))
            now = replace(now, state=state, message=str(lines[-1]) if lines else "")  # type: ignore[arg-type]
        if problem := results.notify(target, folder, now):
            with self._file(job.number, "log").open("a", encoding="utf-8") as log:
                log.write(f"lorakit: {problem}\n")

    def _begin(self, job: Job, environment: dict[str, str]) -> tuple[Job, subprocess.Popen[bytes]]:
        with self._file(job.number, "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lorakit", *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1", KEYS: "1"} | environment,
                **_detached(),
            )
        # The process may be gone before it is looked at.
        started = time.time()
        with contextlib.suppress(psutil.Error):
            started = psutil.Process(process.pid).create_time()
        job = replace(job, state="running", pid=process.pid, pid_start=started)
        self._write(job)
        return job, process

    def _wait_for_orphans(self) -> None:
        """A worker before this one may have been killed while its run lives on: two at once would only be slower."""
        for job in self.jobs():
            while job.state == "running" and run_folder.alive(job.pid, job.pid_start):
                time.sleep(0.5)
            if job.state != "waiting":
                self._write(self._corrected(job))

    def _corrected(self, job: Job) -> Job:
        """The job as it stands where the worker was killed before it could write how it ended."""
        if job.state != "running" or run_folder.alive(job.pid, job.pid_start):
            return job
        if not self._at_work and self.is_working():
            return job  # it ended just now, and how is about to be written
        try:
            state = run_folder.read(job.folder).state
        except LorakitError:
            state = "interrupted"
        return replace(job, state="interrupted" if state in run_folder.LIVE else state, ended=time.time())

    # -- files ----------------------------------------------------------------------------------------------------

    def _add(self, arguments: Callable[[Path], tuple[str, ...]], folder: Path, config: str | None = None) -> Job:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max((int(file.stem) for file in self.folder.glob("??????.json")), default=0) + 1
        while True:
            try:
                # Claims the number: two browsers may press the button at once.
                self._file(number, "log").touch(exist_ok=False)
                break
            except FileExistsError:
                number += 1
        toml = self._file(number, "toml")
        if config is not None:
            atomic.write(toml, config)
        job = Job(number=number, arguments=tuple(arguments(toml)), folder=str(folder), added=time.time())
        self._write(job)
        return job

    def _lock(self) -> FileLock:
        return FileLock(self.folder / "worker.lock")

    def _file(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:06d}.{kind}"

    def _write(self, job: Job) -> None:
        atomic.write(self._file(job.number, "json"), json.dumps(asdict(job), indent=1, ensure_ascii=False))

    @staticmethod
    def _read(file: Path) -> Job | None:
        try:
            status = file.stat()
            return _parsed(file, status.st_mtime_ns, status.st_ino, status.st_size)
        except (OSError, ValueError, TypeError, KeyError):
            return None


@functools.lru_cache(maxsize=4096)
def _parsed(file: Path, changed: int, inode: int, size: int) -> Job:
    """The parsed file of a job, cached until the file changes."""
    values = foreign_json.loads(file.read_text(encoding="utf-8"))
    return Job(**values | {"arguments": tuple(values["arguments"])})


def _option(job: Job, section: str, name: str) -> str:
    """An option of the config that a job trains with; "" where it has none."""
    file = Path(job.arguments[2]) if job.verb == "train" else Path(job.folder, "config.toml")
    try:
        return str(tomllib.loads(file.read_text(encoding="utf-8"))[section][name])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _detached() -> dict[str, Any]:
    """How a process is started that outlives this one and gets none of its signals."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS}
    return {"start_new_session": True}


if __name__ == "__main__":
    Queue(Path(sys.argv[1])).work()
