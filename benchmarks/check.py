"""Measure time and memory of `lorakit check` with tens of thousands of photos.

    python benchmarks/check.py [--photos 20000] [--megapixels 1] [--like FOLDER] [--keep FOLDER] [--json FILE]

The photos are JPEG files of about `--megapixels` in six aspect ratios. They are crops of the pictures in `--like`, or
of generated clouds with edges, some of them mirrored, with random brightness and noise. About 2 % are exact copies of
another file, and about 5 % are another photo at a lower JPEG quality.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import common
import numpy as np
from PIL import Image

SOURCES, SOURCE_SIDE = 64, 1400
ASPECTS = ((1, 1), (3, 2), (2, 3), (4, 3), (3, 4), (16, 9))


def main() -> None:
    """Create the photos, run the check, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=20_000, help="number of photos (default: %(default)s)")
    parser.add_argument("--megapixels", type=float, default=1.0, help="size of a photo (default: %(default)s)")
    parser.add_argument("--like", type=Path, default=None, help="folder of photos, with subfolders, to crop from")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the photos; photos in it are used again")
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        if not folder.is_dir() or not any(folder.iterdir()):
            make(folder, args.photos, args.megapixels, args.like)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "lorakit", "check", str(folder), "--subject", "sks toy", "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    system = after.ru_stime - before.ru_stime
    processor = after.ru_utime - before.ru_utime + system
    rows = [("wall time", wall, "s"), ("processor time", processor, "s"), ("of it in the system", system, "s")]
    rows.append(("memory at most", after.ru_maxrss / 1024, "MiB"))
    common.finish([common.row(name, value, unit) for name, value, unit in rows], args.json)


def make(folder: Path, count: int, megapixels: float, like: Path | None) -> None:
    """Write `count` photos to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool() as pool:
        pool.starmap(write, [(folder, number, megapixels, like) for number in range(count)], chunksize=50)


@cache
def source(number: int, like: Path | None) -> Image.Image:
    """Return one of the pictures from which photos are cropped."""
    if like is not None:
        files = sorted(path for path in like.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        return Image.open(files[number % len(files)]).convert("RGB")
    draw = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(SOURCE_SIDE)[:, None], np.fft.rfftfreq(SOURCE_SIDE)[None])
    noise = np.fft.rfft2(draw.normal(size=(3, SOURCE_SIDE, SOURCE_SIDE)))
    clouds = np.fft.irfft2(noise / np.maximum(frequency, 1 / SOURCE_SIDE) ** 1.5, s=(SOURCE_SIDE, SOURCE_SIDE))
    clouds /= clouds.std()
    return Image.fromarray(
        np.clip(128 + 40 * (clouds + np.sign(clouds[:1])).transpose(1, 2, 0), 0, 255).astype("uint8")
    )


def write(folder: Path, number: int, megapixels: float, like: Path | None) -> None:
    """Write the photo with this number."""
    draw, path = random.Random(number), folder / f"{number:06d}.jpg"
    original = draw.randrange(number) if number and draw.random() < 0.07 else number
    copy = random.Random(original)
    copy.random()
    picture = source(copy.randrange(SOURCES), like)
    across, down = copy.choice(ASPECTS)
    scale = (megapixels * 1e6 / across / down) ** 0.5 * copy.uniform(0.9, 1.1)
    size = round(across * scale), round(down * scale)
    share = copy.uniform(0.5, 1.0) * min(picture.width / across, picture.height / down)
    left, top = copy.uniform(0, picture.width - across * share), copy.uniform(0, picture.height - down * share)
    picture = picture.resize(size, Image.Resampling.BICUBIC, (left, top, left + across * share, top + down * share))
    pixels = np.asarray(picture, np.float32) * copy.uniform(0.7, 1.2)
    pixels += np.random.default_rng(original).normal(scale=3, size=(*pixels.shape[:2], 1)).astype(np.float32)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)[:, :: copy.choice((1, -1))])
    picture.save(path, quality=90 if original == number or number % 7 < 2 else 75)


if __name__ == "__main__":
    main()
