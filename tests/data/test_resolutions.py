"""Tests of several resolutions and of the aspect limit: a run trains the sizes that the check announces."""

import tomllib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.config import Config, ConfigError, from_tables, load, parse_override, to_toml, without_paths
from lorakit.config.importing import convert
from lorakit.data import buckets, checks, latents
from lorakit.runs import plan
from lorakit.runs.preflight import preflight


def averages(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation as a VAE would."""
    mean = torch.nn.functional.avg_pool2d(pixels, 4)
    return mean, torch.full_like(mean, 0.01)


def fill(photos: Path, *sizes: tuple[int, int]) -> None:
    draw = np.random.default_rng(1)
    for number, (width, height) in enumerate(sizes):
        colours = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(colours).save(photos / f"{number}.png")


def config_of(photos: Path, **changes: Any) -> Config:
    options = {"data.folder": str(photos), "data.name": "sks toy", "train.steps": 12, "train.holdout": 0}
    return from_tables({}, options | {name.replace("__", "."): value for name, value in changes.items()})


def build(config: Config, base: Any, messages: list[str]) -> Any:
    return latents.build(
        checks.check(config.data, base),
        config.data,
        config.train,
        encode_images=partial(map, averages),
        size_conditions=lambda original, crop, target: {"time_ids": [*original, *crop, *target]},
        device="cpu",
        identity="base",
        say=messages.append,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_epoch_shows_each_photo_once_at_each_resolution(photos: Path, base: Any, batch_size: int) -> None:
    # 64 and 80 share the size 64x80, so that size has the same photo twice and counts it twice.
    fill(photos, (256, 256), (300, 200), (64, 80), (256, 200))
    messages: list[str] = []
    config = config_of(photos, data__resolution=[96, 64, 80], train__batch_size=batch_size, data__caption_dropout=0.5)
    dataset, _ = build(config, base, messages)
    assert messages[-1] == "latents: 12 encoded (4 photos at 3 resolutions)"
    items = checks.check(config.data, base).items
    for epoch in range(3):
        batches = dataset.batches(0, epoch, batch_size)
        rows = [(batch.bucket, row) for batch in batches for row in batch.entries.tolist()]
        counter = Counter(int(dataset.buckets[bucket].photo[row]) for bucket, row in rows)
        assert counter == {0: 3, 1: 3, 2: 3, 3: 3}
        for photo, item in enumerate(items):
            sizes = [
                (dataset.buckets[bucket].width, dataset.buckets[bucket].height)
                for bucket, row in rows
                if int(dataset.buckets[bucket].photo[row]) == photo
            ]
            assert sorted(sizes) == sorted(item.buckets)
        repeats, planned, _ = plan._training_sizes(config, checks.check(config.data, base))
        counts = Counter(planned).values()
        assert len(batches) == sum(-(-count // batch_size) for count in counts)
        assert sum(counts) == len(rows) == 12 and repeats == [1] * 4
    for bucket in dataset.buckets:
        assert bucket.sizes["time_ids"][:, -2:].tolist() == [[bucket.height, bucket.width]] * len(bucket.mean)
    plain = dataset.unaugmented()
    assert sum(len(bucket.mean) for bucket in plain.buckets) == 4
    assert {(bucket.width, bucket.height) for bucket in plain.buckets} == {item.bucket for item in items}


def test_repeats_count_at_each_resolution_and_variants_take_turns(photos: Path, base: Any) -> None:
    fill(photos, (64, 64))
    (photos / "3_sks toy").mkdir()
    fill(photos / "3_sks toy", (80, 80))
    config = config_of(
        photos, data__resolution=128, data__lower_resolutions=[64], data__variants=2, data__crop_jitter=0.2
    )
    dataset, _ = build(config, base, [])
    counts = Counter(
        (int(bucket.resolution[row]), int(bucket.photo[row]), int(bucket.variant[row]))
        for epoch in (0, 1)
        for batch in dataset.batches(0, epoch, 4)
        for bucket in [dataset.buckets[batch.bucket]]
        for row in batch.entries.tolist()
    )
    often = next(index for index, photo in enumerate(dataset.photos) if photo.repeats == 3)
    for resolution in (0, 1):
        assert [counts[resolution, often, variant] for variant in (0, 1)] == [3, 3]
        assert [counts[resolution, 1 - often, variant] for variant in (0, 1)] == [1, 1]


def test_validation_is_at_the_highest_resolution(photos: Path, base: Any) -> None:
    fill(photos, *[(128, 128)] * 10)
    config = config_of(photos, data__resolution=[128, 64], train__holdout=0.2)
    dataset, holdout = build(config, base, [])
    assert [len(bucket.mean) for bucket in holdout.buckets] == [2]
    assert holdout.buckets[0].width == 128
    assert sum(len(bucket.mean) for bucket in dataset.buckets) == 16


@pytest.mark.parametrize(
    ("changes", "repeats", "batches", "text"),
    [
        ({"train__steps": 30}, [1] * 5, 10, "30 steps, each of 5 photos seen 3 times at each of 2 resolutions"),
        ({"train__steps": None, "train__epochs": 2}, [1] * 5, 10,
         "2 epochs x 10 batches of 5 photos at 2 resolutions = 20 steps"),
        ({"train__steps": None, "train__steps_per_image": 3, "train__batch_size": 2}, [1] * 4, 4,
         "4 photos x 3 steps each = 12 steps of 2 photos at 2 resolutions"),
        ({"train__steps": 30, "data__lower_resolutions": ()}, [1, 20], 21,
         "30 steps, each of 2 photos seen 1.43 to 28.6 times"),
        ({"train__steps": 20, "train__batch_size": 4, "data__lower_resolutions": ()}, [20] * 5, 25,
         "20 steps of 4 photos, each of 5 photos seen 16 times"),
    ],
)  # fmt: skip
def test_the_length_counts_each_resolution_and_repeat(
    changes: dict[str, Any], repeats: list[int], batches: int, text: str
) -> None:
    values = {"data__lower_resolutions": (256,)} | changes
    config = from_tables({}, {name.replace("__", "."): value for name, value in values.items()})
    assert plan.run_length(config, repeats, batches)[1] == text


@pytest.mark.parametrize("max_aspect", [1.0, 1.5, 2.0, 6.0])
@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (1024, 64), (64, 16)])
def test_no_size_is_longer_than_the_limit(resolution: int, multiple: int, max_aspect: float) -> None:
    sizes = buckets.sizes(resolution, multiple, max_aspect)
    assert (resolution, resolution) in sizes
    assert all(max(size) <= max_aspect * min(size) for size in sizes)
    panorama = buckets.assign((6000, 1000), resolution, multiple, max_aspect)
    assert panorama.bucket.width / panorama.bucket.height <= max_aspect
    if max_aspect == 6.0:
        assert panorama.bucket.width / panorama.bucket.height > 4
        assert {size for size in sizes if max(size) <= 4 * min(size)} >= {*buckets.sizes(resolution, multiple)}


@pytest.mark.parametrize(
    ("text", "resolutions"),
    [
        ("data.resolution=[512, 768]", (768, 512)),
        ("data.resolution=[512]", (512,)),
        ("data.lower_resolutions=384, 256", (512, 384, 256)),
        ("data.lower_resolutions=[384]", (512, 384)),
        ("data.lower_resolutions=", (512,)),
    ],
)
def test_resolutions_are_read_and_written_back(text: str, resolutions: tuple[int, ...], tmp_path: Path) -> None:
    key, value = parse_override(text)
    config = load(None, {"train.steps": 1, key: value})
    assert config.data.resolutions == resolutions
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert load(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([512], r"data.lower_resolutions = \[512\]: each must be below data.resolution = 512, and stand there once"),
        ([256, 256], "stand there once"),
        ([100], "data.lower_resolutions = 100: must be a multiple of 8"),
        ([8], "data.lower_resolutions = 8: must be between 64 and 4096"),
        (["big"], "data.lower_resolutions = 'big': must be a whole number"),
        (3.5, r"data.lower_resolutions = 3.5: must be a list of whole numbers, such as \[512, 384\]"),
        ([True], "must be a whole number"),
    ],
)
def test_wrong_lower_resolutions_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, {"train.steps": 1, "data.lower_resolutions": value})


def test_another_trainers_list_becomes_several_resolutions() -> None:
    toml, *_ = convert({"training_method": "LORA", "resolution": "512,768", "base_model_name": "x", "epochs": 3})
    assert "resolution = 768\nlower_resolutions = [512]" in toml
    toml, *_ = convert({"network_dim": 4, "resolution": "512,768"})  # width and height
    assert "resolution = 624\nlower_resolutions = []" in toml


def test_two_resolutions_that_are_equal_for_the_base_are_refused(photos: Path) -> None:
    fill(photos, (64, 64))
    config = config_of(photos, data__resolution=[128, 120, 64])
    assert preflight(config).problems == (
        "data.lower_resolutions: 128 and 120 are one size in this base, whose sides are multiples of 16: leave one out",
    )


@pytest.mark.parametrize("name", ["reg", "regularisation", "class images"])
def test_own_class_images_are_named_in_the_plan(photos: Path, name: str) -> None:
    fill(photos, (64, 64), (80, 80))
    (photos / name).mkdir()
    fill(photos / name, (64, 64), (64, 64), (64, 64))
    line = "prior: your own class images (3), none is drawn"
    assert line in preflight(config_of(photos, train__prior="images")).lines()
    assert line not in preflight(config_of(photos)).lines()


def test_folders_have_their_own_resolution(photos: Path, base: Any) -> None:
    for name in ("5_sks toy", "faces"):
        (photos / name).mkdir()
        fill(photos / name, (256, 256), (256, 192))
    config = config_of(photos, data__resolution=128, data__folder_resolutions={"faces": 64}, data__concepts="one")
    report = checks.check(config.data, base)
    assert report.errors == [] and any(note.startswith("mixed sizes: trained at") for note in report.notes)
    areas = {item.relative: item.bucket.width * item.bucket.height for item in report.items if item.bucket}
    assert {areas[f"faces/{n}.png"] <= 80 * 64 for n in (0, 1)} == {True} and areas["5_sks toy/0.png"] == 128 * 128
    dataset, _ = build(config, base, [])
    for bucket in dataset.buckets:
        for row, sides in zip(bucket.photo.tolist(), bucket.sizes["time_ids"][:, -2:].tolist(), strict=True):
            assert sides[0] * sides[1] == areas[dataset.photos[row].relative]
    texts = plan.run_length(config, [photo.repeats for photo in report.photos], 12)
    assert texts == (12, "12 steps, each of 4 photos seen 1 to 5 times") and len(dataset.batches(0, 0, 1)) == 12
    private = to_toml(config)
    assert "faces" in private and "folder_resolutions" not in without_paths(config)["data"]
    assert from_tables(tomllib.loads(private)).data == config.data
    wrong = config_of(photos, data__folder_resolutions={"face": 64}, data__concepts="one")
    assert checks.check(wrong.data, base).errors == [
        "data.folder_resolutions: no photo is in a folder face/ (did you mean faces?)"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"faces": 100},
            "folder_resolutions.faces = 100: must be a multiple of 8, and not above data.resolution = 512",
        ),
        (
            {"faces": 768},
            "folder_resolutions.faces = 768: must be a multiple of 8, and not above data.resolution = 512",
        ),
        ({"faces": 8}, "data.folder_resolutions.faces = 8: must be between 64 and 4096"),
        ({"faces": "big"}, "data.folder_resolutions.faces = 'big': must be a whole number"),
        (512, r"data.folder_resolutions = 512: must be a table, such as \{'10_faces' = 512\}"),
    ],
)
def test_wrong_resolutions_of_folders_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, {"train.steps": 1, "data.folder_resolutions": options})
    with pytest.raises(ConfigError, match=r"data.folder_resolutions and data.lower_resolutions are both set"):
        load(None, {"train.steps": 1, "data.resolution": [512, 256], "data.folder_resolutions": {"a": 256}})
