"""The encoded photos for training: rows of latents by size, and the batches of an epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lorakit.core import rng
from lorakit.data.photo_folder import Photo


@dataclass(frozen=True)
class LatentBucket:
    """Encoded photos of one size. A row is a variant of a photo.

    Attributes:
        width, height: pixels.
        mean, std: float32 `[n, C, h, w]`, scaled for the denoiser: latents = mean + std * noise.
        mask: float32 `[n, 1, h, w]`, 0 to 1, or None if the loss uses no masks.
        sizes: name -> `[n, ...]`, the family's `size_conditions`; empty if it has none.
        photo: int64 `[n]` on the CPU, index into `Dataset.photos`.
        variant: int64 `[n]` on the CPU, number of the variant; 0 is the photo without augmentation.
        text: int64 `[n]` on the CPU, index into `Dataset.texts` of the photo's own text.
        resolution: int64 `[n]` on the CPU, index in `data.resolutions` of the row's resolution.
    """

    width: int
    height: int
    mean: torch.Tensor
    std: torch.Tensor
    mask: torch.Tensor | None
    sizes: dict[str, torch.Tensor]
    photo: torch.Tensor
    variant: torch.Tensor
    text: torch.Tensor
    resolution: torch.Tensor

    def to(self, device: torch.device | str) -> LatentBucket:
        """Move the tensors that a step reads to `device`. The indices stay on the CPU."""
        mask = None if self.mask is None else self.mask.to(device)
        sizes = {name: table.to(device) for name, table in self.sizes.items()}
        return replace(self, mean=self.mean.to(device), std=self.std.to(device), mask=mask, sizes=sizes)

    def sizes_of(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The size conditions of some rows, for `Conditioning.with_rows`."""
        return {name: table[rows] for name, table in self.sizes.items()}


@dataclass(frozen=True)
class Batch:
    """One batch. `entries`, int64 `[b]`, are rows of `Dataset.buckets[bucket]`; `text_rows`, int64 `[b]`, index
    `Dataset.texts`."""

    bucket: int
    entries: torch.Tensor
    text_rows: torch.Tensor


@dataclass(frozen=True)
class Dataset:
    """Encoded photos and the texts they are trained with.

    Attributes:
        buckets: one for each size.
        photos: the photos, in order of name.
        texts: every different text. Training and validation photos share the list.
        choices: for each photo, the indices of its texts; its own text is first.
        instance_prompts: for each photo, the index of the instance prompt, which replaces a dropped text.
        caption_dropout: probability that a text is dropped.
    """

    buckets: list[LatentBucket]
    photos: list[Photo]
    texts: list[str]
    choices: list[list[int]]
    instance_prompts: list[int]
    caption_dropout: float

    def to(self, device: torch.device | str) -> Dataset:
        """Move every bucket to `device`."""
        return replace(self, buckets=[bucket.to(device) for bucket in self.buckets])

    def unaugmented(self) -> Dataset:
        """The same photos for validation: only variant 0 at the highest resolution, and only each photo's own text."""
        latent_buckets = []
        for bucket in self.buckets:
            rows = torch.nonzero((bucket.variant == 0) & (bucket.resolution == 0)).flatten()
            if not len(rows):
                continue
            device_rows = rows.to(bucket.mean.device)
            latent_buckets.append(
                replace(
                    bucket,
                    mean=bucket.mean[device_rows],
                    std=bucket.std[device_rows],
                    mask=None if bucket.mask is None else bucket.mask[device_rows],
                    sizes=bucket.sizes_of(device_rows),
                    photo=bucket.photo[rows],
                    variant=bucket.variant[rows],
                    text=bucket.text[rows],
                    resolution=bucket.resolution[rows],
                )
            )
        return replace(self, buckets=latent_buckets, choices=[own[:1] for own in self.choices], caption_dropout=0.0)

    def names(self, bucket: int) -> list[str]:
        """Name of the photo of each row of a bucket."""
        return [self.photos[photo].relative for photo in self.buckets[bucket].photo.tolist()]

    def batches(self, seed: int, epoch: int, batch_size: int) -> list[Batch]:
        """The batches of one epoch: every photo `repeats` times at each resolution, each time with one of its variants
        and one of its texts.

        The last batch of a size may be smaller. The result is a pure function of (seed, epoch, batch_size). A photo
        uses its variants in turn from a random start, so every variant is used equally often.
        """
        draw = rng.generator(seed, epoch, "order")
        starts = rng.generator(seed, 0, "variants")
        repeats = torch.tensor([photo.repeats for photo in self.photos])
        resolutions = 1 + max(int(bucket.resolution.max()) for bucket in self.buckets)
        passes = resolutions * int(repeats.max())
        text_rows_of_passes = [self._text_rows(seed, number) for number in range(epoch * passes, (epoch + 1) * passes)]
        batches = []
        for index, bucket in enumerate(self.buckets):
            device = bucket.mean.device
            groups = _rows_by_photo(bucket)
            of_group = [int(bucket.resolution[own[0]]) for own in groups]
            offsets = torch.randint(2**31, (len(groups),), generator=starts).tolist()
            pairs = [
                (
                    own[(start + epoch * int(repeats[bucket.photo[own[0]]]) + at) % len(own)],
                    text_rows_of_passes[at * resolutions + resolution],
                )
                for at in range(int(repeats.max()))
                for own, resolution, start in zip(groups, of_group, offsets, strict=True)
                if at < repeats[bucket.photo[own[0]]]
            ]
            order = torch.randperm(len(pairs), generator=draw)
            rows = torch.tensor([row for row, _ in pairs])[order]
            row_texts = torch.tensor([int(of_pass[bucket.photo[row]]) for row, of_pass in pairs])[order]
            # One copy to the device for the whole epoch; the host does not wait for CUDA. The batches are views of it.
            non_blocking = device.type == "cuda"
            entries, text_rows = (t.to(device, non_blocking=non_blocking) for t in (rows, row_texts))
            parts = zip(torch.split(entries, batch_size), torch.split(text_rows, batch_size), strict=True)
            batches += [Batch(index, part, text) for part, text in parts]
        return [batches[at] for at in torch.randperm(len(batches), generator=draw).tolist()]

    def _text_rows(self, seed: int, epoch: int) -> torch.Tensor:
        """Index of the text of each photo in this epoch."""
        draw = rng.generator(seed, epoch, "texts")
        count = len(self.photos)
        picks, drops = torch.randint(2**31, (count,), generator=draw).tolist(), torch.rand(count, generator=draw)
        choices = torch.tensor([own[pick % len(own)] for own, pick in zip(self.choices, picks, strict=True)])
        return torch.where(drops < self.caption_dropout, torch.tensor(self.instance_prompts), choices)


def _rows_by_photo(bucket: LatentBucket) -> list[list[int]]:
    """The rows of each (photo, resolution) in this bucket, in the order of the photos."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(bucket.photo.tolist(), bucket.resolution.tolist(), strict=True)):
        rows.setdefault(key, []).append(row)
    return list(rows.values())
