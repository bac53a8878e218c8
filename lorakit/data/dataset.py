"""The encoded photos as training sees them: rows of latents by size, and the batches of an epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lorakit.core import rng
from lorakit.data.folder import Photo


@dataclass(frozen=True)
class LatentBucket:
    """Encoded photos of one size. A row is a variant of a photo.

    Attributes:
        width, height: pixels.
        mean, std: float32 `[n, C, h, w]`, scaled as the U-Net takes them: latents = mean + std * noise.
        mask: float32 `[n, 1, h, w]`, 0 to 1, or None where no loss is masked.
        time_ids: `[n, 6]` SDXL's size and crop conditions, or None.
        photo: int64 `[n]` on the CPU, index into `Dataset.photos`.
        variant: int64 `[n]` on the CPU, number of the variant; 0 is the photo as it is.
        text: int64 `[n]` on the CPU, index into `Dataset.texts` of the photo's own text.
    """

    width: int
    height: int
    mean: torch.Tensor
    std: torch.Tensor
    mask: torch.Tensor | None
    time_ids: torch.Tensor | None
    photo: torch.Tensor
    variant: torch.Tensor
    text: torch.Tensor

    def to(self, device: torch.device | str) -> LatentBucket:
        """What a step gathers from, on `device`; the rest stays."""
        mask = None if self.mask is None else self.mask.to(device)
        ids = None if self.time_ids is None else self.time_ids.to(device)
        return replace(self, mean=self.mean.to(device), std=self.std.to(device), mask=mask, time_ids=ids)


@dataclass(frozen=True)
class Batch:
    """One batch: rows `entries` (int64 `[b]`) of `Dataset.buckets[bucket]`, and `texts` (int64 `[b]`) of its texts."""

    bucket: int
    entries: torch.Tensor
    texts: torch.Tensor


@dataclass(frozen=True)
class Dataset:
    """Encoded photos and the texts they may be shown with.

    Attributes:
        buckets: one for each size.
        photos: the photos, in order of name.
        texts: every different text; photos kept for validation share the list.
        choices: for each photo the texts (indices) it alternates between, its own first.
        dropped: index of the bare instance prompt that `caption_dropout` puts in a text's place.
        caption_dropout: how often.
    """

    buckets: list[LatentBucket]
    photos: list[Photo]
    texts: list[str]
    choices: list[list[int]]
    dropped: int
    caption_dropout: float

    def to(self, device: torch.device | str) -> Dataset:
        """The same with every bucket on `device`."""
        return replace(self, buckets=[bucket.to(device) for bucket in self.buckets])

    def plain(self) -> Dataset:
        """The photos as they are, to examine a model on: no variants, and each with its own text and no other."""
        kept = []
        for bucket in self.buckets:
            rows = torch.nonzero(bucket.variant == 0).flatten()
            there = rows.to(bucket.mean.device)
            kept.append(
                replace(
                    bucket,
                    mean=bucket.mean[there],
                    std=bucket.std[there],
                    mask=None if bucket.mask is None else bucket.mask[there],
                    time_ids=None if bucket.time_ids is None else bucket.time_ids[there],
                    photo=bucket.photo[rows],
                    variant=bucket.variant[rows],
                    text=bucket.text[rows],
                )
            )
        return replace(self, buckets=kept, choices=[own[:1] for own in self.choices], caption_dropout=0.0)

    def names(self, bucket: int) -> list[str]:
        """The photo's name for each row of a bucket."""
        return [self.photos[photo].relative for photo in self.buckets[bucket].photo.tolist()]

    def batches(self, seed: int, epoch: int, batch_size: int) -> list[Batch]:
        """One epoch: every photo exactly once, in one of its variants and one of its texts; the last batch of a size
        may be smaller.

        A pure function of (seed, epoch, batch_size). A photo goes through its variants epoch by epoch, from a place
        of its own, so each is used equally often.
        """
        draw = rng.generator(seed, epoch, "order")
        starts = rng.generator(seed, 0, "variants")
        texts = self._texts(seed, epoch)
        batches = []
        for number, bucket in enumerate(self.buckets):
            device = bucket.mean.device
            rows = _rows(bucket)
            first = torch.randint(2**31, (len(rows),), generator=starts).tolist()
            chosen = torch.tensor([own[(start + epoch) % len(own)] for own, start in zip(rows, first, strict=True)])
            chosen = chosen[torch.randperm(len(chosen), generator=draw)]
            # One copy to the device for the whole epoch, which CUDA need not be waited for; batches are views of it.
            ahead = device.type == "cuda"
            entries, told = (t.to(device, non_blocking=ahead) for t in (chosen, texts[bucket.photo[chosen]]))
            pairs = zip(torch.split(entries, batch_size), torch.split(told, batch_size), strict=True)
            batches += [Batch(number, part, text) for part, text in pairs]
        return [batches[at] for at in torch.randperm(len(batches), generator=draw).tolist()]

    def _texts(self, seed: int, epoch: int) -> torch.Tensor:
        """For each photo the text it has in this epoch."""
        draw = rng.generator(seed, epoch, "texts")
        count = len(self.photos)
        picks, drops = torch.randint(2**31, (count,), generator=draw).tolist(), torch.rand(count, generator=draw)
        shown = torch.tensor([own[pick % len(own)] for own, pick in zip(self.choices, picks, strict=True)])
        return torch.where(drops < self.caption_dropout, torch.tensor(self.dropped), shown)


def _rows(bucket: LatentBucket) -> list[list[int]]:
    """Rows of each photo of the bucket, in the photos' order."""
    rows: dict[int, list[int]] = {}
    for row, photo in enumerate(bucket.photo.tolist()):
        rows.setdefault(photo, []).append(row)
    return list(rows.values())
