"""The loss between prediction and target, and the noise: pure functions of tensors, without a model or a host sync.

The family defines the target (`families.prediction`). Latents, noise and predictions are float32 `[B, C, h, w]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

# The c of pseudo-Huber, where it turns from squared to absolute error; sd-scripts uses the same value.
HUBER = 0.1


@dataclass(frozen=True)
class LossTerm:
    """One term of a batch's loss: model input, target and weight.

    If `target` is None, the target is the prediction of the base without the adapter, on the same input under the
    condition `teacher`. `mask` is `[B, 1, h, w]` or None.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    condition: Any
    target: torch.Tensor | None
    mask: torch.Tensor | None
    factor: float
    teacher: Any = None


def loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    kind: str = "mse",
    weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean loss over the batch, a scalar.

    Args:
        kind: "mse", or "huber": pseudo-Huber 2 c (sqrt(d^2 + c^2) - c) (Charbonnier et al. 1997), which is d^2 near 0.
        weight: `[B]`, a factor for each sample.
        mask: `[B, 1, h, w]` in [0, 1]. A sample's loss is its mean weighted by the mask. Where the mask is 0 the
            gradient is exactly 0; a mask of all zeros gives a loss of 0.
    """
    if kind == "mse":
        distance = functional.mse_loss(prediction, target, reduction="none")
    else:
        distance = 2 * HUBER * (((prediction - target) ** 2 + HUBER**2).sqrt() - HUBER)
    if mask is None:
        each = distance.mean(dim=(1, 2, 3))
    else:
        area = mask.sum(dim=(1, 2, 3)) * distance.shape[1]
        each = (distance * mask).sum(dim=(1, 2, 3)) / area.clamp(min=1.0)
    return (each if weight is None else each * weight).mean()


def sample_noise(
    generator: torch.Generator, shape: torch.Size | tuple[int, ...], device: torch.device | str, offset: float = 0.0
) -> torch.Tensor:
    """Standard normal noise. With `offset`, each channel of each sample is shifted by `offset` times a normal number
    (crosslabs.org/blog/diffusion-with-offset-noise)."""
    noise = torch.randn(shape, generator=generator, device=device)
    if offset:
        noise += offset * torch.randn((*shape[:2], 1, 1), generator=generator, device=device)
    return noise


def add_coarse_noise(noise: torch.Tensor, generator: torch.Generator, discount: float) -> torch.Tensor:
    """Add coarser noise: each level has half the resolution of the last and `discount` times its strength. The sum is
    scaled to a standard deviation of 1 (wandb.ai/johnowhitaker/multires_noise)."""
    height, width = noise.shape[2:]
    level = 1
    while min(height, width) >> level:
        coarse = torch.randn(
            (*noise.shape[:2], height >> level, width >> level), generator=generator, device=noise.device
        )
        noise = noise + discount**level * functional.interpolate(coarse, (height, width), mode="bilinear")
        level += 1
    return noise / noise.std(dim=(1, 2, 3), keepdim=True)
