"""The training step: from a batch's place in the run to its loss.

Everything a step needs is on the device before the first one: latents (mean and standard deviation), text embeddings,
masks. The host says which photos and texts and seeds the generators by (seed, index); all else, drawing noise and
timesteps included, is a function of tensors on the device that never reads a value back: so the host can run ahead, or
let a CUDA graph repeat it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.config import TrainConfig
from lorakit.core import rng
from lorakit.data.dataset import Batch
from lorakit.training import objective
from lorakit.training.precompute import Precomputed

# What is drawn for photos or class images, each from a generator of its own.
DRAWN = ("posterior", "noise", "timesteps")


@dataclass(frozen=True)
class LossTerm:
    """One part of a batch's loss: what the model is given, what it should say, and how much that counts.

    Where `target` is None, the base by itself says what the target is, being told `teacher` of the same noisy latents.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    condition: Any
    target: torch.Tensor | None
    mask: torch.Tensor | None
    factor: float
    teacher: Any = None


class LossStep:
    """Computes the loss of the `index`-th batch of a run, a pure function of the weights, the seed and the index.

    Args:
        family: the loaded base (see `families.Family`).
        adapter: the attached adapter.
        encoded: photos, texts and class images, on the device. Where it has tokens, a text encoder is trained: texts
            pass through it in each step.
        train: the section of the config.
        retry: how often the run went back to a checkpoint; it salts the noise, which would else repeat what failed.

    Attributes:
        generators: what `loss_of` draws from, by purpose; `begin` seeds them.
    """

    def __init__(
        self,
        family: Any,
        adapter: Any,
        encoded: Precomputed,
        train: TrainConfig,
        *,
        retry: int = 0,
    ):
        self.family, self.adapter, self.encoded, self.train = family, adapter, encoded, train
        self.retry = retry
        purposes = [f"instance {drawn}" for drawn in DRAWN]
        if train.prior == "images":
            purposes += ["class order", *(f"class {drawn}" for drawn in DRAWN)]
        self.generators = {purpose: torch.Generator(family.device) for purpose in purposes}
        self._epoch = -1
        self._batches: list[Batch] = []

    @property
    def batches_per_epoch(self) -> int:
        """Batches that show every photo once."""
        return len(self.encoded.dataset.batches(self.train.seed, 0, self.train.batch_size))

    def batch(self, index: int) -> Batch:
        """The `index`-th batch of the run, counted from 0 through all epochs."""
        epoch, place = divmod(index, self._per_epoch())
        if epoch != self._epoch:
            self._epoch = epoch
            self._batches = self.encoded.dataset.batches(self.train.seed, epoch, self.train.batch_size)
        return self._batches[place]

    def loss(self, index: int) -> torch.Tensor:
        """Loss of the `index`-th batch, a scalar on the device; `backward` may be called on it."""
        with self.drawing():
            return self.loss_of(self.begin(index))

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Dropout draws from the global generators: around `begin`, which seeds them too, and what follows it. They are
        as they were afterwards."""
        if not self.adapter.dropout:
            yield
            return
        device = self.family.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield

    def begin(self, index: int) -> Batch:
        """The `index`-th batch, its generators seeded: what the host does for it."""
        for purpose, generator in self.generators.items():
            salted = f"{purpose}/{self.retry}" if self.retry else purpose
            generator.manual_seed(rng.seed_for(self.train.seed, index, salted))
        if self.adapter.dropout:
            torch.manual_seed(rng.seed_for(self.train.seed, index, f"dropout/{self.retry}"))
        return self.batch(index)

    def loss_of(self, batch: Batch) -> torch.Tensor:
        """The loss of the batch that `begin` gave last: what the device does for it."""
        terms = self._terms(batch)
        targets = [term.target if term.target is not None else self._taught(term) for term in terms]
        total = torch.zeros((), device=self.family.device)
        for term, target, prediction in zip(terms, targets, self._predict(terms), strict=True):
            weight = objective.weights(
                self.family.prediction_type, term.timesteps, self.family.alphas_cumprod, self.train.min_snr_gamma
            )
            total = total + term.factor * objective.loss(prediction, target, self.train.loss, weight, term.mask)
        return total

    def _terms(self, batch: Batch) -> list[LossTerm]:
        """All that is looked up and drawn for a batch."""
        instance = self._instance_term(batch)
        if self.train.prior == "images":
            return [instance, self._class_image_term(len(instance.noisy))]
        if self.train.prior == "teacher":
            return [instance, self._teacher_term(batch, instance)]
        return [instance]

    def _per_epoch(self) -> int:
        if not self._batches:
            self._epoch, self._batches = 0, self.encoded.dataset.batches(self.train.seed, 0, self.train.batch_size)
        return len(self._batches)

    def _noised(self, whose: str, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Latents drawn from the posterior, with noise and timesteps: (noisy, timesteps, target)."""
        family, count = self.family, len(mean)
        posterior, spread, place = (self.generators[f"{whose} {drawn}"] for drawn in DRAWN)
        latents = mean + std * torch.randn(mean.shape, generator=posterior, device=family.device)
        noise = objective.sample_noise(spread, mean.shape, family.device, self.train.noise_offset)
        # One uniform offset for the whole batch spreads its timesteps evenly; each alone is still uniform.
        offset = torch.rand((), generator=place, device=family.device)
        share = (torch.arange(count, device=family.device) + offset) / count
        timesteps = (share * len(family.alphas_cumprod)).long().clamp_(max=len(family.alphas_cumprod) - 1)
        noisy = objective.add_noise(latents, noise, timesteps, family.alphas_cumprod)
        target = objective.target(family.prediction_type, latents, noise, timesteps, family.alphas_cumprod)
        return noisy, timesteps, target

    def _instance_term(self, batch: Batch) -> LossTerm:
        bucket, entries = self.encoded.dataset.buckets[batch.bucket], batch.entries
        noisy, timesteps, target = self._noised("instance", bucket.mean[entries], bucket.std[entries])
        condition = self._told(self.encoded.tokens, self.encoded.conditions, batch.texts)
        if bucket.time_ids is not None:
            condition = condition.with_sizes(bucket.time_ids[entries])
        mask = bucket.mask[entries] if bucket.mask is not None else None
        return LossTerm(noisy, timesteps, condition, target, mask, 1.0)

    def _told(self, tokens: list[torch.Tensor] | None, known: Any, chosen: torch.Tensor) -> Any:
        """The chosen texts, int64 `[b]`, as the base has them, or anew through the text encoder that is trained: it is
        given the chosen ones or all there are, whichever is less, for the host does not know which are the same."""
        if tokens is None:
            return known.index(chosen)
        if len(tokens[0]) <= len(chosen):
            return self.family.encode_tokens(tokens, grad=True).index(chosen)
        return self.family.encode_tokens([table[chosen] for table in tokens], grad=True)

    def _class_text_condition(self, texts: torch.Tensor, time_ids: torch.Tensor | None) -> Any:
        condition = self._told(self.encoded.class_tokens, self.encoded.class_conditions, texts)
        return condition if time_ids is None else condition.with_sizes(time_ids)

    def _class_image_term(self, count: int) -> LossTerm:
        """Class images under the texts that the base drew them for (Ruiz et al. 2022, arXiv 2208.12242)."""
        latents = self.encoded.class_latents
        assert latents is not None, "prior = 'images' comes with class latents"
        mean, std, ids = latents.mean, latents.std, latents.time_ids
        order = self.generators["class order"]
        chosen = torch.randint(len(mean), (count,), generator=order, device=self.family.device)
        noisy, timesteps, target = self._noised("class", mean[chosen], std[chosen])
        condition = self._class_text_condition(latents.texts[chosen], None if ids is None else ids.expand(count, -1))
        return LossTerm(noisy, timesteps, condition, target, None, self.train.prior_loss_weight)

    def _teacher_term(self, batch: Batch, instance: LossTerm) -> LossTerm:
        """The same noisy photos under their texts without the trigger; the target is what the base says of them."""
        sizes = instance.condition.time_ids
        texts = self.encoded.class_of[batch.texts]
        base = self.encoded.class_conditions.index(texts)
        base = base if sizes is None else base.with_sizes(sizes)
        condition = self._class_text_condition(texts, sizes)
        return LossTerm(instance.noisy, instance.timesteps, condition, None, None, self.train.prior_loss_weight, base)

    def _taught(self, term: LossTerm) -> torch.Tensor:
        with torch.no_grad(), self.adapter.disabled():
            target: torch.Tensor = self.family.predict(term.noisy, term.timesteps, term.teacher)
        return target

    def _predict(self, terms: list[LossTerm]) -> list[torch.Tensor]:
        """One pass where the shapes agree, which is what a device likes; else one for each term."""
        if len({term.noisy.shape[1:] for term in terms}) > 1:
            return [self.family.predict(term.noisy, term.timesteps, term.condition) for term in terms]
        condition = (
            terms[0].condition if len(terms) == 1 else type(terms[0].condition).cat([t.condition for t in terms])
        )
        joined = self.family.predict(
            torch.cat([term.noisy for term in terms]), torch.cat([term.timesteps for term in terms]), condition
        )
        return list(joined.split([len(term.noisy) for term in terms]))
