"""The prediction types as objects: how to add noise to latents, the training target, and how to invert both.

A loaded family has one (`Family.prediction`). Latents, noise and predictions are float32 `[B, C, h, w]`, timesteps
`[B]`. All functions work on the device and read no value back, so a CUDA graph can replay them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from lorakit.core.messages import Message
from lorakit.families.spec import EPSILON, FLOW, VELOCITY

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class Prediction(ABC):
    """The output of a denoiser, on the noise schedule that it was trained with.

    Attributes:
        name: the prediction type, as in `BaseInfo.prediction_type`.
        last: upper bound of the timesteps.
    """

    name: str
    last = 999

    @abstractmethod
    def timesteps_at(self, shares: torch.Tensor, cells: int | None = None) -> torch.Tensor:
        """Quantiles of the training distribution of timesteps: a uniform share in [0, 1) gives a timestep `[B]`.

        Args:
            cells: latent cells of a picture, if the distribution depends on its size.
        """

    @abstractmethod
    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents at `timesteps`."""

    @abstractmethod
    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The training target of the denoiser for these latents."""

    @abstractmethod
    def to_x0_noise(
        self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The picture (x0) and the noise that a prediction implies for `noisy`: the inverse of `add_noise` and
        `target`."""

    @abstractmethod
    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio `[B]`: variance of the signal over that of the noise."""

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor | None:
        """Min-SNR weights `[B]` (Hang et al. 2023, arXiv 2303.09556), or None if `gamma` is None.

        Raises:
            ValueError: the weights are not defined for this type.
        """
        if gamma is None:
            return None
        raise ValueError(Message("min-SNR weights are not defined for {name!r}", self.name))

    def loss_weights(self, timesteps: torch.Tensor, kind: str, gamma: float | None) -> torch.Tensor | None:
        """Loss weights `[B]`, or None: `min_snr_weights` if `kind` is "min".

        Raises:
            ValueError: the weights are not defined for this type.
        """
        if kind == "min":
            return self.min_snr_weights(timesteps, gamma)
        raise ValueError(Message("{kind} weights are not defined for {name!r}", kind, self.name))

    @abstractmethod
    def default_sampler(self, scheduler: SchedulerMixin) -> tuple[Any, str]:
        """A sampler for the base with this scheduler, and the sampler's name in web UIs."""

    def sample_timesteps(
        self,
        count: int,
        generator: torch.Generator,
        device: torch.device | str,
        cells: int | None = None,
        *,
        between: tuple[float, float] = (0.0, 1.0),
        sampling: str = "base",
        shift: float = 1.0,
    ) -> torch.Tensor:
        """Timesteps `[count]` of a training batch.

        One uniform offset for the batch spreads them evenly; each single one still has the training distribution.

        Args:
            between: range of the quantiles to draw from.
            sampling: "base": the training distribution; "uniform": all noise levels alike; "logit_normal": quantiles s
                with normally distributed logit(s) (Esser et al. 2024, arXiv 2403.03206, 3.1).
            shift: shift s of the quantiles t towards noise, s t / (1 + (s - 1) t) (the same paper, equation 23).
        """
        offset = torch.rand((), generator=generator, device=device)
        shares = (torch.arange(count, device=device) + offset) / count
        if sampling == "logit_normal":
            shares = torch.special.ndtri(shares).sigmoid()
        if shift != 1:
            shares = shift * shares / (1 + (shift - 1) * shares)
        if between != (0.0, 1.0):
            shares = between[0] + (between[1] - between[0]) * shares
        return self.level_at(shares) if sampling == "uniform" else self.timesteps_at(shares, cells)

    @abstractmethod
    def level_at(self, shares: torch.Tensor) -> torch.Tensor:
        """Timesteps `[B]` at shares in [0, 1) of all noise levels, independent of the training distribution."""


class _Diffusion(Prediction):
    """sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise (Ho et al. 2020, arXiv 2006.11239, equation 4).

    Args:
        alphas_cumprod: alpha_bar by timestep, the cumulative products of 1 - beta: float32 `[1000]`, decreasing.
    """

    def __init__(self, alphas_cumprod: torch.Tensor):
        self.alphas_cumprod = alphas_cumprod
        self.last = len(alphas_cumprod) - 1

    def timesteps_at(self, shares: torch.Tensor, cells: int | None = None) -> torch.Tensor:
        """See `Prediction`; the distribution is uniform."""
        return self.level_at(shares)

    def level_at(self, shares: torch.Tensor) -> torch.Tensor:
        """See `Prediction`; timesteps are int64."""
        return (shares * len(self.alphas_cumprod)).long().clamp_(max=self.last)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Prediction`."""
        signal, spread = self._roots(timesteps)
        return signal * latents + spread * noise

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Prediction`."""
        alpha_bar = self.alphas_cumprod[timesteps]
        return alpha_bar / (1 - alpha_bar)

    def default_sampler(self, scheduler: SchedulerMixin) -> tuple[Any, str]:
        """See `Prediction`: DPM++ 2M (Lu et al. 2022, arXiv 2211.01095), with timesteps that start at pure noise.

        With zero terminal SNR it has no such step; then DDIM is used, which starts at the last timestep (Lin et al.
        2023, arXiv 2305.08891).
        """
        ddim: Any = DDIMScheduler
        solver: Any = DPMSolverMultistepScheduler
        if scheduler.config.get("rescale_betas_zero_snr"):
            return ddim.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=False), "DDIM"
        return solver.from_config(scheduler.config, timestep_spacing="linspace"), "DPM++ 2M"

    def loss_weights(self, timesteps: torch.Tensor, kind: str, gamma: float | None) -> torch.Tensor | None:
        """See `Prediction`.

        "soft_min": SNR gamma / (SNR + gamma) for the error of x0 (Crowson et al. 2024, arXiv 2401.11605, 4.3).
        "debiased": sqrt(SNR) for the error of x0, which is 1 / sqrt(SNR) for that of the noise (Yu et al. 2023, arXiv
        2310.08442).
        """
        if kind == "min":
            return super().loss_weights(timesteps, kind, gamma)
        snr = self.snr(timesteps).clamp(1e-3, 1e3)
        if kind == "debiased":
            return snr.sqrt() / self.loss_of_error(snr)
        assert gamma is not None, "the config check asks for it"
        return snr * gamma / (snr + gamma) / self.loss_of_error(snr)

    @abstractmethod
    def loss_of_error(self, snr: torch.Tensor) -> torch.Tensor:
        """Ratio of the squared error of the prediction to that of its x0."""

    def _roots(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)), `[B, 1, 1, 1]`."""
        alpha_bar = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


class Epsilon(_Diffusion):
    """Predicts the noise (arXiv 2006.11239)."""

    name = EPSILON

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Prediction`."""
        return noise

    def to_x0_noise(
        self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Prediction`."""
        signal, spread = self._roots(timesteps)
        return (noisy - spread * prediction) / signal, prediction

    def loss_of_error(self, snr: torch.Tensor) -> torch.Tensor:
        """See `_Diffusion`."""
        return snr

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor | None:
        """min(SNR, gamma) / SNR, without a division by zero at alpha_bar = 1."""
        if gamma is None:
            return None
        alpha_bar = self.alphas_cumprod[timesteps]
        return (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)


class VPrediction(_Diffusion):
    """Predicts v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x (Salimans and Ho 2022, arXiv 2202.00512, app. D)."""

    name = VELOCITY

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Prediction`."""
        signal, spread = self._roots(timesteps)
        return signal * noise - spread * latents

    def to_x0_noise(
        self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Prediction`."""
        signal, spread = self._roots(timesteps)
        return signal * noisy - spread * prediction, spread * noisy + signal * prediction

    def loss_of_error(self, snr: torch.Tensor) -> torch.Tensor:
        """See `_Diffusion`."""
        return snr + 1

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor | None:
        """min(SNR, gamma) / (SNR + 1), without a division by zero at alpha_bar = 0."""
        if gamma is None:
            return None
        alpha_bar = self.alphas_cumprod[timesteps]
        return torch.minimum(alpha_bar, gamma * (1 - alpha_bar))


class Flow(Prediction):
    """Predicts noise - x on the straight line z = (1 - sigma) x + sigma noise (Liu et al. 2022, arXiv 2209.03003).

    Timesteps are 1000 sigma, float32. In training sigma is logit-normal and shifted towards noise (Esser et al. 2024,
    arXiv 2403.03206, sections 3.1 and 5.3.2).

    Args:
        shift: the scheduler's shift; 1 has no effect.
        shift_for: latent cells of a picture -> shift, for a model whose shift depends on the size. Without a size,
            `shift` applies.
    """

    name = FLOW
    num_train_timesteps = 1000

    def __init__(self, shift: float = 1.0, shift_for: Callable[[int], float] | None = None):
        self.shift, self.shift_for = shift, shift_for

    def timesteps_at(self, shares: torch.Tensor, cells: int | None = None) -> torch.Tensor:
        """See `Prediction`."""
        shift = self.shift if cells is None or self.shift_for is None else self.shift_for(cells)
        normal = math.sqrt(2) * torch.erfinv(2 * shares - 1)
        unshifted = normal.sigmoid()
        return (self.num_train_timesteps * (shift * unshifted / (1 + (shift - 1) * unshifted))).float()

    def level_at(self, shares: torch.Tensor) -> torch.Tensor:
        """See `Prediction`: 1000 sigma, float32."""
        return (self.num_train_timesteps * shares).float()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Prediction`."""
        sigma = self._sigma(timesteps)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Prediction`."""
        return noise - latents

    def to_x0_noise(
        self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Prediction`."""
        sigma = self._sigma(timesteps)
        return noisy - sigma * prediction, noisy + (1 - sigma) * prediction

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Prediction`."""
        sigma = timesteps / self.num_train_timesteps
        return ((1 - sigma) / sigma).square()

    def default_sampler(self, scheduler: SchedulerMixin) -> tuple[Any, str]:
        """See `Prediction`: the base's own, which uses Euler's method."""
        return scheduler, "Euler"

    def _sigma(self, timesteps: torch.Tensor) -> torch.Tensor:
        """sigma, `[B, 1, 1, 1]`."""
        return (timesteps / self.num_train_timesteps).reshape(-1, 1, 1, 1)


def of_schedule(prediction_type: str, alphas_cumprod: torch.Tensor) -> Prediction:
    """The prediction type of a diffusion model, by its name.

    Raises:
        ValueError: there is no such type.
    """
    types: dict[str, type[_Diffusion]] = {cls.name: cls for cls in (Epsilon, VPrediction)}
    if prediction_type not in types:
        raise ValueError(
            Message("unknown prediction type {prediction_type!r}; known: {types}", prediction_type, ", ".join(types))
        )
    return types[prediction_type](alphas_cumprod)
