"""Find the photos of a folder, with their captions and masks. Nothing is written to it."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorakit.config import DataConfig, photo_edits
from lorakit.config.photo_edits import NO_EDIT, PhotoEdit
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join
from lorakit.core.names import expand, printable
from lorakit.data import caption_files, concepts, masks
from lorakit.data.entries import Names, is_hidden, some_names, usable

FORMATS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "avif", "mpo", "heic", "heif", "gif",
)  # fmt: skip
CAPTIONS = (".txt", ".caption")
TEXT_KINDS = ("txt", "caption", "jsonl", "json", "csv", "tsv", "bak")
MASK = ".mask.png"
# The most folders that are searched for deeper photos: the user's folder may be an entire disk.
MAX_FOLDERS = 1000


@dataclass(frozen=True)
class Photo:
    """One photo with its caption and mask.

    Attributes:
        path: the file.
        relative: path relative to the folder, with `/`. It is used in messages and as the seed of the photo's variants.
        caption: text of the caption, or None.
        caption_source: name of the caption's file, or None.
        mask: the file of its mask (`name.mask.png`), or None.
        subject: the name of its subfolder without the number; "" for a photo outside subfolders.
        repeats: how often an epoch uses it: the number in the name of its subfolder.
        caption_lines: the lines of the caption's file.
        edit: its edit in `data.edits`.
    """

    path: Path
    relative: str
    caption: str | None = None
    caption_source: str | None = None
    mask: Path | None = None
    subject: str = ""
    repeats: int = 1
    caption_lines: tuple[str, ...] = ()
    edit: PhotoEdit = NO_EDIT

    @property
    def has_mask(self) -> bool:
        """Whether it has a mask, as a file or painted in `data.edits`."""
        return self.mask is not None or bool(self.edit.strokes)


@dataclass
class Folder:
    """Result of `scan`. `warnings` are probable mistakes of the user; `notes` are decisions of `scan`. `class_photos`
    are class images for prior preservation, which are never trained as the subject."""

    path: Path
    photos: list[Photo] = field(default_factory=list)
    class_photos: list[Photo] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def of_config(config: DataConfig) -> Folder:
    """The photos of a config; see `scan`."""
    return scan(require(config.folder), config.class_folder, config.exclude, config.more_folders, config.edits)


def scan(
    folder: str | Path,
    class_folder: str = "",
    exclude: Sequence[str] = (),
    more_folders: Mapping[str, str] | None = None,
    edits: Mapping[str, str] | None = None,
) -> Folder:
    """Read the photos in `folder` and in its direct subfolders, in order of name.

    Args:
        exclude: names or patterns of photos to leave out.
        class_folder: folder of class images, instead of reg/, class/ or regularization/ in `folder`.
        more_folders: name -> path of folders that are read like subfolders.
        edits: photo -> its rotation, crop and mask.

    Raises:
        LorakitError: the folder is missing, is a file, cannot be read, or has no pictures.
    """
    path = expand(folder)
    _require_folder(path)
    result = Folder(path)
    other_files: Counter[str] = Counter()
    metadata: dict[str, tuple[str, str]] = {}
    try:
        if concepts.is_run(path):
            raise LorakitError("{path} holds pictures of a run of lorakit; give the folder of the photos", path)
        below = [entry for entry in usable(path, path, []) if entry.is_dir()]
        below = _read_class_folders(result, _pass_over(result, below), class_folder)
        for level in (path, *below):
            _read_level(result, level, metadata, other_files)
        mask_folders = _take_masks(result)
        deep_folders = _deep_folders(path, [folder for folder in below if folder not in mask_folders])
    except OSError as error:
        raise LorakitError("{file}: cannot be read ({why})", error.filename or path, error.strerror or error) from None
    deep_folders = {name: count for name, count in deep_folders.items() if path / name not in mask_folders}
    photo_names = {photo.relative for photo in result.photos}
    _read_more_folders(result, more_folders or {})
    _edit(result, edits or {})
    _leave_out(result, exclude)
    if not result.photos:
        refused = [_no_photos_message(path, other_files, deep_folders), *result.warnings]
        if result.class_photos:
            refused.append(Message("class images are no photos of the subject: {count}", len(result.class_photos)))
        raise LorakitError(join("; ", refused))
    photo_names |= {name.rpartition(".")[0] for name in photo_names}
    for source in dict.fromkeys(source for source, _ in metadata.values()):
        absent = [name for name, (own, _) in metadata.items() if own == source and name not in photo_names]
        if absent:
            result.warnings.append(
                Message("{file} names files that are not there: {names}", source, some_names(absent))
            )
    if deep_folders:
        folders = ", ".join(f"{name}/ ({count})" for name, count in deep_folders.items())
        result.warnings.append(Message("pictures more than one folder down are not read: {names}", folders))
    _describe_folders(result)
    ignored = {kind: count for kind, count in other_files.items() if kind not in TEXT_KINDS}
    if ignored:
        result.notes.append(Message("not pictures, ignored: {kinds}", _count_kinds(ignored)))
    return result


def excluded(photos: Iterable[Photo], exclude: Sequence[str]) -> set[str]:
    """The photos that `data.exclude` leaves out. An entry is a path in the folder, else a pattern."""
    names = {photo.relative for photo in photos}
    return {n for name in exclude for n in ([name] if name in names else fnmatch.filter(names, name))}


def _leave_out(result: Folder, exclude: Sequence[str]) -> None:
    """Remove the photos of `data.exclude`, with a note."""
    for name in exclude:
        if not excluded(result.photos, [name]):
            result.warnings.append(Message("data.exclude: no photo is called {name}", printable(name)))
    if absent := excluded(result.photos, exclude):
        result.photos = [photo for photo in result.photos if photo.relative not in absent]
        result.notes.append(Message("left out by data.exclude: {names}", some_names(sorted(absent))))
        if not result.photos:
            raise LorakitError("data.exclude leaves out every photo of {folder}: remove a name or pattern", result.path)


def _read_more_folders(result: Folder, more_folders: Mapping[str, str]) -> None:
    """Add the photos of other folders, each under its own name."""
    for name, place in more_folders.items():
        repeats, subject = concepts.split_name(name)
        if (result.path / name).exists():
            raise LorakitError(
                "data.more_folders: {folder} has {name} already; give another name", result.path, printable(name)
            )
        if repeats == 0 or concepts.is_class_folder(Path(name)):
            why = "0 repeats" if repeats == 0 else "class images; name their folder in data.class_folder"
            raise LorakitError("data.more_folders: {name}/ would not be trained ({why})", printable(name), why)
        part = scan(place)
        result.photos += [
            replace(photo, relative=f"{name}/{photo.relative}", subject=subject, repeats=repeats)
            for photo in part.photos
        ]
        result.warnings += [Message("{folder}/: {problem}", printable(name), line) for line in part.warnings]


def _edit(result: Folder, edits: Mapping[str, str]) -> None:
    """Assign the edits of `data.edits` to the photos, with notes."""
    parsed = {name: photo_edits.parse(text) for name, text in edits.items()}
    names = [photo.relative for photo in result.photos if photo.relative in parsed]
    masked = [name for name in names if parsed[name].strokes]
    geometric = [name for name in names if parsed[name].geometry != NO_EDIT]
    result.photos = [replace(photo, edit=parsed.get(photo.relative, photo.edit)) for photo in result.photos]
    absent = [printable(name) for name in parsed if name not in names]
    result.warnings += [Message("data.edits: no photo is called {name}", some_names(absent))] if absent else []
    if geometric:
        result.notes.append(Message("turned or cropped by data.edits: {names}", some_names(geometric)))
    if masked:
        result.notes.append(Message("with a mask painted in data.edits: {names}", some_names(masked)))


def versions(photos: Sequence[Photo]) -> dict[str, list[int]]:
    """Relative path -> size and modification time of each photo, which show whether it changed since a run."""
    statuses = {photo.relative: photo.path.stat() for photo in photos}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in statuses.items()}


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
                raise LorakitError(
                    "{file}: cannot be read any more ({why})", photo.relative, error.strerror or error
                ) from None
        edit = f"{photo.edit}\0" if str(photo.edit) else ""
        total.update(f"{photo.relative}\0{photo.caption}\0{edit}".encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def _pass_over(result: Folder, below: list[Path]) -> list[Path]:
    """The subfolders without runs and without those of 0 repeats; notes name the skipped ones."""
    runs = [entry for entry in below if concepts.is_run(entry)]
    zero = [entry for entry in below if concepts.split_name(entry.name)[0] == 0]
    for names, reason in ((runs, "a run of lorakit, not photos"), (zero, "0 repeats")):
        if names:
            folders = some_names(f"{printable(entry.name)}/" for entry in names)
            result.notes.append(Message("skipped ({reason}): {names}", reason, folders))
    return [entry for entry in below if entry not in runs and entry not in zero]


def _read_class_folders(result: Folder, below: list[Path], class_folder: str) -> list[Path]:
    """Read the class images. Return the other subfolders."""
    folders = [entry for entry in below if concepts.is_class_folder(entry)]
    if class_folder:
        _require_folder(expand(class_folder))
        if folders:
            names = some_names(f"{printable(folder.name)}/" for folder in folders)
            result.notes.append(Message("skipped ({reason}): {names}", "data.class_folder is set", names))
    for path in [expand(class_folder)] if class_folder else folders:
        part, others = Folder(path), Counter[str]()
        for level in (path, *(entry for entry in usable(path, path, []) if entry.is_dir())):
            _read_level(part, level, {}, others)
        result.class_photos += [
            replace(photo, relative=f"{printable(path.name)}/{photo.relative}") for photo in part.photos
        ]
        result.warnings += [Message("{folder}/: {problem}", printable(path.name), warning) for warning in part.warnings]
        if not part.photos:
            result.warnings.append(Message("{folder}/: no class images in it", printable(path.name)))
    own = expand(class_folder).resolve() if class_folder else None
    return [entry for entry in below if entry not in folders and entry.resolve() != own]


def require(path: str) -> str:
    """The folder of photos in a config.

    Raises:
        LorakitError: the config has none.
    """
    if not path:
        raise LorakitError("no folder of photos: name one (data.folder)")
    return path


def _require_folder(path: Path) -> None:
    if not path.exists():
        matches: list[str] = []
        if path.parent.is_dir():
            matches = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
        hint = Message(" (did you mean {name}?)", path.parent / matches[0]) if matches else ""
        raise LorakitError("folder {path} does not exist{hint}", path, hint)
    if path.is_dir():
        return
    if _kind(path) in FORMATS:
        raise LorakitError("{path} is one picture; give the folder it is in: {folder}", path, path.parent)
    raise LorakitError("{path} is a file; give a folder of photos", path)


def _kind(entry: Path) -> str:
    return entry.suffix[1:].lower()


def _is_photo(entry: Path) -> bool:
    return (
        _kind(entry) in FORMATS and not entry.name.lower().endswith(MASK) and not is_hidden(entry) and entry.is_file()
    )


def _read_level(result: Folder, level: Path, metadata: dict[str, tuple[str, str]], other_files: Counter[str]) -> None:
    """Add the photos directly in `level`, with captions and masks. Add the rows of metadata.jsonl to `metadata`."""
    entries = [entry for entry in usable(level, result.path, result.warnings) if entry.is_file()]
    inside = "" if level == result.path else f"{printable(level.name)}/"
    repeats, subject = concepts.split_name(level.name) if inside else (1, "")
    paths = [entry for entry in entries if _is_photo(entry)]
    own = _read_tables(result, entries, inside, metadata, {path.stem.lower() for path in paths})
    names = Names({entry.name: entry for entry in entries}, paths)
    matches = set()
    for path in paths:
        relative = inside + printable(path.name)
        # Some taggers write `photo.jpg.txt`.
        sources = [file for suffix in CAPTIONS for file in names.every(path, suffix)]
        candidates = [(printable(file.name), _read_caption(result, file)) for file in sources]
        candidates += [own[path.stem.lower()]] if path.stem.lower() in own else []
        names_in_tables = (relative, inside + printable(path.stem))
        candidates += [metadata[name] for name in names_in_tables if name in metadata]
        mask = names.side_file(path, MASK)
        matches.update(sources if mask is None else [*sources, mask])
        source, caption = _choose_caption(result, relative, candidates)
        lines = tuple((caption or "").splitlines())
        result.photos.append(Photo(path, relative, " ".join(lines) or None, source, mask, subject, repeats, lines))
    orphans = [file for file in entries if file.name.lower().endswith((*CAPTIONS, MASK)) and file not in matches]
    if orphans and (paths or inside):
        labels = some_names(inside + printable(file.name) for file in orphans)
        no_photos = "{names}: captions or masks in a folder without photos, not used: put each beside its photo"
        result.warnings.append(Message("not used, as no photo has this name: {names}" if paths else no_photos, labels))
    other_files.update(
        _kind(entry) or "without an ending" for entry in entries if not _is_photo(entry) and not _is_mask(entry)
    )


def _take_masks(result: Folder) -> set[Path]:
    """Assign masks with other programs' names. Return the folders that only contain masks."""
    matches = masks.find(result.photos, result.path)
    matched = set(matches.of.values())
    result.photos = [
        replace(photo, mask=photo.mask or matches.of.get(photo.path))
        for photo in result.photos
        if photo.path not in matched and photo.path.parent not in matches.folders
    ]
    result.warnings += matches.warnings
    return matches.folders


def _is_mask(entry: Path) -> bool:
    return entry.name.lower().endswith(MASK)


def _choose_caption(result: Folder, relative: str, candidates: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Source and text of the first non-empty caption, in the order .txt, .caption, .json, table."""
    nonempty = [(source, caption) for source, caption in candidates if caption]
    if not nonempty:
        if candidates:
            result.warnings.append(Message("{photo}: its caption in {file} is empty", relative, candidates[0][0]))
        return None, None
    source, caption = nonempty[0]
    for other_source, text in nonempty[1:]:
        if text.split() != caption.split():
            result.warnings.append(
                Message(
                    "{photo}: {file} and {other} say different things; {used} is used",
                    *(relative, source, other_source, source),
                )
            )
    return source, caption


def _read_caption(result: Folder, path: Path) -> str:
    """The non-empty lines of a caption file; see `_decode_text` for its encoding."""
    return "\n".join(" ".join(line.split()) for line in _decode_text(result, path).splitlines() if line.strip())


def _decode_text(result: Folder, path: Path) -> str:
    name = printable(path.relative_to(result.path).as_posix())
    return caption_files.decode(path.read_bytes(), name, result.warnings.append)


def _read_tables(
    result: Folder, entries: list[Path], inside: str, metadata: dict[str, tuple[str, str]], stems: set[str]
) -> dict[str, tuple[str, str]]:
    """Add the rows of caption tables to `metadata`: relative path -> (source, text). Note tables that are not read.

    Returns:
        the captions of JSON files that belong to one photo each, by the stem of the photo in lower case.
    """
    own: dict[str, tuple[str, str]] = {}
    for path in entries:
        source = inside + printable(path.name)
        if path.suffix.lower() not in caption_files.TABLES:
            continue
        try:
            content = _decode_text(result, path)
            stem = path.stem.lower()
            stem = stem if stem in stems else stem.rpartition(".")[0]
            if path.suffix.lower() == ".json" and stem in stems:
                text = caption_files.of_one_photo(content)
                if text is None:
                    result.notes.append(
                        Message(
                            "{file}: not read, it has no caption ({keys})", source, ", ".join(caption_files.TEXT_KEYS)
                        )
                    )
                else:
                    own[stem] = (printable(path.name), " ".join(text.split()))
                continue
            table = list(caption_files.rows(source, content))
            if not table:
                raise LorakitError("{source}: no row of it has a picture and a text", source)
        except LorakitError as error:
            if path.name.lower() == caption_files.METADATA:
                raise
            result.notes.append(Message("not read as captions: {problem}", error))
            continue
        for number, file, text in table:
            name = inside + caption_files.photo_key(file, path.parent)
            entry = (source, " ".join(text.split()))
            if metadata.setdefault(name, entry)[1] != entry[1]:
                result.warnings.append(
                    Message(
                        "{name}: {file} line {line} says something else than before; not used", name, source, number
                    )
                )
    return own


def _deep_folders(path: Path, below: list[Path]) -> dict[str, int]:
    """Number of photos of each folder two or more levels down, for the first `MAX_FOLDERS` folders."""
    counts: dict[str, int] = {}
    visits = 0
    for entry in below:
        for root, folders, _ in os.walk(entry):
            folders[:] = sorted(
                name for name in folders if not is_hidden(Path(name)) and not concepts.is_run(Path(root, name))
            )
            visits += 1
            if visits > MAX_FOLDERS:
                return counts
            folder = Path(root)
            count = sum(_is_photo(p) for p in folder.iterdir()) if folder != entry else 0
            if count:
                counts[printable(folder.relative_to(path).as_posix())] = count
    return counts


def _describe_folders(result: Folder) -> None:
    counts = Counter(photo.relative.partition("/")[0] for photo in result.photos if "/" in photo.relative)
    if not counts:
        return
    names = ", ".join(f"{name}/ ({count})" for name, count in sorted(counts.items()))
    result.notes.append(Message("subfolders: {names}", names))
    repeats = {photo.relative.partition("/")[0]: photo.repeats for photo in result.photos if photo.repeats > 1}
    if repeats:
        counts_by_name = join(", ", (Message("{name}/ {count} times", *item) for item in repeats.items()))
        result.notes.append(Message("repeats: an epoch shows each photo of {names}", counts_by_name))


def _no_photos_message(path: Path, other_files: Counter[str], deep_folders: dict[str, int]) -> str:
    parts = [_count_kinds(other_files)] if other_files else []
    parts += [
        Message("{count} in {name}/ (only one level of subfolders is read)", count, name)
        for name, count in deep_folders.items()
    ]
    kinds, content = ", ".join(FORMATS), join("; ", parts or ["nothing"])
    return Message("0 images in {path}; looked for {kinds}; found {content}", path, kinds, content)


def _count_kinds(kinds: dict[str, int]) -> str:
    pairs = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return join(", ", (Message("{count} without an ending", n) if " " in kind else f"{n} .{kind}" for kind, n in pairs))
