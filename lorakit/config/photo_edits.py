"""Edits of photos before training, as text: "turn 90, crop 10 0 90 100, paint 20 30 40 60 70".

The file does not change. Brush strokes are in percent of the picture in the file, so they stay in place if the photo is
turned or cropped again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from lorakit.config.option import label, to_text
from lorakit.core.messages import Message

if TYPE_CHECKING:
    from lorakit.config.schema import DataConfig

GRAMMAR = (
    "turn 90, 180 or 270, crop LEFT TOP RIGHT BOTTOM in percent of the turned photo: 'turn 90, crop 10 0 90 100'; "
    "for a mask paint or erase SIZE X Y X Y ... in percent of the file's picture"
)
# A stroke: paint or erase, the brush's width in percent of the picture's longer side, then the points.
STROKE = re.compile(r"(paint|erase)((?: \d{1,3}(?:\.\d+)?){3,})")
MAX_STROKES, MAX_POINTS = 500, 2000
TOO_MANY = (
    "data.edits.{name}: {count} strokes, and a photo has {limit} at most: paint fewer with a wider brush, or put "
    "a mask file, NAME.mask.png, beside it"
)
# Percent; a smaller crop is probably a mistake.
MIN_SIDE = 2.0
WHOLE = (0.0, 0.0, 100.0, 100.0)


@dataclass(frozen=True)
class PhotoEdit:
    """Turn clockwise by `turn` degrees, then cut to `crop`: left, top, right, bottom, in percent of the sides.

    `strokes` paint the mask, see `STROKE`: painted parts are learned. If the first stroke erases, all other parts are
    learned.
    """

    turn: int = 0
    crop: tuple[float, float, float, float] = WHOLE
    strokes: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __str__(self) -> str:
        """The text for a config; "" for no edit."""
        turn = [f"turn {self.turn}"] if self.turn else []
        crop = ["crop " + " ".join(f"{side:g}" for side in self.crop)] if self.crop != WHOLE else []
        strokes = [" ".join([act, *(f"{number:g}" for number in numbers)]) for act, numbers in self.strokes]
        return ", ".join(turn + crop + strokes)

    def is_valid(self) -> bool:
        """Whether it can be written in a config."""
        try:
            return parse(str(self)) is not None
        except ValueError:
            return False

    @property
    def geometry(self) -> PhotoEdit:
        """The same edit without the mask: the part that changes the pixels."""
        return replace(self, strokes=())

    def turned(self, degrees: int) -> PhotoEdit:
        """The same part of the photo, turned further."""
        left, top, right, bottom = self.crop
        for _ in range(degrees // 90 % 4):
            left, top, right, bottom = 100 - bottom, left, 100 - top, right
        return replace(self, turn=(self.turn + degrees) % 360, crop=(left, top, right, bottom))

    def cropped(self, box: tuple[float, float, float, float]) -> PhotoEdit:
        """A part of the current part, in percent of it."""
        left, top, right, bottom = self.crop
        width, height = (right - left) / 100, (bottom - top) / 100
        x1, y1, x2, y2 = box
        sides = left + x1 * width, top + y1 * height, left + x2 * width, top + y2 * height
        crop = tuple(round(min(100.0, max(0.0, side)), 2) for side in sides)
        return replace(self, crop=(crop[0], crop[1], crop[2], crop[3]))

    def painted(self, act: str, width: float, points: Sequence[float], ratio: float) -> PhotoEdit:
        """Add a stroke, in percent of the cropped photo. `ratio` is the width of the cropped photo divided by its
        height."""
        left, top, right, bottom = self.crop
        sides = ratio / (right - left), 1 / (bottom - top)  # of the full photo, in hundredths of the part's height
        numbers = [width * max(ratio, 1) / max(sides) / 100]
        for x, y in zip(points[::2], points[1::2], strict=True):
            x, y = left + x * (right - left) / 100, top + y * (bottom - top) / 100
            for _ in range(self.turn // 90):
                x, y = y, 100 - x
            numbers += [min(100.0, max(0.0, x)), min(100.0, max(0.0, y))]
        stroke = act, tuple(round(number, 1) for number in numbers)
        return replace(self, strokes=(*self.strokes, stroke))

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The part in pixels of the turned photo; at least one pixel. `size` is the size of the original photo."""
        width, height = size if self.turn % 180 == 0 else size[::-1]
        sides = zip((width, height) * 2, self.crop, strict=True)
        left, top, right, bottom = (round(side * share / 100) for side, share in sides)
        left, top = min(left, width - 1), min(top, height - 1)
        return left, top, max(left + 1, right), max(top + 1, bottom)

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of a photo of this size after the edit."""
        left, top, right, bottom = self.box(size)
        return right - left, bottom - top


NO_EDIT = PhotoEdit()


@lru_cache(maxsize=4096)
def parse(text: str) -> PhotoEdit:
    """Parse an edit.

    Raises:
        ValueError: the text is not an edit.
    """
    parts = [part.strip() for part in text.split(",")]
    strokes = tuple(_stroke(part) for part in parts if part.startswith(("paint", "erase")))
    rest = ", ".join(part for part in parts if not part.startswith(("paint", "erase")))
    match = re.fullmatch(r"(?:turn (90|180|270))?(?:(?:^|, )crop((?: \d{1,3}(?:\.\d+)?){4}))?", rest)
    if match is None or not (strokes or any(match.groups())) or len(strokes) > MAX_STROKES:
        raise ValueError(text)
    left, top, right, bottom = map(float, (match[2] or "0 0 100 100").split())
    if right - left < MIN_SIDE or bottom - top < MIN_SIDE or max(right, bottom) > 100:
        raise ValueError(text)
    return PhotoEdit(int(match[1] or 0), (left, top, right, bottom), strokes)


def _stroke(text: str) -> tuple[str, tuple[float, ...]]:
    match = STROKE.fullmatch(text)
    numbers = tuple(map(float, match[2].split())) if match else ()
    if match is None or len(numbers) % 2 == 0 or len(numbers) > 2 * MAX_POINTS or max(numbers) > 100 or not numbers[0]:
        raise ValueError(text)
    return match[1], numbers


def problems(data: DataConfig) -> list[str]:
    """Problems of `data.edits` and `data.more_folders`: malformed edits, and names of folders without a subject."""
    lines = list[str]()
    for name, text in data.edits.items():
        try:
            parse(text)
        except ValueError:
            count = sum(part.strip().startswith(("paint", "erase")) for part in text.split(","))
            if count > MAX_STROKES:
                lines.append(Message(TOO_MANY, label(name), count, MAX_STROKES))
                continue
            lines.append(Message("data.edits.{name} = {value}: write {grammar}", label(name), to_text(text), GRAMMAR))
    for name, path in data.more_folders.items():
        if not path.strip():
            lines.append(Message("data.more_folders.{name}: give the path of a folder", label(name)))
        if not name.strip() or name.startswith(".") or {*name} & {*"/\\"}:
            wish = "data.more_folders.{name}: the name must be one of a folder, such as '3_sks cat'"
            lines.append(Message(wish, label(name)))
    if data.more_folders and data.concepts == "ask":
        lines.append("data.more_folders needs data.concepts = 'folders' (each its own subject) or 'one'")
    return lines
