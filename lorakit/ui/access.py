"""Access control of the front end: the address it listens on, and the folders it may read."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorakit.core.errors import LorakitError
from lorakit.data import photo_folder

# The search for folders of photos ends after this many folders, so that a suggestion never reads an entire disk.
MAX_FOLDERS = 2000
LEVELS = 3


class Roots:
    """The folders below which the front end may read and write. It treats all other paths as missing.

    Hidden files and folders (`.ssh`, `.env`) are outside wherever they lie.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = tuple(dict.fromkeys(Path(path).expanduser().resolve() for path in paths))

    def resolve(self, text: str | Path) -> Path:
        """The real path of a typed text. `~`, `..` and links are resolved before the check.

        Raises:
            LorakitError: it is outside of every root, or hidden.
        """
        typed = str(text).strip().strip("\"'")
        if not typed or "\0" in typed:
            raise LorakitError("type the path of a folder or a file")
        try:
            path = Path(typed).expanduser()
            path = (path if path.is_absolute() else self._relative(path)).resolve()
        except (OSError, RuntimeError):  # a loop of links; a home folder that cannot be found
            raise LorakitError("{path}: this path cannot be read; give another one", typed) from None
        for root in self.paths:
            if path.is_relative_to(root):
                if any(part.startswith(".") for part in path.relative_to(root).parts):
                    raise LorakitError("{path}: hidden files and folders are not opened", typed)
                return path
        allowed = ", ".join(str(root) for root in self.paths)
        raise LorakitError(
            "{path} is outside of {roots}; start the front end with --root FOLDER to allow it", typed, allowed
        )

    def _relative(self, path: Path) -> Path:
        """A relative path starts at the first root where it exists, else at the first."""
        for root in self.paths:
            if (root / path).exists():
                return root / path
        return self.paths[0] / path

    def photo_folders(self) -> list[Path]:
        """Folders below the roots that hold pictures, to suggest; nearest first."""
        folders = []
        for number, path in enumerate(self._folders()):
            if number >= MAX_FOLDERS:
                break
            with os.scandir(path) as entries:
                if any(entry.name.lower().endswith(photo_folder.FORMATS) and entry.is_file() for entry in entries):
                    folders.append(path)
        return folders

    def _folders(self) -> Iterator[Path]:
        """Readable folders, level by level."""
        level = list(self.paths)
        for _ in range(LEVELS + 1):
            below: list[Path] = []
            for path in level:
                try:
                    entries = sorted(entry for entry in path.iterdir() if entry.is_dir())
                except OSError:
                    continue
                yield path
                below += [entry for entry in entries if not entry.name.startswith(".") and not entry.is_symlink()]
            level = below


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_password(host: str, share: bool, password: str, public: str = "") -> None:
    """Refuse an address that others can reach without a password.

    Raises:
        LorakitError: others could reach it, and there is no password or a short one.
    """
    if public and not re.fullmatch(r"https?://[^/]+(/.*)?", public):
        raise LorakitError("--public {public}: give the whole address, as https://box.example/lorakit", public)
    if is_loopback(host) and not share and not public:
        return
    what = "--share" if share else f"--public {public}" if public else f"--host {host}"
    if not password:
        raise LorakitError("{what} lets others in: set a password in LORAKIT_PASSWORD (or --password) first", what)
    if len(password) < 8:
        raise LorakitError("{what} lets others in: the password needs 8 characters or more", what)


def require_origin(embed: str) -> None:
    """Refuse a value of `--embed` that is not one origin: more than that would let other pages in, or be no policy.

    Raises:
        LorakitError: it has a path, a wildcard, or no scheme.
    """
    if embed and not re.fullmatch(r"https?://(\[[0-9a-f:]+\]|[a-z0-9.-]+)(:\d{1,5})?", embed, re.IGNORECASE):
        raise LorakitError("--embed {embed}: give the origin of one program, as http://127.0.0.1:7860", embed)
