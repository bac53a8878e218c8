"""What the model is asked to say, and how far it is from saying it: pure functions of tensors, no model, no host sync.

`alphas_cumprod` is float32 `[1000]`; alpha_bar below is its entry at a timestep. Latents, noise and predictions are
float32 `[B, C, h, w]`, timesteps int64 `[B]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

# Where pseudo-Huber turns from squared to absolute distance; the value that sd-scripts uses.
HUBER = 0.1


@dataclass(frozen=True)
class LossTerm:
    """One part of a batch's loss: input of the model, target, and weight.

    Where `target` is None, the base without the adapter gives it, on the same input under the condition `teacher`.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    condition: Any
    target: torch.Tensor | None
    mask: torch.Tensor | None
    factor: float
    teacher: Any = None


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise (Ho et al. 2020, arXiv 2006.11239, equation 4)."""
    signal, spread = _roots(timesteps, alphas_cumprod)
    return signal * latents + spread * noise


def target(
    prediction_type: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """What the model should predict.

    epsilon: the noise (arXiv 2006.11239). v_prediction: sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x (Salimans and Ho
    2022, arXiv 2202.00512, appendix D). flow_prediction: noise - x (Liu et al. 2022, arXiv 2209.03003).

    Raises:
        ValueError: any other type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, spread = _roots(timesteps, alphas_cumprod)
        return signal * noise - spread * latents
    if prediction_type == "flow_prediction":
        return noise - latents
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def weights(
    prediction_type: str, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, min_snr_gamma: float | None
) -> torch.Tensor | None:
    """Min-SNR weights `[B]` (Hang et al. 2023, arXiv 2303.09556), or None where `min_snr_gamma` is.

    With SNR = a / (1 - a), a = alpha_bar: epsilon min(SNR, gamma) / SNR, v min(SNR, gamma) / (SNR + 1). They are
    written out so that nothing is divided by zero where a zero-terminal schedule has a = 0.

    Raises:
        ValueError: the weights are not defined for this type.
    """
    if min_snr_gamma is None:
        return None
    signal = alphas_cumprod[timesteps]
    if prediction_type == "epsilon":
        return (min_snr_gamma * (1 - signal) / signal).clamp(max=1.0)
    if prediction_type == "v_prediction":
        return torch.minimum(signal, min_snr_gamma * (1 - signal))
    raise ValueError(f"min-SNR weights are not defined for {prediction_type!r}")


def loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    kind: str = "mse",
    weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean distance over the batch, a scalar.

    Args:
        kind: "mse", or "huber": pseudo-Huber 2 c (sqrt(d^2 + c^2) - c) (Charbonnier et al. 1997), which is d^2 near 0.
        weight: `[B]`, a factor for each sample.
        mask: `[B, 1, h, w]` in [0, 1]. A sample's loss is the mean over what its mask lets through; where the mask is 0
            the gradient is exactly 0, and a mask of all zeros makes a loss of 0.
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
    """Standard normal noise; with `offset`, each channel of each sample is moved by a normal number times it
    (crosslabs.org/blog/diffusion-with-offset-noise)."""
    noise = torch.randn(shape, generator=generator, device=device)
    if offset:
        noise += offset * torch.randn((*shape[:2], 1, 1), generator=generator, device=device)
    return noise


def _roots(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sqrt(alpha_bar), sqrt(1 - alpha_bar)), `[B, 1, 1, 1]`."""
    signal = alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    return signal.sqrt(), (1 - signal).sqrt()
