"""Commands of lorakit that a page waits for. Each runs in its own process: torch never runs in the front end."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.core.errors import LorakitError
from lorakit.core.messages import KEYS, STEP_LINE, Message, from_lines, join, to_lines
from lorakit.runs import quickstart

if TYPE_CHECKING:
    from lorakit.ui.tasks import Steps

# Timeout of a conversion in seconds. The largest adapters need a fraction of it.
PATIENCE = 600
# Seconds that a process waits for its conversion, and its exit code if none came.
WAIT, UNUSED = 300, 75
# Keys of the names of a conversion's steps. The process starts with the first one and reports each later one.
CONVERSION = ("convert.starting", "convert.reading", "convert.writing")
# app.py sets HF_HUB_OFFLINE to OFFLINE for the front end. `fetch` and `caption` use the user's own value, which is read
# before that.
OFFLINE, USERS = "1", os.environ.get("HF_HUB_OFFLINE", "0")


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """Remove the proxy variables from the environment while Gradio is imported, and restore them afterwards.

    At import, Gradio opens an HTTP client that fails with a SOCKS proxy.
    """
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(proxies)


@contextlib.contextmanager
def without_stubs() -> Iterator[None]:
    """Import Gradio without its stubs: at each import, it parses its components' sources to renew their .pyi files.

    This takes a third of the import. Gradio itself leaves it out for a component without a source file.
    """
    find: Callable[..., str] = inspect.getfile

    def getfile(object: object) -> str:
        if isinstance(object, type) and object.__module__.startswith("gradio."):
            raise OSError("the stubs of Gradio stay as they are")
        return find(object)

    inspect.getfile = getfile
    try:
        yield
    finally:
        inspect.getfile = find


class Exporter:
    """Starts the processes that convert adapters, one ahead of time where a page expects a conversion. Thread-safe.

    There is one process at a time, because each takes about 230 MiB: it waits or converts.
    """

    def __init__(self) -> None:
        self.ready: subprocess.Popen[str] | None = None
        self._lock, self._conversion = threading.Lock(), threading.Lock()

    def prepare(self) -> None:
        """Start a process that imports its libraries and waits, unless there is a process already."""
        with self._lock:
            if not self._conversion.locked():
                self.ready = self._alive() or _exporting()

    def run(self, arguments: Sequence[str], step: Callable[[int], object]) -> tuple[int, str, str]:
        """Run a command of lorakit after those that came before. Return the exit code, stdout and stderr.

        Args:
            step: called with the index of each step in `CONVERSION` that begins.

        Raises:
            TimeoutExpired: it took longer than `PATIENCE`.
        """
        with self._conversion:
            while True:
                with self._lock:
                    process, self.ready = self._alive() or _exporting(), None
                step(0)
                code, out, errors = _converse(process, json.dumps(arguments) + "\n", step)
                if code != UNUSED:  # else it ended before it got the arguments
                    return code, out, errors

    def close(self) -> None:
        """End the process that waits."""
        with self._lock:
            process, self.ready = self._alive(), None
        if process is not None:
            process.kill()
            process.communicate()

    def _alive(self) -> subprocess.Popen[str] | None:
        if self.ready is not None and self.ready.poll() is not None:
            self.ready.communicate()  # closes its pipes
            return None
        return self.ready


EXPORTER = Exporter()
atexit.register(EXPORTER.close)


def _converse(process: subprocess.Popen[str], text: str, step: Callable[[int], object]) -> tuple[int, str, str]:
    """Write `text` to a process and wait for its end. Return the exit code, stdout and stderr without the steps."""
    assert process.stdin and process.stdout and process.stderr
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(PATIENCE, end)
    timer.start()
    try:
        with contextlib.suppress(OSError):  # it has ended
            process.stdin.write(text)
            process.stdin.flush()
        errors = ""
        for line in process.stderr:
            if line.startswith(STEP_LINE):
                step(int(line.removeprefix(STEP_LINE)))
            else:
                errors += line
        out, _ = process.communicate()  # a few paths, which fit into the pipe until now
    finally:
        timer.cancel()
    if late.is_set():
        raise subprocess.TimeoutExpired(process.args, PATIENCE)
    return process.returncode, out, errors


def _exporting() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lorakit.cli.imports", str(WAIT), str(UNUSED)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | {KEYS: "1"},
    )


def export(
    source: Path,
    kind: str,
    folder: Path,
    dtype: str | None = None,
    rank: int = 0,
    progress: Steps = lambda count, total, doing="": None,
    others: Sequence[str] = (),
) -> list[Path]:
    """Write an adapter in another format. Return the written files and folders.

    Args:
        rank: largest rank of a layer in the new file; 0 keeps the ranks.
        others: adapters to combine it with, as `lorakit combine` takes them. The ranks add up, so `rank` must be 0.
        progress: called when a step of `CONVERSION` begins.

    Raises:
        LorakitError: the error of the command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["resize", str(source), "--rank", str(rank)] if rank else ["export", str(source)]
    arguments = ["combine", str(source), *others] if others else arguments
    arguments += ["--to", kind, "--output", str(folder), "--json"]
    arguments += ["--dtype", dtype] if dtype else []
    try:
        code, out, errors = EXPORTER.run(
            arguments, lambda number: progress(number + 1, len(CONVERSION), CONVERSION[number])
        )
    except subprocess.TimeoutExpired:
        raise LorakitError("{file}: not converted after {seconds} s", source.name, PATIENCE) from None
    if code:
        raise LorakitError(
            _complaint(errors) or Message("{file}: the conversion ended with code {code}", source.name, code)
        )
    return [Path(path) for path in json.loads(out).values()]


def fetch(base: str, progress: Callable[[int, int], object] = lambda count, total: None, *, vae: bool = False) -> None:
    """Download a base from the hub into the cache, without a timeout.

    Args:
        base: hub id.
        progress: called each second with the downloaded MiB, and 0 because the total is unknown.
        vae: whether the base is a VAE.

    Raises:
        LorakitError: the download failed, with its message.
    """
    before = _cache_size()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorakit.ui.commands", base, *(["vae"] if vae else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"HF_HUB_OFFLINE": USERS, KEYS: "1"},
        )
        while True:
            try:
                code = process.wait(1)
                break
            except subprocess.TimeoutExpired:
                progress(max(0, _cache_size() - before) >> 20, 0)
        errors.seek(0)
        if code:
            raise LorakitError(
                _complaint(errors.read()) or Message("{name}: the download ended with code {code}", base, code)
            )


def caption(
    arguments: Sequence[str],
    progress: Callable[[int, int], object],
    begin: Callable[[subprocess.Popen[str]], object] = lambda process: None,
) -> dict[str, Any]:
    """Run `lorakit caption --json` and return its last event.

    Args:
        progress: called with the number of captioned photos and the number of all.
        begin: called with the process. If the process is terminated, it ends after the current photo.

    Raises:
        LorakitError: the command failed without a result, with its message.
    """
    result: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(
            [sys.executable, "-m", "lorakit", "caption", *arguments, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=os.environ | {"HF_HUB_OFFLINE": USERS, KEYS: "1"},
        ) as process:
            begin(process)
            for line in process.stdout or ():
                event = json.loads(line)
                if event["event"] == "work":
                    progress(event["position"], event["total"])
                elif event["event"] == "result":
                    result = event
        code = process.returncode
        errors.seek(0)
        if not result:
            raise LorakitError(
                _complaint(errors.read()) or Message("captions: the command ended with code {code}", code)
            )
    return result


def _cache_size() -> int:
    """Bytes in the hub's cache, with unfinished downloads."""
    from huggingface_hub import constants

    total = 0
    for blob in Path(constants.HF_HUB_CACHE).glob("*/blobs/*"):
        with contextlib.suppress(OSError):  # a finished download is renamed
            total += blob.stat().st_size
    return total


def _complaint(errors: str) -> str:
    """The error message of a failed command."""
    return join("\n", from_lines(errors))


if __name__ == "__main__":
    try:
        quickstart.fetch(sys.argv[1], vae=len(sys.argv) > 2)
    except LorakitError as problem:
        sys.stderr.write(to_lines(str(problem)))
        sys.exit(1)
