"""Compare lorakit's preset with the recipe of diffusers' `train_dreambooth_lora.py`, with one classifier for both.

    python benchmarks/against_diffusers.py RESULTS.jsonl [--names lulu ...] [--seeds 0 1] [--recipes readme ...]

This file contains the script's training loop in short form. Each step encodes its photos and texts, draws noise and
timesteps, and adds the loss on class images if there are any. PEFT adds LoRA to the layers that the script adapts. The
optimizer is AdamW, gradients are clipped to 1, and `save_lora_weights` writes the file. As in the script, all photos
have the same prompt.

    readme   the values of the script's README: rank 4, 1e-4, 500 steps of one photo, UNet only, no prior
    tuned    rank 8, 1e-3 with cosine decay, text encoder too, 64 class images, 210 steps of 2 photos + 2 class images
    preset   lorakit's preset without `train.min_steps` (see benchmarks/teach.py)

RESULTS.jsonl and the table have the format of benchmarks/recipes.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import recipes
import teach
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from lorakit import config
from lorakit.families import pocket
from lorakit.families.pocket import subjects

UNET_LAYERS = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass(frozen=True)
class Script:
    """The arguments of the script in which the recipes differ."""

    rank: int
    learning_rate: float
    lr_scheduler: str
    steps: int
    batch_size: int
    class_images: int = 0
    train_text_encoder: bool = False


SCRIPTS = {
    "readme": Script(4, 1e-4, "constant", 500, 1),
    "tuned": Script(8, 1e-3, "cosine", 210, 2, class_images=64, train_text_encoder=True),
}


def main() -> None:
    """Train the runs that are not in the results yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON lines file of the runs; new runs are appended")
    parser.add_argument("--names", nargs="+", default=list(subjects.SUBJECTS), help="subjects to learn (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1], help="seeds of pictures and training (default: 0 1)"
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=[*SCRIPTS, "preset"],
        default=[*SCRIPTS, "preset"],
        help="recipes to compare (default: all)",
    )
    arguments = parser.parse_args()
    rows = recipes.read(arguments.results)
    for seed in arguments.seeds:
        for name in arguments.names:
            for recipe in arguments.recipes:
                title = recipe if recipe == "preset" else f"diffusers, {recipe}"
                run = {"recipe": title, "name": name, "seed": seed, "captions": "scene"}
                if recipes.key(run) not in map(recipes.key, rows):
                    script = SCRIPTS.get(recipe)
                    settings = dict(map(config.parse_override, recipes.QUIET))
                    figures = teach.teach(name, settings, None, seed=seed, trainer=script and trainer(script))
                    rows.append(run | recipes.columns(figures))
                    recipes.add(arguments.results, rows[-1])
    print(recipes.table(rows))


def trainer(script: Script) -> teach.Trainer:
    """Return a trainer for `teach.teach` that trains like the script with these arguments."""

    def train(settings: config.Config) -> Path:
        folder = Path(settings.output.folder)
        torch.manual_seed(settings.train.seed)
        pipeline = StableDiffusionPipeline.from_pretrained(pocket.path(), safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        photos = [Image.open(file) for file in sorted(Path(settings.data.folder).glob("*.png"))]
        noun = settings.data.noun
        class_images: list[Image.Image] = []
        size = {"width": 64, "height": 64, "num_inference_steps": 12, "guidance_scale": 4.0}
        for _ in range(script.class_images // 8):
            class_images += pipeline([f"a photo of a {noun}"] * 8, **size).images
        _attach(pipeline, script)
        prompts = [f"a photo of a {settings.data.name}", f"a photo of a {noun}"]
        _fit(pipeline, script, _pixels(photos), _pixels(class_images), prompts)
        text = pipeline.text_encoder if script.train_text_encoder else None
        pipeline.save_lora_weights(folder, _weights(pipeline.unet), _weights(text) if text else None)
        file = folder / "pytorch_lora_weights.safetensors"
        # Names and widths of the layers do not tell that the adapter is for the bundled base.
        save_file(load_file(file), file, {"lorakit.family": "sd1"})
        return file

    return train


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1 if arrays else torch.empty(0, 3, 64, 64)


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    return weights


def _attach(pipeline: StableDiffusionPipeline, script: Script) -> None:
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    shape = {"r": script.rank, "lora_alpha": script.rank, "init_lora_weights": "gaussian"}
    pipeline.unet.add_adapter(LoraConfig(target_modules=UNET_LAYERS, **shape))
    if script.train_text_encoder:
        pipeline.text_encoder.add_adapter(LoraConfig(target_modules=TEXT_LAYERS, **shape))


def _fit(
    pipeline: StableDiffusionPipeline,
    script: Script,
    photos: torch.Tensor,
    class_images: torch.Tensor,
    prompts: list[str],
) -> None:
    models = (pipeline.unet, pipeline.text_encoder)
    parameters = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=script.learning_rate, weight_decay=1e-2)
    schedule = get_scheduler(script.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=script.steps)
    noises = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.unet.train()
    order: list[int] = []
    for _ in range(script.steps):
        while len(order) < script.batch_size:
            order += torch.randperm(len(photos)).tolist()
        rows, order = order[: script.batch_size], order[script.batch_size :]
        pixels, texts = photos[rows], prompts[:1] * len(rows)
        if len(class_images):
            pixels = torch.cat([pixels, class_images[torch.randint(len(class_images), (len(rows),))]])
            texts = texts + prompts[1:] * len(rows)
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noises.config.num_train_timesteps, (len(latents),))
        tokens = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = pipeline.text_encoder(tokens)[0]
        prediction = pipeline.unet(noises.add_noise(latents, noise, timesteps), timesteps, states).sample
        is_v = noises.config.prediction_type == "v_prediction"
        target = noises.get_velocity(latents, noise, timesteps) if is_v else noise
        loss = torch.zeros(())
        for answer, right in zip(prediction.split(len(rows)), target.split(len(rows)), strict=True):
            loss = loss + functional.mse_loss(answer, right)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
