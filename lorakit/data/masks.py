"""Find masks by the names that other programs give them: `x-masklabel.png`, `x_mask.png`, `masks/x.png`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core.messages import Message
from lorakit.core.names import printable
from lorakit.data import decode
from lorakit.data.entries import Names, some_names, usable

if TYPE_CHECKING:
    from lorakit.data.checks import Item
    from lorakit.data.decode import Pixels
    from lorakit.data.photo_folder import Photo

# Words between a photo's name and the suffix of its mask. `x.mask.png` itself is read with the photos.
WORDS = ("mask", "masklabel", "matte", "segmentation", "seg", "alpha")
MARKS = tuple(separator + word for word in WORDS for separator in "._- ")
FOLDERS = {*WORDS, "_mask", "_masks", "mask_images", "mask images"} | {f"{word}s" for word in WORDS}
# Prefix instead of such a word, as in "mask_x.png".
PREFIX = re.compile(r"mask[._ -](?=.)", re.IGNORECASE)
NO_MASK = "train.masked_loss: no photo has a mask; put name.mask.png beside name.jpg, or set it to false"
BLACK_MASK = (
    "{photo}: its mask is black all over, so nothing of it would be learned: change the mask, or leave "
    "the photo out (data.exclude)"
)


def problems(items: Sequence[Item]) -> list[str]:
    """The reasons why `train.masked_loss` cannot be used with these photos, one message each. Transparent photos are
    masked by their alpha channel."""
    readable = [item for item in items if item.readable]
    if not any(item.photo.has_mask or item.transparent for item in readable):
        return [NO_MASK]
    return [Message(BLACK_MASK, item.relative) for item in readable if item.black_mask]


def of_photo(photo: Photo, raw: bytes, size: tuple[int, int], alpha: Pixels | None) -> Pixels | None:
    """The mask of a photo: painted, else its mask file, else its alpha channel, else None (every pixel is learned).

    Args:
        raw: bytes of the photo's file.
        size: size of the photo after its edit.
    """
    if photo.edit.strokes:
        return decode.painted_mask(photo.edit, decode.measure(raw, photo.relative))
    return alpha if photo.mask is None else decode.decode_mask(photo.mask, size, photo.edit)


@dataclass
class Masks:
    """The mask of each photo that has one, and the pictures that are masks instead of photos."""

    of: dict[Path, Path] = field(default_factory=dict)
    folders: set[Path] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def match(self, photos: list[Path], files: dict[str, Path], marks: tuple[str, ...]) -> bool:
        """Assign to each photo without a mask the first of `files` with its name and a mark. Return whether there was
        one."""
        in_front = {PREFIX.sub("", stem) + MARKS[0]: file for stem, file in files.items() if PREFIX.match(stem)}
        names = Names({**in_front, **files}, photos)
        before = len(self.of)
        for photo in photos:
            mask = next((file for mark in marks if (file := names.side_file(photo, mark))), None)
            if mask is not None and mask != photo:
                self.of.setdefault(photo, mask)
        return len(self.of) > before


def find(photos: list[Photo], root: Path) -> Masks:
    """Find masks among the pictures of `root` and its subfolders, and in mask folders inside a subfolder.

    A picture is a mask in two cases. Either its name is that of a photo plus a mark of `MARKS`. Or it has the name of a
    photo and is in a folder of `FOLDERS`, inside or next to the photo's folder.
    """
    masks = Masks()
    levels: dict[Path, list[Path]] = {}
    for photo in photos:
        levels.setdefault(photo.path.parent, []).append(photo.path)
    photo_levels = {level: files for level, files in levels.items() if level.name.lower() not in FOLDERS}
    for level, files in photo_levels.items():
        masks.match(files, {file.stem: file for file in files}, MARKS)
        folders = [path for path in levels if path not in photo_levels and path.parent in (level, level.parent)]
        if level != root:
            inside = usable(level, root, [])
            folders += [entry for entry in inside if entry.is_dir() and entry.name.lower() in FOLDERS]
        for folder in folders:
            entries = levels.get(folder) or [entry for entry in usable(folder, root, masks.warnings) if entry.is_file()]
            if masks.match(files, {entry.stem: entry for entry in entries}, ("", *MARKS)):
                masks.folders.add(folder)
    matched = set(masks.of.values())
    orphans = [file for folder in sorted(masks.folders) for file in levels.get(folder, []) if file not in matched]
    if orphans:
        names = some_names(printable(file.relative_to(root).as_posix()) for file in orphans)
        masks.warnings.append(Message("not used, as no photo has this name: {names}", names))
    return masks
