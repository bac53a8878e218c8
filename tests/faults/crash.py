"""Crash points: each file operation is a point at which a process may be killed or the disk may be full.

Python reports these operations to audit hooks before it does them, also in libraries. A hook that raises simulates a
kill. From then on every operation fails, because a killed process cannot clean up.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["kill", "torn", "full", "sigkill"]
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class Killed(BaseException):
    """Simulates SIGKILL: no `except Exception` catches it."""


class Hook:
    """Counts the file operations below a folder while it is on, and ends one of them.

    Kinds: "kill" raises before the operation. "torn" does the same, and half of the file to rename remains. "full"
    lets every write fail but allows deletion. "sigkill" kills this process.
    """

    def __init__(self) -> None:
        self.folder, self.at, self.kind, self.count, self.operation = "", -1, "kill", 0, ""
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.folder or not (event in _CHANGES or (event == "open" and _writes(arguments))):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
        inside = path.startswith(self.folder) or event in ("os.remove", "os.rmdir")  # rmtree passes no full path
        is_end = event in ("os.remove", "os.rmdir")
        if not inside or (self.kind == "full" and is_end):
            return
        self.count += 1
        if self.count > self.at >= 0:
            self.operation = self.operation or f"{event} {Path(path).name}"
            if self.kind == "sigkill":
                os.kill(os.getpid(), 9)
            if self.kind == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.kind == "torn" and event == "os.rename" and self.count == self.at + 1 and Path(path).is_file():
                folder, self.folder = self.folder, ""
                os.truncate(path, Path(path).stat().st_size // 2)
                self.folder = folder
            raise Killed

    def on(self, folder: Path, at: int, kind: Kind) -> None:
        self.folder, self.at, self.kind, self.count, self.operation = str(folder), at, kind, 0, ""

    def off(self) -> None:
        self.folder = ""


def _writes(arguments: tuple[object, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


_hook: list[Hook] = []


def hook() -> Hook:
    """Return this process's only hook: Python cannot remove an audit hook."""
    if not _hook:
        _hook.append(Hook())
    return _hook[0]


def points(
    folder: Path, prepare: Callable[[Path], object], work: Callable[[Path], object], kind: Kind = "kill"
) -> Iterator[tuple[Path, str]]:
    """Run `work` in new folders that `prepare` fills, and end it at operation 1, 2, ... until it completes. Yield the
    folder and the operation of each interrupted call."""
    for at in range(1000):
        place = folder / f"{kind}-{at}"
        place.mkdir()
        prepare(place)
        ended = hook()
        ended.on(place, at, kind)
        try:
            work(place)
        except Killed:
            pass
        finally:
            ended.off()
        if not ended.operation:
            return
        yield place, f"{kind} {at}: {ended.operation}"
    raise AssertionError("no end of operations")
