"""Class images drawn by the base, for prior preservation, and their cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from lorakit.config import NO_CLASS_IMAGE_CACHE, SampleConfig
from lorakit.core import image_grid
from lorakit.core.cache_dir import cache_dir
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.families.facts.distilled import Sampling, complete
from lorakit.inference.sampling import Part, draw_part, sampling_pipeline

if TYPE_CHECKING:
    from lorakit.core.events import Events
    from lorakit.core.protocols import Map
    from lorakit.families import Family

CHECKSUM = "blake2b"  # name of the checksum in a picture's metadata
# Number of pixels in one batch of class images.
BATCH_PIXELS = 2 * 512 * 512


# A CPU is fastest with small batches, which fit in its caches.
LARGEST_BATCH = 8


# Maximum denoising steps of class images: more hardly change the sampler's pictures, and there are many to draw.
DENOISING_STEPS = 20


@dataclass(frozen=True)
class CachedImages:
    """The class images of one prompt: their files in the user's cache, and which of them must be drawn.

    Attributes:
        text: the result of `embed` for the prompt.
        recipe: all values that the pictures depend on; its hash names the folder.
        missing: numbers of the files that are missing or damaged.
        damaged: number of damaged files.
    """

    text: Mapping[str, Any]
    sampling: Sampling
    recipe: Mapping[str, Any]
    files: list[Path]
    missing: list[int]
    damaged: int


def find(
    family: Family, prompt: str, text: Mapping[str, Any], count: int, sample: SampleConfig, side: int, seed: int
) -> CachedImages:
    """Look up `count` class images of a prompt in the cache. The n-th depends on (seed, n) and on the recipe."""
    sampling = complete(sample, family.info)
    sampling = replace(sampling, steps=min(sampling.steps, DENOISING_STEPS))
    _, sampler = sampling_pipeline(family, sampling.steps)
    recipe = _recipe(family, text, sampling) | {"prompt": prompt, "size": side, "sampler": sampler, "seed": seed}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    place = cache_dir() / "class-images" / key
    files = [place / f"{number:05d}.png" for number in range(count)]
    missing = [number for number, file in enumerate(files) if not _is_complete(file)]
    return CachedImages(text, sampling, recipe, files, missing, sum(files[number].exists() for number in missing))


def summary(groups: Sequence[CachedImages]) -> str:
    """A message with the numbers of cached and missing class images of all prompts."""
    total, missing, damaged = (
        sum(numbers)
        for numbers in zip(*((len(group.files), len(group.missing), group.damaged) for group in groups), strict=True)
    )
    suffix = Message("; {count} in the cache were damaged and are drawn again", damaged) if damaged else ""
    text = "class images: {cached} of {count} in the cache, {missing} to draw{suffix}"
    return Message(text, total - missing, total, missing, suffix)


def draw(family: Family, group: CachedImages, *, events: Events, map_batches: Map = map) -> list[Image.Image]:
    """All class images of a prompt; missing ones are drawn by the base. The caller disables adapters.

    Args:
        events: counts the pictures.
        map_batches: applies `sampling.draw_part` to each batch.

    Raises:
        LorakitError: the cache cannot be written.
    """
    place, missing = group.files[0].parent, group.missing
    side, seed = group.recipe["size"], group.recipe["seed"]
    events.advance(len(group.files) - len(missing))
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / "recipe.json").write_text(json.dumps(group.recipe, indent=1), encoding="utf-8")
        batch = max(1, min(LARGEST_BATCH, BATCH_PIXELS // side**2))
        batches = [missing[start : start + batch] for start in range(0, len(missing), batch)]
        # A range of seeds that the samples do not use: both are below 2**31.
        seeds = [[2**32 + seed * 2**20 + number for number in numbers] for numbers in batches]
        parts = [Part(group.text, numbers, group.sampling, (side, side)) for numbers in seeds]
        for numbers, pictures in zip(batches, map_batches(partial(draw_part, family), parts), strict=True):
            for number, picture in zip(numbers, pictures, strict=True):
                picture.info[CHECKSUM] = _checksum(picture)
                image_grid.save(picture, group.files[number])
            events.advance(len(numbers))
    except OSError as error:
        raise LorakitError(NO_CLASS_IMAGE_CACHE, place, error.strerror) from None
    return [_open(file) for file in group.files]


def _recipe(family: Family, text: Mapping[str, torch.Tensor], sampling: SampleConfig) -> dict[str, object]:
    """The values that the pictures depend on, from the base and the sample options."""
    recipe: dict[str, object] = {
        "base": family.info.hash,
        "negative_prompt": sampling.negative_prompt,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
    }
    return {**recipe, **_reading(family, text)}


def _reading(family: Family, text: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """How the text is encoded, if it differs from the base's default."""
    token_count, layer = text["prompt_embeds"].shape[1], family.info.clip_skip
    reading = {"tokens": token_count} if token_count > family.info.text_tokens else {}
    return reading | ({"clip_skip": layer} if layer != (family.info.spec.clip_skip or 0) else {})


def as_pixels(images: Sequence[Image.Image], batch: int) -> Iterator[torch.Tensor]:
    """Pictures as `[n, 3, H, W]` float32 in [-1, 1], `batch` of them at a time."""
    for start in range(0, len(images), batch):
        arrays = [np.asarray(image.convert("RGB")) for image in images[start : start + batch]]
        yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _is_complete(file: Path) -> bool:
    try:
        picture = image_grid.read(file)
    except (OSError, SyntaxError, ValueError):
        return False
    return picture.info.get(CHECKSUM) == _checksum(picture)


def _checksum(picture: Image.Image) -> str:
    return hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()


def _open(file: Path) -> Image.Image:
    return image_grid.read(file).convert("RGB")
