"""Decode the bytes of a picture to pixels: upright, in sRGB, 8 bits, transparency on white.

Imports Pillow and numpy only. Everything that shows, checks or encodes a photo calls `decode`. The content of a file
decides its format, and only the formats of `CODECS` are tried. Each error of a decoder becomes one that names the file.
"""

from __future__ import annotations

import io
import math
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageOps, UnidentifiedImageError

from lorakit.config.photo_edits import NO_EDIT, PhotoEdit
from lorakit.core import install
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import printable

# Pillow's decoders of the formats in `photo_folder.FORMATS`. Pillow has many more, one of which runs another program
# (PostScript), and chooses them by content, independent of the file name.
CODECS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF", "HEIF")
# First bytes of files that people have under the name of a picture, and what they are.
OTHER_FORMATS = {
    b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"%PDF": "PDF", b"8BPS": "Photoshop",
    b"DDS ": "DirectDraw", b"icns": "an Apple icon", b"\0\0\1\0": "a Windows icon", b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL", b"\0\0\0\x0cjP  ": "JPEG 2000", b"PK\3\4": "a zip archive",
}  # fmt: skip
# Pillow refuses more pixels than this (twice its warning limit). Phones and cameras have fewer; stitched scans do not.
MAX_PIXELS = 178_956_970
# The most that JPEG takes. A line of 170 million pixels needs 6 GB to be resized.
MAX_SIDE = 65_535
# A file of `MAX_PIXELS` without compression has 0.5 GB, or 1 GB with 16 bits.
MAX_BYTES = 2**30 + 2**26
# Larger pictures are decoded one at a time, and every picture in strips of so many pixels: the largest needs 1.5 GB.
LARGE_PIXELS, STRIP_PIXELS = 32_000_000, 8_000_000
# Masks are painted at no more than this side, and then enlarged: a stroke has places of a thousandth of the picture.
PAINT_SIDE = 2048
_LARGE = threading.RLock()
# Pages of a file are counted up to this number.
MAX_PAGES = 100
ORIENTATION = 0x0112
ROTATIONS = {
    2: "mirrored", 3: "turned 180°", 4: "mirrored, turned 180°", 5: "mirrored, turned 90° left",
    6: "turned 90° right", 7: "mirrored, turned 90° right", 8: "turned 90° left",
}  # fmt: skip
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
COLOUR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}  # Pillow's mode -> ICC colour space
# Pillow warns of large pictures, odd palettes and damaged EXIF data, but does not name the file.
warnings.filterwarnings("ignore", module=r"PIL\.")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Unreadable(LorakitError):
    """A file cannot be decoded. `reason` says why and what to do, without the file's name."""

    def __init__(self, name: str, reason: str):
        self.reason = reason
        super().__init__("{file}: {problem}", name, reason)


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        content: RGB picture or uint8 `[height, width, 3]`, in sRGB, upright, transparency shown on white.
        alpha: uint8 `[height, width]`, or None if nothing is transparent.
        orientation: the rotation of its EXIF tag, or "".
        notes: other changes that the user may want to know of.
    """

    content: Image.Image | Pixels
    alpha: Pixels | None = None
    orientation: str = ""
    notes: tuple[str, ...] = ()

    @cached_property
    def image(self) -> Image.Image:
        """The content as Pillow's picture."""
        return self.content if isinstance(self.content, Image.Image) else Image.fromarray(self.content)

    @cached_property
    def pixels(self) -> Pixels:
        """The content as uint8 `[height, width, 3]`."""
        return np.array(self.content)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) after the EXIF rotation."""
        if isinstance(self.content, Image.Image):
            return self.content.size
        return self.content.shape[1], self.content.shape[0]


def decode(source: Path | bytes, name: str = "", *, at_least: int | None = None, edit: PhotoEdit = NO_EDIT) -> Picture:
    """Read a picture.

    Args:
        source: a file, or its bytes.
        name: name of the picture in messages; by default the file's own name.
        at_least: side of a thumbnail. A JPEG is then decoded at a half, quarter or eighth of its size, which is much
            faster, if both of its sides stay at least this long.
        edit: turn and crop that are applied to the picture.

    Raises:
        Unreadable: the picture cannot be decoded; the message has the file's name, the cause, and a remedy.
    """
    name = name or (printable(source.name) if isinstance(source, Path) else "picture")
    image = _open(source, name)
    with one_at_a_time(image.size), _errors_of(name):
        if at_least is not None:
            left, top, right, bottom = edit.crop
            side = math.ceil(100 * at_least / min(right - left, bottom - top))
            image.draft(None, (side, side))
        notes = _note_frames(image)
        orientation = _orientation(image)  # before the pixels: Pillow turns a TIFF while it loads and forgets the tag
        image.load()
        if orientation in ROTATIONS:
            image = ImageOps.exif_transpose(image)
        content, alpha = _to_srgb(image, notes)
        if edit.geometry != NO_EDIT:
            content, alpha = _edited(np.array(content), edit), None if alpha is None else _edited(alpha, edit)
    return Picture(content, alpha, ROTATIONS.get(orientation, ""), tuple(dict.fromkeys(notes)))


def _edited(pixels: Pixels, edit: PhotoEdit) -> Pixels:
    """The part of a picture that an edit leaves, as separate pixels."""
    left, top, right, bottom = edit.box((pixels.shape[1], pixels.shape[0]))
    return np.ascontiguousarray(np.rot90(pixels, -edit.turn // 90)[top:bottom, left:right])


def one_at_a_time(size: tuple[int, int]) -> AbstractContextManager[object]:
    """Wait while another thread works on a large picture, if one of this size is large."""
    return _LARGE if size[0] * size[1] > LARGE_PIXELS else nullcontext()


def measure(source: Path | bytes, name: str = "", edit: PhotoEdit = NO_EDIT) -> tuple[int, int]:
    """(width, height) of the picture that `decode` returns, read from the header alone.

    Raises:
        Unreadable: as `decode`.
    """
    image = _open(source, name or (printable(source.name) if isinstance(source, Path) else "picture"))
    # A TIFF's size is already the upright one.
    swaps_sides = _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"
    return edit.size((image.height, image.width) if swaps_sides else (image.width, image.height))


def decode_mask(path: Path, size: tuple[int, int], edit: PhotoEdit = NO_EDIT) -> Pixels:
    """Decode a mask to uint8 `[height, width]`: white is learned, black is not. `edit` is that of its photo, `size` the
    photo's after it.

    Raises:
        Unreadable: as `decode`, and if its size is not the photo's.
    """
    name = printable(path.name)
    picture = decode(path, name, edit=edit)
    if picture.size != size:
        own, other = (f"{width} x {height}" for width, height in (picture.size, size))
        raise Unreadable(name, Message("mask is {size}, its photo {other}: make them equal", own, other))
    return np.array(picture.image.convert("L"))


def painted_mask(edit: PhotoEdit, size: tuple[int, int]) -> Pixels:
    """The mask that an edit paints on a photo of `size` before it: uint8 as `decode_mask`, turned and cropped."""
    share = min(1.0, PAINT_SIDE / max(size))
    width, height = (max(1, round(side * share)) for side in size)
    image = Image.new("L", (width, height), 0 if edit.strokes[0][0] == "paint" else 255)
    draw = ImageDraw.Draw(image)
    for act, (brush, *places) in edit.strokes:
        radius, colour = brush / 200 * max(width, height), 255 if act == "paint" else 0
        points = [(x * width / 100, y * height / 100) for x, y in zip(places[::2], places[1::2], strict=True)]
        draw.line(points, colour, max(1, round(2 * radius)))
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return _edited(np.asarray(image.resize(size, Image.Resampling.NEAREST)), edit)


def read(path: Path, name: str) -> bytes:
    """The bytes of a file that may be a picture.

    Raises:
        Unreadable: it cannot be read, is empty, or is larger than any picture that can be decoded.
    """
    try:
        raw = path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
    except OSError as error:
        raise Unreadable(name, Message("cannot be read ({why})", error.strerror or error)) from None
    if raw is None:
        raise Unreadable(name, Message("larger than {size} MiB; save it smaller, as jpg or png", MAX_BYTES >> 20))
    return raw


def _open(source: Path | bytes, name: str) -> Image.Image:
    raw = source if isinstance(source, bytes) else read(source, name)
    if not raw:
        raise Unreadable(name, "empty, 0 bytes; copy it again from its source")
    if raw[4:8] == b"ftyp" and raw[8:12] in HEIC_BRANDS:
        _register_heif(name)
    Image.init()
    with _errors_of(name):
        try:
            image = Image.open(io.BytesIO(raw), formats=[codec for codec in CODECS if codec in Image.OPEN])
        except UnidentifiedImageError:
            raise Unreadable(name, _not_a_picture_reason(raw)) from None
    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(name, _too_large_reason())
    if max(image.size) > MAX_SIDE:
        raise Unreadable(name, Message("more than {count} pixels on a side; save it smaller", MAX_SIDE))
    return image


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Convert every exception of a decoder to `Unreadable`, because the bytes are untrusted."""
    try:
        yield
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(name, _too_large_reason()) from None
    except MemoryError:
        raise Unreadable(name, "needs more memory than there is; save it smaller") from None
    except Exception as error:
        why = printable(str(error)) or type(error).__name__
        raise Unreadable(name, Message("damaged or cut off ({why}); copy it again from its source", why)) from None


def _register_heif(name: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise Unreadable(name, Message("HEIC needs pillow-heif; {hint}", install.hint("heic"))) from None
    pillow_heif.register_heif_opener()


def _too_large_reason() -> str:
    return Message("more than {count} megapixels; save it smaller", MAX_PIXELS // 10**6)


def _not_a_picture_reason(raw: bytes) -> str:
    head = raw[:512]
    for start, kind in OTHER_FORMATS.items():
        if head.startswith(start):
            return Message("{kind}, whatever its name says; save it as jpg or png", kind)
    if b"\0" not in head:
        try:
            head.decode("utf-8")
        except UnicodeDecodeError:
            pass
        else:
            return "text, not a picture, whatever its name says; remove it or save the picture again"
    return "not a picture that can be read; save it as jpg or png"


def _note_frames(image: Image.Image) -> list[str]:
    """Return a note if a file has several pictures. An MPO has the same view for 3-D screens, so it gets no note."""
    if image.format in ("MPO", "JPEG"):
        return []
    try:
        count = _pages(image) if image.format == "TIFF" else int(getattr(image, "n_frames", 1))
        image.seek(0)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error):
        return []  # the damage is named when the pixels are loaded
    if count < 2:
        return []
    pages, pictures = "holds {count} pages: the first is used", "holds {count} pictures: the first is used"
    return [Message(pages if image.format == "TIFF" else pictures, count)]


def _pages(image: Image.Image) -> int:
    """Pages of a TIFF, up to `MAX_PAGES`: Pillow's own count takes minutes where a file lists very many."""
    for page in range(1, MAX_PAGES):
        try:
            image.seek(page)
        except EOFError:
            return page
    return MAX_PAGES


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) if it is absent or damaged, as in image viewers."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _to_srgb(image: Image.Image, notes: list[str]) -> tuple[Image.Image | Pixels, Pixels | None]:
    """Convert any mode of Pillow to RGB on white and an alpha channel, strip by strip."""
    is_deep = image.mode.startswith("I") or image.mode == "F"
    white = _white(image) if is_deep else 0.0
    if image.width * image.height <= STRIP_PIXELS:
        return _strip_to_srgb(_scale_grey(image, white) if is_deep else image, notes)
    pixels, alpha = np.empty((image.height, image.width, 3), np.uint8), None
    for rows, strip in _strips(image):
        rgb, opacity = _strip_to_srgb(_scale_grey(strip, white) if is_deep else strip, notes)
        pixels[rows] = np.asarray(rgb)
        if opacity is not None:
            alpha = np.full(pixels.shape[:2], 255, np.uint8) if alpha is None else alpha
            alpha[rows] = opacity
    return pixels, alpha


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """The picture in parts of complete rows with `STRIP_PIXELS` pixels each."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield slice(top, bottom), image if rows >= image.height else image.crop((0, top, image.width, bottom))


def _strip_to_srgb(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Pixels | None]:
    profile = image.info.get("icc_profile")
    alpha = None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = np.array(rgba.getchannel("A"))
        image = image.convert("L") if image.mode == "LA" else rgba.convert("RGB")
    elif image.mode not in COLOUR_SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    rgb = (_convert_by_profile(image, profile, notes) if profile else None) or _convert_without_profile(image, notes)
    if alpha is None or int(alpha.min()) == 255:
        return rgb, None
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), Image.fromarray(alpha)), alpha


def _white(image: Image.Image) -> float:
    """The value of white in a picture of 16 or 32 bits."""
    if image.mode.startswith("I;16"):
        return 65535.0
    maximum = max(float(_finite(strip).max(initial=0.0)) for _, strip in _strips(image))
    if image.mode == "F":
        return 1.0 if maximum <= 1 else 255.0 if maximum <= 255 else maximum
    return 65535.0 if maximum <= 65535 else 2.0**32 - 1 if maximum > 2**31 - 1 else 2.0**31 - 1


def _finite(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _scale_grey(image: Image.Image, white: float) -> Image.Image:
    """Scale grey of 16 or 32 bits to 8 bits, which Pillow's own conversion clips at 255; keep its transparent value."""
    scaled = Image.fromarray(np.clip(np.rint(_finite(image) * (255.0 / white)), 0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)))
    scaled.info["icc_profile"] = image.info.get("icc_profile")
    return scaled


def _convert_by_profile(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image | None:
    """Convert the picture from its embedded ICC profile to sRGB. Return None if the profile is not usable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if image.mode == "L" and space == "RGB":
            image = image.convert("RGB")  # grey files saved with a colour profile are common
        if COLOUR_SPACES.get(image.mode) != space:
            notes.append(Message("its colour profile is for {space}, not for this picture: left out", space))
            return None
        if space == "RGB" and (source.profile.profile_description or "").startswith("sRGB"):
            return None  # already there; a pass through the tables would only round
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("its colour profile is damaged: left out")
        return None


def _convert_without_profile(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode == "CMYK":
        notes.append("CMYK without a colour profile: its colours are a guess")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert rgb is not None  # only an in-place conversion returns None
        return rgb
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large photo takes its time
