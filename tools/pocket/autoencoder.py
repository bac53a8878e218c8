"""The autoencoder, trained on crops; later its encoder stays as it is, for the latents depend on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from tools.pocket import dataset
from tools.pocket.recipe import Recipe
from tools.pocket.workers import Run, Worker, save


def build(recipe: Recipe) -> AutoencoderKL:
    levels = len(recipe.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=recipe.size,
        mid_block_add_attention=False,
    )


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pictures(tensor: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8."""
    return ((tensor.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(pictures: np.ndarray, columns: int, zoom: int = 1) -> Image.Image:
    """Contact sheet of (N, H, W, 3) uint8."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2), columns * (width + 2), 3), 128, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (height + 2), i % columns * (width + 2)
        sheet[y : y + height, x : x + width] = picture
    return Image.fromarray(np.repeat(np.repeat(sheet, zoom, 0), zoom, 1))


def reconstruction_loss(output: Tensor, real: Tensor) -> Tensor:
    """L1 and squared error of the pixels, and L1 of their differences: edges count more than flat areas."""
    error = output - real
    across, down = error[:, :, :, 1:] - error[:, :, :, :-1], error[:, :, 1:] - error[:, :, :-1]
    return error.abs().mean() + error.square().mean() + across.abs().mean() + down.abs().mean()


def psnr(output: Tensor, real: Tensor) -> float:
    """Decibels; both in [-1, 1]."""
    return float(10 * torch.log10(4.0 / (output.float().clamp(-1, 1) - real).square().mean()))


def train(worker: Worker, recipe: Recipe, work: Path) -> None:
    """Encoder and decoder on random crops of renders, one in eight of a texture."""
    torch.manual_seed(recipe.seed)
    model = build(recipe).to(worker.device)
    run = Run(
        worker,
        {"vae": model},
        work / "vae.state",
        recipe.vae_pictures,
        recipe.vae_batch,
        recipe.vae_rate,
        recipe.seed,
        recipe.bf16,
        save_seconds=recipe.save_seconds,
    )
    pictures, textures = dataset.load(work / "renders", "pictures"), dataset.load(work / "renders", "textures")
    crop = recipe.vae_crop
    while not run.is_finished:
        rng = np.random.default_rng((recipe.seed, run.position, worker.rank))
        # Late in training, full pictures sometimes replace crops, so that borders and distant context count too.
        full_size = run.position > 0.8 * recipe.vae_pictures
        source = [textures if rng.random() < 0.12 else pictures for _ in range(run.batch)]
        size = recipe.size if full_size else crop
        crops = []
        for array in source[: run.batch // 4 if full_size else run.batch]:
            x, y = rng.integers(0, recipe.size - size + 1, 2)
            picture = array[rng.integers(len(array)), y : y + size, x : x + size]
            crops.append(picture[:, ::-1] if rng.random() < 0.5 else picture)
        real = to_tensor(np.stack(crops)).to(worker.device)
        with worker.autocast(recipe.bf16):
            posterior = model.encode(real).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=run.generator).to(mean.device)
            output = model.decode(latents).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(output, real) + recipe.kl_weight * kl
        run.step(loss)
        run.note(loss=float(loss.detach()), psnr=psnr(output.detach(), real), kl=float(kl.detach()))
        if (
            worker.first
            and run.position // (100 * run.batch) % 8 == 0
            and run.position % (100 * run.batch) < run.batch * worker.world
        ):
            preview(model, pictures, work / "preview-vae.png")
    run.use_average()
    if worker.first:
        save(model.state_dict(), work / "vae.pt")
        preview(model, pictures, work / "preview-vae.png")


@torch.no_grad()
def preview(model: AutoencoderKL, pictures: np.ndarray, file: Path, count: int = 16) -> float:
    """Save pictures above their round trips; return the decibels."""
    real = to_tensor(pictures[:count]).to(model.device)
    output = model.decode(model.encode(real).latent_dist.mean).sample
    grid(np.concatenate([pictures[:count], to_pictures(output)]), count, 2).save(file)
    return psnr(output, real)


@torch.no_grad()
def encode_all(
    model: AutoencoderKL, pictures: np.ndarray, batch: int = 64, bf16: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every picture's latents, (N, 4, h, w) float16 each."""
    means, deviations = [], []
    for start in range(0, len(pictures), batch):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            posterior = model.encode(to_tensor(pictures[start : start + batch]).to(model.device)).latent_dist
        means.append(posterior.mean.to(torch.float16).cpu().numpy())
        deviations.append(posterior.std.to(torch.float16).cpu().numpy())
    return np.concatenate(means), np.concatenate(deviations)
