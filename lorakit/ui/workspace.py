"""State shared by all pages of the front end: the allowed folders, the runs, the queue and cached reports on photos."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lorakit import families
from lorakit.config import Config, DataConfig
from lorakit.core import atomic, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import from_lines, join
from lorakit.data import checks, photo_folder
from lorakit.data.photo_folder import Photo
from lorakit.formats import identify
from lorakit.runs import nvidia, results, run_folder
from lorakit.runs.preflight import Preflight, preflight
from lorakit.runs.queue import Job, Queue
from lorakit.ui import uploads
from lorakit.ui.access import Roots
from lorakit.ui.tasks import Progress, Tasks
from lorakit.ui.thumbnails import Thumbnails
from lorakit.ui.uploads import Upload

# Folder of the runs that the user has put aside.
TRASH = ".trash"
# Number of cached reports. Each is small.
MAX_REPORTS = 20
# Seconds that `staged_soon` waits. A hard link takes less; a copy of a large file takes more.
LINK_SECONDS = 0.3
# Seconds after which a copy that failed is tried again.
RETRY_SECONDS = 20
NO_COPY = "{file}: no copy for the download could be made ({reason}); make room in {folder}, or take it from {place}"
# Largest number of suggested base models.
MAX_BASES = 500


@dataclass(frozen=True)
class _Copy:
    """A file that the browser may download, or why there is none, and when the attempt ended."""

    target: Path | None = None
    problem: LorakitError | None = None
    end: float = 0.0

    def is_outdated(self, path: Path) -> bool:
        """Whether to stage the file again: it has changed, its copy is missing, or an attempt has failed long ago."""
        if self.target is None:
            return time.monotonic() - self.end > RETRY_SECONDS
        try:
            return self.target.parent.name != _version(path) or not self.target.exists()
        except OSError:
            return True


class Workspace:
    """The workspace of a front end. Thread-safe.

    Args:
        runs: parent folder of the run folders. It is created if missing, and the front end may always read it.
        roots: other folders that the front end may read.
        base_folders: folders of base models. The front end may read them too.
        notify: `output.notify` of the runs that the front end starts.

    Raises:
        LorakitError: `notify` is invalid.
    """

    def __init__(self, runs: Path, roots: Sequence[Path], base_folders: Sequence[Path] = (), notify: str = ""):
        if problem := results.notify_problem(notify):
            raise LorakitError(problem)
        self.notify = notify
        self.runs = runs.expanduser().resolve()
        self.runs.mkdir(parents=True, exist_ok=True)
        self.base_folders = [folder.expanduser().resolve() for folder in base_folders]
        self.roots = Roots([*roots, *self.base_folders, self.runs])
        self.queue = Queue(self.runs)
        self.thumbnails = Thumbnails()
        self.cards = nvidia.Monitor()
        # Cached measurements of each photo, so that a changed option does not decode all photos again.
        self._measurements: checks.MeasurementCache = {}
        self._reports: OrderedDict[Any, tuple[Future[checks.Report], list[Progress]]] = OrderedDict()
        self.tasks = Tasks()
        self._lock, self._staging_lock = threading.Lock(), threading.Lock()
        self._copies: dict[Path, Future[_Copy]] = {}
        self._copy_pool = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._staging = Path(tempfile.mkdtemp(prefix="lorakit-"))
        weakref.finalize(self, shutil.rmtree, self._staging, ignore_errors=True)
        # One worker, because a check uses all cores.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="check")

    def bases(self) -> list[Path]:
        """Possible base models in `base_folders`: single files, and folders in diffusers layout."""
        files = [path for folder in self.base_folders for path in folder.glob("**/*.safetensors")]
        folders = {path.parent for folder in self.base_folders for path in folder.glob("**/model_index.json")}
        single = [path for path in files if folders.isdisjoint(path.parents) and ".vae" not in path.name]
        return sorted([*single, *folders])[:MAX_BASES]

    def adapters(self) -> list[Path]:
        """The adapter files of all runs, newest first. Whole models are left out."""
        files = [path for path in self.runs.glob("*/*.safetensors") if is_adapter(path)]
        return sorted(files, key=lambda path: -path.stat().st_mtime)

    def photos(self, folder: str, data: DataConfig | None = None) -> list[Photo]:
        """All photos of a folder and of `data.more_folders`, with the edits of `data`. Excluded photos are included.

        Raises:
            LorakitError: a folder is outside of the roots, or `photo_folder.scan` raises it.
        """
        place, data = self.roots.resolve(folder), data or DataConfig()
        more = {name: str(self.roots.resolve(path)) for name, path in data.more_folders.items()}
        return photo_folder.scan(place, more_folders=more, edits=data.edits).photos

    def report(self, config: Config, progress: Progress | None = None) -> Future[checks.Report]:
        """The report of `lorakit check` on the config's photos, from a thread.

        The report is cached until a file or an option changes. A call during a running check shares this check and its
        progress.
        """
        info = families.describe(config.model)
        folders = [Path(folder) for folder in (config.data.folder, *config.data.more_folders.values())]
        key = (config.data, config.model, info.path, info.downscale, *map(_fingerprint, folders))
        with self._lock:
            if key not in self._reports:
                self._reports[key] = self._check(config, info)
                while len(self._reports) > MAX_REPORTS:
                    self._reports.popitem(last=False)
            future, watchers = self._reports[key]
        if progress is not None and not future.done():
            watchers.append(progress)
        return future

    def _check(self, config: Config, info: families.BaseInfo) -> tuple[Future[checks.Report], list[Progress]]:
        watchers: list[Progress] = []

        def progress(count: int, total: int) -> None:
            for watcher in watchers:
                watcher(count, total)

        return self._pool.submit(checks.check, config.data, info, cache=self._measurements, progress=progress), watchers

    def train(self, config: Config) -> Job:
        """Add a run to the queue, and start the process of the queue if necessary."""
        job = self.queue.train(replace(config, output=replace(config.output, notify=self.notify)))
        self.queue.start()
        return job

    def preflight(self, config: Config, progress: Progress | None = None) -> Preflight:
        """The preflight of a run that the queue would start. Waits until the photos are checked."""
        folder = str(self.queue.new_folder(config))
        result = preflight(
            replace(config, output=replace(config.output, folder=folder)),
            check=lambda *_: self.report(config, progress).result(),
        )
        return replace(result, config=replace(result.config, output=config.output))

    def take_in(
        self, files: Sequence[Path], folder: str = "", progress: Progress = lambda count, total: None
    ) -> tuple[Path | None, Upload]:
        """Move the usable uploaded files into a folder, see `uploads.take_in`.

        Args:
            folder: the folder on the page. If it is an earlier upload, the files are added to it. Otherwise they get a
                new folder.

        Returns:
            The folder, or None if no file is usable, and the result of the upload.
        """
        is_upload = bool(folder) and Path(folder).resolve().parent == self.runs / "uploads" and Path(folder).is_dir()
        place = Path(folder).resolve() if is_upload else self.unused("uploads")
        upload = uploads.take_in(files, place, progress)
        return place if place.is_dir() else None, upload

    def caption_of(self, photo: Path) -> str:
        """The text in the file `name.txt` beside a photo, or "" if there is none.

        Raises:
            LorakitError: the file is outside of the roots.
        """
        try:
            file = self.roots.resolve(photo.parent / f"{photo.stem}.txt")
            return " ".join(file.read_text(encoding="utf-8", errors="replace").split())
        except OSError:
            return ""

    def save_caption(self, photo: Path, text: str) -> Path:
        """Write a photo's caption into the file `name.txt` beside it, and return the file's path.

        `name.txt` has priority over all other sources of captions. For a photo that is a link, the file is beside the
        link. An older text is copied to `name.txt.bak`, `name.txt.2.bak` and so on.

        Raises:
            LorakitError: there is no such photo below the roots, or the file cannot be written.
        """
        place = self.roots.resolve(photo.parent)
        if not self.roots.resolve(photo).is_file() or not photo.name.lower().endswith(photo_folder.FORMATS):
            raise LorakitError("{photo}: no such photo", photo.name)
        target = place / photo.with_suffix(".txt").name
        self.roots.resolve(target)
        content, number = (" ".join(text.split()) + "\n").encode(), 1
        try:
            former = target.read_bytes() if target.exists() else content
            if former != content:
                backup = target.with_name(f"{target.name}.bak")
                while backup.exists():
                    number += 1
                    backup = target.with_name(f"{target.name}.{number}.bak")
                atomic.write(backup, former)
            atomic.write(target, content)
        except OSError as error:
            raise LorakitError("{file}: cannot be written ({reason})", target, error.strerror or error) from None
        return target

    def run(self, name: str) -> Path:
        """The path of a run folder by its name. The folder need not exist.

        Raises:
            LorakitError: the name is empty, hidden or a path.
        """
        name = str(name)  # a program may send a number or a table
        path = self.runs / name
        if not name or Path(name).name != name or name.startswith("."):
            raise LorakitError("{name!r} is no run", name)
        return path

    def staged(self, path: Path) -> Path:
        """Link or copy a file into the folder from which the browser may download it. Return the new path.

        It is Gradio's own folder, so that Gradio neither reads nor copies the file again within a request.

        Raises:
            LorakitError: the file can neither be linked nor copied.
        """
        place = self.private("gradio")
        try:
            target = place / _version(path) / path.name
            with self._staging_lock:
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _link_or_copy(path, target)
        except OSError as error:
            raise LorakitError(NO_COPY, path.name, error.strerror or error, place, path) from None
        return target

    def offered(self, files: Sequence[Path]) -> list[str]:
        """Stage files, and the files of folders one by one. Return the new paths.

        Raises:
            LorakitError: as `staged`.
        """
        single = [one for path in files for one in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        return [str(self.staged(path)) for path in single if path.is_file()]

    def staged_soon(self, path: Path) -> Path | None:
        """As `staged`, but returns None after `LINK_SECONDS` while the file is being copied.

        A copy that failed is tried again after `RETRY_SECONDS`.

        Raises:
            LorakitError: as `staged`.
        """
        with self._lock:
            future = self._copies.get(path)
            if future is None or (future.done() and future.result().is_outdated(path)):
                future = self._copies[path] = self._copy_pool.submit(self._copy, path)
        wait([future], LINK_SECONDS)
        if not future.done():
            return None
        copy = future.result()
        if copy.problem:
            raise copy.problem.with_traceback(None)
        return copy.target

    def _copy(self, path: Path) -> _Copy:
        try:
            return _Copy(self.staged(path))
        except LorakitError as problem:
            return _Copy(problem=problem, end=time.monotonic())

    def private(self, name: str) -> Path:
        """Create a folder that no other user can read. It is deleted when this process ends."""
        path = self._staging / name
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def unused(self, name: str) -> Path:
        """The path of a new folder below the runs, for files that belong to no run."""
        return self.runs / name / f"{datetime.now():%Y-%m-%d-%H%M%S-%f}"

    def runs_and_jobs(self) -> list[tuple[str, run_folder.State]]:
        """The names and states of all runs. Waiting and starting runs come first, then the newest."""
        states = {path.name: state for path, state in run_folder.list_runs(self.runs)}
        waiting: list[tuple[str, run_folder.State]] = []
        for job in sorted(self.queue.jobs(), key=lambda job: (job.rank, job.number)):
            name = Path(job.folder).name
            if job.verb not in ("train", "resume") or Path(job.folder).parent != self.runs:
                continue
            if job.state == "waiting":
                states.pop(name, None)
                waiting.append((name, _as_state(job.state, job.added)))
            elif name not in states and not (self.runs / TRASH / name).is_dir():
                # The run has no folder yet, or ended before it created one. The job's log has the reason.
                state = "preparing" if job.state == "running" else job.state
                waiting.append((name, _as_state(state, job.ended or job.added, self.why(job.number))))
        order = {"waiting": 0, "preparing": 1}
        waiting.sort(key=lambda run: order.get(run[1].state, 2))  # stable: waiting runs stay in the queue's order
        begun = [run for run in waiting if run[1].state in order]
        ended = [run for run in waiting if run[1].state not in order]
        others = sorted([*states.items(), *ended], key=lambda run: -run[1].updated)
        return begun + others

    def why(self, number: int) -> str:
        """The last error messages in a job's log."""
        return join("\n", from_lines(self.queue.log(number))[-3:])


def _as_state(state: str, updated: float, message: str = "") -> run_folder.State:
    return run_folder.State(state=state, updated=updated, message=message)  # type: ignore[arg-type]


def _version(path: Path) -> str:
    status = path.stat()
    return f"{status.st_mtime_ns}-{status.st_size}"


def _link_or_copy(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another disk, or a system without links
        part = target.with_name(f"{target.name}.part")
        try:
            shutil.copyfile(path, part)
            part.rename(target)
        finally:
            part.unlink(missing_ok=True)


def is_adapter(path: Path) -> bool:
    """Whether a run's file is an adapter and not a whole model.

    The file's header is read only if the file's name ends like that of a whole model.
    """
    if not path.stem.endswith("-model"):
        return True
    try:
        return identify.kind(safetensors_header.read(path).shapes()) == "adapter"
    except LorakitError:
        return False


def _fingerprint(path: Path) -> tuple[Any, ...]:
    """Names, sizes and times of the files in a folder and its subfolders. It changes with each photo or caption."""
    try:
        files = [file for level in (path, *(p for p in path.iterdir() if p.is_dir())) for file in level.iterdir()]
        return tuple(sorted((str(f), s.st_size, s.st_mtime_ns) for f in files if (s := f.stat())))
    except OSError:
        return ()
