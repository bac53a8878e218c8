"""Pictures of the class by the base, for prior preservation, kept in a cache."""

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

CHECKSUM = "blake2b"  # the name of the digest of a picture's pixels among its texts
# Class images are drawn as many at a time as have this many pixels together.
BATCH_PIXELS = 2 * 512 * 512


# A CPU draws small pictures fastest in small batches, which stay in its caches.
LARGEST_BATCH = 8


# Denoising steps of class images, at most: the sampler's pictures hardly change beyond, and there are many to draw.
DENOISING_STEPS = 20


@dataclass(frozen=True)
class CachedImages:
    """The class images of one prompt: their files in the user's cache, and which of these are to be drawn.

    Attributes:
        text: what `embed` makes of the prompt.
        recipe: all that the pictures depend on; its hash names the folder.
        missing: numbers of the files that are not there, or damaged.
        damaged: how many are there and damaged.
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
    """Look up `count` class images of a prompt in the cache; the n-th depends on (seed, n) and on the recipe."""
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
    """How many class images are in the cache and how many are to be drawn, of all prompts together."""
    total, missing, damaged = (
        sum(numbers)
        for numbers in zip(*((len(group.files), len(group.missing), group.damaged) for group in groups), strict=True)
    )
    suffix = Message("; {count} in the cache were damaged and are drawn again", damaged) if damaged else ""
    text = "class images: {cached} of {count} in the cache, {missing} to draw{suffix}"
    return Message(text, total - missing, total, missing, suffix)


def draw(family: Family, group: CachedImages, *, events: Events, map_batches: Map = map) -> list[Image.Image]:
    """All class images of a prompt, drawn by the base where they are missing; the caller switches adapters off.

    Args:
        events: counts each picture that is there.
        map_batches: calls `sampling.draw_part` of each batch.

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
    """What the pictures depend on, as far as the base and the options of samples say it."""
    recipe: dict[str, object] = {
        "base": family.info.hash,
        "negative_prompt": sampling.negative_prompt,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
    }
    return {**recipe, **_reading(family, text)}


def _reading(family: Family, text: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """How the text is read, where that is not as the base has it."""
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
