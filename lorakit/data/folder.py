"""Find the photos of a folder and the captions and masks that belong to them. Nothing is ever written there."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.core.errors import LorakitError

FORMATS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "avif", "mpo", "heic", "heif", "gif",
)  # fmt: skip
CAPTIONS = (".txt", ".caption")
METADATA = "metadata.jsonl"
MASK = ".mask.png"
TEXT_KEYS = ("text", "caption", "prompt")
# Folders that systems make and people do not see.
HIDDEN = ("__MACOSX", "@eaDir")
LOOKED_INTO = 1000
KOHYA = re.compile(r"\d+_.+")


@dataclass(frozen=True)
class Photo:
    """One photo and what lies beside it.

    Attributes:
        path: the file.
        relative: its name below the folder, with `/`; it names the photo in every message and seeds its variants.
        caption: text that came with it, or None.
        caption_source: name of the file that the caption is from, or None.
        mask: `name.mask.png` beside it, or None.
    """

    path: Path
    relative: str
    caption: str | None = None
    caption_source: str | None = None
    mask: Path | None = None


@dataclass
class Folder:
    """What `scan` found. `warnings` name what the user probably did not mean; `notes` say what was decided."""

    path: Path
    photos: list[Photo] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def scan(folder: str | Path) -> Folder:
    """Photos directly in `folder` and one level below it, in order of name.

    Kohya's `10_sks dog/` is such a folder too; its number of repeats is not used, and that is said.

    Raises:
        LorakitError: the folder is missing, is a file, cannot be read, or holds no picture.
    """
    path = Path(folder).expanduser()
    _require_folder(path)
    found = Folder(path)
    others: Counter[str] = Counter()
    metadata: dict[str, tuple[str, str]] = {}
    try:
        below = [entry for entry in _sorted(path.iterdir()) if entry.is_dir() and not _hidden(entry)]
        for level in (path, *below):
            _read_level(found, level, metadata, others)
        deeper = _deeper(path, below)
    except OSError as error:
        raise LorakitError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    if not found.photos:
        raise LorakitError(_nothing(path, others, deeper))
    absent = [name for name in metadata if name not in {photo.relative for photo in found.photos}]
    if absent:
        found.warnings.append(f"{METADATA} names files that are not there: {_some(absent)}")
    if deeper:
        listed = ", ".join(f"{name}/ ({count})" for name, count in deeper.items())
        found.warnings.append(f"pictures more than one folder down are not read: {listed}")
    _describe_folders(found, below)
    skipped = {kind: count for kind, count in others.items() if kind not in ("txt", "caption", "jsonl", "json")}
    if skipped:
        found.notes.append(f"not pictures, left alone: {_counted(skipped)}")
    return found


def digest(photos: Iterable[Photo]) -> str:
    """SHA-256 over names, bytes, captions and masks: two runs with the same digest saw the same photos.

    Raises:
        LorakitError: a file cannot be read any more.
    """
    total = hashlib.sha256()
    for photo in photos:
        for part in (photo.path, photo.mask):
            try:
                total.update(hashlib.sha256(part.read_bytes() if part else b"").digest())
            except OSError as error:
                raise LorakitError(f"{photo.relative}: cannot be read any more ({error.strerror or error})") from None
        total.update(f"{photo.relative}\0{photo.caption}\0".encode())
    return total.hexdigest()


def _require_folder(path: Path) -> None:
    if not path.exists():
        near: list[str] = []
        if path.parent.is_dir():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
        hint = f" (did you mean {path.parent / near[0]}?)" if near else ""
        raise LorakitError(f"folder {path} does not exist{hint}")
    if path.is_dir():
        return
    if _kind(path) in FORMATS:
        raise LorakitError(f"{path} is one picture; give the folder it is in: {path.parent}")
    raise LorakitError(f"{path} is a file; give a folder of photos")


def _sorted(entries: Iterable[Path]) -> list[Path]:
    return sorted(entries, key=lambda entry: entry.name)


def _hidden(entry: Path) -> bool:
    return entry.name.startswith(".") or entry.name in HIDDEN


def _kind(entry: Path) -> str:
    return entry.suffix[1:].lower()


def _is_photo(entry: Path) -> bool:
    return _kind(entry) in FORMATS and not entry.name.lower().endswith(MASK) and not _hidden(entry) and entry.is_file()


def _read_level(found: Folder, level: Path, metadata: dict[str, tuple[str, str]], others: Counter[str]) -> None:
    """Add the photos directly in `level`, each with its caption and mask; metadata.jsonl fills `metadata`."""
    entries = [entry for entry in _sorted(level.iterdir()) if not _hidden(entry) and entry.is_file()]
    by_name = {entry.name.lower(): entry for entry in entries}
    inside = "" if level == found.path else f"{level.name}/"
    if METADATA in by_name:
        _read_metadata(found, by_name[METADATA], inside, metadata)
    used = set()
    photos = [entry for entry in entries if _is_photo(entry)]
    for path in photos:
        relative = inside + path.name
        given: list[tuple[str, str]] = []
        for suffix in CAPTIONS:
            # `photo.jpg.txt` is what some taggers write.
            for name in (path.stem.lower() + suffix, path.name.lower() + suffix):
                if name in by_name:
                    used.add(name)
                    given.append((by_name[name].name, _read_caption(found, by_name[name])))
        if relative in metadata:
            given.append(metadata[relative])
        mask = by_name.get(path.stem.lower() + MASK)
        used.add(path.stem.lower() + MASK)
        source, caption = _choose(found, relative, given)
        found.photos.append(Photo(path, relative, caption, source, mask))
    belongings = {name for name in by_name if name.endswith((*CAPTIONS, MASK))}
    if photos and belongings - used:
        orphans = [inside + by_name[name].name for name in sorted(belongings - used)]
        found.warnings.append(f"no photo has the name of {_some(orphans)}: not used")
    others.update(
        _kind(entry) or "without an ending" for entry in entries if not _is_photo(entry) and not _is_mask(entry)
    )


def _is_mask(entry: Path) -> bool:
    return entry.name.lower().endswith(MASK)


def _choose(found: Folder, relative: str, given: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """The caption to use, the first that is not empty (.txt, .caption, metadata.jsonl), and where it is from."""
    told = [(source, caption) for source, caption in given if caption]
    if not told:
        if given:
            found.warnings.append(f"{relative}: its caption in {given[0][0]} is empty")
        return None, None
    source, caption = told[0]
    for other, text in told[1:]:
        if text != caption:
            found.warnings.append(f"{relative}: {source} and {other} say different things; {source} is used")
    return source, caption


def _read_caption(found: Folder, path: Path) -> str:
    """Text of a caption file on one line; see `_text` for its encoding."""
    return " ".join(_text(found, path).split())


def _text(found: Folder, path: Path) -> str:
    """UTF-8 with or without a byte-order mark, UTF-16 with one, else Windows-1252, which is said."""
    raw = path.read_bytes()
    try:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            return raw.decode("utf-16")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    name = path.relative_to(found.path).as_posix()
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        raise LorakitError(f"{name}: not text in UTF-8 or Windows-1252; save it as UTF-8") from None
    found.notes.append(f"{name}: not UTF-8, read as Windows-1252")
    return text


def _read_metadata(found: Folder, path: Path, inside: str, metadata: dict[str, tuple[str, str]]) -> None:
    """Add what a metadata.jsonl, as the `datasets` library reads it, says: name below the folder -> (source, text)."""
    source = inside + path.name
    for number, line in enumerate(_text(found, path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LorakitError(f"{source} line {number}: not JSON ({error.msg}); each line is one object") from None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise LorakitError(f'{source} line {number}: needs "file_name", the name of a picture beside it')
        text = next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), None)
        if text is None:
            raise LorakitError(f"{source} line {number}: needs one of {', '.join(TEXT_KEYS)}")
        name = inside + row["file_name"].removeprefix("./")
        told = (source, " ".join(text.split()))
        if metadata.setdefault(name, told)[1] != told[1]:
            found.warnings.append(f"{name}: {source} line {number} says something else than before; not used")


def _deeper(path: Path, below: list[Path]) -> dict[str, int]:
    """Folders two or more levels down that hold pictures, and how many; it stops looking after `LOOKED_INTO` folders,
    as the folder given may be a whole disk.
    """
    counts: dict[str, int] = {}
    visited = 0
    for entry in below:
        for place, folders, _ in os.walk(entry):
            folders[:] = sorted(name for name in folders if not _hidden(Path(name)))
            visited += 1
            if visited > LOOKED_INTO:
                return counts
            folder = Path(place)
            count = sum(_is_photo(p) for p in folder.iterdir()) if folder != entry else 0
            if count:
                counts[folder.relative_to(path).as_posix()] = count
    return counts


def _describe_folders(found: Folder, below: list[Path]) -> None:
    counts = Counter(photo.relative.partition("/")[0] for photo in found.photos if "/" in photo.relative)
    if not counts:
        return
    found.notes.append(f"subfolders: {', '.join(f'{name}/ ({count})' for name, count in sorted(counts.items()))}")
    kohya = [entry.name for entry in below if KOHYA.fullmatch(entry.name) and entry.name in counts]
    if kohya:
        found.notes.append(
            f"{_some(kohya)}: the number in front (repeats) is not used, every photo counts once an epoch; "
            "length is train.steps_per_image"
        )


def _nothing(path: Path, others: Counter[str], deeper: dict[str, int]) -> str:
    found = [_counted(others)] if others else []
    found += [f"{count} in {name}/ (only one level of subfolders is read)" for name, count in deeper.items()]
    return f"0 images in {path}; looked for {', '.join(FORMATS)}; found {'; '.join(found) or 'nothing'}"


def _counted(kinds: dict[str, int]) -> str:
    listed = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind if ' ' in kind else '.' + kind}" for kind, count in listed)


def _some(names: Iterable[str], most: int = 4) -> str:
    """A few of the names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
