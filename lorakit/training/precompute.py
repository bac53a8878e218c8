"""Before the first step: photos, class images and texts through the frozen encoders, once.

The results stay on the device for the whole run, so a step only indexes them and runs the model.
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

if TYPE_CHECKING:
    from lorakit.core.events import Events
    from lorakit.core.protocols import Map, Trainable
    from lorakit.data.checks import Report
    from lorakit.data.photo_folder import Photo
    from lorakit.families import Family
    from lorakit.families.conditioning import Conditioning

# Pictures that the autoencoder is given together on a card: as many as have so many pixels; one of that size keeps it
# busy. A CPU is quicker with one at a time, and a latent is then the same to the bit whatever else is encoded.
PIXELS = 512 * 512
# Texts that are encoded together: SDXL's second encoder keeps 6.5 MB for each, in half precision, and there may be
# hundreds.
TEXTS = 16


@dataclass(frozen=True)
class ClassLatents:
    """Precomputed class images for prior preservation.

    Attributes:
        mean, std: `[n, C, h, w]`.
        text_rows: int64 `[n]`, index into `Precomputed.class_texts` of the text each was drawn for.
        sizes: name -> one row, the family's `size_conditions` of all of them.
    """

    mean: torch.Tensor
    std: torch.Tensor
    text_rows: torch.Tensor
    sizes: dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampleInputs:
    """The sample prompts and, where the text encoders stay as they are, what these make of them.

    Attributes:
        embeddings: of the prompts, for `sampling.draw`; None where a text encoder is trained.
        condition: of the first prompt, for `selfcheck.probe`; None as above.
    """

    prompts: list[str]
    embeddings: list[dict[str, Any]] | None
    condition: Conditioning | None

    @property
    def first(self) -> str:
        """The first prompt without its own settings."""
        return parse(self.prompts[0], SampleConfig(), (0, 0)).text


@dataclass(frozen=True)
class Precomputed:
    """Everything a run trains and is examined on.

    Attributes:
        dataset: the photos to train on; holdout: those kept for validation, or None.
        conditions: the base's embeddings of `dataset.texts`, a row each.
        tokens: `dataset.texts` as `Family.encode_tokens` takes them where a text encoder is trained, else None.
        class_texts: the class prompt, then every other text that a photo's becomes without the trigger.
        class_conditions, class_tokens: of them, likewise.
        class_of: int64 `[len(dataset.texts)]`, each text's place in `class_texts`.
        class_latents: class images where `train.prior` is "images", else None.
        samples: what is drawn while the run goes on.
        other_rows: int64 `[n]`, the places in `class_texts` of `train.prior_prompts`.
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


def precompute(
    config: Config,
    family: Family,
    adapter: Trainable | None,
    report: Report,
    events: Events,
    poll: Callable[[], object] = lambda: None,
    processes: Processes = SINGLE,
) -> Precomputed:
    """Encode the photos and texts of a run, with one part of the base on the device at a time.

    Args:
        adapter: one that is attached already, or None; it is switched off while class images are drawn and texts
            encoded.
        report: what `data.checks.check` reported.
        events: receives messages and progress.
        poll: called before each batch of photos or texts and each pass of the UNet; an exception of it ends the work.
        processes: of the run. Photos and class images are distributed among them; the others wait with `tasks`.

    Raises:
        LorakitError: a photo cannot be read or its latents are not finite; the class-image cache cannot be written.
    """
    encode_images = _encoder(family, events, poll, processes)
    family.release("unet", "text_encoders")
    dataset, holdout = _photos(config, family, report, encode_images, events)
    configs = concepts.of_photos(report.photos, config.data)
    without = [captions.class_text_of_any(text, configs) for text in dataset.texts]
    own_class = _own_class_texts(config, report)
    others = config.train.prior_prompts
    class_texts = list(dict.fromkeys([captions.class_prompt(configs[0]), *others, *without, *own_class.values()]))
    family.release("vae")
    class_latents = None
    disabled = adapter.disabled() if adapter is not None else contextlib.nullcontext()
    with disabled, polled(family.modules().values(), poll):
        tokens, class_tokens = _tokens(config, family, dataset.texts, class_texts)
        conditions, class_conditions = embed(family, tokens), embed(family, class_tokens)
        samples = _samples(config, family, configs)
        if own_class:
            class_latents = _own_class_latents(config, family, own_class, class_texts, encode_images, events)
        elif config.train.prior == "images":
            draw = functools.partial(processes.map, "draw")
            pictures, rows = _class_images(config, family, class_texts, class_tokens, draw, events)
            events.begin("encoding the class images", len(pictures))
            class_latents = _encode_class(family, pictures, rows, config.data.resolution, encode_images)
    family.release("vae", "text_encoders")
    trains_text = config.adapter.trains_text
    return Precomputed(
        dataset=dataset,
        holdout=holdout,
        conditions=conditions,
        tokens=tokens if trains_text else None,
        class_texts=class_texts,
        class_conditions=class_conditions,
        class_tokens=class_tokens if trains_text else None,
        class_of=_places(without, class_texts, family.device),
        class_latents=class_latents,
        samples=samples,
        other_rows=_places(others, class_texts, family.device),
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
    """The embeddings of what `Family.tokens` made of texts, a row each, by the encoders as they are."""
    with torch.no_grad():
        parts = [
            family.encode_tokens([table[at : at + TEXTS] for table in tokens]) for at in range(0, len(tokens[0]), TEXTS)
        ]
    return type(parts[0]).cat(parts)


def _at_once(pixels: int, device: torch.device) -> int:
    return 1 if device.type == "cpu" else max(1, PIXELS // pixels)


def _tokens(config: Config, family: Family, *lists: list[str]) -> Iterator[list[torch.Tensor]]:
    """The tokens of lists of texts, all of one length: what a step computes does not depend on which texts it has."""
    family.reserve(config.data.trigger, config.adapter.new_tokens)
    chunks = min(family.chunks([text for texts in lists for text in texts]), captions.max_chunks(config.data))
    for texts in lists:
        parts = [family.tokens(texts[at : at + TEXTS], chunks) for at in range(0, len(texts), TEXTS)]
        yield [torch.cat(tables) for tables in zip(*parts, strict=True)]


def _samples(config: Config, family: Family, concept_configs: Sequence[DataConfig]) -> SampleInputs:
    prompts = list(config.sample.prompts) or captions.sample_prompts_of_all(concept_configs)
    if config.adapter.trains_text:
        return SampleInputs(prompts, None, None)
    embeddings = sampling.embed(family, prompts, config.sample)
    return SampleInputs(prompts, embeddings, family.encode_text([SampleInputs(prompts, None, None).first]))


def tasks(family: Family) -> Tasks:
    """What a process that waits for `precompute` in the first one does for it."""
    return {"encode": family.encode_image, "draw": functools.partial(sampling.draw_part, family)}


def _class_images(
    config: Config, family: Family, class_texts: list[str], class_tokens: list[torch.Tensor], draw: Map, events: Events
) -> tuple[list[Image.Image], list[int]]:
    """Class images, drawn by the base once and kept in the user's cache, and each one's place in `class_texts`.

    They are shared out among the class texts: under "a toy on a beach" the base must go on drawing what it drew.
    """
    side = config.data.resolution
    total, seed = config.train.class_images, config.train.seed
    pictures, text_rows = [], []
    events.begin("drawing the class images", total)
    prompts = class_texts[:total]
    # As training reads them, letter by letter.
    rows = [[table[place : place + 1] for table in class_tokens] for place in range(len(prompts))]
    embeds = sampling.embed_each(family, [functools.partial(family.encode_tokens, row) for row in rows], config.sample)
    groups = [
        class_images.find(family, prompt, text, len(range(place, total, len(class_texts))), config.sample, side, seed)
        for place, (prompt, text) in enumerate(zip(prompts, embeds, strict=True))
    ]
    events.say(class_images.summary(groups))
    for place, group in enumerate(groups):
        pictures += class_images.draw(family, group, events=events, map_batches=draw)
        text_rows += [place] * len(group.files)
    return pictures, text_rows


def _own_class_texts(config: Config, report: Report) -> dict[Photo, str]:
    """The user's own class images with their texts; none where `train.prior` is not "images"."""
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
    """The user's own class images, each cropped to the square in its middle."""
    side = config.data.resolution

    def square(photo: Photo) -> Image.Image:
        picture = decode.decode(photo.path.read_bytes(), photo.relative)
        return ImageOps.fit(picture.image, (side, side), Image.Resampling.LANCZOS)

    text_rows = [class_texts.index(text) for text in own.values()]
    events.begin("encoding the class images", len(own))
    return _encode_class(family, [square(photo) for photo in own], text_rows, side, encode_images)


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
