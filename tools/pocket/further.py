"""`python -m tools.pocket.further --work DIR --output DIR` trains the shipped UNet on, on pictures rendered meanwhile.

For a GPU and the cores beside it: renderers write chunks of pictures and captions, the training encodes what is there
and draws its batches from all of it. The rate falls to zero by a cosine over `--seconds`. Written at the end:
`diffusion_pytorch_model.safetensors`, the averaged weights in half precision, for the folder
`lorakit/families/pocket/weights/unet`.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing import get_context
from transformers import CLIPTextModel, CLIPTokenizer

from lorakit.families import pocket
from lorakit.families.pocket.scene_captions import caption
from lorakit.families.pocket.scenes import render
from lorakit.families.pocket.spec import random_spec
from tools.pocket import dataset, denoiser
from tools.pocket.recipe import SHIPPED

# The weights of the first run saw seeds below 120,000, those on a card seeds from 200,000,000; no renderer repeats one.
FIRST_SEED, SEEDS_A_RENDERER = 1_000_000_000, 10_000_000
UNSEEN_SEED = 3_900_000_000


def render_chunks(folder: Path, number: int, seconds: float, size: int, unseen: bool = False) -> None:
    """A renderer: chunks of `size` pictures with token ids into `folder`, for `seconds`; one chunk if `unseen`."""
    tokens = CLIPTokenizer.from_pretrained(str(pocket.path() / "tokenizer"))
    seed, end = UNSEEN_SEED if unseen else FIRST_SEED + number * SEEDS_A_RENDERER, time.time() + seconds
    while time.time() < end:
        specs = [(random_spec(s, unseen=unseen), s) for s in range(seed, seed + size)]
        pictures = np.stack([np.asarray(render(spec, s, SHIPPED.size)) for spec, s in specs])
        words = [caption(spec, s, variant) for spec, s in specs for variant in range(dataset.VARIANTS)]
        ids = tokens(words, padding="max_length", max_length=SHIPPED.max_tokens, truncation=True).input_ids
        file = folder / f"{seed:010}.part"
        with file.open("wb") as stream:
            np.savez(stream, pictures=pictures, ids=np.asarray(ids, np.int16).reshape(size, dataset.VARIANTS, -1))
        file.replace(file.with_suffix(".unseen" if unseen else ".npz"))
        seed += size
        if unseen:
            return


def start_renderers(folder: Path, count: int, seconds: float, size: int) -> list[SpawnProcess]:
    """`count` renderers, and one for the combinations that are never trained."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, number, seconds, size) for number in range(count)]
    context = get_context("spawn")
    started = [context.Process(target=render_chunks, args=job, daemon=True) for job in jobs]
    started.append(context.Process(target=render_chunks, args=(folder, count, seconds, size, True), daemon=True))
    for process in started:
        process.start()
    return started


@dataclass(frozen=True)
class Chunk:
    """Encoded pictures: latents' mean and deviation (n, 4, 16, 16), token ids (n, variants, 32)."""

    mean: Tensor
    deviation: Tensor
    ids: Tensor


class Further:
    """The shipped model and what trains its UNet."""

    def __init__(self, device: torch.device, rate: float, seed: int = 1):
        folder = pocket.path()
        self.device, self.rate = device, rate
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(device).eval()
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device).eval()
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).to(device)
        self.unet = unet.to(memory_format=torch.channels_last).train()
        self.average = copy.deepcopy(self.unet).eval().requires_grad_(False)
        tokens = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
        self.empty = tokens("", padding="max_length", max_length=SHIPPED.max_tokens, return_tensors="pt").input_ids
        self.empty = self.empty.to(device)
        self.scale = float(self.vae.config.scaling_factor)
        self.alphas = denoiser.scheduler().alphas_cumprod.to(device)
        self.weights = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.steps = 0

    @torch.no_grad()
    def encode(self, file: Path) -> Chunk:
        """A renderer's chunk."""
        with np.load(file) as arrays:
            pixels = torch.from_numpy(arrays["pictures"]).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            ids = torch.from_numpy(arrays["ids"]).to(self.device)
        posterior = self.vae.encode(pixels).latent_dist
        return Chunk(posterior.mean.half(), posterior.std.half(), ids)

    def loss(self, unet: UNet2DConditionModel, latents: Tensor, ids: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """The mean squared error of the velocity."""
        with torch.no_grad():
            states = self.text(input_ids=ids).last_hidden_state
        noisy, velocity = denoiser.add_noise(self.alphas[steps], latents, noise)
        with torch.autocast(self.device.type, torch.bfloat16):
            output = unet(noisy.to(memory_format=torch.channels_last), steps, states).sample
        return F.mse_loss(output.float(), velocity)

    def step(self, chunks: Chunk, batch: int, progress: float) -> Tensor:
        """One step of the optimizer on `batch` random pictures; its loss. `progress` goes from 0 to 1."""
        rand: dict[str, Any] = {"device": self.device, "generator": self.generator}
        rows = torch.randint(0, len(chunks.mean), (batch,), **rand)
        mean, deviation = chunks.mean[rows].float(), chunks.deviation[rows].float()
        latents = (mean + deviation * torch.randn(mean.shape, **rand)) * self.scale
        ids = chunks.ids[rows, torch.randint(0, dataset.VARIANTS, (batch,), **rand)].long()
        ids = torch.where(torch.rand(batch, 1, **rand) < SHIPPED.empty_captions, self.empty, ids)
        bands = torch.randperm(batch, **rand) + torch.rand(batch, **rand)
        steps = (bands * (1000 / batch)).long().clamp(max=999)
        loss = self.loss(self.unet, latents, ids, steps, torch.randn(latents.shape, **rand))
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, self.steps / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.weights, strict=True):
                mean.lerp_(weight, 1 - min(SHIPPED.ema, (1 + self.steps) / (10 + self.steps)))
        return loss.detach()

    @torch.no_grad()
    def unseen_loss(self, chunk: Chunk) -> float:
        """The averaged weights' loss on combinations that are never trained, with the same noise each time."""
        noise = torch.randn(chunk.mean.shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        steps = torch.arange(len(noise), device=self.device) * 1000 // len(noise)
        return float(self.loss(self.average, chunk.mean.float() * self.scale, chunk.ids[:, 0].long(), steps, noise))

    def save(self, file: Path) -> None:
        """The averaged weights, as the shipped file has them."""
        values = {name: value.half().contiguous().cpu() for name, value in self.average.state_dict().items()}
        save_file(values, file, metadata={"format": "pt"})


def train(model: Further, folder: Path, batch: int, seconds: float, say: Callable[[str], None] = print) -> None:
    """Steps for `seconds` on what lies in `folder` by then, a chunk more with each step."""
    files: set[Path] = set()
    chunks: Chunk | None = None
    start = report = time.monotonic()
    while (now := time.monotonic()) < start + seconds:
        new = sorted(set(folder.glob("*.npz")) - files)[:8]
        if new:
            more = [model.encode(file) for file in new]
            parts = [*([chunks] if chunks else []), *more]
            chunks = Chunk(*(torch.cat([getattr(p, name) for p in parts]) for name in ("mean", "deviation", "ids")))
            files.update(new)
        if chunks is None or len(chunks.mean) < batch:
            time.sleep(0.2)
            continue
        loss = model.step(chunks, batch, (now - start) / seconds)
        if now > report + 10:
            report = now
            unseen = next((model.unseen_loss(model.encode(file)) for file in folder.glob("*.unseen")), math.nan)
            progress = f"{model.steps * batch} of {len(chunks.mean)} pictures"
            say(f"{now - start:.0f} s: {progress}, loss {float(loss):.4f}, unseen {unseen:.4f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the shipped UNet further.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the renderers' chunks")
    parser.add_argument("--output", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--renderers", type=int, default=12, help="processes that render")
    parser.add_argument("--chunk", type=int, default=512, help="pictures that a renderer writes at once")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    options = parser.parse_args(arguments)
    renderers = start_renderers(options.work, options.renderers, options.seconds, options.chunk)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Further(device, options.rate)
    train(model, options.work, options.batch, options.seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    model.save(options.output / "diffusion_pytorch_model.safetensors")
    for process in renderers:
        process.terminate()


if __name__ == "__main__":
    main()
