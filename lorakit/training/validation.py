"""Metrics of an adapter that can be compared: the same photos, noise and timesteps every time.

The training loss depends mostly on the timestep that was drawn. Here every photo gets noise at one timestep of each
band, and the noise depends only on the seed. So two evaluations of the same weights are equal to the bit, and a
difference between two checkpoints comes from their weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lorakit.core import rng
from lorakit.inference.mode import inference

if TYPE_CHECKING:
    from lorakit.core.protocols import Trainable
    from lorakit.data.dataset import Dataset, LatentBucket
    from lorakit.families import Family
    from lorakit.families.conditioning import Conditioning

# Number of bands of equal width that the timesteps are divided into, from little noise to pure noise.
BANDS = 4
# The most photos, and the fewest noisy versions in each band: they keep an evaluation short and its metrics steady.
PHOTOS = 16
POINTS = 8
# For the prior drift: pictures of the class, how many in a batch, and denoising steps of each. Every second step is in
# the middle of a band.
CLASS_PICTURES, CLASS_BATCH = 8, 4
DENOISING_STEPS = 2 * BANDS


class Validation:
    """A fixed evaluation.

    It uses the mean of each photo's posterior, without mask and loss weights. So its error is that of the plain
    objective, whatever loss the run trains with.

    Args:
        family: the loaded base.
        dataset: the held-out photos or, without a hold-out, the training photos (`data.dataset.Dataset`).
        conditions: embeddings of `dataset.texts` by the base.
        class_condition: embedding of the class prompt by the base, one row.
        seed: the seed of the run.
        from_holdout: whether `dataset` holds held-out photos; the metrics say so.
    """

    def __init__(
        self,
        family: Family,
        dataset: Dataset,
        conditions: Conditioning,
        class_condition: Conditioning,
        seed: int,
        *,
        from_holdout: bool = False,
    ):
        self.family, self.dataset, self.conditions, self.seed = family, dataset, conditions, seed
        self.class_condition = class_condition
        self.source = "held-out photos" if from_holdout else "training photos"
        places = _spread(_unaugmented_rows(dataset), PHOTOS)
        # (bucket, row, text) of each evaluation. If there are few photos, each is evaluated several times.
        self.places = places * math.ceil(POINTS / len(places))
        self.photo_count = len(places)
        # (noisy latents, timesteps, the base's prediction) under the class prompt; filled by the first `run`.
        self._class_points: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def run(
        self, adapter: Trainable, *, conditions: Conditioning | None = None, class_condition: Conditioning | None = None
    ) -> dict[str, Any]:
        """Evaluate the current weights.

        Args:
            adapter: the attached adapter. It is disabled for the base's part of the drift, which is computed once.
            conditions, class_condition: current embeddings where text encoders are trained; by default those of the
                base.
        Returns:
            {"mse", "rmse", "mae", "r2"} over all bands; "bands": the same for each band with its "timesteps" [first,
                last]; "prior_drift": the mean of ||with - without||^2 / ||without||^2 over the inputs that the base
                meets while it draws pictures of the class; "photos" and "source": how many photos, and which.
        """
        family = self.family
        conditions = self.conditions if conditions is None else conditions
        class_condition = self.class_condition if class_condition is None else class_condition
        sums, drifts = [], []
        with inference(family.modules().values()):
            for number in range(len(self.places)):
                noisy, timesteps, target, text, sizes = self._point(number)
                prediction = family.predict(noisy, timesteps, conditions.index(text).with_rows(**sizes))
                sums.append(_sums(prediction, target))
            if not self._class_points:
                with adapter.disabled():
                    self._class_points = self._follow_the_base()
            for noisy, timesteps, without in self._class_points:
                adapted = family.predict(noisy, timesteps, self._class_sized(class_condition))
                drifts.append((adapted - without).square().sum((1, 2, 3)) / without.square().sum((1, 2, 3)))
        # One transfer to the CPU. The sum is in float64 and always in the same order.
        totals = torch.stack(sums).cpu().double().sum(0)
        # The last timestep of a band lies just below the first of the next.
        shares = torch.arange(BANDS, dtype=torch.float64) / BANDS
        edges = torch.stack([shares, shares + 1 / BANDS - 1e-9], dim=1).to(family.device)
        first_and_last = family.prediction.timesteps_at(edges).long().tolist()
        bands = [{"timesteps": first_and_last[band], **_figures(totals[:, band])} for band in range(BANDS)]
        drift = torch.stack(drifts).cpu().double().mean().item()
        overall = _figures(totals.sum(1))
        return {**overall, "prior_drift": drift, "bands": bands, "photos": self.photo_count, "source": self.source}

    def gains(self, adapter: Trainable, conditions: Conditioning | None = None) -> dict[str, float]:
        """Name of each photo -> the share of the base's squared error that the adapter removes.

        Args:
            adapter, conditions: as for `run`.
        """
        with inference(self.family.modules().values()):
            with adapter.disabled():
                before = self._errors(self.conditions)
            after = self._errors(self.conditions if conditions is None else conditions)
        names = [self.dataset.names(bucket)[row] for bucket, row, _ in self.places]
        errors = {name: [0.0, 0.0] for name in names}
        for name, *pair in zip(names, before, after, strict=True):
            errors[name] = [total + error for total, error in zip(errors[name], pair, strict=True)]
        return {name: 1 - trained / max(base, 1e-30) for name, (base, trained) in errors.items()}

    def _errors(self, conditions: Conditioning) -> list[float]:
        """The mean squared error at each of `places`."""
        errors = []
        for number in range(len(self.places)):
            noisy, timesteps, target, text, sizes = self._point(number)
            prediction = self.family.predict(noisy, timesteps, conditions.index(text).with_rows(**sizes))
            errors.append((prediction - target).square().mean())
        return [float(error) for error in torch.stack(errors).cpu()]

    def _follow_the_base(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Draw pictures of the class in a few DDIM steps (Song et al. 2020, arXiv 2010.02502). Return the base's inputs
        and predictions in the middle of each band.

        Photos cannot be used: they show the subject, for which the adapter is meant to change the predictions.
        """
        family, device = self.family, self.family.device
        # Just below the edges of equal shares of the training timesteps.
        shares = torch.arange(DENOISING_STEPS, 0, -1, dtype=torch.float64) / DENOISING_STEPS - 1e-9
        times = family.prediction.timesteps_at(shares.to(device))
        shape = (CLASS_BATCH, *self._largest.mean.shape[1:])
        points = []
        for number in range(CLASS_PICTURES // CLASS_BATCH):
            draw = rng.generator(self.seed, number, "prior drift")
            latents = torch.randn(shape, generator=draw).to(device)
            for place, time in enumerate(times):
                timesteps = time.expand(CLASS_BATCH)
                prediction = family.predict(latents, timesteps, self._class_sized(self.class_condition))
                if place % 2:
                    points.append((latents, timesteps, prediction))
                clean, noise = family.prediction.to_x0_noise(latents, prediction, timesteps)
                below = times[min(place + 1, len(times) - 1)].expand(CLASS_BATCH)
                latents = family.prediction.add_noise(clean, noise, below)
        return points

    @property
    def _largest(self) -> LatentBucket:
        """The bucket with the most rows; class pictures have its size."""
        return max(self.dataset.buckets, key=lambda bucket: len(bucket.mean))

    def _class_sized(self, condition: Conditioning) -> Conditioning:
        """The class prompt for a batch of class pictures, with the sizes of a photo."""
        tables = self._largest.sizes.items()
        sizes = {name: table[:1].to(self.family.device).expand(CLASS_BATCH, -1) for name, table in tables}
        return condition.expand(CLASS_BATCH).with_rows(**sizes)

    def _point(
        self, number: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """One photo with noise in each band: noisy latents `[BANDS, C, h, w]`, timesteps, target, text rows and
        sizes."""
        family, device = self.family, self.family.device
        bucket_index, row, text = self.places[number]
        bucket = self.dataset.buckets[bucket_index]
        latents = bucket.mean[row].to(device).expand(BANDS, -1, -1, -1)
        # Drawn on the CPU, so that the noise is the same on every device.
        draw = rng.generator(self.seed, number, "validation")
        noise = torch.randn(latents.shape, generator=draw).to(device)
        # Across all points, the positions within a band are spread evenly: a stratified sample.
        place = (number + torch.rand(BANDS, generator=draw, dtype=torch.float64)) / len(self.places)
        shares = (torch.arange(BANDS, dtype=torch.float64) + place) / BANDS
        timesteps = family.prediction.timesteps_at(shares.to(device))
        noisy = family.prediction.add_noise(latents, noise, timesteps)
        target = family.prediction.target(latents, noise, timesteps)
        sizes = {name: table[row].to(device).expand(BANDS, -1) for name, table in bucket.sizes.items()}
        return noisy, timesteps, target, torch.full((BANDS,), text, device=device), sizes


def _unaugmented_rows(dataset: Dataset) -> list[tuple[int, int, int]]:
    """(bucket, row, text) of each unaugmented photo (variant 0) with its own text, in the order of the photos."""
    rows = [
        (photo, number, row, text)
        for number, bucket in enumerate(dataset.buckets)
        for row, (photo, variant, text) in enumerate(
            zip(bucket.photo.tolist(), bucket.variant.tolist(), bucket.text.tolist(), strict=True)
        )
        if variant == 0
    ]
    return [row[1:] for row in sorted(rows)]


def _spread(rows: list[tuple[int, int, int]], count: int) -> list[tuple[int, int, int]]:
    """At most `count` of the rows, evenly spread."""
    return rows if len(rows) <= count else [rows[number * len(rows) // count] for number in range(count)]


def _sums(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[5, BANDS]`: sums of squared errors, absolute errors, targets and squared targets, and the number of values."""
    error, target = (prediction - target).flatten(1), target.flatten(1)
    count = torch.full((len(target),), target.shape[1], device=target.device)
    parts = [error.square().sum(1), error.abs().sum(1), target.sum(1), target.square().sum(1), count.to(error.dtype)]
    return torch.stack(parts)


def _figures(sums: torch.Tensor) -> dict[str, float]:
    """MSE, RMSE, MAE and R2 from the five sums. R2 = 1 - squared error / (variance of the target * count)."""
    squared, absolute, target, target_squared, count = sums.tolist()
    variance = target_squared - target * target / count
    mse = squared / count
    return {"mse": mse, "rmse": math.sqrt(mse), "mae": absolute / count, "r2": 1 - squared / max(variance, 1e-30)}
