"""Encode photos, class images and texts once, before the first step, with the frozen encoders.

The results stay on the device for the run. A step indexes them and runs the model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps

from lorakit.config import Config, DataConfig, SampleConfig
from lorakit.config.sample_prompts import parse
from lorakit.data import captions, concepts, decode, latents
from lorakit.data.dataset import Dataset
from lorakit.inference import class_images, sampling
from lorakit.inference.mode import polled
from lorakit.training.parallel import SINGLE, Processes, Tasks
from lorakit.training.prior import ReferenceTexts, random_texts

if TYPE_CHECKING:
    from lorakit.core.events import Events
    from lorakit.core.protocols import Map, Trainable
    from lorakit.data.checks import Report
    from lorakit.data.photo_folder import Photo
    from lorakit.families import Family
    from lorakit.families.conditioning import Conditioning

# Pixels that the autoencoder encodes in one batch on a GPU: one picture of that size keeps it busy. A CPU is faster
# with one picture at a time, and its latents then do not depend, to the bit, on the other pictures.
PIXELS = 512 * 512
# Texts in one batch: SDXL's second encoder keeps 6.5 MB for each in half precision, and there may be hundreds.
TEXTS = 16


@dataclass(frozen=True)
class ClassLatents:
    """Precomputed class images for prior preservation.

    Attributes:
        mean, std: `[n, C, h, w]`.
        text_rows: int64 `[n]`, for each image the index of its prompt in `Precomputed.class_texts`.
        sizes: name -> one row: the family's `size_conditions`, which all images share.
    """

    mean: torch.Tensor
    std: torch.Tensor
    text_rows: torch.Tensor
    sizes: dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampleInputs:
    """The sample prompts and, where no text encoder is trained, their embeddings.

    Attributes:
        embeddings: of the prompts, for `sampling.draw`; None where a text encoder is trained.
        condition: of the first prompt, for `selfcheck.probe`; None where a text encoder is trained.
    """

    prompts: list[str]
    embeddings: list[dict[str, Any]] | None
    condition: Conditioning | None

    @property
    def first(self) -> str:
        """The first prompt, without its own settings."""
        return parse(self.prompts[0], SampleConfig(), (0, 0)).text


@dataclass(frozen=True)
class Precomputed:
    """All inputs of training and validation.

    Attributes:
        dataset: the photos to train on; holdout: those kept for validation, or None.
        conditions: embeddings of `dataset.texts` by the base, one row each.
        tokens: token ids of `dataset.texts` for `Family.encode_tokens` where a text encoder is trained, else None.
        class_texts: the class prompt, then the other texts that photos have when the trigger is left out.
        class_conditions, class_tokens: the same of `class_texts`.
        class_of: int64 `[len(dataset.texts)]`, for each text its index in `class_texts`.
        class_latents: class images where `train.prior` is "images", else None.
        samples: inputs of the samples that the run draws.
        other_rows: int64 `[n]`, indices of `train.prior_prompts` in `class_texts`.
        reference_texts: texts for `prior.text_distance` where `train.text_prior_weight` is set, else None.
    """

    dataset: Dataset
    holdout: Dataset | None
    conditions: Conditioning
    tokens: list[torch.Tensor] | None
    class_texts: list[str]
    class_conditions: Conditioning
    class_tokens: list[torch.Tensor] | None
    class_of: torch.Tensor
    class_latents: ClassLatents | None
    samples: SampleInputs
    other_rows: torch.Tensor = field(default_factory=functools.partial(torch.empty, 0, dtype=torch.int64))
    reference_texts: ReferenceTexts | None = None


def precompute(
    config: Config,
    family: Family,
    adapter: Trainable | None,
    report: Report,
    events: Events,
    poll: Callable[[], object] = lambda: None,
    processes: Processes = SINGLE,
) -> Precomputed:
    """Encode the photos and texts of a run. One part of the base is on the device at a time.

    Args:
        adapter: an adapter that is attached already, or None; it is disabled while class images are drawn and texts
            encoded.
        report: the result of `data.checks.check`.
        events: receives messages and progress.
        poll: called before each batch of photos or texts and each pass of the UNet; its exceptions end the work.
        processes: the processes of the run. They share photos and class images; those that wait run `tasks`.

    Raises:
        LorakitError: a photo cannot be read or its latents are not finite; the class-image cache cannot be written.
    """
    encode_images = _encoder(family, events, poll, processes)
    family.release("unet", "text_encoders")
    dataset, holdout = _photos(config, family, report, encode_images, events)
    configs = concepts.of_photos(report.photos, config.data)
    without = [captions.class_text_of_any(text, configs) for text in dataset.texts]
    own_class = _own_class_texts(config, report)
    class_texts = list(
        dict.fromkeys([captions.class_prompt(configs[0]), *config.train.prior_prompts, *without, *own_class.values()])
    )
    family.release("vae")
    class_latents = None
    with adapter.disabled() if adapter else contextlib.nullcontext(), polled(family.modules().values(), poll):
        tokens, class_tokens = _tokens(config, family, dataset.texts, class_texts)
        conditions, class_conditions = embed(family, tokens), embed(family, class_tokens)
        samples = _samples(config, family, configs)
        reference_texts = (
            _reference_texts(config, family, class_tokens, tokens, configs) if config.train.text_prior_weight else None
        )
        if own_class:
            class_latents = _own_class_latents(config, family, own_class, class_texts, encode_images, events)
        elif config.train.prior == "images":
            draw = functools.partial(processes.map, "draw")
            class_latents = _class_latents(config, family, class_texts, class_tokens, draw, encode_images, events)
    family.release("vae", "text_encoders")
    return Precomputed(
        dataset=dataset,
        holdout=holdout,
        conditions=conditions,
        tokens=tokens if config.adapter.trains_text else None,
        class_texts=class_texts,
        class_conditions=class_conditions,
        class_tokens=class_tokens if config.adapter.trains_text else None,
        class_of=_places(without, class_texts, family.device),
        class_latents=class_latents,
        samples=samples,
        other_rows=_places(config.train.prior_prompts, class_texts, family.device),
        reference_texts=reference_texts,
    )


def _places(texts: Sequence[str], among: list[str], device: torch.device) -> torch.Tensor:
    return torch.tensor([among.index(text) for text in texts], dtype=torch.int64, device=device)


def _encoder(family: Family, events: Events, poll: Callable[[], object], processes: Processes) -> latents.EncodeImages:
    def encode_image(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        poll()
        return family.encode_image(pixels)

    def encode_images(batches: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for mean, std in processes.map("encode", encode_image, batches):
            events.advance(len(mean))
            yield mean, std

    return encode_images


def _photos(
    config: Config, family: Family, report: Report, encode_images: latents.EncodeImages, events: Events
) -> tuple[Dataset, Dataset | None]:
    """The photos to train on, and those kept for validation."""
    sizes = len(config.data.resolutions) * config.data.variants
    events.begin("encoding the photos", len(report.photos) * sizes)
    return latents.build(
        report,
        config.data,
        config.train,
        encode_images=encode_images,
        size_conditions=family.size_conditions,
        device=family.device,
        identity=family.info.hash,
        say=events.say,
        batch_size=lambda size: _at_once(size.width * size.height, family.device),
    )


def embed(family: Family, tokens: list[torch.Tensor]) -> Conditioning:
    """Embeddings of the texts whose token ids `Family.tokens` returned, one row each, with the current encoders."""
    with torch.no_grad():
        parts = [
            family.encode_tokens([table[at : at + TEXTS] for table in tokens]) for at in range(0, len(tokens[0]), TEXTS)
        ]
    return type(parts[0]).cat(parts)


def _at_once(pixels: int, device: torch.device) -> int:
    return 1 if device.type == "cpu" else max(1, PIXELS // pixels)


def _tokens(config: Config, family: Family, *lists: list[str]) -> Iterator[list[torch.Tensor]]:
    """The token ids of each list of texts. All have one length, so that a step does not depend on which texts it
    has."""
    family.reserve(config.data.trigger, config.adapter.new_tokens)
    chunks = min(family.chunks([text for texts in lists for text in texts]), captions.max_chunks(config.data))
    for texts in lists:
        parts = [family.tokens(texts[at : at + TEXTS], chunks) for at in range(0, len(texts), TEXTS)]
        yield [torch.cat(tables) for tables in zip(*parts, strict=True)]


def _reference_texts(
    config: Config,
    family: Family,
    class_tokens: list[torch.Tensor],
    photo_tokens: list[torch.Tensor],
    configs: Sequence[DataConfig],
) -> ReferenceTexts:
    """Texts without a trigger, and their embeddings by the base."""
    triggers = [each.trigger for each in configs]
    tokens = random_texts(family, class_tokens, photo_tokens, triggers, config.train.seed)
    return ReferenceTexts(tokens, embed(family, tokens))


def _samples(config: Config, family: Family, concept_configs: Sequence[DataConfig]) -> SampleInputs:
    prompts = list(config.sample.prompts) or captions.sample_prompts_of_all(concept_configs)
    if config.adapter.trains_text:
        return SampleInputs(prompts, None, None)
    embeddings = sampling.embed(family, prompts, config.sample)
    return SampleInputs(prompts, embeddings, family.encode_text([SampleInputs(prompts, None, None).first]))


def tasks(family: Family) -> Tasks:
    """The tasks of the processes that wait while the first one runs `precompute`."""
    return {"encode": family.encode_image, "draw": functools.partial(sampling.draw_part, family)}


def _class_images(
    config: Config, family: Family, class_texts: list[str], class_tokens: list[torch.Tensor], draw: Map, events: Events
) -> tuple[list[Image.Image], list[int]]:
    """Draw class images with the base, or take them from the user's cache. Return them with the index of each one's
    text.

    Images are distributed over all class texts, so that the base keeps its output for texts such as "a toy on a beach".
    """
    side = config.data.resolution
    total, seed = config.train.class_images, config.train.seed
    pictures, text_rows = [], []
    prompts = class_texts[:total]
    # The same token ids as in training.
    rows = [[table[place : place + 1] for table in class_tokens] for place in range(len(prompts))]
    embeds = sampling.embed_each(family, [functools.partial(family.encode_tokens, row) for row in rows], config.sample)
    groups = [
        class_images.find(family, prompt, text, len(range(place, total, len(class_texts))), config.sample, side, seed)
        for place, (prompt, text) in enumerate(zip(prompts, embeds, strict=True))
    ]
    events.say(class_images.summary(groups))
    missing = any(group.missing for group in groups)
    events.begin("drawing the class images" if missing else "reading the class images", total)
    for place, group in enumerate(groups):
        pictures += class_images.draw(family, group, events=events, map_batches=draw)
        text_rows += [place] * len(group.files)
    return pictures, text_rows


def _own_class_texts(config: Config, report: Report) -> dict[Photo, str]:
    """The user's own class images and their texts; empty unless `train.prior` is "images"."""
    own = report.class_photos if config.train.prior == "images" else []
    return {photo: captions.class_photo_text(photo, config.data) for photo in own}


def _own_class_latents(
    config: Config,
    family: Family,
    own: Mapping[Photo, str],
    class_texts: list[str],
    encode_images: latents.EncodeImages,
    events: Events,
) -> ClassLatents:
    """Encode the user's own class images, each cropped to the square in its middle."""
    side = config.data.resolution

    def square(photo: Photo) -> Image.Image:
        picture = decode.decode(photo.path.read_bytes(), photo.relative)
        return ImageOps.fit(picture.image, (side, side), Image.Resampling.LANCZOS)

    text_rows = [class_texts.index(text) for text in own.values()]
    events.begin("encoding the class images", len(own))
    return _encode_class(family, [square(photo) for photo in own], text_rows, side, encode_images)


def _class_latents(
    config: Config,
    family: Family,
    class_texts: list[str],
    class_tokens: list[torch.Tensor],
    draw: Map,
    encode_images: latents.EncodeImages,
    events: Events,
) -> ClassLatents:
    """The latents of the class images that the base draws."""
    pictures, rows = _class_images(config, family, class_texts, class_tokens, draw, events)
    events.begin("encoding the class images", len(pictures))
    return _encode_class(family, pictures, rows, config.data.resolution, encode_images)


def _encode_class(
    family: Family,
    pictures: Sequence[Image.Image],
    text_rows: list[int],
    side: int,
    encode_images: latents.EncodeImages,
) -> ClassLatents:
    batches = class_images.as_pixels(pictures, _at_once(side * side, family.device))
    means, stds = zip(*encode_images(batches), strict=True)
    conditions = family.size_conditions((side, side), (0, 0), (side, side))
    mean, std = (torch.cat([part.to(family.device) for part in parts]) for parts in (means, stds))
    rows = torch.tensor(text_rows, device=family.device)
    sizes = {name: torch.tensor([row], device=family.device) for name, row in conditions.items()}
    return ClassLatents(mean, std, rows, sizes)
