"""The run folder, the only record of a run, for all programs that train, watch, stop or resume it.

    config.toml             the resolved config
    plan.json               the plan, written before the first step
    state.json              the current state; replaced completely at every change
    log.jsonl               all events, one JSON object per line
    .lock                   lock of the training process; the system releases it when the process ends
    stop, save-now, sample-now  request to stop, for a checkpoint, for pictures; created by the front end or `touch`
    checkpoints/step-000100/
    samples/step-000100.png, samples/step-000100/01.png ...
    <name>.safetensors
    report.json, curves.svg, contact-sheet.png, report.html

A viewer needs only this folder and this module, which does not import torch.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout
from PIL import Image

from lorakit import config as configuration
from lorakit.config import Config, load, to_toml
from lorakit.core import atomic, foreign_json, image_grid
from lorakit.core.errors import LorakitError
from lorakit.core.events import Event, json_value
from lorakit.core.messages import Message, from_json, key_of
from lorakit.core.names import expand, quote, slug, step_name, unique_path

States = Literal["waiting", "preparing", "running", "done", "failed", "stopped", "interrupted"]
# An event as the log has it.
LogLine = dict[str, Any]
# States in which a process must be alive; where it is not, the run was interrupted.
LIVE = ("preparing", "running")
# A run on another machine that has written nothing for so many seconds was interrupted.
SILENCE = 900
# Seconds between two writes of mere progress: an fsync takes time, and nobody reads faster.
PROGRESS_EVERY = 0.5
LOCKED = "{path} is being trained by process {pid}; stop that first"
NO_WRITING = "cannot write to {path}: {why}; give another --output"
NOT_EMPTY = "{path} is not empty and nothing in it is overwritten; give another --output{hint}"
AMONG_PHOTOS = "{path} is inside the folder of photos, where nothing is written; give another --output"


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a run.

    Attributes:
        step, steps: optimizer steps done and planned.
        loss: smoothed training loss.
        learning_rate: of the last step.
        images_per_second, memory_mib, eta_s: speed, peak memory in MiB, seconds left.
        doing: current phase of the run, named as in the phase events.
        position, total: progress within the phase, for example in class images, if the phase counts; else 0.
        threads: number of threads that torch uses on the CPU; 0 before it is known. Sums of floats depend on it.
        pid, pid_start: the process that trains and the second since the epoch at which it started; a process number
            alone is given out again.
        host: name of the machine that trains; "" before it is known.
        message: how the run ended, for the user; state.json also has its key and values, see `core.messages`.
        adapter: file name of the exported adapter.
        updated: seconds since the epoch of the last change.
    """

    state: States = "preparing"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    memory_mib: float | None = None
    eta_s: float | None = None
    threads: int = 0
    doing: str = ""
    position: int = 0
    total: int = 0
    pid: int = 0
    pid_start: float = 0.0
    host: str = ""
    message: str = ""
    adapter: str = ""
    updated: float = 0.0


class RunFolder:
    """Paths, state and log of one run. Making the object touches nothing; `create` and `open` claim the run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.plan_file = self.path / "plan.json"
        self.state_file = self.path / "state.json"
        self.log_file = self.path / "log.jsonl"
        self.report_file = self.path / "report.json"
        self.stop_file = self.path / "stop"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.curves_file = self.path / "curves.svg"
        self.contact_sheet_file = self.path / "contact-sheet.png"
        self.html_file = self.path / "report.html"
        self._state = State()
        self._lock: FileLock | None = None
        self._unwritten: OSError | None = None

    @property
    def current(self) -> State:
        """Where this process says that the run stands."""
        return self._state

    @property
    def threads(self) -> int:
        """See `State`."""
        return self._state.threads

    @property
    def step(self) -> int:
        """Optimizer steps done, as `State` has it."""
        return self._state.step

    @property
    def steps(self) -> int:
        """Optimizer steps planned, as `State` has it."""
        return self._state.steps

    # -- for the process that trains ------------------------------------------------------------------------------

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Create a folder for a new run and claim it for this process: `output.folder`, or runs/<time>-<name>.

        Raises:
            LorakitError: the requested folder is not empty, is a file, or cannot be created.
        """
        path = place(config)
        if problem := output_problem(path):
            raise LorakitError(problem)
        try:
            run = cls(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Config, report and samples have captions and prompts, so other users of this machine may not read them.
            path.mkdir(mode=0o700, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            run.samples.mkdir(exist_ok=True)
            run.lock()
            atomic.sweep(path, 0)  # what a kill left; nobody else writes here now
            if run.config_file.exists():
                raise LorakitError("another process has just started a run in {path}; give another --output", path)
            atomic.write(run.config_file, to_toml(configuration.with_absolute_paths(config)))
            run._claim(State())
        except OSError as error:
            raise LorakitError(NO_WRITING, path, error.strerror or error) from None
        run.event("start", resumed=False)
        return run

    def require(self) -> None:
        """Raise LorakitError if this is no run folder."""
        if not self.config_file.is_file():
            missing = "it is a file" if self.path.is_file() else "there is no such folder"
            why = "it has no config.toml" if self.path.is_dir() else missing
            raise LorakitError("{path} is not a run folder: {why}", self.path, why)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Lock an existing run for this process, to resume it. Its state does not change until `begin`.

        Raises:
            LorakitError: the path is not a run folder, or another process still trains in it.
        """
        run = cls(path)
        run.require()
        state = _read_or_guess(run.path)
        # For a run of another machine, only the lock shows this; the user who resumes knows that the machine is gone.
        is_here = state.host in ("", platform.node())
        if state.state in LIVE and is_here and state.pid != _this_process()[0]:
            raise LorakitError(LOCKED, run.path, state.pid)
        run.lock()
        run._state = replace(state, message="")
        return run

    def begin(self, step: int, config: Config | None = None) -> None:
        """Claim an opened run to resume it at `step`. `config` replaces its config. A request to stop is removed."""
        if config is not None:
            atomic.write(self.config_file, to_toml(configuration.with_absolute_paths(config)))
        self.stop_file.unlink(missing_ok=True)
        self.take_requests()
        self.checkpoints.mkdir(exist_ok=True)
        self.samples.mkdir(exist_ok=True)
        for folder in (self.path, self.samples, *self.samples.glob("step-*/"), self.path / "tensorboard"):
            atomic.sweep(folder, 0)
        atomic.end_last_line(self.log_file)
        self._claim(replace(self._state, step=step))
        self.event("start", resumed=True)

    def lock(self) -> None:
        """Lock the folder against other processes until `unlock` or the end of this process.

        Raises:
            LorakitError: another process or another thread of this process holds the lock.
        """
        # One lock object for each path, so that the same thread can acquire it again.
        self._lock = FileLock(self.path / ".lock", is_singleton=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            pid = _read_or_guess(self.path).pid
            raise LorakitError(LOCKED, self.path, pid or "unknown") from None

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release(force=True)
            self._lock = None

    def update(self, **changes: Any) -> None:
        """Change fields of `State` and write it. Progress alone may be written later, together with the next change."""
        self._state = replace(self._state, **changes)
        if "state" in changes or time.time() - self._state.updated >= PROGRESS_EVERY:
            try:
                self._write_state()
            except OSError as error:
                self._unwritten = error

    def record(self, event: Event) -> None:
        """Record an event of the run: progress goes into state.json, every other event becomes a line of the log.

        Raises:
            OSError: the state or the log could not be written; the run can continue without it.
        """
        if event.kind == "phase":
            self.update(doing=event.facts["phase"], position=0, total=0)
        if event.kind == "progress":
            self.update(step=event.step, **event.facts)
        elif event.kind == "work":
            self.update(**event.facts)
        else:
            self._add(event)
        error, self._unwritten = self._unwritten, None
        if error is not None:
            raise error

    def event(self, event: str, **facts: object) -> None:
        """Append one line to the log. See `record` for errors."""
        self._add(Event(event, None, facts))

    def _add(self, event: Event) -> None:
        line = json.dumps({"time": round(time.time(), 3), **event.to_json()}, ensure_ascii=False)
        try:
            with self.log_file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(line + "\n")
        except OSError as error:
            self._unwritten = error

    def write_plan(self, plan: Any) -> None:
        """Write the plan as plain JSON values."""
        atomic.write(self.plan_file, json.dumps(json_value(plan), indent=1, ensure_ascii=False))

    def write_report(self, findings: Iterable[dict[str, Any]], lessons: Iterable[str] = ()) -> None:
        """Write the findings of the self-check, each a dict with name, passed and detail, and the lessons of a run."""
        rows = [json_value(finding | key_of(finding["detail"])) for finding in findings]
        verdict = {"passed": all(finding["passed"] for finding in rows), "findings": rows}
        verdict["lessons"] = [{"message": line, **key_of(line)} for line in lessons]
        atomic.write(self.report_file, json.dumps(verdict, indent=1, ensure_ascii=False))

    def save_samples(self, step: int, images: Sequence[Image.Image], prompts: Sequence[str]) -> Path:
        """Write each picture with its recipe, then the grid of all pictures. Return the path of the grid."""
        folder = self.samples / step_name(step)
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images, 1):
            image_grid.save(image, folder / f"{number:02d}.png")
        path = folder.with_suffix(".png")
        image_grid.save(image_grid.grid(images, [f"step {step}"], prompts), path)
        return path

    # -- for whoever watches --------------------------------------------------------------------------------------

    @property
    def adapter_name(self) -> str:
        """Stem of the exported file. Of an embedding that is its word."""
        config = load(self.config_file)
        return config.data.trigger if config.adapter.words_only else name_of(config)

    @property
    def stop_requested(self) -> bool:
        """Whether a stop of the run was requested."""
        return self.stop_file.exists()

    def request_stop(self) -> None:
        """Ask the run to save, export and end, after its step or immediately while it samples or encodes."""
        self.stop_file.touch()

    def request(self, what: str) -> None:
        """Ask the run for a checkpoint ("save") or pictures ("sample"), within some steps."""
        (self.path / f"{what}-now").touch()

    def take_requests(self) -> list[str]:
        """The requests since the last call, in a fixed order. They are removed."""
        files = [(name, self.path / f"{name}-now") for name in ("save", "sample")]
        names = [name for name, file in files if file.exists()]
        for _, file in files:
            file.unlink(missing_ok=True)
        return names

    def events(self, *kinds: str) -> Iterator[LogLine]:
        """The log's events of the given kinds (default: all), in order. Incomplete lines are skipped."""
        if not self.log_file.is_file():
            return
        with self.log_file.open(encoding="utf-8", errors="replace") as file:
            yield from _of_kinds(file, kinds)

    def sample_grids(self) -> dict[int, Path]:
        """Step -> grid picture, in order of steps."""
        return {_step_of(path): path for path in sorted(self.samples.glob("step-*.png"))}

    def sample_pictures(self, step: int) -> list[Path]:
        """The single pictures of a step, in order of prompts."""
        return sorted((self.samples / step_name(step)).glob("*.png"))

    # -- inside ---------------------------------------------------------------------------------------------------

    def _claim(self, state: State) -> None:
        pid, started = _this_process()
        self._state = replace(state, state="preparing", pid=pid, pid_start=started, host=platform.node())
        self._write_state()

    def _write_state(self) -> None:
        self._state = replace(self._state, updated=time.time())
        table = asdict(self._state) | key_of(self._state.message)
        atomic.write(self.state_file, json.dumps(json_value(table), indent=1, ensure_ascii=False))


class LogReader:
    """Events of a growing log: each call reads on from the end of the last one. Safe to use from several threads.

    Args:
        kinds: kinds of events to return; default: all.
    """

    def __init__(self, file: Path, *kinds: str):
        self.file, self.kinds, self.position = file, kinds, 0
        self._events: list[LogLine] = []
        self._lock = threading.Lock()

    def events(self) -> list[LogLine]:
        """All events so far, in order. An unfinished last line is read in the next call.

        Raises:
            OSError: the log cannot be read.
        """
        with self._lock, self.file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self.position:  # another log of that name
                self.position, self._events = 0, []
            file.seek(self.position)
            text = file.read()
            end = text.rfind(b"\n") + 1
            self.position += end
            lines = text[:end].decode("utf-8", "replace").splitlines()
            self._events = [*self._events, *_of_kinds(lines, self.kinds)]
            return self._events


def _of_kinds(lines: Iterable[str], kinds: Sequence[str]) -> Iterator[LogLine]:
    """The events of the given kinds (default: all) in the log's lines. Lines that are not events are skipped."""
    for line in lines:
        try:
            event = foreign_json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and (not kinds or event.get("event") in kinds):
            yield event


def read(path: str | Path) -> State:
    """The state in state.json, changed to "interrupted" if the process that wrote it no longer exists.

    Raises:
        LorakitError: there is no readable state.json.
    """
    file = Path(path) / "state.json"
    try:
        status = file.stat()
        state = _parsed(file, status.st_mtime_ns, status.st_ino, status.st_size)
    except OSError:
        raise LorakitError("{path} is not a run folder: it has no state.json", path) from None
    except (ValueError, AttributeError):
        raise LorakitError("{path} is damaged; the checkpoints beside it are not touched by that", file) from None
    if state.state in LIVE and not _is_alive(state):
        return replace(state, state="interrupted")
    return state


@functools.lru_cache(maxsize=4096)
def _parsed(file: Path, changed: int, inode: int, size: int) -> State:
    """The parsed state.json, cached until the file changes."""
    names, table = {field.name for field in fields(State)}, foreign_json.loads(file.read_text(encoding="utf-8"))
    table["message"] = from_json(table.get("message", ""), table)
    return State(**{name: value for name, value in table.items() if name in names})


def _is_alive(state: State) -> bool:
    """Whether the training process exists. For another machine: whether it has written recently."""
    if state.host in ("", platform.node()):
        return alive(state.pid, state.pid_start)
    return time.time() - state.updated < SILENCE


def _read_or_guess(path: Path) -> State:
    """As `read`, but an interrupted state if state.json is damaged or missing; the checkpoints have the rest."""
    try:
        return read(path)
    except LorakitError:
        return State(state="interrupted")


def status(path: str | Path) -> States:
    """The state of a run in one word: preparing, running, done, failed, stopped or interrupted."""
    return read(path).state


def list_runs(root: str | Path) -> list[tuple[Path, State]]:
    """The runs directly in `root`, last changed first. Other folders are ignored."""
    runs = []
    for file in Path(root).glob("*/state.json"):
        try:
            runs.append((file.parent, read(file.parent)))
        except LorakitError:
            continue
    return sorted(runs, key=lambda run: (run[1].updated, run[0].name), reverse=True)


def place(config: Config) -> Path:
    """The folder of a new run: `output.folder`, or runs/<time>-<name>."""
    new = Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{name_of(config)}"
    return Path(config.output.folder or unique_path(new))


def output_problem(path: Path, data_folder: str = "") -> str | None:
    """The reason why a new run cannot be written to `path`, or None. Nothing is created.

    Args:
        data_folder: the folder of photos, which must not be written to; "" if there is none.
    """
    try:
        if path.is_dir() and not _is_unused(path):
            hint = Message(", or go on with: lorakit resume {path}", quote(path))
            return Message(NOT_EMPTY, path, hint if (path / "config.toml").exists() else "")
        if path.exists() and not path.is_dir():
            return Message("{path} is a file; give --output a folder", path)
        if data_folder and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(expand(data_folder))):
            return Message(AMONG_PHOTOS, path)
        reason = atomic.refusal(path)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
    return Message(NO_WRITING, path, reason) if reason else None


def _is_unused(path: Path) -> bool:
    """Whether a folder is empty, or contains only files of a run that was killed at its start."""
    folders = [path / "checkpoints", path / "samples"]
    leftovers = {*folders, path / ".lock"}
    return all(file in leftovers or atomic.TEMPORARY.fullmatch(file.name) for file in path.iterdir()) and not any(
        folder.is_file() or (folder.is_dir() and any(folder.iterdir())) for folder in folders
    )


def name_of(config: Config) -> str:
    """The name of a run and its adapter."""
    return slug(config.data.name) or slug(Path(config.data.folder).name) or "adapter"


def _this_process() -> tuple[int, float]:
    process = psutil.Process()
    return process.pid, process.create_time()


def alive(pid: int, started: float) -> bool:
    """Whether the process `pid` that started at `started` (seconds since the epoch) still exists."""
    try:
        process = psutil.Process(pid)
        # A zombie has ended and only waits to be noticed. The clock may have been set by a second or two meanwhile.
        return bool(process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 2)
    except psutil.Error:
        return False


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
