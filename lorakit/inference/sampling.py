"""Pictures: while a run goes on, from a finished file, and of the class for prior preservation.

Nothing here can disturb training: each picture has its own generator, the scheduler is made afresh, and train flags are
put back. A picture depends on its prompt and its seed only, not on the pictures beside it. Seeds count up from
`sample.seed`, as in web UIs. The noise is drawn on the CPU; a web UI set to CPU noise starts from the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from PIL import Image

from lorakit import adapters, families, formats
from lorakit.adapters.weights import AdapterWeights
from lorakit.config import Config, ConfigError, MemoryConfig, ModelConfig, SampleConfig, from_tables, load
from lorakit.config.sample_prompts import default_size, parse_all
from lorakit.core import foreign_json, registry
from lorakit.core.errors import LorakitError
from lorakit.core.image_grid import grid, save
from lorakit.core.messages import Message
from lorakit.core.names import unique_path
from lorakit.data import captions
from lorakit.engine import device as placement
from lorakit.families import adapter_base, loading
from lorakit.families.facts.distilled import Sampling, complete
from lorakit.formats.metadata import family as metadata_family
from lorakit.inference.mode import inference
from lorakit.inference.recipe import picture_info

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from lorakit.families import Family
    from lorakit.families.conditioning import Conditioning

# Called with how many pictures are drawn, and of how many.
Progress = Callable[[int, int], object]
# diffusers' samplers of distilled models -> the names that web UIs give them.
SAMPLERS = {"EulerDiscreteScheduler": "Euler", "LCMScheduler": "LCM"}
# Steps of the solver that an LCM was distilled from; it draws on a part of them.
LCM_STEPS = 50


@dataclass(frozen=True)
class Part:
    """Pictures that are drawn together: the arguments of `draw_batch`, and further values for their recipe.

    Attributes:
        prompt: None where they are to have no recipe.
    """

    text: Mapping[str, Any]
    seeds: list[int]
    sample: Sampling
    size: tuple[int, int]
    prompt: str | None = None
    adapter: str = ""
    strength: float = 1.0


def draw(
    family: Family,
    prompts: Sequence[str],
    sample: SampleConfig,
    size: int | tuple[int, int],
    *,
    embeddings: Sequence[Mapping[str, Any]] | None = None,
    adapter: str = "",
    strength: float = 1.0,
) -> list[Image.Image]:
    """One picture for each prompt, by the weights as they are.

    Drawn one by one: rounding then does not depend on the company either, and memory is that of a single picture.

    Args:
        family: the loaded base, with an adapter or without.
        prompts: the n-th is drawn with seed `sample.seed + n`; each may have its own settings (`sample_prompts`).
        size: side, or (width, height), in pixels.
        embeddings: what `embed` makes of the prompts; by default it is asked.
        adapter: stem of the adapter's file, for the recipe.
        strength: what the adapter is set to, for the recipe.

    Returns:
        RGB pictures; `info` holds the recipe, which `pictures.save` writes into the file: "parameters" as web UIs read
        it, "lorakit" as JSON.
    """
    own = parts(family, prompts, sample, size, embeddings=embeddings, adapter=adapter, strength=strength)
    return [picture for part in own for picture in draw_part(family, part)]


def parts(
    family: Family,
    prompts: Sequence[str],
    sample: SampleConfig,
    size: int | tuple[int, int],
    *,
    embeddings: Sequence[Mapping[str, Any]] | None = None,
    adapter: str = "",
    strength: float = 1.0,
) -> list[Part]:
    """What `draw` draws, for `draw_part`: a picture each."""
    embeddings = embed(family, prompts, sample) if embeddings is None else embeddings
    side = (size, size) if isinstance(size, int) else size
    parsed = parse_all(list(prompts), sample, side)
    return [
        Part(
            text,
            [own.sample.seed],
            complete(own.sample, family.info),
            own.size,
            prompt=own.text,
            adapter=adapter,
            strength=strength,
        )
        for text, own in zip(embeddings, parsed, strict=True)
    ]


def draw_part(family: Family, part: Part) -> list[Image.Image]:
    """As `draw_batch`, with a new pipeline. A picture with a prompt carries its recipe."""
    pipeline, sampler = sampling_pipeline(family, part.sample.steps)
    pictures = draw_batch(family, pipeline, part.text, part.seeds, part.sample, part.size)
    if part.prompt is not None:
        for picture, seed in zip(pictures, part.seeds, strict=True):
            facts = part.prompt, seed, part.sample, part.size, part.adapter, part.strength
            picture.info.update(picture_info(family.info, sampler, *facts))
    return pictures


def embed(family: Family, prompts: Sequence[str], sample: SampleConfig) -> list[dict[str, torch.Tensor]]:
    """Embeddings of each prompt and its negative prompt, by the names of the pipeline's arguments. Only the text
    encoders and trained parts are on the device meanwhile."""
    embeddings = []
    for own in parse_all(list(prompts), sample, (0, 0)):
        embeddings += embed_each(family, [partial(family.encode_prompt, own.text)], own.sample)
    return embeddings


def embed_each(
    family: Family, encoders: Sequence[Callable[[], Conditioning]], sample: SampleConfig
) -> list[dict[str, torch.Tensor]]:
    """As `embed`, for texts that are not read as web UIs read prompts: each is encoded by its own function."""
    family.release("unet", "vae")
    embeddings, guides = [], complete(sample, family.info).guidance > 1
    with inference(family.text_encoders.values()):
        negative = family.encode_prompt(sample.negative_prompt) if guides else None
        for encode in encoders:
            condition = encode()
            text: dict[str, torch.Tensor] = {}
            for name, part in (("", condition), ("negative_", negative)):
                if part is not None:
                    rows, other = part["encoder_hidden_states"], negative if part is condition else condition
                    text[f"{name}prompt_embeds"] = rows if other is None else _as_long_as(rows, other)
                    if part.get("pooled") is not None:
                        text[f"{name}pooled_prompt_embeds"] = part["pooled"]
            embeddings.append(text)
    return embeddings


def _as_long_as(rows: torch.Tensor, other: Conditioning) -> torch.Tensor:
    """States `[1, T, D]` over and over until another's, over and over, are as many: attention to states that are all
    there equally often is attention to them once (ComfyUI does the same)."""
    length = math.lcm(rows.shape[1], other["encoder_hidden_states"].shape[1])
    return rows.repeat(1, length // rows.shape[1], 1)


def sample(
    adapter: str | Path,
    prompts: Sequence[str] = (),
    *,
    base: str = "",
    strengths: Sequence[float] = (1.0,),
    folder: str | Path | None = None,
    size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress = lambda count, total: None,
) -> list[Path]:
    """As `lorakit sample`: pictures by an exported adapter, with the settings of the run that made it.

    Args:
        adapter: the adapter's file, or its PEFT folder.
        prompts: what to draw; none: what the run drew.
        base: base model: a folder, a file or a hub id; empty: the one that the file names, see `base_of`.
        strengths: one row of the grid for each; 0 is the base alone.
        folder: where the pictures go; `runs/<time>-<name>` unless given.
        size: side in pixels; None: as trained.
        overrides: dotted option names over the recorded ones, e.g. {"sample.steps": 20}.
        progress: called after each picture with how many are drawn, and of how many.

    Returns:
        the grid, then each picture.

    Raises:
        ConfigError: an override is wrong.
        LorakitError: as `from_file`.
    """
    config = recorded(Path(adapter), overrides or {})
    return from_file(
        Path(adapter),
        replace(config.model, base=base or base_of(adapter)),
        prompts or config.sample.prompts,
        strengths,
        config.sample,
        folder=Path(folder) if folder else None,
        size=size,
        memory=config.memory,
        progress=progress,
    )


def base_of(adapter: str | Path) -> str:
    """The base that an adapter was trained on, found on this machine.

    Raises:
        LorakitError: not an adapter, or the base is not found; the message says what to give.
    """
    return adapter_base.find(Path(adapter), formats.read(Path(adapter), embedding=True).metadata)


def findings(adapter: str | Path, prompts: Sequence[str], *, base: str, overrides: Mapping[str, object]) -> list[str]:
    """What of the prompts `sample` leaves out or reads otherwise than web UIs do, a line each."""
    config = recorded(Path(adapter), overrides)
    settings = replace(config.sample, prompts=tuple(prompts) or config.sample.prompts)
    skip = (
        [Message("clip skip {clip_skip}, as the adapter or --set says", config.model.clip_skip)]
        if config.model.clip_skip
        else []
    )
    return skip + captions.prompt_findings(settings, families.describe(replace(config.model, base=base)))


def from_file(
    adapter: Path,
    base: str | ModelConfig,
    prompts: Sequence[str],
    strengths: Sequence[float],
    sample: SampleConfig,
    *,
    folder: Path | None = None,
    size: int | None = None,
    memory: MemoryConfig | None = None,
    progress: Progress = lambda count, total: None,
) -> list[Path]:
    """Pictures by an exported adapter in a base loaded afresh, written to a folder; the grid's path comes first.

    Strength 0 is the base. With the prompts and settings of the run (`recorded` has the latter), the pictures equal
    those of its end, to the bit on the CPU.

    Args:
        adapter: a file or a PEFT folder.
        prompts: what to draw; none: what a run draws for the trigger that the file names.
        folder: where to write, new or empty; by default runs/<time>-<name>-samples.
        size: side in pixels; by default `sample.width` and `sample.height`, else the side it was trained at.

    Raises:
        LorakitError: not an adapter, or one for another family than the base's; no prompt and no trigger; a folder
            with something in it.
    """
    weights = formats.read(adapter, embedding=True)
    config = _recorded(weights.metadata, {})
    prompts = list(prompts) or (captions.sample_prompts(config.data) if config.data.name else [])
    if not prompts:
        raise LorakitError("{adapter} does not say what its trigger is; give a --prompt", adapter.name)
    folder = folder or unique_path(Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{adapter.stem}-samples")
    if folder.is_dir() and any(folder.iterdir()):
        raise LorakitError("{folder} is not empty and nothing in it is overwritten; give another --output", folder)
    side = (size, size) if size else default_size(sample, config.data.resolution)
    rows = draw_weights(
        weights, base, prompts, strengths, sample, side, name=adapter.stem, memory=memory, progress=progress
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table = grid([p for row in rows for p in row], [f"strength {value:g}" for value in strengths], prompts)
        save(table, folder / "grid.png")
        files = [folder / "grid.png"]
        for strength, row in zip(strengths, rows, strict=True):
            for number, picture in enumerate(row, 1):
                files.append(folder / f"{number:02d}-strength-{strength:g}.png")
                save(picture, files[-1])
    except OSError as error:
        raise LorakitError("cannot write to {path}: {why}; give another --output", folder, error.strerror) from None
    return files


def draw_weights(
    weights: AdapterWeights,
    base: str | ModelConfig,
    prompts: Sequence[str],
    strengths: Sequence[float],
    sample: SampleConfig,
    size: int | tuple[int, int],
    *,
    name: str,
    memory: MemoryConfig | None = None,
    progress: Progress = lambda count, total: None,
) -> list[list[Image.Image]]:
    """As `from_file`, of weights already read and without writing: a list for each strength, a picture a prompt."""
    where = memory or MemoryConfig()
    info = families.describe(base)
    if weights.family != info.family:
        raise LorakitError(
            "{name} was made for {family} and {info} is {family_2}; give its --base",
            name,
            weights.family,
            info.title,
            info.family,
        )
    device = placement.device(where)
    placement.prepare(where, device)
    # A file may come from a run on a card that streamed; elsewhere there is nowhere to, and the pictures are the same.
    stream = where.stream_base and device.type == "cuda"
    family = families.load(
        info, device, placement.dtype(where, device), where.base_storage, stream, where.engine == "plain"
    )
    applied = adapters.apply(family, weights)
    embeddings = []
    for strength in strengths:  # all of them before the UNet comes to the device
        applied.set_strength(strength)
        embeddings.append(embed(family, prompts, sample))
    rows: list[list[Image.Image]] = []
    total = len(prompts) * len(strengths)
    for strength, embedded in zip(strengths, embeddings, strict=True):
        applied.set_strength(strength)
        row: list[Image.Image] = []
        for part in parts(family, prompts, sample, size, embeddings=embedded, adapter=name, strength=strength):
            row += draw_part(family, part)
            progress(len(rows) * len(prompts) + len(row), total)
        rows.append(row)
    return rows


def recorded(adapter: Path, overrides: Mapping[str, Any]) -> Config:
    """The config in an adapter's file, with `overrides`. Missing options have their defaults.

    What `lorakit sample` starts from, so that its pictures are those of the run.

    Raises:
        ConfigError: an override is wrong.
        LorakitError: not an adapter.
    """
    return _recorded(formats.read(adapter, embedding=True).metadata, overrides)


def _recorded(metadata: Mapping[str, str], overrides: Mapping[str, Any]) -> Config:
    defaults = load(None, {"train.steps": 1} | dict(overrides))
    try:
        return from_tables(foreign_json.loads(metadata["lorakit.config"]), overrides)
    except (KeyError, ValueError, AttributeError, ConfigError):
        # Made by another program, or by a later lorakit that has other options.
        skip, own = metadata.get("ss_clip_skip", ""), _own_clip_skip(metadata)
        if not skip.isdecimal() or own is None or int(skip) <= own or defaults.model.clip_skip is not None:
            return defaults
        return replace(defaults, model=replace(defaults.model, clip_skip=int(skip)))


def _own_clip_skip(metadata: Mapping[str, str]) -> int | None:
    """The layer that the family of a file is read at, where `model.clip_skip` may say another."""
    family = metadata_family(metadata)
    return registry.family_of(family).clip_skip if family else None


def sampling_pipeline(family: Family, num_inference_steps: int = 1) -> tuple[DiffusionPipeline, str]:
    """The family's pipeline for texts that are embedded already, with a fresh sampler, and the name that web UIs give
    the sampler, which can take so many steps. The text encoders leave the device."""
    family.release("text_encoders")
    pipeline = family.pipeline()
    for name in family.text_encoders:
        setattr(pipeline, name, None)
    own = pipeline.scheduler
    pipeline.scheduler, name = family.prediction.default_sampler(own)
    kind = family.info.distilled
    if kind is not None and not family.info.spec.predicts_flow:
        solver_timesteps = LCM_STEPS if num_inference_steps <= LCM_STEPS else own.config.num_train_timesteps
        changes = {"timestep_spacing": "trailing", "original_inference_steps": solver_timesteps}
        with loading.quiet():  # about settings of other samplers
            pipeline.scheduler = getattr(diffusers, kind.scheduler).from_config(own.config, **changes)
        name = SAMPLERS[kind.scheduler]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, name


def draw_batch(
    family: Family,
    pipeline: DiffusionPipeline,
    text: Mapping[str, Any],
    seeds: list[int],
    sample: Sampling,
    size: tuple[int, int],
) -> list[Image.Image]:
    """One batch, a picture a seed, through the pipeline, decoded by the family's VAE (float32 in every precision)."""
    width, height = size
    family.acquire("unet", "vae")
    shape = (family.info.latent_channels, height // family.info.downscale, width // family.info.downscale)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    with inference([*family.modules().values(), family.vae]):
        latents = pipeline(
            **{name: _times(value, len(seeds)) for name, value in text.items()},
            width=width,
            height=height,
            num_inference_steps=sample.steps,
            guidance_scale=sample.guidance,
            latents=noise.to(family.device, family.dtype),
            generator=generators,  # of samplers that add noise
            output_type="latent",
        ).images
        pixels = family.decode(latents.float())
    values = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(value) for value in values]


def _times(value: Any, count: int) -> Any:
    """The one row of an embedding that often; without guidance there is none of the negative prompt."""
    return None if value is None else value.repeat_interleave(count, dim=0)
