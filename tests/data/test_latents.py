"""Tests of the cached data set: the encoder gets the right pixels, an epoch has all photos, and no latent is stale."""

import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import marked
import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.config import DataConfig, TrainConfig
from lorakit.core.errors import LorakitError
from lorakit.data import captions, checks, latents
from lorakit.data.dataset import Batch, Dataset

DOWNSCALE = 4


class Encoder:
    """A VAE for tests that averages 4 x 4 pixels, so that a latent shows the picture. It records its inputs."""

    def __init__(self) -> None:
        self.pictures: list[np.ndarray] = []
        self.batch_sizes: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert pixels.dtype == torch.float32
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        self.batch_sizes.append(len(pixels))
        self.pictures += [((one.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy() for one in pixels]
        mean = torch.nn.functional.avg_pool2d(pixels, DOWNSCALE)
        return torch.cat([mean, mean[:, :1]], 1), torch.full_like(torch.cat([mean, mean[:, :1]], 1), 0.01)


def sdxl_sizes(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> dict[str, list[int]]:
    return {"time_ids": [*original, *crop, *target]}


class Builder:
    """Builds a data set from a folder as a run does, and records the messages."""

    def __init__(self, photos: Path, base):
        self.photos, self.base = photos, base
        self.encoder, self.messages = Encoder(), []

    def __call__(
        self,
        data: DataConfig | None = None,
        train: TrainConfig | None = None,
        identity: str = "base",
        ids: bool = False,
        at_once: int = 1,
    ) -> tuple[Dataset, Dataset | None]:
        self.encoder, self.messages = Encoder(), []
        data = replace(data or DataConfig(name="sks toy", resolution=64), folder=str(self.photos))
        report = checks.check(data, self.base)
        assert report.errors == []
        return latents.build(
            report,
            data,
            train or TrainConfig(holdout=0.0),
            encode_images=partial(map, self.encoder),
            size_conditions=sdxl_sizes if ids else lambda *_: {},
            device="cpu",
            identity=identity,
            say=self.messages.append,
            batch_size=lambda size: at_once,
        )


@pytest.fixture
def build(photos: Path, base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "kept"))
    return Builder(photos, base)


def fill(photos: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 64), (64, 96))) -> None:
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        marked.save(photos / f"{number:02}.png", marked.picture(number, width, height))


def photos_of(dataset: Dataset, batch: Batch) -> list[int]:
    """Return the numbers of the pictures in a batch, read from its latents."""
    pixels = (dataset.buckets[batch.bucket].mean[batch.entries, :3] + 1) * 127.5
    return [marked.number_of(one.permute(1, 2, 0).numpy()) for one in pixels]


def test_photos_of_one_size_are_encoded_in_batches_in_order(build: Builder, photos: Path) -> None:
    fill(photos, 11)  # 4, 4 and 3 photos of a size
    disk_config = DataConfig(name="sks toy", resolution=64, cache="disk")
    alone, _ = build()
    assert build.encoder.batch_sizes == [1] * 11
    for photo in photos.iterdir():
        if photo.name not in ("00.png", "04.png"):
            photo.unlink()
    build(disk_config)
    fill(photos, 11)  # two of them are in the cache, between the others
    batch_sizes, _ = build(disk_config, at_once=2)
    assert "2 from the cache, 9 encoded" in build.messages[-1]
    assert sorted(build.encoder.batch_sizes) == [1, 1, 1, 2, 2, 2]
    actual, _ = build(disk_config, at_once=2)
    assert "11 from the cache, 0 encoded" in build.messages[-1] and build.encoder.batch_sizes == []
    for one, *others in zip(alone.buckets, batch_sizes.buckets, actual.buckets, strict=True):
        for other in others:
            assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)
            assert torch.equal(one.photo, other.photo)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5])
def test_an_epoch_shows_every_photo_once(build: Builder, photos: Path, batch_size: int) -> None:
    """No photo is dropped: neither the rest of an incomplete batch nor a bucket with few photos."""
    fill(photos, 7)
    dataset, holdout = build()
    assert holdout is None
    for epoch in range(4):
        batches = dataset.batches(0, epoch, batch_size)
        assert Counter(n for batch in batches for n in photos_of(dataset, batch)) == Counter(range(7))
        assert all(1 <= len(batch.entries) <= batch_size for batch in batches)
        # ceil(3 / b) + ceil(2 / b) + ceil(2 / b): each batch has one size and is as full as possible
        assert len(batches) == -(-3 // batch_size) + 2 * -(-2 // batch_size)
    assert sorted(marked.number_of(picture) for picture in build.encoder.pictures) == list(range(7))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_encoded_photos_are_upright(build: Builder, photos: Path, orientation: int) -> None:
    """The VAE sees the photo with the mark in its upper left corner."""
    upright = marked.picture(11, 96, 64)
    marked.save(photos / "a.png", marked.as_camera_stores(upright, orientation), orientation)
    dataset, _ = build()
    assert [marked.marked_corner(picture) for picture in build.encoder.pictures] == ["upper left"]
    assert (dataset.buckets[0].width, dataset.buckets[0].height) == (80, 48)
    assert dataset.buckets[0].mean.shape == (1, 4, 12, 20)


def test_flip_is_in_the_cache_both_ways(build: Builder, photos: Path) -> None:
    fill(photos, 3)
    dataset, _ = build(DataConfig(name="sks toy", resolution=64, flip=True, variants=2))
    assert Counter(marked.marked_corner(p) for p in build.encoder.pictures) == {"upper left": 3, "upper right": 3}
    corners: dict[int, Counter[str]] = {n: Counter() for n in range(3)}
    for epoch in range(100):
        for batch in dataset.batches(0, epoch, 2):
            pixels = (dataset.buckets[batch.bucket].mean[batch.entries, :3] + 1) * 127.5
            for one in pixels.permute(0, 2, 3, 1).numpy():
                corners[marked.number_of(one)][marked.marked_corner(one)] += 1
    assert all(count == {"upper left": 50, "upper right": 50} for count in corners.values())


def test_batches_follow_from_seed_and_epoch(build: Builder, photos: Path) -> None:
    fill(photos, 12)
    data = DataConfig(name="sks toy", resolution=64, flip=True, variants=2, caption_dropout=0.5, shuffle_tags=True)
    for number in range(12):
        (photos / f"{number:02}.txt").write_text("sks toy, a, b, c")
    dataset, _ = build(data)

    def plain(seed: int, epoch: int) -> list[tuple[int, list[int], list[int]]]:
        return [(b.bucket, b.entries.tolist(), b.text_rows.tolist()) for b in dataset.batches(seed, epoch, 3)]

    assert plain(0, 5) == plain(0, 5)
    torch.manual_seed(123)
    assert plain(0, 5) == plain(0, 5)
    assert plain(0, 5) != plain(0, 6)
    assert plain(0, 5) != plain(1, 5)
    repeat, _ = build(data)
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(dataset.buckets, repeat.buckets, strict=True))
    assert [(b.bucket, b.entries.tolist(), b.text_rows.tolist()) for b in repeat.batches(0, 5, 3)] == plain(0, 5)


def test_every_epoch_has_its_own_order_and_batches(build: Builder, photos: Path) -> None:
    fill(photos, 8, ((64, 64),))
    dataset, _ = build()
    epochs = [[photos_of(dataset, batch) for batch in dataset.batches(0, epoch, 2)] for epoch in range(20)]
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 20
    assert len({frozenset(pair) for epoch in epochs for pair in epoch}) > 20  # of 28 possible pairs


def test_sdxl_conditions_tell_size_and_crop_with_flip_too(build: Builder, photos: Path) -> None:
    marked.save(photos / "a.png", marked.picture(1, 200, 64))
    dataset, _ = build(DataConfig(name="sks toy", resolution=64, flip=True, variants=2), ids=True)
    bucket = dataset.buckets[0]
    assert (bucket.width, bucket.height) == (112, 32)
    # 200 x 64 is scaled to 112 x 35.84; the middle 32 rows begin 1.92 from the top; no columns are cropped
    assert bucket.sizes["time_ids"].tolist() == [[64, 200, 2, 0, 32, 112]] * 2
    assert bucket.variant.tolist() == [0, 1]


def test_each_photo_has_its_own_text(build: Builder, photos: Path) -> None:
    """Every batch has the caption of each of its photos."""
    fill(photos, 6)
    for number in range(5):
        (photos / f"{number:02}.txt").write_text(f"sks toy number {number}")
    dataset, _ = build()
    for batch in dataset.batches(0, 3, 2):
        for number, text in zip(photos_of(dataset, batch), batch.text_rows.tolist(), strict=True):
            expected = f"sks toy number {number}" if number < 5 else "a photo of a sks toy"
            assert dataset.texts[text] == expected
    assert sorted(dataset.texts) == ["a photo of a sks toy", *(f"sks toy number {n}" for n in range(5))]
    for bucket in range(len(dataset.buckets)):
        names = [f"{n:02}.png" for n in range(6) if bucket == {0: 1, 1: 2, 2: 0}[n % 3]]
        assert dataset.names(bucket) == names
        own = [dataset.texts[text] for text in dataset.buckets[bucket].text.tolist()]
        assert own == [dataset.texts[dataset.choices[int(name[:2])][0]] for name in names]


def test_swapping_two_captions_swaps_their_texts(build: Builder, photos: Path) -> None:
    fill(photos, 2, ((64, 64),))
    pairs = []
    for first, second in (("one", "two"), ("two", "one")):
        (photos / "00.txt").write_text(f"sks toy {first}")
        (photos / "01.txt").write_text(f"sks toy {second}")
        dataset, _ = build()
        pairs.append([dataset.texts[text] for text in dataset.buckets[0].text.tolist()])
    assert pairs == [["sks toy one", "sks toy two"], ["sks toy two", "sks toy one"]]


def test_a_thousand_draws_keep_the_trigger(build: Builder, photos: Path) -> None:
    """Shuffled tags and caption dropout together keep the trigger in a thousand texts of batches."""
    fill(photos, 10)
    for number in range(10):
        (photos / f"{number:02}.txt").write_text(f"red, blue, table {number}" + (", sks" if number % 2 else ""))
    data = DataConfig(name="sks toy", resolution=64, shuffle_tags=True, caption_dropout=0.3)
    dataset, _ = build(data)
    texts = [
        dataset.texts[text]
        for epoch in range(100)
        for batch in dataset.batches(0, epoch, 4)
        for text in batch.text_rows
    ]
    assert len(texts) == 1000
    assert all(captions.has_trigger(text, data) for text in texts)
    assert 250 <= texts.count("a photo of a sks toy") <= 350
    assert len(set(texts)) > 40
    others = [text for text in texts if text != "a photo of a sks toy"]
    assert all(any(f"table {n}" in text for n in range(10)) for text in others)


def test_holdout_photos_are_never_trained_on(build: Builder, photos: Path) -> None:
    fill(photos, 20)
    data = DataConfig(name="sks toy", resolution=64, flip=True, variants=2)
    dataset, holdout = build(data, TrainConfig(holdout=0.1))
    assert holdout is not None
    assert build.messages[0] == "validation: 2 of 20 photos held out, never trained on"
    validation_names = {photo.relative for photo in holdout.photos}
    trained = {photo.relative for photo in dataset.photos}
    assert len(validation_names) == 2
    assert len(trained) == 18
    assert not validation_names & trained
    assert holdout.texts is dataset.texts
    # one row each, without flip
    assert sum(len(bucket.mean) for bucket in holdout.buckets) == 2
    assert sum(len(bucket.mean) for bucket in dataset.buckets) == 36
    assert all(bucket.variant.tolist() == [0] * len(bucket.mean) for bucket in holdout.buckets)
    repeat, _ = build(data, TrainConfig(holdout=0.1))
    assert {photo.relative for photo in repeat.photos} == trained
    other, _ = build(data, TrainConfig(holdout=0.1, seed=1))
    assert {photo.relative for photo in other.photos} != trained


@pytest.mark.parametrize(
    ("count", "holdout", "line"),
    [
        (9, 0.5, "validation: fewer than 10 photos, none is held out; it uses training photos"),
        (10, 0.0, "validation: no photo is held out (train.holdout = 0); it uses training photos"),
        (10, 0.01, "validation: 1 of 10 photos held out, never trained on"),
    ],
)
def test_the_split_is_reported(build: Builder, photos: Path, count: int, holdout: float, line: str) -> None:
    fill(photos, count)
    build(train=TrainConfig(holdout=holdout))
    assert build.messages[0] == line


def test_unaugmented_has_variant_0_of_every_photo_with_its_own_text(build: Builder, photos: Path) -> None:
    fill(photos, 6)
    for number in range(6):
        (photos / f"{number:02}.txt").write_text(f"sks toy, a, b, {number}")
    data = DataConfig(name="sks toy", resolution=64, flip=True, variants=4, caption_dropout=0.9, shuffle_tags=True)
    dataset, _ = build(data, ids=True)
    unaugmented = dataset.unaugmented()
    expected, _ = build(ids=True)
    for one, other in zip(unaugmented.buckets, expected.buckets, strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.std, other.std)
        assert torch.equal(one.sizes["time_ids"], other.sizes["time_ids"])
        assert torch.equal(one.photo, other.photo)
    for epoch in range(3):
        for batch in unaugmented.batches(0, epoch, 2):
            texts = [unaugmented.texts[text] for text in batch.text_rows.tolist()]
            assert texts == [f"sks toy, a, b, {number}" for number in photos_of(unaugmented, batch)]


# -- the cache on disk ---------------------------------------------------------------------------------------------

DISK = DataConfig(name="sks toy", resolution=64, cache="disk")


def test_only_what_changed_is_encoded_again(build: Builder, photos: Path, tmp_path: Path) -> None:
    fill(photos, 20)
    before = marked.digests(photos)
    first, _ = build(DISK)
    assert build.messages[-1] == f"latents: 0 from the cache, 20 encoded, kept in {tmp_path / 'kept' / 'latents'}"
    build(DISK)
    assert build.messages[-1].startswith("latents: 20 from the cache, 0 encoded")
    assert build.encoder.pictures == []
    assert marked.digests(photos) == before  # the photos' folder stays unchanged

    times = (photos / "00.png").stat()
    marked.save(photos / "00.png", marked.picture(63, 64, 64))
    os.utime(photos / "00.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # an edit that keeps name and time
    second, _ = build(DISK)
    assert build.messages[-1].startswith("latents: 19 from the cache, 1 encoded")
    assert [marked.number_of(picture) for picture in build.encoder.pictures] == [63]
    row = second.names(1).index("00.png")
    assert not torch.equal(first.buckets[1].mean[row], second.buckets[1].mean[row])
    in_memory, _ = build(replace(DISK, cache="memory"))
    assert build.messages[-1] == "latents: 20 encoded"
    for reused, fresh in zip(second.buckets, in_memory.buckets, strict=True):
        assert torch.equal(reused.mean, fresh.mean)
        assert torch.equal(reused.std, fresh.std)


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 128},
        {"identity": "another base"},
        {"flip": True, "variants": 2},
        {"crop_jitter": 0.1, "variants": 2},
        {"color_jitter": 0.1, "variants": 2},
    ],
)
def test_a_changed_option_or_base_is_a_cache_miss(build: Builder, photos: Path, change: dict[str, object]) -> None:
    fill(photos, 3)
    build(DISK)
    identity = str(change.pop("identity", "base"))
    build(replace(DISK, **change), identity=identity)
    # Variant 0 is the plain photo and is in the cache; every other variant is new.
    hits = 3 if "variants" in change else 0
    assert build.messages[-1].startswith(f"latents: {hits} from the cache, 3 encoded")


def test_renamed_photos_are_cache_hits(build: Builder, photos: Path) -> None:
    fill(photos, 3)
    build(DISK)
    (photos / "00.png").rename(photos / "renamed.png")
    build(DISK)
    assert build.messages[-1].startswith("latents: 3 from the cache, 0 encoded")


def flipped(at: float) -> Callable[[bytes], bytes]:
    """Return a function that flips one bit at a relative position of a file."""

    def flip(raw: bytes) -> bytes:
        place = min(int(at * len(raw)), len(raw) - 1)
        return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]

    return flip


@pytest.mark.parametrize(
    "damage",
    [lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: b"x" * len(raw), *map(flipped, (0, 0.03, 0.5, 1))],
)
def test_a_damaged_latent_is_encoded_again(
    build: Builder, photos: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    fill(photos, 2)
    build(DISK)
    files = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert len(files) == 2
    files[0].write_bytes(damage(files[0].read_bytes()))
    build(DISK)
    assert build.messages[-1].startswith("latents: 1 from the cache, 1 encoded")
    assert build.messages[-1].endswith("; 1 on disk were damaged and are encoded again")
    build(DISK)
    assert build.messages[-1].startswith("latents: 2 from the cache, 0 encoded") and "; " not in build.messages[-1]


def test_the_cache_is_private_and_complete(build: Builder, photos: Path, tmp_path: Path) -> None:
    fill(photos, 2)
    build(DISK)
    files = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert all(path.suffix == ".safetensors" for path in files)  # no temporary file remains
    if os.name == "posix":
        assert {stat.S_IMODE(path.parent.stat().st_mode) for path in files} == {0o700}


def test_an_unwritable_cache_is_refused(
    build: Builder, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(photos, 1)
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(LorakitError, match=r"latents cannot be kept there \(.+\); set data\.cache = 'memory' or LORA"):
        build(DISK)


# -- masks and errors ---------------------------------------------------------------------------------------------

MASKED = TrainConfig(holdout=0.0, masked_loss=True)


def test_masks_from_file_or_alpha_have_latent_size(build: Builder, photos: Path) -> None:
    fill(photos, 2, ((64, 64),))
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(photos / "00.mask.png")
    alpha = np.dstack([marked.picture(5, 64, 64), mask.T])
    Image.fromarray(alpha).save(photos / "02.png")
    dataset, _ = build(train=MASKED)
    masks = dataset.buckets[0].mask
    assert masks is not None
    assert masks.shape == (3, 1, 16, 16)
    half = torch.zeros(16, 16)
    half[:, :8] = 1
    assert torch.equal(masks[0, 0], half)
    assert torch.equal(masks[1, 0], torch.ones(16, 16))
    assert torch.equal(masks[2, 0], half.T)
    plain, _ = build()
    assert plain.buckets[0].mask is None
    disk, _ = build(DISK, MASKED)
    disk, _ = build(DISK, MASKED)
    assert disk.buckets[0].mask is not None
    assert torch.equal(disk.buckets[0].mask, masks)


def test_missing_and_black_masks_are_refused(build: Builder, photos: Path) -> None:
    fill(photos, 2)
    with pytest.raises(
        LorakitError, match=r"^train\.masked_loss: no photo has a mask; put name\.mask\.png beside name"
    ):
        build(train=MASKED)
    Image.new("L", (64, 64)).save(photos / "00.mask.png")
    with pytest.raises(
        LorakitError, match=r"^00\.png: its mask is black all over, so nothing of it would be learned: change the mask"
    ):
        build(train=MASKED)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_names_its_photo(
    build: Builder, photos: Path, tmp_path: Path, value: float
) -> None:
    """The latent is neither replaced by zeros nor stored in the cache."""
    fill(photos, 3)
    real = Encoder.__call__

    def broken(self: Encoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = real(self, pixels)
        if marked.number_of(self.pictures[-1]) == 1:
            mean[0, 0, 0, 0] = value
        return mean, std

    Encoder.__call__ = broken
    try:
        with pytest.raises(
            LorakitError, match=r"^01\.png: its latent is not finite, because the base's VAE cannot encode it"
        ):
            build(DISK)
    finally:
        Encoder.__call__ = real
    build(DISK)
    assert build.messages[-1].startswith("latents: 1 from the cache, 2 encoded")


def test_a_photo_that_disappeared_is_named(build: Builder, photos: Path) -> None:
    fill(photos, 2)
    data = DataConfig(name="sks toy", resolution=64, folder=str(photos))
    report = checks.check(data, build.base)
    (photos / "01.png").unlink()
    with pytest.raises(LorakitError, match=r"^01\.png: cannot be read any more \(No such file or directory\)$"):
        latents.build(
            report, data, TrainConfig(holdout=0.0), encode_images=partial(map, Encoder()),
            size_conditions=lambda *_: {},
            device="cpu", identity="", say=lambda _: None,
        )  # fmt: skip


def test_moving_to_a_device_moves_all_tensors_of_a_step(build: Builder, photos: Path) -> None:
    fill(photos, 3)
    dataset, _ = build(ids=True)
    meta = dataset.to("meta")
    assert {bucket.mean.device.type for bucket in meta.buckets} == {"meta"}
    assert {bucket.sizes["time_ids"].device.type for bucket in meta.buckets} == {"meta"}
    assert {bucket.photo.device.type for bucket in meta.buckets} == {"cpu"}
    (batch, *_) = meta.batches(0, 0, 2)
    assert batch.entries.device.type == batch.text_rows.device.type == "meta"
