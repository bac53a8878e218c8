"""Draw grids of pictures and save pictures. Needs only Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from lorakit.core import atomic
from lorakit.core.messages import Message

# Smaller cells are enlarged to at least this many pixels by an integer factor, so that a label fits below.
SMALLEST_CELL = 160
GAP = 8
FONT_SIZE = 13
PAPER, INK = (250, 250, 249), (40, 40, 38)
EMPTY = (228, 228, 225)


def grid(
    images: Sequence[Image.Image | None], rows: Sequence[str], columns: Sequence[str], *, largest: int = 512
) -> Image.Image:
    """Draw pictures row by row, with a label left of each row and a label below each column.

    Args:
        images: `len(rows) * len(columns)` pictures; None draws a grey cell.
        largest: cells with a longer side are scaled down to it.

    Raises:
        ValueError: the number of pictures is not rows times columns, or there is none.
    """
    if len(images) != len(rows) * len(columns) or not any(images):
        raise ValueError(
            Message(
                "the number of pictures, {count}, does not fill {rows} rows and {columns} columns",
                len(images),
                len(rows),
                len(columns),
            )
        )
    font = ImageFont.load_default(FONT_SIZE)
    line = FONT_SIZE + 5
    sizes = [image.size for image in images if image is not None]
    width, height = _cell((max(size[0] for size in sizes), max(size[1] for size in sizes)), largest)
    captions = [_wrap(text, font, width) for text in columns]
    left = max((int(font.getlength(text)) for text in rows), default=0)
    left += 2 * GAP if left else GAP
    foot = max(map(len, captions)) * line + GAP
    size = (left + len(columns) * (width + GAP), GAP + len(rows) * (height + GAP) + foot)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        row, column = divmod(number, len(columns))
        place = (left + column * (width + GAP), GAP + row * (height + GAP))
        if image is None:
            draw.rectangle((*place, place[0] + width - 1, place[1] + height - 1), fill=EMPTY)
            continue
        enlarge = width % image.width == 0 and width > image.width
        scale = min(width / image.width, height / image.height)
        side = (round(image.width * scale), round(image.height * scale))
        resample = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
        sheet.paste(image.convert("RGB").resize(side, resample), place)
    for row, text in enumerate(rows):
        draw.text((GAP, GAP + row * (height + GAP) + height // 2 - line // 2), text, INK, font)
    for column, lines in enumerate(captions):
        for number, text in enumerate(lines):
            y = GAP + len(rows) * (height + GAP) + number * line
            draw.text((left + column * (width + GAP), y), text, INK, font)
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically, with all texts of `image.info`."""
    text = PngImagePlugin.PngInfo()
    for key, value in image.info.items():
        if isinstance(key, str) and isinstance(value, str):
            text.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    atomic.write(path, buffer.getvalue())


def read(path: Path) -> Image.Image:
    """Read a PNG from `save`, with its texts in `image.info`. Other formats are refused."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        return image


def read_software(path: Path) -> str:
    """The program in a PNG's metadata; "" if there is none, or if it is not a PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return str(image.info.get("Software", ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy whose longer side is at most `side`."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _cell(size: tuple[int, int], largest: int) -> tuple[int, int]:
    width, height = size
    if min(size) < SMALLEST_CELL:
        factor = -(-SMALLEST_CELL // min(size))
        return width * factor, height * factor
    shrink = min(1.0, largest / max(size))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break the text into lines of at most `width` pixels. A wider word is its own line."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]
