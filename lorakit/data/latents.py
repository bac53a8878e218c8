"""Encode the photos with the frozen VAE, once. Keep the latents in memory or on disk, by the hash of their content."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch

from lorakit.config import NO_LATENT_CACHE, DataConfig, TrainConfig
from lorakit.config.photo_edits import NO_EDIT, PhotoEdit
from lorakit.core import atomic, safetensors_header
from lorakit.core.cache_dir import cache_dir
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.units import count
from lorakit.data import augment, buckets, captions, concepts, decode, holdout, masks
from lorakit.data.augment import Variant
from lorakit.data.dataset import Dataset, LatentBucket
from lorakit.data.decode import Picture, Pixels
from lorakit.data.photo_folder import Photo

# Part of every key on disk. Raise it when decoding, cropping or the saved tensors change.
CACHE_VERSION = 2
CHECKSUM = "blake2b"
# Number of photos that are decoded in advance. A decoded photo may have a hundred megabytes.
MAX_PREFETCH = 4

EncodeImages = Callable[[Iterable[torch.Tensor]], Iterable[tuple[torch.Tensor, torch.Tensor]]]
SizeConditions = Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], dict[str, list[int]]]
BatchSize = Callable[[buckets.Bucket], int]
Say = Callable[[str], object]


class PhotoSource(Protocol):
    """The part of `checks.Report` that `build` needs."""

    @property
    def photos(self) -> list[Photo]: ...
    @property
    def multiple(self) -> int: ...
    @property
    def downscale(self) -> int: ...


def build(
    report: PhotoSource,
    config: DataConfig,
    train: TrainConfig,
    *,
    encode_images: EncodeImages,
    size_conditions: SizeConditions,
    device: torch.device | str,
    identity: str,
    say: Say,
    batch_size: BatchSize = lambda size: 1,
    folder: Path | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Encode every photo.

    Args:
        report: the report of `checks.check`.
        encode_images: batches of pixels `[B, 3, H, W]` in [-1, 1] -> (mean, std) of the scaled latents of each.
        size_conditions: ((height, width), (top, left), (target height, target width)) -> name -> row (see
            `Family.size_conditions`).
        identity: hash of the base, part of the key of latents on disk.
        say: called with each message for the user.
        batch_size: size -> number of photos per call of the encoder.
        folder: folder of the latents on disk; by default in the user's cache.

    Returns:
        the training photos, and the validation photos or None. Both index the same texts.

    Raises:
        LorakitError: a photo cannot be read any more, a latent is not finite, or `train.masked_loss` is set and no
            photo has a mask.
    """
    encoder = _Encoder(
        config, train, encode_images, size_conditions, identity, report.multiple, report.downscale, batch_size
    )
    encoder.folder = None if config.cache == "memory" else folder or cache_dir() / "latents"
    training_photos, validation_photos = holdout.split(report.photos, train.holdout, train.seed)
    say(holdout.describe_split(len(report.photos), len(validation_photos), train.holdout))
    table = _TextTable(config, train.seed)
    dataset = _dataset(training_photos, encoder, table, device)
    # Validation only uses variant 0 at the highest resolution.
    encoder.config = replace(config, variants=1, lower_resolutions=())
    validation = _dataset(validation_photos, encoder, table, device).unaugmented() if validation_photos else None
    if train.masked_loss and encoder.masks == 0:
        raise LorakitError(masks.NO_MASK)
    say(encoder.describe(len(report.photos), config))
    return dataset, validation


class _TextTable:
    """The distinct texts of a run. The list grows while photos are added."""

    def __init__(self, config: DataConfig, seed: int):
        self.config, self.seed = config, seed
        self.texts: list[str] = []
        self.index(captions.instance_prompt(config))

    def index(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)

    def choices(self, photo: Photo) -> list[int]:
        config = concepts.of_photo(photo, self.config)
        seed = f"{self.seed}/{photo.relative}"
        texts = [t for text in captions.photo_texts(photo, config) for t in captions.variants(text, config, seed)]
        return [self.index(text) for text in dict.fromkeys(texts)]

    def instance_prompt(self, photo: Photo) -> int:
        return self.index(captions.instance_prompt(concepts.of_photo(photo, self.config)))


@dataclass
class _VariantRow:
    """A variant of a photo: its latent (mean, std), or its pixels until they are encoded."""

    variant: Variant
    number: int
    resolution: int
    key: str
    sizes: dict[str, list[int]]
    pixels: Pixels | None
    latent: tuple[torch.Tensor, torch.Tensor] | None
    mask: torch.Tensor | None


# (index of a photo, a variant of it).
_IndexedRow = tuple[int, _VariantRow]


@dataclass
class _Encoder:
    """Encodes photos to latents, and counts rows for `describe`."""

    config: DataConfig
    train: TrainConfig
    encode_images: EncodeImages
    size_conditions: SizeConditions
    identity: str
    multiple: int
    downscale: int
    batch_size: BatchSize
    folder: Path | None = None
    hits: int = 0
    damaged: set[str] = field(default_factory=set)
    encoded: int = 0
    masks: int = 0

    def describe(self, photo_count: int, config: DataConfig) -> str:
        """A message with the number of rows read from disk and of rows encoded."""
        rows = self.hits + self.encoded
        sizes = Message(" at {count} resolutions", len(config.resolutions)) if config.lower_resolutions else ""
        variants = " with their variants" if config.variants > 1 else ""
        photos = count(photo_count, "photo")
        of = Message(" ({photos}{variants}{sizes})", photos, variants, sizes) if rows > photo_count else ""
        if self.folder is None:
            return Message("latents: {encoded} encoded{of}", self.encoded, of)
        suffix = (
            Message("; {count} on disk were damaged and are encoded again", len(self.damaged)) if self.damaged else ""
        )
        return Message(
            "latents: {hits} from the cache, {encoded} encoded{of}, kept in {folder}{suffix}",
            *(self.hits, self.encoded, of, self.folder, suffix),
        )

    def prepare(self, photo: Photo) -> list[_VariantRow]:
        """All variants of a photo at each resolution. The photo is decoded only if one of them is not on disk, or if
        the loss uses masks."""
        try:
            raw = photo.path.read_bytes()
        except OSError as error:
            raise LorakitError(
                "{file}: cannot be read any more ({why})", photo.relative, error.strerror or error
            ) from None
        size = decode.measure(raw, photo.relative, photo.edit)
        of_photo = partial(augment.of_photo, size, config=self.config, seed=self.train.seed, name=photo.relative)
        numbered = [
            (resolution, number, variant)
            for resolution, placement in enumerate(buckets.placements(size, self.config, self.multiple, photo.relative))
            for number, variant in enumerate(of_photo(placement))
        ]
        variants = [variant for _, _, variant in numbered]
        keys = [self.key(raw, variant, photo.edit) for variant in variants]
        disk_latents = [self._load(key, variant) for key, variant in zip(keys, variants, strict=True)]
        needs_pixels = None in disk_latents or self.train.masked_loss
        picture = decode.decode(raw, photo.relative, edit=photo.edit) if needs_pixels else None
        mask = _photo_mask(photo, picture, raw) if picture and self.train.masked_loss else None
        rows = []
        for (resolution, number, variant), key, latent in zip(numbered, keys, disk_latents, strict=True):
            target = (variant.bucket.height, variant.bucket.width)
            sizes = self.size_conditions((size[1], size[0]), augment.top_left(size, variant), target)
            pixels = augment.render(picture.pixels, variant) if picture and latent is None else None
            variant_mask = (
                torch.from_numpy(augment.render_mask(mask, variant, self.downscale)) if mask is not None else None
            )
            rows.append(_VariantRow(variant, number, resolution, key, sizes, pixels, latent, variant_mask))
        return rows

    def key(self, raw: bytes, variant: Variant, edit: PhotoEdit) -> str:
        """Key on disk: hash of the file's bytes, its edit, crop, flip and colours, and the base's hash."""
        edits = [str(edit.geometry)] if edit.geometry != NO_EDIT else []
        content = json.dumps([CACHE_VERSION, self.identity, "float32", *astuple(variant), *edits])
        return hashlib.sha256(hashlib.sha256(raw).digest() + content.encode()).hexdigest()

    def encode(self, photos: Sequence[Photo], batches: Iterable[Sequence[_IndexedRow]]) -> None:
        """Encode batches of rows of one size to float32 latents on the CPU, check them, and save them if there is a
        folder."""
        pending = deque[Sequence[_IndexedRow]]()

        def pixels() -> Iterator[torch.Tensor]:
            for rows in batches:
                pending.append(rows)
                arrays = [torch.from_numpy(row.pixels) for _, row in rows if row.pixels is not None]
                yield torch.stack(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1

        for latents in self.encode_images(pixels()):
            for (index, row), *latent in zip(pending.popleft(), *latents, strict=True):
                mean, std = (part.float().cpu() for part in latent)
                if not (bool(torch.isfinite(mean).all()) and bool(torch.isfinite(std).all())):
                    name = photos[index].relative
                    raise LorakitError(
                        "{photo}: its latent is not finite, because the base's VAE cannot encode it: "
                        "leave it out (data.exclude), or give another VAE (model.vae)",
                        name,
                    )
                self.encoded += 1
                if self.folder is not None:
                    _save(_cache_path(self.folder, row.key), mean, std)
                row.pixels, row.latent = None, (mean, std)

    def _load(self, key: str, variant: Variant) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The latent on disk for a key, or None. A damaged file is counted and will be replaced."""
        if self.folder is None or not _cache_path(self.folder, key).is_file():
            return None
        try:
            head = safetensors_header.read(_cache_path(self.folder, key))
            tensors = safetensors_header.load(head)
            mean, std = tensors["mean"], tensors["std"]
            is_complete = head.metadata[CHECKSUM] == _checksum(mean, std)
        except (KeyError, LorakitError):
            is_complete = False
        if not is_complete:
            self.damaged.add(key)
            return None
        size = (variant.bucket.height // self.downscale, variant.bucket.width // self.downscale)
        shape_matches = mean.shape == std.shape and tuple(mean.shape[1:]) == size
        return (mean, std) if shape_matches and bool(torch.isfinite(mean).all() and torch.isfinite(std).all()) else None


def _checksum(mean: torch.Tensor, std: torch.Tensor) -> str:
    """Checksum of a latent's bytes. Without it, a flipped bit on disk would go unnoticed."""
    digest = hashlib.blake2b(mean.contiguous().numpy().data, digest_size=16)
    digest.update(std.contiguous().numpy().data)
    return digest.hexdigest()


def _cache_path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def _photo_mask(photo: Photo, picture: Picture, raw: bytes) -> Pixels | None:
    """As `masks.of_photo`, but a completely black mask is refused."""
    mask = masks.of_photo(photo, raw, picture.size, picture.alpha)
    if mask is not None and int(mask.max()) == 0:
        raise LorakitError(masks.BLACK_MASK, photo.relative)
    return mask


def _dataset(photos: Sequence[Photo], encoder: _Encoder, table: _TextTable, device: torch.device | str) -> Dataset:
    choices = [table.choices(photo) for photo in photos]
    rows: dict[buckets.Bucket, list[_IndexedRow]] = {}
    encoder.encode(photos, _batches(photos, encoder, rows))
    latent_buckets = [
        _latent_bucket(size, rows[size], choices, encoder.train.masked_loss).to(device) for size in sorted(rows)
    ]
    prompts = [table.instance_prompt(photo) for photo in photos]
    return Dataset(latent_buckets, list(photos), table.texts, choices, prompts, encoder.config.caption_dropout)


def _batches(
    photos: Sequence[Photo], encoder: _Encoder, rows: dict[buckets.Bucket, list[_IndexedRow]]
) -> Iterator[list[_IndexedRow]]:
    """Put the variants of all photos into `rows`. Yield batches to encode, each of one size and `batch_size` rows."""
    pending: dict[buckets.Bucket, list[_IndexedRow]] = {}
    for index, row in _prefetch(photos, encoder):
        size = row.variant.bucket
        rows.setdefault(size, []).append((index, row))
        encoder.masks += row.mask is not None
        if row.latent is not None:
            encoder.hits += 1
            continue
        pending.setdefault(size, []).append((index, row))
        if len(pending[size]) == encoder.batch_size(size):
            yield pending.pop(size)
    yield from pending.values()


def _prefetch(photos: Sequence[Photo], encoder: _Encoder) -> Iterator[tuple[int, _VariantRow]]:
    """Yield the variants in the order of the photos. Threads decode `MAX_PREFETCH` photos in advance."""
    with ThreadPoolExecutor(MAX_PREFETCH) as pool:
        futures = deque(pool.submit(encoder.prepare, photo) for photo in photos[:MAX_PREFETCH])
        for index in range(len(photos)):
            rows = futures.popleft().result()
            if index + MAX_PREFETCH < len(photos):
                futures.append(pool.submit(encoder.prepare, photos[index + MAX_PREFETCH]))
            for row in rows:
                yield index, row


def _latent_bucket(
    size: buckets.Bucket,
    rows: Sequence[_IndexedRow],
    choices: Sequence[Sequence[int]],
    use_mask: bool,
) -> LatentBucket:
    latents = [row.latent for _, row in rows if row.latent is not None]
    assert len(latents) == len(rows), "every row is encoded"
    mean, std = (torch.stack(part) for part in zip(*latents, strict=True))
    mask = None
    if use_mask:
        ones = torch.ones(mean.shape[-2:])
        masks = [ones if row.mask is None else row.mask for _, row in rows]
        mask = torch.stack(masks)[:, None]
    names = rows[0][1].sizes
    sizes = {name: torch.tensor([row.sizes[name] for _, row in rows], dtype=torch.float32) for name in names}
    photo = torch.tensor([index for index, _ in rows])
    variant = torch.tensor([row.number for _, row in rows])
    text = torch.tensor([choices[index][0] for index, _ in rows])
    resolution = torch.tensor([row.resolution for _, row in rows])
    return LatentBucket(size.width, size.height, mean, std, mask, sizes, photo, variant, text, resolution)


def _save(path: Path, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Write one latent atomically, in a folder that only the user may read: a latent shows the photo.

    Raises:
        LorakitError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        tensors = {"mean": mean.contiguous(), "std": std.contiguous()}
        atomic.write(path, safetensors.torch.save(tensors, {CHECKSUM: _checksum(mean, std)}))
    except OSError as error:
        raise LorakitError(NO_LATENT_CACHE, path.parent, error.strerror) from None
