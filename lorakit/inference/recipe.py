"""The recipe of a picture: its settings, in the metadata formats of web UIs and of lorakit."""

from __future__ import annotations

import json

from lorakit import __version__, families
from lorakit.families.facts.distilled import Sampling


def picture_info(
    info: families.BaseInfo,
    sampler: str,
    prompt: str,
    seed: int,
    sample: Sampling,
    size: tuple[int, int],
    adapter: str,
    strength: float,
) -> dict[str, str]:
    """The recipe as text for web UIs ("parameters"), and as JSON ("lorakit")."""
    width, height = size
    tag = f" <lora:{adapter}:{strength:g}>" if adapter else ""
    negative = f"\nNegative prompt: {sample.negative_prompt}" if sample.negative_prompt else ""
    spacing = "Uniform" if info.distilled is None else "SGM Uniform"
    skip = f"Clip skip: {info.clip_skip}, " if info.clip_skip != (info.spec.clip_skip or 0) else ""
    parameters = (
        f"{prompt}{tag}{negative}\nSteps: {sample.steps}, Sampler: {sampler}, Schedule type: {spacing}, "
        f"CFG scale: {sample.guidance:g}, Seed: {seed}, Size: {width}x{height}, "
        f"Model: {info.title}, {skip}RNG: CPU, Version: lorakit {__version__}"
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
