"""Decode the bytes of a picture to pixels: upright, in sRGB, 8 bits, transparency on white.

Imports Pillow and numpy only. Everything that shows, checks or encodes a photo calls `decode`.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lorakit.core.errors import LorakitError

# Pillow refuses more pixels than this (twice its warning limit). Phones and cameras have fewer; stitched scans do not.
MAX_PIXELS = 178_956_970
ORIENTATION = 0x0112
ROTATIONS = {
    2: "mirrored", 3: "turned 180°", 4: "mirrored, turned 180°", 5: "mirrored, turned 90° left",
    6: "turned 90° right", 7: "mirrored, turned 90° right", 8: "turned 90° left",
}  # fmt: skip
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
COLOUR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}  # Pillow's mode -> ICC colour space
HEIC_HINT = "HEIC needs an extra: pip install 'lorakit[heic]'"
# Pillow warns of large pictures, odd palettes and damaged EXIF data, but does not name the file.
warnings.filterwarnings("ignore", module=r"PIL\.")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Unreadable(LorakitError):
    """A file cannot be decoded. `reason` says why and what to do, without the file's name."""

    def __init__(self, name: str, reason: str):
        self.reason = reason
        super().__init__(f"{name}: {reason}")


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        pixels: uint8 `[height, width, 3]`, sRGB, upright, transparency shown on white.
        alpha: uint8 `[height, width]`, or None if nothing is transparent.
        orientation: the rotation of its EXIF tag, or "".
        notes: other changes that the user may want to know of.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    orientation: str = ""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) after the EXIF rotation."""
        return self.pixels.shape[1], self.pixels.shape[0]


def decode(source: Path | bytes, name: str = "", *, at_least: int | None = None) -> Picture:
    """Read a picture.

    Args:
        source: a file, or its bytes.
        name: name of the picture in messages; by default the file's own name.
        at_least: side of a thumbnail. A JPEG is then decoded at a half, quarter or eighth of its size, which is much
            faster, if both of its sides stay at least this long.

    Raises:
        Unreadable: with the file's name, the cause, and what to do.
    """
    name = name or (source.name if isinstance(source, Path) else "picture")
    image = _open(source, name)
    if at_least is not None:
        image.draft(None, (at_least, at_least))
    notes = _note_frames(image)
    orientation = _orientation(image)  # before the pixels: Pillow turns a TIFF while it loads and forgets the tag
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise Unreadable(name, f"damaged or cut off ({error}); copy it again from where it came") from None
    if orientation in ROTATIONS:
        image = ImageOps.exif_transpose(image)
    rgb, alpha = _to_srgb(image, notes)
    return Picture(np.array(rgb), alpha, ROTATIONS.get(orientation, ""), tuple(notes))


def measure(source: Path | bytes, name: str = "") -> tuple[int, int]:
    """(width, height) of the picture that `decode` returns, read from the header alone.

    Raises:
        Unreadable: as `decode`.
    """
    image = _open(source, name or (source.name if isinstance(source, Path) else "picture"))
    swaps_sides = (
        _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"
    )  # a TIFF's size is already the upright one
    return (image.height, image.width) if swaps_sides else (image.width, image.height)


def decode_mask(path: Path, size: tuple[int, int], name: str = "") -> Pixels:
    """Decode a mask to uint8 `[height, width]`: white is learned, black is not.

    Raises:
        Unreadable: as `decode`, and if its size is not the photo's.
    """
    name = name or path.name
    picture = decode(path, name)
    if picture.size != size:
        raise Unreadable(name, "mask is {} x {}, its photo {} x {}: make them equal".format(*picture.size, *size))
    return np.array(Image.fromarray(picture.pixels).convert("L"))


def _open(source: Path | bytes, name: str) -> Image.Image:
    try:
        raw = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise Unreadable(name, f"cannot be read ({error.strerror or error})") from None
    if not raw:
        raise Unreadable(name, "empty, 0 bytes; copy it again from where it came")
    heic = raw[4:8] == b"ftyp" and raw[8:12] in HEIC_BRANDS
    if heic:
        _register_heif(name)
    try:
        image = Image.open(io.BytesIO(raw))
    except Image.DecompressionBombError:
        raise Unreadable(name, _too_large_reason()) from None
    except UnidentifiedImageError:
        raise Unreadable(name, _not_a_picture_reason(raw)) from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise Unreadable(name, f"damaged or cut off ({error}); copy it again from where it came") from None
    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(name, _too_large_reason())
    return image


def _register_heif(name: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise Unreadable(name, HEIC_HINT) from None
    pillow_heif.register_heif_opener()


def _too_large_reason() -> str:
    return f"more than {MAX_PIXELS // 10**6} megapixels; save it smaller"


def _not_a_picture_reason(raw: bytes) -> str:
    head = raw[:512]
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
        count = int(getattr(image, "n_frames", 1))
        image.seek(0)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error):
        return []  # the damage is named when the pixels are loaded
    if count < 2:
        return []
    noun = "page" if image.format == "TIFF" else "picture"
    return [f"holds {count} {noun}s: the first is used"]


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) if it is absent or damaged, as in image viewers."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _to_srgb(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Pixels | None]:
    """Convert any mode of Pillow to RGB on white and an alpha channel."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_grey(image)
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


def _scale_grey(image: Image.Image) -> Image.Image:
    """Scale grey of 16 or 32 bits to 8 bits. Pillow's own conversion clips at 255."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    maximum = float(values.max(initial=0.0))
    if image.mode == "F":
        white = 1.0 if maximum <= 1 else 255.0 if maximum <= 255 else max(maximum, 1.0)
    else:
        white = 65535.0 if maximum <= 65535 else 2.0**32 - 1 if maximum > 2**31 - 1 else 2.0**31 - 1
    return Image.fromarray(np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8))


def _convert_by_profile(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image | None:
    """Convert the picture from its embedded ICC profile to sRGB. Return None if the profile is not usable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if image.mode == "L" and space == "RGB":
            image = image.convert("RGB")  # grey files saved with a colour profile are common
        if COLOUR_SPACES.get(image.mode) != space:
            notes.append(f"its colour profile is for {space}, not for this picture: left out")
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
