"""Draw pictures: samples during a run, pictures from a finished file, and class images for prior preservation.

Nothing here disturbs training: each picture has its own generator, the scheduler is new, and train flags are restored.
A picture depends only on its prompt and its seed, not on the other pictures. Seeds count up from `sample.seed`, as in
web UIs. Noise is drawn on the CPU; a web UI set to CPU noise starts from the same noise.
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

# Called with the number of finished pictures and the total.
Progress = Callable[[int, int], object]
# diffusers' sampler of a distilled model -> its name in web UIs.
SAMPLERS = {"EulerDiscreteScheduler": "Euler", "LCMScheduler": "LCM"}
# Steps of the solver that an LCM was distilled from; sampling uses a part of them.
LCM_STEPS = 50


@dataclass(frozen=True)
class Part:
    """Pictures that are drawn in one batch: the arguments of `draw_batch`, and values for their recipe.

    Attributes:
        prompt: None for pictures without a recipe.
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
    """Draw one picture for each prompt with the current weights.

    They are drawn one by one: rounding then does not depend on other pictures, and memory is that of a single picture.

    Args:
        family: the loaded base, with an adapter or without.
        prompts: the n-th is drawn with seed `sample.seed + n`; each may have its own settings (`sample_prompts`).
        size: side, or (width, height), in pixels.
        embeddings: the result of `embed` for the prompts; computed by default.
        adapter: stem of the adapter's file, for the recipe.
        strength: strength of the adapter, for the recipe.

    Returns:
        RGB pictures. Their `info` has the recipe, which `image_grid.save` writes into the file: "parameters" in the
        format of web UIs, "lorakit" as JSON.
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
    """The pictures of `draw` as arguments of `draw_part`, one each."""
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
    """As `draw_batch`, with a new pipeline. A picture with a prompt gets its recipe."""
    pipeline, sampler = sampling_pipeline(family, part.sample.steps)
    pictures = draw_batch(family, pipeline, part.text, part.seeds, part.sample, part.size)
    if part.prompt is not None:
        for picture, seed in zip(pictures, part.seeds, strict=True):
            facts = part.prompt, seed, part.sample, part.size, part.adapter, part.strength
            picture.info.update(picture_info(family.info, sampler, *facts))
    return pictures


def embed(family: Family, prompts: Sequence[str], sample: SampleConfig) -> list[dict[str, torch.Tensor]]:
    """Embeddings of each prompt and its negative prompt, by the names of the pipeline's arguments.

    UNet and VAE leave the device unless they have trained weights.
    """
    embeddings = []
    for own in parse_all(list(prompts), sample, (0, 0)):
        embeddings += embed_each(family, [partial(family.encode_prompt, own.text)], own.sample)
    return embeddings


def embed_each(
    family: Family, encoders: Sequence[Callable[[], Conditioning]], sample: SampleConfig
) -> list[dict[str, torch.Tensor]]:
    """As `embed`, with one encoding function for each text, for texts that are not in the prompt syntax of web UIs."""
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
    """Repeat states `[1, T, D]` until their number is the least common multiple of both lengths. Attention to states
    that all occur equally often is the same as to each of them once (as in ComfyUI)."""
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
    """As `lorakit sample`: draw pictures with an exported adapter, with the settings of its run.

    Args:
        adapter: the adapter's file, or its PEFT folder.
        prompts: the prompts; by default those of the run.
        base: base model: a folder, a file or a hub id; by default the one named in the file, see `base_of`.
        strengths: strengths of the adapter, one row of the grid each; 0 is the base alone.
        folder: output folder; by default `runs/<time>-<name>`.
        size: side in pixels; None: as trained.
        overrides: option -> value, which replaces the recorded one, e.g. {"sample.steps": 20}.
        progress: called after each picture with the number of finished pictures and the total.

    Returns:
        the files of the grid and of each picture.

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
    """Find the base that an adapter was trained on, on this machine.

    Raises:
        LorakitError: the file is not an adapter, or the base is not found; the message says what to give.
    """
    return adapter_base.find(Path(adapter), formats.read(Path(adapter), embedding=True).metadata)


def findings(adapter: str | Path, prompts: Sequence[str], *, base: str, overrides: Mapping[str, object]) -> list[str]:
    """Messages about parts of the prompts that `sample` leaves out or reads differently than web UIs."""
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
    """Draw pictures with an exported adapter in a newly loaded base and write them to a folder. The grid's path is
    first.

    Strength 0 is the base. With the prompts and settings of the run (`recorded` has the latter), the pictures equal the
    last samples of the run, to the bit on the CPU.

    Args:
        adapter: a file or a PEFT folder.
        prompts: the prompts; by default the sample prompts for the trigger in the file.
        folder: output folder, new or empty; by default runs/<time>-<name>-samples.
        size: side in pixels; by default `sample.width` and `sample.height`, else the training resolution.

    Raises:
        LorakitError: the file is not an adapter or is for another family, there is no prompt and no trigger, or the
            folder is not empty.
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
    """As `from_file`, for loaded weights and without writing: a list for each strength, with one picture per prompt."""
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
    # The run may have offloaded weights on CUDA; other devices cannot, and the pictures are the same.
    stream = where.stream_base and device.type == "cuda"
    family = families.load(
        info, device, placement.dtype(where, device), where.base_storage, stream, where.engine == "plain"
    )
    applied = adapters.apply(family, weights)
    embeddings = []
    for strength in strengths:  # encode all texts before the UNet is moved to the device
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

    `lorakit sample` uses it, so that its pictures are those of the run.

    Raises:
        ConfigError: an override is invalid.
        LorakitError: the file is not an adapter.
    """
    return _recorded(formats.read(adapter, embedding=True).metadata, overrides)


def _recorded(metadata: Mapping[str, str], overrides: Mapping[str, Any]) -> Config:
    defaults = load(None, {"train.steps": 1} | dict(overrides))
    try:
        return from_tables(foreign_json.loads(metadata["lorakit.config"]), overrides)
    except (KeyError, ValueError, AttributeError, ConfigError):
        # From another program, or from a later version of lorakit with other options.
        skip, own = metadata.get("ss_clip_skip", ""), _own_clip_skip(metadata)
        if not skip.isdecimal() or own is None or int(skip) <= own or defaults.model.clip_skip is not None:
            return defaults
        return replace(defaults, model=replace(defaults.model, clip_skip=int(skip)))


def _own_clip_skip(metadata: Mapping[str, str]) -> int | None:
    """The default layer of a file's family, if `model.clip_skip` can change it."""
    family = metadata_family(metadata)
    return registry.family_of(family).clip_skip if family else None


def sampling_pipeline(family: Family, num_inference_steps: int = 1) -> tuple[DiffusionPipeline, str]:
    """The family's pipeline for embedded texts, with a new sampler for this number of steps, and the sampler's name in
    web UIs. The text encoders leave the device."""
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
    """Draw one batch, one picture per seed, with the pipeline, and decode it with the family's VAE (always float32)."""
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
            generator=generators,  # for samplers that add noise
            output_type="latent",
        ).images
        pixels = family.decode(latents.float())
    values = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(value) for value in values]


def _times(value: Any, count: int) -> Any:
    """Repeat the one row of an embedding; None (no negative prompt without guidance) stays None."""
    return None if value is None else value.repeat_interleave(count, dim=0)
