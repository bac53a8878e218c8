"""Pictures: while a run goes on, from a finished file, and of the class for prior preservation.

Nothing here can disturb training: each picture has a generator of its own, the scheduler is made afresh, and train
flags are put back. A picture depends on its prompt and its seed alone, not on what is drawn beside it: seeds count up
from `sample.seed` as web UIs count them, and the noise is drawn on the CPU: a web UI set to CPU noise starts from the
same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from lorakit import __version__, adapters, export, families, memory as placement
from lorakit.cache_folder import cache_folder
from lorakit.config import Config, ConfigError, MemoryConfig, ModelConfig, SampleConfig, from_tables, load
from lorakit.data import captions
from lorakit.errors import LorakitError
from lorakit.evaluate import inference
from lorakit.pictures import grid, save
from lorakit.run_folder import unused
from lorakit.weights import AdapterWeights

# Class images are drawn as many at a time as have this many pixels together.
BATCH_PIXELS = 2 * 512 * 512
# A CPU draws small pictures fastest in small batches, which stay in its caches.
LARGEST_BATCH = 8
# Denoising steps of class images, at most: the sampler's pictures hardly change beyond, and there are many to draw.
CLASS_STEPS = 20


def draw(
    family: Any,
    prompts: Sequence[str],
    sample: SampleConfig,
    size: int | tuple[int, int],
    *,
    texts: Sequence[Mapping[str, Any]] | None = None,
    adapter: str = "",
    strength: float = 1.0,
) -> list[Image.Image]:
    """One picture for each prompt, by the weights as they are.

    Drawn one by one: rounding then does not depend on the company either, and memory is that of a single picture.

    Args:
        family: the loaded base, with an adapter or without.
        prompts: the n-th is drawn with seed `sample.seed + n`.
        size: side, or (width, height), in pixels.
        texts: what `embed` makes of the prompts; by default it is asked.
        adapter: stem of the adapter's file, for the recipe.
        strength: what the adapter is set to, for the recipe.

    Returns:
        RGB pictures; `info` holds the recipe, which `pictures.save` writes into the file: "parameters" as web UIs read
        it, "lorakit" as JSON.
    """
    width, height = (size, size) if isinstance(size, int) else size
    texts = embed(family, prompts, sample) if texts is None else texts
    pipeline, sampler = _pipeline(family)
    drawn = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        seed = sample.seed + number
        (picture,) = _pictures(family, pipeline, text, [seed], sample, (width, height))
        picture.info.update(_recipe(family.info, sampler, prompt, seed, sample, (width, height), adapter, strength))
        drawn.append(picture)
    return drawn


def embed(family: Any, prompts: Sequence[str], sample: SampleConfig) -> list[dict[str, Any]]:
    """What the text encoders, as they are, make of each prompt and of the negative prompt: by the names under which the
    family's pipeline takes it. They have the device to themselves, but for what is trained."""
    family.release("unet", "vae")
    family.acquire("text_encoders")
    pipeline = family.pipeline()
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    texts = []
    for prompt in prompts:
        with inference(family.text_encoders.values()):
            made = pipeline.encode_prompt(
                prompt=[prompt],
                device=family.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=sample.guidance > 1,
                negative_prompt=[sample.negative_prompt],
            )
        texts.append(dict(zip(names, made, strict=False)))
    return texts


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
) -> list[Path]:
    """Pictures by an exported adapter in a base loaded afresh, written to a folder; the grid's path comes first.

    Strength 0 is the base. With the prompts and settings of the run (`recorded` has the latter), the pictures equal
    those of its end, to the bit on the CPU.

    Args:
        adapter: a file or a PEFT folder.
        prompts: what to draw; none: what a run draws for the trigger that the file names.
        folder: where to write, new or empty; by default runs/<time>-<name>-samples.
        size: side in pixels; by default the side it was trained at.

    Raises:
        LorakitError: not an adapter, or one for another family than the base's; no prompt and no trigger; a folder
            with something in it.
    """
    weights = export.read(adapter)
    config = _recorded(weights.metadata, {})
    prompts = list(prompts) or (captions.sample_prompts(config.data) if config.data.name else [])
    if not prompts:
        raise LorakitError(f"{adapter.name} does not say what its trigger is; give a --prompt")
    folder = folder or unused(Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{adapter.stem}-samples")
    if folder.is_dir() and any(folder.iterdir()):
        raise LorakitError(f"{folder} is not empty and nothing in it is overwritten; give another --output")
    size = size or config.data.resolution
    rows = draw_weights(weights, base, prompts, strengths, sample, size, name=adapter.stem, memory=memory)
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
        raise LorakitError(f"cannot write to {folder}: {error.strerror}; give another --output") from None
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
) -> list[list[Image.Image]]:
    """As `from_file`, of weights already read and without writing: a list for each strength, a picture a prompt."""
    where = memory or MemoryConfig()
    info = families.describe(base)
    if weights.family != info.family:
        raise LorakitError(f"{name} was made for {weights.family} and {info.title} is {info.family}; give its --base")
    device = placement.device(where)
    # A file may come from a run on a card that streamed; elsewhere there is nowhere to, and the pictures are the same.
    stream = where.stream_base and device.type == "cuda"
    family = families.load(info, device, placement.dtype(where, device), where.base_storage, stream)
    applied = adapters.apply(family, weights)
    texts = []
    for strength in strengths:  # all of them before the UNet comes to the device
        applied.set_strength(strength)
        texts.append(embed(family, prompts, sample))
    rows = []
    for strength, embedded in zip(strengths, texts, strict=True):
        applied.set_strength(strength)
        rows.append(draw(family, prompts, sample, size, texts=embedded, adapter=name, strength=strength))
    return rows


def recorded(adapter: Path, overrides: Mapping[str, Any]) -> Config:
    """The config that an adapter's file carries, with `overrides` over it; defaults for what it does not say.

    What `lorakit sample` starts from, so that its pictures are those of the run.

    Raises:
        ConfigError: an override is wrong.
        LorakitError: not an adapter.
    """
    return _recorded(export.read(adapter).metadata, overrides)


def _recorded(metadata: Mapping[str, str], overrides: Mapping[str, Any]) -> Config:
    defaults = load(None, {"train.steps": 1} | dict(overrides))
    try:
        return from_tables(json.loads(metadata["lorakit.config"]), overrides)
    except (KeyError, ValueError, AttributeError, ConfigError):
        # Made by another program, or by a later lorakit that has other knobs.
        return defaults


def class_images(
    family: Any,
    prompt: str,
    text: Mapping[str, Any],
    count: int,
    sample: SampleConfig,
    side: int,
    seed: int,
    *,
    say: Callable[[str], None] = lambda line: None,
    folder: Path | None = None,
) -> list[Image.Image]:
    """Pictures of the class by the base, drawn once and kept in the user's cache; the caller switches adapters off.

    The n-th depends on (seed, n) and on what names the folder: base, prompt, size, steps, guidance, negative prompt.
    Whatever is missing is drawn, whether that is all, what an interruption left or what a higher `count` asks for.

    Args:
        text: what `embed` makes of the prompt.
        folder: cache to use instead of the user's.

    Raises:
        LorakitError: the cache cannot be written.
    """
    pipeline, sampler = _pipeline(family)
    sample = replace(sample, steps=min(sample.steps, CLASS_STEPS))
    recipe = {
        "base": family.info.hash,
        "prompt": prompt,
        "negative_prompt": sample.negative_prompt,
        "size": side,
        "steps": sample.steps,
        "guidance": sample.guidance,
        "sampler": sampler,
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    place = (folder or cache_folder()) / "class-images" / key
    files = [place / f"{number:05d}.png" for number in range(count)]
    missing = [number for number, file in enumerate(files) if not _opens(file)]
    say(f"class images: {count - len(missing)} of {count} in the cache, {len(missing)} to draw ({prompt!r})")
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / "recipe.json").write_text(json.dumps(recipe, indent=1), encoding="utf-8")
        batch = max(1, min(LARGEST_BATCH, BATCH_PIXELS // side**2))
        for start in range(0, len(missing), batch):
            numbers = missing[start : start + batch]
            # A seed range of their own, far from the samples' (both are below 2**31).
            seeds = [2**32 + seed * 2**20 + number for number in numbers]
            drawn = _pictures(family, pipeline, text, seeds, sample, (side, side))
            for number, picture in zip(numbers, drawn, strict=True):
                save(picture, files[number])
    except OSError as error:
        raise LorakitError(f"cannot keep class images in {place}: {error.strerror}; set LORAKIT_CACHE") from None
    return [_open(file) for file in files]


def as_pixels(images: Sequence[Image.Image], batch: int) -> Iterator[torch.Tensor]:
    """Pictures as `[n, 3, H, W]` float32 in [-1, 1], `batch` of them at a time."""
    for start in range(0, len(images), batch):
        arrays = [np.asarray(image.convert("RGB")) for image in images[start : start + batch]]
        yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _pipeline(family: Any) -> tuple[Any, str]:
    """The family's pipeline for texts that are embedded already, with a fresh sampler, and the name that web UIs give
    the sampler. The text encoders leave the device."""
    family.release("text_encoders")
    pipeline = family.pipeline()
    for name in family.text_encoders:
        setattr(pipeline, name, None)
    if family.prediction_type == "flow_prediction":
        name = "Euler"  # the scheduler that the base names: straight lines need nothing better
    else:
        pipeline.scheduler, name = _sampler(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, name


def _pictures(
    family: Any, pipeline: Any, text: Mapping[str, Any], seeds: list[int], sample: SampleConfig, size: tuple[int, int]
) -> list[Image.Image]:
    """One batch, a picture a seed, through the pipeline, decoded by the family's VAE (float32 in every precision)."""
    width, height = size
    family.acquire("unet", "vae")
    shape = (family.info.latent_channels, height // family.info.downscale, width // family.info.downscale)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with inference([*family.modules().values(), family.vae]):
        latents = pipeline(
            **{name: _times(value, len(seeds)) for name, value in text.items()},
            width=width,
            height=height,
            num_inference_steps=sample.steps,
            guidance_scale=sample.guidance,
            latents=noise.to(family.device, family.dtype),
            output_type="latent",
        ).images
        pixels = family.decode(latents.float())
    values = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(value) for value in values]


def _times(value: Any, count: int) -> Any:
    """The one row of an embedding that often; without guidance there is none of the negative prompt."""
    return None if value is None else value.repeat_interleave(count, dim=0)


def _sampler(config: Any) -> tuple[Any, str]:
    """A sampler on a base's own noise schedule (its scheduler's config), and the name that web UIs give it.

    DPM++ 2M (Lu et al. 2022, arXiv 2211.01095), on timesteps that begin at pure noise. A schedule that ends in zero
    signal-to-noise has no such step for it; there DDIM begins at the last timestep (Lin et al. 2023, arXiv 2305.08891).
    """
    ddim: Any = DDIMScheduler
    solver: Any = DPMSolverMultistepScheduler
    if config.get("rescale_betas_zero_snr"):
        return ddim.from_config(config, timestep_spacing="trailing", clip_sample=False), "DDIM"
    return solver.from_config(config, timestep_spacing="linspace"), "DPM++ 2M"


def _recipe(
    info: families.BaseInfo,
    sampler: str,
    prompt: str,
    seed: int,
    sample: SampleConfig,
    size: tuple[int, int],
    adapter: str,
    strength: float,
) -> dict[str, str]:
    """What the picture was made with: a line to paste into a web UI, and the same as JSON."""
    width, height = size
    tag = f" <lora:{adapter}:{strength:g}>" if adapter else ""
    negative = f"\nNegative prompt: {sample.negative_prompt}" if sample.negative_prompt else ""
    parameters = (
        f"{prompt}{tag}{negative}\nSteps: {sample.steps}, Sampler: {sampler}, Schedule type: Uniform, "
        f"CFG scale: {sample.guidance:g}, Seed: {seed}, Size: {width}x{height}, "
        f"Model: {info.title}, RNG: CPU, Version: lorakit {__version__}"
    )
    recipe = {
        "prompt": prompt,
        "negative_prompt": sample.negative_prompt,
        "seed": seed,
        "steps": sample.steps,
        "guidance": sample.guidance,
        "sampler": sampler,
        "width": width,
        "height": height,
        "adapter": adapter,
        "strength": strength,
        "base": info.hash,
        "version": __version__,
    }
    return {"parameters": parameters, "lorakit": json.dumps(recipe)}


def _opens(file: Path) -> bool:
    try:
        _open(file)
    except (OSError, SyntaxError):
        return False
    return True


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
