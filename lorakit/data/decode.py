"""The one place where a picture's bytes become pixels: upright, in sRGB, 8 bits, on white.

Pillow and numpy only. Everything that shows, checks or encodes a photo goes through `decode`.
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

# Pillow refuses above this (twice its warning limit); it is past every phone and camera that is not a stitched scan.
MAX_PIXELS = 178_956_970
ORIENTATION = 0x0112
TURNS = {
    2: "mirrored", 3: "turned 180°", 4: "mirrored, turned 180°", 5: "mirrored, turned 90° left",
    6: "turned 90° right", 7: "mirrored, turned 90° right", 8: "turned 90° left",
}  # fmt: skip
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}  # Pillow's mode -> ICC colour space
HEIC_HINT = "HEIC needs an extra: pip install 'lorakit[heic]'"
# Pillow warns of large pictures, odd palettes and damaged EXIF data, once and without the file's name.
warnings.filterwarnings("ignore", module=r"PIL\.")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Unreadable(LorakitError):
    """A file that cannot be decoded. `reason` says why and what to do, without the file's name."""

    def __init__(self, name: str, reason: str):
        self.reason = reason
        super().__init__(f"{name}: {reason}")


@dataclass(frozen=True)
class Decoded:
    """A picture, ready to use.

    Attributes:
        pixels: uint8 `[height, width, 3]`, sRGB, upright, transparency shown on white.
        alpha: uint8 `[height, width]`, or None where nothing is transparent.
        orientation: what its EXIF tag asked for, "" if nothing.
        notes: what else was done to it that its owner may want to know.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    orientation: str = ""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""
        return self.pixels.shape[1], self.pixels.shape[0]


def decode(source: Path | bytes, name: str = "", *, at_least: int | None = None) -> Decoded:
    """Read a picture.

    Args:
        source: a file, or its bytes.
        name: what messages call it; by default the file's own name.
        at_least: for a thumbnail with this side: a JPEG may be decoded at a half, quarter or eighth of its size, which
            is many times faster, as long as both of its sides stay that long.

    Raises:
        Unreadable: with the file's name, the cause, and what to do.
    """
    name = name or (source.name if isinstance(source, Path) else "picture")
    image = _open(source, name)
    if at_least is not None:
        image.draft(None, (at_least, at_least))
    notes = _frames(image)
    orientation = _orientation(image)  # before the pixels: Pillow turns a TIFF while it loads and forgets the tag
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise Unreadable(name, f"damaged or cut off ({error}); copy it again from where it came") from None
    if orientation in TURNS:
        image = ImageOps.exif_transpose(image)
    rgb, alpha = _to_srgb(image, notes)
    return Decoded(np.array(rgb), alpha, TURNS.get(orientation, ""), tuple(notes))


def measure(source: Path | bytes, name: str = "") -> tuple[int, int]:
    """(width, height) of a picture as `decode` will give it, from the header alone.

    Raises:
        Unreadable: as `decode`.
    """
    image = _open(source, name or (source.name if isinstance(source, Path) else "picture"))
    turned = _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"  # a TIFF's size is already the upright one
    return (image.height, image.width) if turned else (image.width, image.height)


def decode_mask(path: Path, size: tuple[int, int], name: str = "") -> Pixels:
    """A mask as uint8 `[height, width]`: white is learned, black is not.

    Raises:
        Unreadable: as `decode`, and where its size is not the photo's.
    """
    name = name or path.name
    decoded = decode(path, name)
    if decoded.size != size:
        raise Unreadable(name, "mask is {} x {}, its photo {} x {}: make them equal".format(*decoded.size, *size))
    return np.array(Image.fromarray(decoded.pixels).convert("L"))


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
        raise Unreadable(name, _too_large()) from None
    except UnidentifiedImageError:
        raise Unreadable(name, _unidentified(raw)) from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise Unreadable(name, f"damaged or cut off ({error}); copy it again from where it came") from None
    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(name, _too_large())
    return image


def _register_heif(name: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise Unreadable(name, HEIC_HINT) from None
    pillow_heif.register_heif_opener()


def _too_large() -> str:
    return f"more than {MAX_PIXELS // 10**6} megapixels; save it smaller"


def _unidentified(raw: bytes) -> str:
    head = raw[:512]
    if b"\0" not in head:
        try:
            head.decode("utf-8")
        except UnicodeDecodeError:
            pass
        else:
            return "text, not a picture, whatever its name says; remove it or save the picture again"
    return "not a picture that can be read; save it as jpg or png"


def _frames(image: Image.Image) -> list[str]:
    """A note where a file holds several pictures. An MPO's others are the same view for 3-D screens: no note."""
    if image.format in ("MPO", "JPEG"):
        return []
    try:
        count = int(getattr(image, "n_frames", 1))
        image.seek(0)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error):
        return []  # the damage is named when the pixels are loaded
    if count < 2:
        return []
    what = "page" if image.format == "TIFF" else "picture"
    return [f"holds {count} {what}s: the first is used"]


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where it is absent or damaged: a viewer shows such a photo as it is stored, too."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _to_srgb(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Pixels | None]:
    """RGB on white and the alpha channel, from whatever mode Pillow gave."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey(image)
    alpha = None
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        alpha = np.array(clear.getchannel("A"))
        image = image.convert("L") if image.mode == "LA" else clear.convert("RGB")
    elif image.mode not in SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    rgb = (_colour_managed(image, profile, notes) if profile else None) or _unmanaged(image, notes)
    if alpha is None or int(alpha.min()) == 255:
        return rgb, None
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), Image.fromarray(alpha)), alpha


def _deep_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, scaled by its range; Pillow's own conversion clips at 255."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if image.mode == "F":
        full = 1.0 if top <= 1 else 255.0 if top <= 255 else max(top, 1.0)
    else:
        full = 65535.0 if top <= 65535 else 2.0**32 - 1 if top > 2**31 - 1 else 2.0**31 - 1
    return Image.fromarray(np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8))


def _colour_managed(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image | None:
    """The picture through its embedded ICC profile to sRGB, or None where that is no use, which is said."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if image.mode == "L" and space == "RGB":
            image = image.convert("RGB")  # grey files saved with a colour profile are common
        if SPACES.get(image.mode) != space:
            notes.append(f"its colour profile is for {space}, not for this picture: left out")
            return None
        if space == "RGB" and (source.profile.profile_description or "").startswith("sRGB"):
            return None  # already there; a pass through the tables would only round
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("its colour profile is damaged: left out")
        return None


def _unmanaged(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode == "CMYK":
        notes.append("CMYK without a colour profile: its colours are a guess")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # only an in-place conversion returns None
        return converted
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large photo takes its time
