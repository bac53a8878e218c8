"""Photos through the frozen VAE, once, kept in memory and, when asked, on disk under their content's hash."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch

from lorakit.config import DataConfig, TrainConfig
from lorakit.core import atomic
from lorakit.core.cache_dir import cache_dir
from lorakit.core.errors import LorakitError
from lorakit.data import augment, buckets, captions, decode, holdout
from lorakit.data.augment import Variant
from lorakit.data.dataset import Dataset, LatentBucket
from lorakit.data.decode import Decoded, Pixels
from lorakit.data.folder import Photo

# Part of every key on disk: raised when decoding, cutting or the stored tensors change meaning.
FORMAT = 1
# Photos decoded ahead of the encoder; it bounds memory, as every one may be a hundred megabytes until it is cut.
AHEAD = 4

EncodeImage = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
TimeIds = Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], list[int] | None]
AtOnce = Callable[[buckets.Bucket], int]
Say = Callable[[str], object]


class Photos(Protocol):
    """What is built from; `check.check` reports it."""

    @property
    def photos(self) -> list[Photo]: ...
    @property
    def step(self) -> int: ...
    @property
    def downscale(self) -> int: ...


def build(
    found: Photos,
    config: DataConfig,
    train: TrainConfig,
    *,
    encode_image: EncodeImage,
    time_ids: TimeIds,
    device: torch.device | str,
    identity: str,
    say: Say,
    at_once: AtOnce = lambda size: 1,
    folder: Path | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Encode every photo.

    Args:
        found: what `check.check` reported.
        encode_image: pixels `[B, 3, H, W]` in [-1, 1] -> (mean, std) of the scaled latents.
        time_ids: ((height, width), (top, left), (target height, target width)) -> six numbers, or None.
        identity: the base's hash; latents on disk are found again under the same one only.
        say: takes each line for the person.
        at_once: how many photos of a size the encoder is given together.
        folder: where latents are kept on disk; by default in the user's cache.

    Returns:
        the photos to train on, and those kept for validation (None where none are). Both index the same texts.

    Raises:
        LorakitError: a photo cannot be read any more, or its latent is not finite; masks are asked for and none is
            there.
    """
    work = _Work(config, train, encode_image, time_ids, identity, found.step, found.downscale, at_once)
    work.folder = None if config.cache == "memory" else folder or cache_dir() / "latents"
    trained, held_out = holdout.split(found.photos, train.holdout, train.seed)
    say(holdout.describe_split(len(found.photos), len(held_out), train.holdout))
    texts = _Texts(config, train.seed)
    dataset = _dataset(trained, work, texts, device)
    work.config = replace(config, variants=1)  # photos kept for validation are only looked at as they are
    kept = _dataset(held_out, work, texts, device).plain() if held_out else None
    if train.masked_loss and work.masks == 0:
        raise LorakitError(
            "train.masked_loss: no photo has a mask; put name.mask.png beside name.jpg, or set it to false"
        )
    say(work.said(len(found.photos)))
    return dataset, kept


class _Texts:
    """Collects every text a run may show, each once; its list grows as photos are added."""

    def __init__(self, config: DataConfig, seed: int):
        self.config, self.seed = config, seed
        self.all: list[str] = []
        self.dropped = self.index(captions.instance_prompt(config))

    def index(self, text: str) -> int:
        if text not in self.all:
            self.all.append(text)
        return self.all.index(text)

    def choices(self, photo: Photo) -> list[int]:
        text = captions.final_text(photo.caption, self.config)
        return [self.index(t) for t in captions.variants(text, self.config, f"{self.seed}/{photo.relative}")]


@dataclass
class _Ready:
    """A variant of a photo: its latent (mean, std) if that was on disk, else its pixels, until they are encoded."""

    variant: Variant
    number: int
    key: str
    time_ids: list[int] | None
    pixels: Pixels | None
    latent: tuple[torch.Tensor, torch.Tensor] | None
    mask: torch.Tensor | None


# The index of a photo, and a variant of it.
_Row = tuple[int, _Ready]


@dataclass
class _Work:
    """How photos become latents, and the counts that are said at the end."""

    config: DataConfig
    train: TrainConfig
    encode_image: EncodeImage
    time_ids: TimeIds
    identity: str
    step: int
    downscale: int
    at_once: AtOnce
    folder: Path | None = None
    hits: int = 0
    encoded: int = 0
    masks: int = 0

    def said(self, photos: int) -> str:
        """What was done, in a line."""
        rows = self.hits + self.encoded
        of = f" ({photos} photos with their variants)" if rows > photos else ""
        if self.folder is None:
            return f"latents: {self.encoded} encoded{of}"
        return f"latents: {self.hits} hits, {self.encoded} encoded{of}, kept in {self.folder}"

    def prepare(self, photo: Photo) -> list[_Ready]:
        """All variants of a photo; it is decoded only where one of them is not on disk, or has a mask."""
        try:
            raw = photo.path.read_bytes()
        except OSError as error:
            raise LorakitError(f"{photo.relative}: cannot be read any more ({error.strerror or error})") from None
        size = decode.measure(raw, photo.relative)
        placement = buckets.assign(size, self.config.resolution, self.step)
        cuts = augment.of_photo(size, placement, self.config, self.train.seed, photo.relative)
        keys = [self.key(raw, cut) for cut in cuts]
        stored = [self._load(key, cut) for key, cut in zip(keys, cuts, strict=True)]
        needs_pixels = None in stored or self.train.masked_loss
        decoded = decode.decode(raw, photo.relative) if needs_pixels else None
        mask = _mask(photo, decoded) if decoded and self.train.masked_loss else None
        ready = []
        for number, (cut, key, old) in enumerate(zip(cuts, keys, stored, strict=True)):
            target = (cut.bucket.height, cut.bucket.width)
            ids = self.time_ids((size[1], size[0]), augment.top_left(size, cut), target)
            pixels = augment.render(decoded.pixels, cut) if decoded and old is None else None
            cut_mask = torch.from_numpy(augment.render_mask(mask, cut, self.downscale)) if mask is not None else None
            ready.append(_Ready(cut, number, key, ids, pixels, old, cut_mask))
        return ready

    def key(self, raw: bytes, cut: Variant) -> str:
        """Name on disk: the file's bytes, how they are cut, flipped and coloured, and what encodes them."""
        facts = json.dumps([FORMAT, self.identity, "float32", *astuple(cut)])
        return hashlib.sha256(hashlib.sha256(raw).digest() + facts.encode()).hexdigest()

    def encode(self, photos: Sequence[Photo], rows: Sequence[_Row]) -> None:
        """Latents of rows of one size, float32 on the CPU; checked, and kept on disk where that is asked for."""
        cut = [torch.from_numpy(ready.pixels) for _, ready in rows if ready.pixels is not None]
        pixels = torch.stack(cut).permute(0, 3, 1, 2).float() / 127.5 - 1
        means, stds = (part.float().cpu() for part in self.encode_image(pixels))
        for (index, ready), mean, std in zip(rows, means, stds, strict=True):
            if not (bool(torch.isfinite(mean).all()) and bool(torch.isfinite(std).all())):
                name = photos[index].relative
                raise LorakitError(f"{name}: its latent is not finite; the base's VAE cannot encode this photo")
            self.encoded += 1
            if self.folder is not None:
                _store(_file(self.folder, ready.key), mean, std)
            ready.pixels, ready.latent = None, (mean, std)

    def _load(self, key: str, cut: Variant) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What is on disk under a key; a file that is damaged counts as absent and is written anew."""
        if self.folder is None:
            return None
        try:
            tensors = safetensors.torch.load(_file(self.folder, key).read_bytes())
            mean, std = tensors["mean"], tensors["std"]
        except (OSError, KeyError, safetensors.SafetensorError):
            return None
        size = (cut.bucket.height // self.downscale, cut.bucket.width // self.downscale)
        whole = mean.shape == std.shape and tuple(mean.shape[1:]) == size
        return (mean, std) if whole and bool(torch.isfinite(mean).all() and torch.isfinite(std).all()) else None


def _file(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def _mask(photo: Photo, decoded: Decoded) -> Pixels | None:
    """A photo's own mask, else its transparency, else None: all of it counts."""
    if photo.mask is not None:
        mask: Pixels | None = decode.decode_mask(photo.mask, decoded.size)
    else:
        mask = decoded.alpha
    if mask is not None and int(mask.max()) == 0:
        raise LorakitError(f"{photo.relative}: its mask is black all over, so nothing of it would be learned")
    return mask


def _dataset(photos: Sequence[Photo], work: _Work, texts: _Texts, device: torch.device | str) -> Dataset:
    choices = [texts.choices(photo) for photo in photos]
    rows: dict[buckets.Bucket, list[_Row]] = {}
    waiting: dict[buckets.Bucket, list[_Row]] = {}
    for index, ready in _prepared(photos, work):
        size = ready.variant.bucket
        rows.setdefault(size, []).append((index, ready))
        work.masks += ready.mask is not None
        if ready.latent is not None:
            work.hits += 1
            continue
        waiting.setdefault(size, []).append((index, ready))
        if len(waiting[size]) == work.at_once(size):
            work.encode(photos, waiting.pop(size))
    for rest in waiting.values():
        work.encode(photos, rest)
    made = [_bucket(size, rows[size], choices, work.train.masked_loss).to(device) for size in sorted(rows)]
    return Dataset(made, list(photos), texts.all, choices, texts.dropped, work.config.caption_dropout)


def _prepared(photos: Sequence[Photo], work: _Work) -> Iterator[tuple[int, _Ready]]:
    """Variants in the photos' order, decoded a few photos ahead of the encoder."""
    with ThreadPoolExecutor(AHEAD) as pool:
        ahead = deque(pool.submit(work.prepare, photo) for photo in photos[:AHEAD])
        for index in range(len(photos)):
            done = ahead.popleft().result()
            if index + AHEAD < len(photos):
                ahead.append(pool.submit(work.prepare, photos[index + AHEAD]))
            for ready in done:
                yield index, ready


def _bucket(
    size: buckets.Bucket,
    rows: Sequence[_Row],
    choices: Sequence[Sequence[int]],
    masked: bool,
) -> LatentBucket:
    latents = [ready.latent for _, ready in rows if ready.latent is not None]
    assert len(latents) == len(rows), "every row is encoded"
    mean, std = (torch.stack(part) for part in zip(*latents, strict=True))
    mask = None
    if masked:
        everything = torch.ones(mean.shape[-2:])
        masks = [everything if ready.mask is None else ready.mask for _, ready in rows]
        mask = torch.stack(masks)[:, None]
    ids = [ready.time_ids for _, ready in rows]
    time_ids = None if ids[0] is None else torch.tensor(ids, dtype=torch.float32)
    photo = torch.tensor([index for index, _ in rows])
    variant = torch.tensor([ready.number for _, ready in rows])
    text = torch.tensor([choices[index][0] for index, _ in rows])
    return LatentBucket(size.width, size.height, mean, std, mask, time_ids, photo, variant, text)


def _store(path: Path, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Write one latent, whole or not at all, in a folder that only the user may enter: a latent shows the photo.

    Raises:
        LorakitError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic.write(path, safetensors.torch.save({"mean": mean.contiguous(), "std": std.contiguous()}))
    except OSError as error:
        hint = "set data.cache = 'memory' or LORAKIT_CACHE"
        raise LorakitError(f"{path.parent}: latents cannot be kept there ({error.strerror}); {hint}") from None
