"""Before the first step: photos, class images and texts through the frozen encoders, once.

What comes out lies on the device for the whole run, so that a step is nothing but indexing and the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lorakit import sample
from lorakit.config import Config
from lorakit.data import cache, captions
from lorakit.data.cache import Dataset


@dataclass(frozen=True)
class ClassLatents:
    """Encoded class images for prior preservation: mean and std `[n, C, h, w]`, one row of time ids or None."""

    mean: torch.Tensor
    std: torch.Tensor
    time_ids: torch.Tensor | None


@dataclass(frozen=True)
class Encoded:
    """Everything a run trains and is examined on.

    Attributes:
        dataset: the photos to train on; held_out: those kept for validation, or None.
        conditions: the base's embeddings of `dataset.texts`, a row each.
        class_text: the class prompt; class_condition: the base's embedding of it, one row.
        class_latents: class images where `train.prior` is "images", else None.
    """

    dataset: Dataset
    held_out: Dataset | None
    conditions: Any
    class_text: str
    class_condition: Any
    class_latents: ClassLatents | None


def encode(config: Config, family: Any, adapter: Any, photos: Any, say: Callable[[str], None]) -> Encoded:
    """Encode what a run needs. The family's VAE and text encoders must be on the device.

    Args:
        photos: what `data.check.check` reported.
        adapter: switched off while class images are drawn and texts encoded.

    Raises:
        LorakitError: a photo cannot be read or its latents are not finite; the class-image cache cannot be written.
    """
    dataset, held_out = cache.build(
        photos,
        config.data,
        config.train,
        encode_image=family.encode_image,
        time_ids=family.time_ids,
        device=family.device,
        identity=family.info.hash,
        say=say,
    )
    class_text = captions.class_prompt(config.data)
    with adapter.disabled():
        conditions, class_condition = embed(family, dataset.texts, class_text)
        class_latents = _class_latents(config, family, class_text, say) if config.train.prior == "images" else None
    return Encoded(dataset, held_out, conditions, class_text, class_condition, class_latents)


def embed(family: Any, texts: list[str], class_text: str) -> tuple[Any, Any]:
    """(embeddings of the texts, a row each; embedding of the class prompt, one row), by the encoders as they are."""
    with torch.no_grad():
        conditions = family.encode_text([*texts, class_text])
    places = torch.arange(len(texts) + 1, device=family.device)
    return conditions.index(places[:-1]), conditions.index(places[-1:])


def _class_latents(config: Config, family: Any, class_text: str, say: Callable[[str], None]) -> ClassLatents:
    """Class images, drawn by the base once and kept in the user's cache, encoded as the photos were."""
    side = config.data.resolution
    count, seed = config.train.class_images, config.train.seed
    pictures = sample.class_images(family, class_text, count, config.sample, side, seed, say=say)
    means, stds = zip(*(family.encode_image(pixels) for pixels in sample.as_pixels(pictures, 8)), strict=True)
    ids = family.time_ids((side, side), (0, 0), (side, side))
    mean, std = (torch.cat([part.to(family.device) for part in parts]) for parts in (means, stds))
    return ClassLatents(mean, std, None if ids is None else torch.tensor([ids], device=family.device))
