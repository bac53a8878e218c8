"""Sharpening the decoder: the encoder stays as it is; a critic and the judge's eyes join the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.families.pocket.classifier import Classifier, Net
from tools.pocket import autoencoder, dataset
from tools.pocket.recipe import Recipe
from tools.pocket.workers import Run, Worker, save


def critic(width: int = 32) -> nn.Sequential:
    """Tells real patches from decoded ones: (B, 3, H, W) to a map of logits, one for every 14 x 14 px."""
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, width, 4, 2, 1)), nn.LeakyReLU(0.2),
        norm(nn.Conv2d(width, 2 * width, 4, 2, 1)), nn.LeakyReLU(0.2),
        norm(nn.Conv2d(2 * width, 2 * width, 3, 1, 1)), nn.LeakyReLU(0.2),
        norm(nn.Conv2d(2 * width, 1, 3, 1, 1)),
    )  # fmt: skip


def feature_distance(judge: Net, output: Tensor, real: Tensor) -> Tensor:
    """Distance in the judge's first feature maps: edges and textures rather than single pixels."""
    total, a, b = torch.zeros((), device=output.device), output, real
    for layer in list(judge.trunk)[:12]:
        a, b = layer(a), layer(b)
        if isinstance(layer, nn.ReLU):
            total = total + (a - b).abs().mean() / (b.abs().mean() + 1e-3)
    return total / 4


def train(worker: Worker, recipe: Recipe, work: Path) -> None:
    """Train the decoder against a critic on full pictures, from latents sampled from their posterior."""
    torch.manual_seed(recipe.seed)
    model, discriminator = autoencoder.build(recipe), critic()
    model.load_state_dict(torch.load(work / "vae.pt", map_location="cpu", weights_only=True))
    model, discriminator = model.to(worker.device), discriminator.to(worker.device)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    judge = Classifier.load(work / "classifier.safetensors").model.to(worker.device).requires_grad_(False)
    common: dict[str, Any] = {
        "total": recipe.decoder_pictures,
        "batch": recipe.decoder_batch,
        "seed": recipe.seed,
        "save_seconds": recipe.save_seconds,
    }
    run = Run(worker, {"vae": model}, work / "decoder.state", rate=recipe.decoder_rate, decay=0.995, **common)
    opponent = Run(
        worker, {"critic": discriminator}, work / "critic.state", rate=recipe.decoder_rate, decay=0.9, **common
    )
    pictures = dataset.load(work / "renders", "pictures")
    mean, deviation = np.load(work / "mean.npy", mmap_mode="r"), np.load(work / "deviation.npy", mmap_mode="r")
    while not run.is_finished:
        rng = np.random.default_rng((recipe.seed, run.position, worker.rank, 6))
        rows = np.sort(rng.integers(0, len(pictures), run.batch))
        real = autoencoder.to_tensor(pictures[rows]).to(worker.device)
        latents = torch.from_numpy(mean[rows]).float()
        latents = (
            latents + torch.from_numpy(deviation[rows]).float() * torch.randn(latents.shape, generator=run.generator)
        ).to(worker.device)
        with worker.autocast(recipe.bf16):
            output = model.decode(latents).sample
        output = output.float()
        discriminator.requires_grad_(False)
        adversarial_loss = -discriminator(output).mean()
        loss = autoencoder.reconstruction_loss(output, real) + 0.1 * feature_distance(judge, output, real)
        # The critic joins after a tenth: before, it would only learn what is blurred anyway.
        weight = recipe.adversarial_weight if run.position > 0.1 * run.total else 0.0
        run.step(loss + weight * adversarial_loss)
        discriminator.requires_grad_(True)
        critic_loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(output.detach())).mean()
        opponent.step(critic_loss)
        run.note(
            loss=float(loss.detach()), psnr=autoencoder.psnr(output.detach(), real), critic=float(critic_loss.detach())
        )
    run.use_average()
    if worker.first:
        autoencoder.preview(model, pictures, work / "preview-decoder.png")
        save(model.state_dict(), work / "decoder.pt")
