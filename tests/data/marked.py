"""Test pictures that can be identified: each has its own colour and a white mark in its upper left corner."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def picture(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Return uint8 [h, w, 3] in the colour of `number` (0 to 63); the upper left quarter of each side is white."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = [40 + 40 * (number // 16), 40 + 40 * (number // 4 % 4), 40 + 40 * (number % 4)]
    pixels[: height // 4, : width // 4] = 255
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """Return the number of a `picture`, read from the colour at its centre."""
    height, width = pixels.shape[:2]
    red, green, blue = (round((float(value) - 40) / 40) for value in pixels[height // 2, width // 2])
    return 16 * red + 4 * green + blue


def marked_corner(pixels: np.ndarray) -> str:
    """Return the name of the corner with the white mark."""
    corners = {"upper left": (1, 1), "upper right": (1, -2), "lower left": (-2, 1), "lower right": (-2, -2)}
    white = [name for name, place in corners.items() if int(pixels[place].min()) > 235]
    assert len(white) == 1, f"white corners: {white}"
    return white[0]


def save(path: Path, pixels: np.ndarray, orientation: int = 1, **options: object) -> Path:
    """Write a picture with `orientation` in its EXIF data."""
    exif = Image.Exif()
    if orientation != 1:
        exif[ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


def as_camera_stores(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels that a camera stores with an EXIF orientation, so that a viewer shows `upright`.

    The EXIF 2.32 table gives the visual sides of row 0 and column 0. The code uses numpy alone.
    """
    transforms = {
        1: upright,  # row 0: top, column 0: left
        2: upright[:, ::-1],  # row 0: top, column 0: right
        3: upright[::-1, ::-1],  # row 0: bottom, column 0: right
        4: upright[::-1],  # row 0: bottom, column 0: left
        5: upright.transpose(1, 0, 2),  # row 0: left, column 0: top
        6: upright.transpose(1, 0, 2)[::-1],  # row 0: right, column 0: top
        7: upright.transpose(1, 0, 2)[::-1, ::-1],  # row 0: right, column 0: bottom
        8: upright.transpose(1, 0, 2)[:, ::-1],  # row 0: left, column 0: bottom
    }[orientation]
    return np.ascontiguousarray(transforms)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, and "" for each folder. Equal results mean no change."""
    return {
        entry.relative_to(folder).as_posix(): hashlib.sha256(entry.read_bytes()).hexdigest() if entry.is_file() else ""
        for entry in sorted(folder.rglob("*"))
    }
