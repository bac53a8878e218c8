"""From the working folder to a pipeline folder: diffusers' layout, float16, the key names of real checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tools.pocket import autoencoder, denoiser, text
from tools.pocket.recipe import Recipe


def _halve(folder: Path, stem: str, prefix: str = "") -> None:
    """Rewrite one weights file in float16, every key below `prefix`."""
    file = folder / f"{stem}.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        tensors[name if name.startswith(prefix) else prefix + name] = value.half().contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _edit(file: Path, drop: tuple[str, ...] = (), **values: object) -> None:
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps({**config, **values}, indent=2) + "\n")


def export(recipe: Recipe, work: Path, output: Path) -> None:
    """Write the pipeline of the newest state, finished or not. `output` is replaced completely."""
    scale = float(np.load(work / "latents.npz")["scale"])
    vae = autoencoder.build(recipe)
    file = work / ("decoder.pt" if (work / "decoder.pt").exists() else "vae.pt")
    vae.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    vae.register_to_config(scaling_factor=scale, force_upcast=False)
    _, words = text.load(recipe, work)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    denoiser.load_average(recipe, work).save_pretrained(partial / "unet")
    vae.save_pretrained(partial / "vae")
    words.save_pretrained(partial / "text_encoder")
    denoiser.scheduler().save_pretrained(partial / "scheduler")
    shutil.copytree(work / "tokenizer", partial / "tokenizer")
    _halve(partial / "unet", "diffusion_pytorch_model")
    _halve(partial / "vae", "diffusion_pytorch_model")
    # transformers 5.6 and later leave `text_model.` out when they save; every real checkpoint and other program has it.
    _halve(partial / "text_encoder", "model", "text_model.")
    # transformers loads a text encoder in the dtype of its config, diffusers everything else in float32: say float32,
    # or a plain from_pretrained gives a mixed pipeline that cannot draw. The file itself is float16 all the same.
    _edit(partial / "text_encoder" / "config.json", ("torch_dtype",), dtype="float32", architectures=["CLIPTextModel"])
    for part in ("unet", "vae"):
        _edit(partial / part / "config.json", ("_name_or_path",))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": json.loads((partial / "unet" / "config.json").read_text())["_diffusers_version"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    # The judge comes from the working folder, the card is written by hand: both stay with the weights.
    for file in (work / "classifier.safetensors", output / "README.md"):
        if file.exists():
            shutil.copy(file, partial / file.name)
    for file in partial.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.replace(old)
    partial.replace(output)
    shutil.rmtree(old, ignore_errors=True)
