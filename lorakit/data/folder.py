"""Find the photos of a folder, with their captions and masks. Nothing is written there."""

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
# Folders that operating systems create and do not show.
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")
# At most so many folders are searched for photos on deeper levels: the user's folder may be a whole disk.
MAX_FOLDERS = 1000
KOHYA = re.compile(r"\d+_.+")


@dataclass(frozen=True)
class Photo:
    """One photo with its caption and mask.

    Attributes:
        path: the file.
        relative: path relative to the folder, with `/`. Messages show it, and the photo's variants are seeded with it.
        caption: text of the caption, or None.
        caption_source: name of the file that has the caption, or None.
        mask: `name.mask.png` beside it, or None.
    """

    path: Path
    relative: str
    caption: str | None = None
    caption_source: str | None = None
    mask: Path | None = None


@dataclass
class Folder:
    """Result of `scan`. `warnings` are probable mistakes of the user; `notes` are decisions that `scan` made."""

    path: Path
    photos: list[Photo] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def scan(folder: str | Path) -> Folder:
    """Read the photos in `folder` and in its direct subfolders, in order of name.

    Kohya's `10_sks dog/` is read as a subfolder. The number of repeats is not used, and a note says so.

    Raises:
        LorakitError: the folder is missing, is a file, cannot be read, or holds no picture.
    """
    path = Path(folder).expanduser()
    _require_folder(path)
    result = Folder(path)
    other_files: Counter[str] = Counter()
    metadata: dict[str, tuple[str, str]] = {}
    try:
        below = [entry for entry in _sort_by_name(path.iterdir()) if entry.is_dir() and not _is_hidden(entry)]
        for level in (path, *below):
            _read_level(result, level, metadata, other_files)
        deep_folders = _deep_folders(path, below)
    except OSError as error:
        raise LorakitError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    if not result.photos:
        raise LorakitError(_no_photos_message(path, other_files, deep_folders))
    absent = [name for name in metadata if name not in {photo.relative for photo in result.photos}]
    if absent:
        result.warnings.append(f"{METADATA} names files that are not there: {_some_names(absent)}")
    if deep_folders:
        folders = ", ".join(f"{name}/ ({count})" for name, count in deep_folders.items())
        result.warnings.append(f"pictures more than one folder down are not read: {folders}")
    _describe_folders(result, below)
    ignored = {kind: count for kind, count in other_files.items() if kind not in ("txt", "caption", "jsonl", "json")}
    if ignored:
        result.notes.append(f"not pictures, left alone: {_count_kinds(ignored)}")
    return result


def digest(photos: Iterable[Photo]) -> str:
    """SHA-256 of names, bytes, captions and masks. Two runs with the same digest had the same photos.

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
        matches: list[str] = []
        if path.parent.is_dir():
            matches = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
        hint = f" (did you mean {path.parent / matches[0]}?)" if matches else ""
        raise LorakitError(f"folder {path} does not exist{hint}")
    if path.is_dir():
        return
    if _kind(path) in FORMATS:
        raise LorakitError(f"{path} is one picture; give the folder it is in: {path.parent}")
    raise LorakitError(f"{path} is a file; give a folder of photos")


def _sort_by_name(entries: Iterable[Path]) -> list[Path]:
    return sorted(entries, key=lambda entry: entry.name)


def _is_hidden(entry: Path) -> bool:
    return entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS


def _kind(entry: Path) -> str:
    return entry.suffix[1:].lower()


def _is_photo(entry: Path) -> bool:
    return (
        _kind(entry) in FORMATS and not entry.name.lower().endswith(MASK) and not _is_hidden(entry) and entry.is_file()
    )


def _read_level(result: Folder, level: Path, metadata: dict[str, tuple[str, str]], other_files: Counter[str]) -> None:
    """Add the photos directly in `level`, with captions and masks. Add the rows of metadata.jsonl to `metadata`."""
    entries = [entry for entry in _sort_by_name(level.iterdir()) if not _is_hidden(entry) and entry.is_file()]
    by_name = {entry.name.lower(): entry for entry in entries}
    inside = "" if level == result.path else f"{level.name}/"
    if METADATA in by_name:
        _read_metadata(result, by_name[METADATA], inside, metadata)
    matches = set()
    paths = [entry for entry in entries if _is_photo(entry)]
    for path in paths:
        relative = inside + path.name
        candidates: list[tuple[str, str]] = []
        for suffix in CAPTIONS:
            # `photo.jpg.txt` is what some taggers write.
            for name in (path.stem.lower() + suffix, path.name.lower() + suffix):
                if name in by_name:
                    matches.add(name)
                    candidates.append((by_name[name].name, _read_caption(result, by_name[name])))
        if relative in metadata:
            candidates.append(metadata[relative])
        mask = by_name.get(path.stem.lower() + MASK)
        matches.add(path.stem.lower() + MASK)
        source, caption = _choose_caption(result, relative, candidates)
        result.photos.append(Photo(path, relative, caption, source, mask))
    belongings = {name for name in by_name if name.endswith((*CAPTIONS, MASK))}
    if paths and belongings - matches:
        orphans = [inside + by_name[name].name for name in sorted(belongings - matches)]
        result.warnings.append(f"no photo has the name of {_some_names(orphans)}: not used")
    other_files.update(
        _kind(entry) or "without an ending" for entry in entries if not _is_photo(entry) and not _is_mask(entry)
    )


def _is_mask(entry: Path) -> bool:
    return entry.name.lower().endswith(MASK)


def _choose_caption(result: Folder, relative: str, candidates: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Source and text of the first caption that is not empty, in the order .txt, .caption, metadata.jsonl."""
    nonempty = [(source, caption) for source, caption in candidates if caption]
    if not nonempty:
        if candidates:
            result.warnings.append(f"{relative}: its caption in {candidates[0][0]} is empty")
        return None, None
    source, caption = nonempty[0]
    for other_source, text in nonempty[1:]:
        if text != caption:
            result.warnings.append(f"{relative}: {source} and {other_source} say different things; {source} is used")
    return source, caption


def _read_caption(result: Folder, path: Path) -> str:
    """Text of a caption file on one line; see `_decode_text` for its encoding."""
    return " ".join(_decode_text(result, path).split())


def _decode_text(result: Folder, path: Path) -> str:
    """Decode UTF-8, UTF-16 with a byte-order mark, else Windows-1252, for which a note is added."""
    raw = path.read_bytes()
    try:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            return raw.decode("utf-16")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    name = path.relative_to(result.path).as_posix()
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        raise LorakitError(f"{name}: not text in UTF-8 or Windows-1252; save it as UTF-8") from None
    result.notes.append(f"{name}: not UTF-8, read as Windows-1252")
    return text


def _read_metadata(result: Folder, path: Path, inside: str, metadata: dict[str, tuple[str, str]]) -> None:
    """Add the rows of a metadata.jsonl (format of the `datasets` library): relative path -> (source, text)."""
    source = inside + path.name
    for number, line in enumerate(_decode_text(result, path).splitlines(), 1):
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
        entry = (source, " ".join(text.split()))
        if metadata.setdefault(name, entry)[1] != entry[1]:
            result.warnings.append(f"{name}: {source} line {number} says something else than before; not used")


def _deep_folders(path: Path, below: list[Path]) -> dict[str, int]:
    """Number of photos of each folder two or more levels down, for the first `MAX_FOLDERS` folders."""
    counts: dict[str, int] = {}
    visits = 0
    for entry in below:
        for root, folders, _ in os.walk(entry):
            folders[:] = sorted(name for name in folders if not _is_hidden(Path(name)))
            visits += 1
            if visits > MAX_FOLDERS:
                return counts
            folder = Path(root)
            count = sum(_is_photo(p) for p in folder.iterdir()) if folder != entry else 0
            if count:
                counts[folder.relative_to(path).as_posix()] = count
    return counts


def _describe_folders(result: Folder, below: list[Path]) -> None:
    counts = Counter(photo.relative.partition("/")[0] for photo in result.photos if "/" in photo.relative)
    if not counts:
        return
    result.notes.append(f"subfolders: {', '.join(f'{name}/ ({count})' for name, count in sorted(counts.items()))}")
    kohya = [entry.name for entry in below if KOHYA.fullmatch(entry.name) and entry.name in counts]
    if kohya:
        result.notes.append(
            f"{_some_names(kohya)}: the number in front (repeats) is not used, every photo counts once an epoch; "
            "length is train.steps_per_image"
        )


def _no_photos_message(path: Path, other_files: Counter[str], deep_folders: dict[str, int]) -> str:
    parts = [_count_kinds(other_files)] if other_files else []
    parts += [f"{count} in {name}/ (only one level of subfolders is read)" for name, count in deep_folders.items()]
    return f"0 images in {path}; looked for {', '.join(FORMATS)}; found {'; '.join(parts) or 'nothing'}"


def _count_kinds(kinds: dict[str, int]) -> str:
    pairs = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind if ' ' in kind else '.' + kind}" for kind, count in pairs)


def _some_names(names: Iterable[str], limit: int = 4) -> str:
    """The first `limit` names, and the number of the remaining ones."""
    items = list(names)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
