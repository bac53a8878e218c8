"""Access control of the front end: the address it listens on, and the folders it may read."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorakit.core.errors import LorakitError
from lorakit.data import photo_folder

# Largest number of folders that the search for photo folders reads, because a root may be an entire disk.
MAX_FOLDERS = 2000
LEVELS = 3


class Roots:
    """The folders that the front end may read and write, with everything below them.

    Hidden files and folders (`.ssh`, `.env`) below a root are not allowed.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = tuple(dict.fromkeys(Path(path).expanduser().resolve() for path in paths))

    def resolve(self, text: str | Path) -> Path:
        """Convert a typed text into an absolute path. `~`, `..` and links are resolved before the check.

        Raises:
            LorakitError: the text is empty, or the path is outside of all roots, hidden or cannot be read.
        """
        typed = str(text).strip().strip("\"'")
        if not typed or "\0" in typed:
            raise LorakitError("enter the path of a folder or a file")
        try:
            path = Path(typed).expanduser()
            path = (path if path.is_absolute() else self._relative(path)).resolve()
        except (OSError, RuntimeError):  # e.g. a loop of links, or an unknown home folder
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
        """Join a relative path to the first root in which it exists, or else to the first root."""
        for root in self.paths:
            if (root / path).exists():
                return root / path
        return self.paths[0] / path

    def photo_folders(self) -> list[Path]:
        """Folders with pictures to suggest: the roots and folders up to `LEVELS` below, the highest level first."""
        folders = []
        for number, path in enumerate(self._folders()):
            if number >= MAX_FOLDERS:
                break
            with os.scandir(path) as entries:
                if any(entry.name.lower().endswith(photo_folder.FORMATS) and entry.is_file() for entry in entries):
                    folders.append(path)
        return folders

    def _folders(self) -> Iterator[Path]:
        """The readable folders, each once, level by level, without hidden folders and links."""
        level, visited = list(self.paths), set[Path]()
        for _ in range(LEVELS + 1):
            below: list[Path] = []
            for path in level:
                if path in visited:  # a root inside another one
                    continue
                visited.add(path)
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
    """Require a password if other machines can reach the front end.

    Raises:
        LorakitError: the password is missing or has fewer than 8 characters, or `public` is not a URL.
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
    """Require that the value of `--embed` is empty or exactly one origin, because it goes into the content policy.

    Raises:
        LorakitError: it has a path, a wildcard, or no scheme.
    """
    if embed and not re.fullmatch(r"https?://(\[[0-9a-f:]+\]|[a-z0-9.-]+)(:\d{1,5})?", embed, re.IGNORECASE):
        raise LorakitError("--embed {embed}: give the origin of one program, as http://127.0.0.1:7860", embed)
