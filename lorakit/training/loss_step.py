"""The loss of a training step, computed from the index of its batch.

All inputs of a step are on the device before the first one: latents (mean and standard deviation), text embeddings,
masks. The host chooses photos and texts, and seeds the generators by (seed, index). Noise and timesteps are drawn on
the device, and the host reads no value back. So the host can run ahead, and a CUDA graph can replay the step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from lorakit.config import TrainConfig
from lorakit.core import rng
from lorakit.data.dataset import Batch
from lorakit.training import objective, prior
from lorakit.training.objective import LossTerm
from lorakit.training.precompute import Precomputed

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter
    from lorakit.families import Family
    from lorakit.families.conditioning import Conditioning

# Random values of photos and of class images; each has its own generator.
PURPOSES = ("posterior", "noise", "timesteps")
# Weight of the past in the smoothed loss: about the last 50 values count.
SMOOTHING = 0.98


class LossStep:
    """Compute the loss of the `index`-th batch of a run: a pure function of weights, seed and index.

    Args:
        family: the loaded base (see `families.Family`).
        adapter: the attached adapter.
        encoded: photos, texts and class images, on the device. If it has tokens, a text encoder is trained and encodes
            the texts in each step.
        train: the section of the config.
        retry: how often the run went back to a checkpoint. It changes the noise; the same noise would fail again.

    Attributes:
        generators: purpose -> generator that `loss_of` draws from; `seed` seeds them.
    """

    def __init__(
        self,
        family: Family,
        adapter: Adapter,
        encoded: Precomputed,
        train: TrainConfig,
        *,
        retry: int = 0,
    ):
        self.family, self.adapter, self.encoded, self.train = family, adapter, encoded, train
        self.retry = retry
        purposes = [f"instance {purpose}" for purpose in PURPOSES]
        if train.prior == "teacher":
            purposes += ["class order"]
        if train.prior == "images":
            purposes += ["class order", *(f"class {purpose}" for purpose in PURPOSES)]
        if train.text_prior_weight:
            purposes += ["text order"]
        self.generators = {purpose: torch.Generator(family.device) for purpose in purposes}
        self._epoch = -1
        self._batches: list[Batch] = []

    def batch(self, index: int) -> Batch:
        """The `index`-th batch of the run, counted from 0 across all epochs."""
        epoch, place = divmod(index, self._per_epoch())
        if epoch != self._epoch:
            self._epoch = epoch
            self._batches = self.encoded.dataset.batches(self.train.seed, epoch, self.train.batch_size)
        return self._batches[place]

    def loss(self, index: int) -> torch.Tensor:
        """Loss of the `index`-th batch, a scalar on the device; `backward` may be called on it."""
        with self.scoped_rng():
            return self.loss_of(self.seed(index))

    @contextlib.contextmanager
    def scoped_rng(self) -> Iterator[None]:
        """Restore the global generators on exit: with dropout, `seed` seeds them and the forward pass draws from
        them."""
        if not self.adapter.dropout:
            yield
            return
        device = self.family.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield

    def seed(self, index: int) -> Batch:
        """Seed the generators for the `index`-th batch and return the batch. This is the host's part of a step."""
        for purpose, generator in self.generators.items():
            name = f"{purpose}/{self.retry}" if self.retry else purpose
            generator.manual_seed(rng.seed_for(self.train.seed, index, name))
        if self.adapter.dropout:
            torch.manual_seed(rng.seed_for(self.train.seed, index, f"dropout/{self.retry}"))
        return self.batch(index)

    def loss_of(self, batch: Batch) -> torch.Tensor:
        """The loss of the batch that `seed` returned last. This is the device's part of a step."""
        terms = self._terms(batch)
        targets = [term.target if term.target is not None else prior.teacher_target(self, term) for term in terms]
        total = torch.zeros((), device=self.family.device)
        for term, target, prediction in zip(terms, targets, self._predict(terms), strict=True):
            prediction_type, gamma = self.family.prediction, self.train.min_snr_gamma
            weight = prediction_type.loss_weights(term.timesteps, self.train.snr_weighting, gamma)
            total = total + term.factor * objective.loss(prediction, target, self.train.loss, weight, term.mask)
        if self.train.text_prior_weight:
            total = total + self.train.text_prior_weight * prior.text_distance(self, len(batch.entries))
        return total

    def _terms(self, batch: Batch) -> list[LossTerm]:
        """The loss terms of a batch: its photos and, with a prior, the class."""
        instance = self._instance_term(batch)
        if self.train.prior == "images":
            return [instance, prior.class_image_term(self, len(instance.noisy))]
        if self.train.prior == "teacher":
            return [instance, prior.teacher_term(self, batch, instance)]
        return [instance]

    def _per_epoch(self) -> int:
        if not self._batches:
            self._epoch, self._batches = 0, self.encoded.dataset.batches(self.train.seed, 0, self.train.batch_size)
        return len(self._batches)

    def add_noise(self, whose: str, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Draw latents from the posterior `mean`, `std` (`[B, C, h, w]`) and add noise at random timesteps.

        Args:
            whose: "instance" or "class": whose generators are used.
        Returns:
            (noisy latents, timesteps, target)
        """
        family, count = self.family, len(mean)
        posterior, spread, place = (self.generators[f"{whose} {purpose}"] for purpose in PURPOSES)
        latents = mean + std * torch.randn(mean.shape, generator=posterior, device=family.device)
        noise = objective.sample_noise(spread, mean.shape, family.device, self.train.noise_offset)
        if self.train.pyramid_noise:
            noise = objective.add_coarse_noise(noise, spread, self.train.pyramid_noise)
        timesteps = family.prediction.sample_timesteps(
            count,
            place,
            family.device,
            math.prod(mean.shape[2:]),
            between=(self.train.timestep_low, self.train.timestep_high),
            sampling=self.train.timestep_sampling,
            shift=self.train.timestep_shift,
        )
        noisy = family.prediction.add_noise(latents, noise, timesteps)
        target = family.prediction.target(latents, noise, timesteps)
        return noisy, timesteps, target

    def _instance_term(self, batch: Batch) -> LossTerm:
        bucket, entries = self.encoded.dataset.buckets[batch.bucket], batch.entries
        noisy, timesteps, target = self.add_noise("instance", bucket.mean[entries], bucket.std[entries])
        condition = self.condition(self.encoded.tokens, self.encoded.conditions, batch.text_rows)
        condition = condition.with_rows(**bucket.sizes_of(entries))
        mask = bucket.mask[entries] if bucket.mask is not None else None
        return LossTerm(noisy, timesteps, condition, target, mask, 1.0)

    def condition(
        self, tokens: list[torch.Tensor] | None, conditions: Conditioning, rows: torch.Tensor
    ) -> Conditioning:
        """Embeddings of the texts `rows` (int64 `[B]`): rows of `conditions`, or computed where a text encoder is
        trained.

        A trained encoder encodes the chosen texts or all texts, whichever are fewer: the host does not know which of
        the chosen ones are equal.
        """
        if tokens is None:
            return conditions.index(rows)
        if len(tokens[0]) <= len(rows):
            return self.family.encode_tokens(tokens, grad=True).index(rows)
        return self.family.encode_tokens([table[rows] for table in tokens], grad=True)

    def _predict(self, terms: list[LossTerm]) -> list[torch.Tensor]:
        """Predict all terms in one batch if their shapes agree, else term by term."""
        if len({term.noisy.shape[1:] for term in terms}) > 1:
            return [self.family.predict(term.noisy, term.timesteps, term.condition) for term in terms]
        condition = (
            terms[0].condition if len(terms) == 1 else type(terms[0].condition).cat([t.condition for t in terms])
        )
        joined = self.family.predict(
            torch.cat([term.noisy for term in terms]), torch.cat([term.timesteps for term in terms]), condition
        )
        return list(joined.split([len(term.noisy) for term in terms]))


class RunningMean:
    """Exponential moving average with bias correction, used for the smoothed loss."""

    def __init__(self, weight: float = SMOOTHING):
        self.weight = weight
        self._sum = self._mass = 0.0

    def add(self, value: float) -> float:
        """Add a value and return the average; newer values weigh more."""
        self._sum = self.weight * self._sum + (1 - self.weight) * value
        self._mass = self.weight * self._mass + (1 - self.weight)
        return self._sum / self._mass

    def state(self) -> list[float]:
        """The values that `load_state` takes."""
        return [self._sum, self._mass]

    def load_state(self, state: list[float]) -> None:
        """Continue from the values that `state` returned."""
        self._sum, self._mass = state
