"""Names of files and folders, and texts for display."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import unicodedata
from pathlib import Path

# File systems allow 255 bytes, including the suffix and the marker of a temporary file.
MAX_NAME_BYTES = 200
# Windows reserves these names for devices, also with a suffix.
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in "0123456789\u00b9\u00b2\u00b3"
}
DEVICE = "{what} = {name!r}: Windows keeps this name for a device, and has no file of it: choose another"
# Words before a noun, which occur in every text.
DETERMINERS = ("a", "an", "the", "my", "your", "his", "her", "our", "their", "this", "that", "some")


def step_name(step: int) -> str:
    """`step-000100`: the name of checkpoints and samples of a step. Names sort in the order of steps."""
    return f"step-{step:06d}"


def slug(text: str, limit: int = 40) -> str:
    """`text` as a file name for every file system: letters and digits of any script, joined by hyphens.

    Empty if the text has no letter or digit, or if the result is the name of a Windows device.
    """
    name = re.sub(r"[^\w]+|_+", "-", text.lower()).strip("-")[:limit].rstrip("-")
    return "" if is_device(name) else name


def is_device(name: str) -> bool:
    """Whether Windows reserves the name for a device, for example `con` or `NUL.safetensors`."""
    return name.partition(".")[0].strip().lower() in DEVICES


def quote(path: str | Path) -> str:
    """`path` as one word of a shell command."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def expand(path: str | Path) -> Path:
    """`path` with the home folder for `~`; unchanged if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def unique_path(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3` ... that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def is_file_name(text: str) -> bool:
    """Whether an untrusted text can name a file: it leads to no other folder, and is visible and short."""
    is_one_part = text == printable(text).strip(". ") and not re.search(r"[/\\:]", text)
    return is_one_part and 0 < len(text.encode("utf-8", "replace")) <= MAX_NAME_BYTES and not is_device(text)


def shorten(text: str, length: int) -> str:
    """`text`, or its start and an ellipsis if it is longer than `length`."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def pad(text: str, width: int) -> str:
    """`text` and the spaces that fill it up to `width` columns of a terminal."""
    return text + " " * (width - columns(text))


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: two for a Chinese or Japanese character, none for an accent."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def printable(text: str) -> str:
    """`text` on one line, safe to display: control and direction characters, and bytes that are not text, become
    escapes.

    A file name may contain any of them: a newline breaks a table, an escape code controls the terminal, and a byte that
    is not UTF-8 cannot be written to a text file.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    kind, code = unicodedata.category(character), ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, from `os.fsdecode`
        return f"\\x{code - 0xDC00:02x}"
    # The joiners (U+200C, U+200D) make emoji and words of some scripts.
    hidden = kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and character not in "\u200c\u200d")
    return character.encode("unicode_escape").decode("ascii") if hidden else character
