"""What pocket can do, in the judge's figures: asked for combinations it never saw, drawn, and read back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from lorakit.families.pocket.classifier import Classifier
from lorakit.families.pocket.scene_captions import full_caption
from lorakit.families.pocket.scenes import render
from lorakit.families.pocket.spec import FIELDS, Spec, random_spec
from tools.pocket import autoencoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline

# Shares of what the ceiling allows that the project asks of itself.
MARKS = {"kind": 0.80, "colour": 0.90, "pattern": 0.70, "scene": 0.90, "manner": 0.90}


def requests(count: int = 512, seed: int = 3_000_000_000) -> list[Spec]:
    """Combinations that were held out of training, with uniformly drawn fields."""
    return [random_spec(seed + i, unseen=True) for i in range(count)]


def real_pictures(specs: Sequence[Spec], seed: int = 3_000_000_000) -> list[Image.Image]:
    """Renders of the requests: what a perfect model would draw."""
    return [render(spec, seed + i) for i, spec in enumerate(specs)]


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: Sequence[Image.Image]) -> tuple[list[Image.Image], float]:
    """Through the autoencoder and back; and how near, in decibels."""
    outputs = []
    for start in range(0, len(images), 32):
        batch = autoencoder.to_tensor(np.stack([np.asarray(image) for image in images[start : start + 32]])).to(
            vae.device, vae.dtype
        )
        outputs.append(vae.decode(vae.encode(batch).latent_dist.mean).sample.float().cpu())
    pictures = torch.cat(outputs)
    decibels = autoencoder.psnr(pictures, autoencoder.to_tensor(np.stack([np.asarray(image) for image in images])))
    return [Image.fromarray(picture) for picture in autoencoder.to_pictures(pictures)], decibels


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    guidance: float = 4.0,
    steps: int = 30,
    seed: int = 0,
    batch: int = 32,
) -> list[Image.Image]:
    """The pipeline's pictures of the prompts, one each."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        generator = torch.Generator().manual_seed(seed + start)
        chunk = list(prompts[start : start + batch])
        images += pipeline(chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generator).images
    return images


def load(folder: Path, device: str = "cpu") -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).to(device)


def table(
    folder: Path, count: int = 512, guidance: float = 4.0, steps: int = 30, device: str = "cpu"
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Accuracies on renders (the ceiling), after the autoencoder and on what the model draws; and these pictures."""
    judge, pipeline, specs = Classifier.load(folder / "classifier.safetensors"), load(folder, device), requests(count)
    words = [spec.words for spec in specs]
    renders = real_pictures(specs)
    round_trips, decibels = round_trip(pipeline.vae, renders)
    start = time.monotonic()
    images = generate(pipeline, [full_caption(spec) for spec in specs], guidance, steps)
    seconds = time.monotonic() - start
    ceiling, round_trip_scores, scores = (
        judge.scores(renders, words),
        judge.scores(round_trips, words),
        judge.scores(images, words),
    )
    rows = {
        field: {
            "ceiling": ceiling[field], "after_autoencoder": round_trip_scores[field], "drawn": scores[field],
            "of_ceiling": scores[field] / max(ceiling[field], 1e-9), "mark": MARKS[field],
        }
        for field in FIELDS
    }  # fmt: skip
    values = {
        "pictures": count,
        "guidance": guidance,
        "steps": steps,
        "seconds_a_picture": seconds / count,
        "autoencoder_db": decibels,
        "fields": rows,
    }
    return values, images


def text_table(values: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| field | renders (ceiling) | after the autoencoder | drawn | of the ceiling | mark |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for field, row in values["fields"].items():
        shares = " | ".join(
            f"{row[name] * 100:.1f} %" for name in ("ceiling", "after_autoencoder", "drawn", "of_ceiling")
        )
        verdict = "reached" if row["of_ceiling"] >= row["mark"] else "missed"
        lines.append(f"| {field} | {shares} | {row['mark'] * 100:.0f} % {verdict} |")
    lines.append("")
    lines.append(
        f"{values['pictures']} unseen combinations, guidance {values['guidance']:g}, {values['steps']} steps, "
        f"{values['seconds_a_picture']:.2f} s a picture; autoencoder {values['autoencoder_db']:.1f} dB."
    )
    return "\n".join(lines)


def sheet(images: Sequence[Image.Image], file: Path, columns: int = 16, zoom: int = 2) -> None:
    """Save a contact sheet."""
    autoencoder.grid(np.stack([np.asarray(image) for image in images]), columns, zoom).save(file)
