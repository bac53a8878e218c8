"""Tests of masks that are painted on photos: their place after turns and crops, and their effect on the loss."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.config import Config, ConfigError, from_tables, load
from lorakit.config.photo_edits import NO_EDIT, PhotoEdit, parse
from lorakit.core.errors import LorakitError
from lorakit.data import augment, buckets, checks, decode, latents, masks, photo_folder
from lorakit.data.dataset import Dataset
from lorakit.training import objective

SIZE = (120, 80)


def capsule(size: tuple[int, int], width: float, x1: float, y1: float, x2: float, y2: float) -> np.ndarray:
    """Return the pixels whose distance from a line is at most half of `width`; all values are in pixels."""
    y, x = np.mgrid[: size[1], : size[0]] + 0.0
    along = ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / max(1e-9, (x2 - x1) ** 2 + (y2 - y1) ** 2)
    along = along.clip(0, 1)
    return np.hypot(x - x1 - along * (x2 - x1), y - y1 - along * (y2 - y1)) <= width / 2


def difference(mask: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean((mask > 127) != expected))


@pytest.mark.parametrize("before", ["", "turn 90, ", "turn 180, ", "turn 270, ", "crop 0 25 50 100, ",
                                    "turn 90, crop 10 0 100 60, "])  # fmt: skip
def test_a_stroke_keeps_its_place_in_an_edited_photo(before: str) -> None:
    edit = parse(f"{before}paint 20 25 50 75 50, erase 5 50 50")
    assert parse(str(edit)) == edit and str(edit).startswith(before)
    expected = capsule(SIZE, 24, 30, 40, 90, 40) & ~capsule(SIZE, 6, 60, 40, 60, 40)
    turned = np.rot90(expected, -edit.turn // 90)
    left, top, right, bottom = edit.geometry.box(SIZE)
    mask = decode.painted_mask(edit, SIZE)
    assert mask.shape == (bottom - top, right - left) and set(np.unique(mask)) == {0, 255}
    assert difference(mask, turned[top:bottom, left:right]) < 0.02


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_dot_painted_on_an_edited_photo_keeps_its_place(turn: int) -> None:
    """Paint a dot on a part of a turned photo, then turn and crop the photo again."""
    edit = NO_EDIT.turned(turn).cropped((50, 0, 100, 80))
    width, height = edit.size(SIZE)
    edit = edit.painted("paint", 25, [20, 70], width / height)
    expected = capsule((width, height), 0.25 * max(width, height), 0.2 * width, 0.7 * height, 0.2 * width, 0.7 * height)
    assert difference(decode.painted_mask(edit, SIZE), expected) < 0.03
    further = edit.turned(90).cropped((0, 0, 50, 100))
    expected = np.rot90(expected, -1)[:, : round(height / 2)]
    assert difference(decode.painted_mask(further, SIZE), expected) < 0.04
    assert further.geometry == PhotoEdit(further.turn, further.crop) and len(further.strokes) == 1


@pytest.fixture
def photos(photos: Path) -> Path:
    """Two photos of noise; the second has a mask file that selects its lower half."""
    for number, name in enumerate("ab"):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{name}.png")
    half = np.zeros((64, 64), np.uint8)
    half[32:] = 255
    Image.fromarray(half).save(photos / "b.mask.png")
    return photos


def config_of(photos: Path, **data: object) -> Config:
    options = {"folder": str(photos), "name": "sks toy", "resolution": 64, "cache": "disk", **data}
    return from_tables({"data": options, "train": {"steps": 1, "holdout": 0, "masked_loss": True}})


def build(photos: Path, base: Any, say: Any = print, **data: object) -> tuple[checks.Report, Dataset]:
    config = config_of(photos, **data)
    report = checks.check(config.data, base)
    dataset, _ = latents.build(
        report, config.data, config.train,
        encode_images=partial(map, lambda pixels: (torch.nn.functional.avg_pool2d(pixels, 4), pixels[..., ::4, ::4])),
        size_conditions=lambda *sizes: {}, device="cpu", identity="base", say=say,
    )  # fmt: skip
    return report, dataset


def test_the_loss_counts_only_the_painted_part(
    photos: Path, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    lines = list[str]()
    plain = build(photos, base)[1].buckets[0]
    # The first mask is the left half. The second, the lower half, replaces a file with the same mask.
    edits = {"a.png": "paint 50 25 0 25 100", "b.png": "turn 180, erase 50 0 75 100 75"}
    report, dataset = build(photos, base, lines.append, edits=edits)
    (bucket,) = dataset.buckets
    assert "with a mask painted in data.edits: a.png, b.png" in report.notes
    assert "1 from the cache, 1 encoded" in lines[-1]  # a latent depends on the turn, not on the mask
    rows = {int(photo): row for row, photo in enumerate(bucket.photo)}
    mask = torch.stack([bucket.mask[rows[0], 0], bucket.mask[rows[1], 0]])
    side = mask.shape[-1]
    assert mask[0, :, : side // 2 - 1].min() > 0.7 and mask[0, :, side // 2 + 1 :].max() == 0
    assert mask[1, side // 2 + 1 :].min() > 0.7 and mask[1, : side // 2 - 1].max() == 0
    prediction = torch.zeros(2, 4, side, side, requires_grad=True)
    target = torch.ones(2, 4, side, side)
    target[0, :, :, side // 2 + 1 :] = 100.0  # far off, where the mask is 0
    value = objective.loss(prediction, target, mask=mask[:, None])
    value.backward()
    assert value.item() == pytest.approx(1.0)
    assert prediction.grad is not None
    assert prediction.grad[0, :, :, side // 2 + 1 :].abs().max() == 0
    assert torch.allclose(prediction.grad[0], (-2 / (2 * 4) * mask[0] / mask[0].sum()).expand(4, -1, -1), atol=1e-9)
    assert not torch.equal(plain.mask, bucket.mask)


def test_a_painted_mask_counts_as_one_and_an_empty_one_is_refused(photos: Path, base: Any) -> None:
    data = {"folder": str(photos), "name": "sks toy", "resolution": 64}
    edits = {"a.png": "paint 20 50 50, erase 90 50 50"}
    (photos / "b.mask.png").unlink()
    report = checks.check(from_tables({"data": data | {"edits": edits}, "train": {"steps": 1}}).data, base)
    assert masks.problems(report.items) == [
        "a.png: its mask is black all over, so nothing of it would be learned: change the mask, or leave the photo out "
        "(data.exclude)"
    ]
    assert [row["mask"] for row in report.to_json()["photos"]] == [True, False]
    assert "photos with a mask: 1 of 2; train.masked_loss = true uses the masks" in report.notes
    with pytest.raises(LorakitError, match=r"a\.png: its mask is black all over"):
        build(photos, base, edits=edits)
    painted, other = (photo_folder.scan(photos, edits={"a.png": e}).photos for e in ("paint 9 5 5", "paint 9 5 6"))
    assert photo_folder.digest(painted) != photo_folder.digest(other)


@pytest.mark.parametrize(
    "text", ["paint", "paint 5", "paint 5 1", "paint 5 1 2 3", "paint 0 1 2", "erase 5 1 101", "paint 5 -1 2",
             "blur 5 1 2", "paint 5 1 2, turn 45", "paint 5" + " 1 2" * 2001]
)  # fmt: skip
def test_an_invalid_stroke_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.edits\.a\.jpg = .* paint or erase SIZE X Y"):
        load(None, {"train.steps": 1, "data.edits": {"a.jpg": text}})


def test_too_many_strokes_are_refused_with_advice() -> None:
    strokes = {"old/a.b.jpg": ", ".join(["turn 90", *["paint 5 1 2"] * 501])}
    with pytest.raises(ConfigError) as caught:
        load(None, {"train.steps": 1, "data.edits": strokes})
    assert str(caught.value) == (
        "data.edits.old/a.b.jpg: 501 strokes, and a photo has 500 at most: paint fewer with a wider brush, or put "
        "a mask file, NAME.mask.png, beside it"
    )
    load(None, {"train.steps": 1, "data.edits": {"a.jpg": ", ".join(["paint 5 1 2"] * 500)}})


def test_a_mask_of_a_large_photo_matches_its_strokes() -> None:
    """A large mask is painted at a smaller size and then enlarged. At most 0.2 % of its pixels differ."""
    size, edit = (6000, 4000), parse("turn 90, crop 10 0 100 60, paint 20 25 50 75 50, erase 5 50 50")
    mask = decode.painted_mask(edit, size)
    left, top, right, bottom = edit.geometry.box(size)
    assert mask.shape == (bottom - top, right - left) and set(np.bincount(mask.ravel()).nonzero()[0]) == {0, 255}
    # The test compares every fourth pixel of every fourth column of the photo before its turn by 90 degrees.
    expected = capsule((1500, 1000), 300, 375, 500, 1125, 500) & ~capsule((1500, 1000), 75, 750, 500, 750, 500)
    turned = np.rot90(expected, -1)[top // 4 : bottom // 4, left // 4 : right // 4]
    assert difference(mask[::4, 3::4], turned) < 0.002


def averages(mask: np.ndarray, box: tuple[float, float, float, float], side: tuple[int, int]) -> np.ndarray:
    """Return the mean of the part of a mask that each pixel of a smaller picture covers."""

    def shares(start: float, end: float, count: int, length: int) -> np.ndarray:
        edges = np.linspace(start, end, count + 1)
        pixels = np.arange(length)
        overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
        return overlap.clip(0) * count / (end - start)

    rows = shares(box[1], box[3], side[1], mask.shape[0])
    return rows @ (mask / 255.0) @ shares(box[0], box[2], side[0], mask.shape[1]).T


def test_masks_match_their_photos_in_every_variant(photos: Path, base: Any) -> None:
    """Wide, high and square photos lie in folders with repeats, with masks from strokes, a file and transparency. Each
    variant is compared with averages that numpy computes."""
    for file in list(photos.iterdir()):
        file.unlink()
    noise = np.random.default_rng(0)
    own: dict[str, np.ndarray] = {}
    for name, width, height in (("3_sks toy/wide.png", 96, 60), ("1_sks toy/high.png", 50, 96), ("see.png", 64, 64)):
        (photos / name).parent.mkdir(exist_ok=True)
        pixels = noise.integers(0, 256, (height, width, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        if name == "see.png":
            pixels[:20, :, 3] = 0
            own[name] = pixels[..., 3]
        Image.fromarray(pixels if name == "see.png" else pixels[..., :3]).save(photos / name)
    own["1_sks toy/high.png"] = np.add.outer(np.arange(96), 3 * np.arange(50)).astype(np.uint8)
    Image.fromarray(own["1_sks toy/high.png"]).save(photos / "1_sks toy" / "high.mask.png")
    edit = "turn 180, paint 30 20 30 20 90"
    own["3_sks toy/wide.png"] = decode.painted_mask(parse(edit), (96, 60))
    assert own["3_sks toy/wide.png"][:, -40:].any() and not own["3_sks toy/wide.png"][:, :40].any()
    (photos / "reg").mkdir()
    Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photos / "reg" / "class.png")
    options: dict[str, Any] = {"variants": 3, "flip": True, "crop_jitter": 0.2, "concepts": "one", "cache": "memory"}
    options["edits"] = {"3_sks toy/wide.png": edit}
    config = config_of(photos, **options)
    report, dataset = build(photos, base, **options)
    assert [photo.relative for photo in report.class_photos] == ["reg/class.png"]
    cases = set[tuple[str, int, tuple[int, int]]]()
    for index, bucket in enumerate(dataset.buckets):
        for row, name in enumerate(dataset.names(index)):
            number, photo = int(bucket.variant[row]), report.photos[int(bucket.photo[row])]
            size = decode.measure(photo.path, edit=photo.edit)
            (placement,) = buckets.placements(size, config.data, base.bucket_multiple, name)
            variant = augment.of_photo(size, placement, config.data, config.train.seed, name)[number]
            side = bucket.width // 4, bucket.height // 4
            expected = averages(own[name], variant.box, side)
            expected = expected[:, ::-1] if number == 1 else expected
            assert bucket.mask is not None
            mask = bucket.mask[row, 0].numpy()
            assert mask.shape == expected.shape and np.abs(mask - expected).mean() < 0.02, (name, number)
            assert min(np.abs(mask - np.rot90(expected, 2)).mean(), np.abs(mask.mean() - mask).mean()) > 0.05
            cases.add((name, number, side))
    assert len(cases) == 9 and len({side for _, _, side in cases}) == 3
    batches = dataset.batches(0, 0, 2)
    trained = [name for batch in batches for name in np.array(dataset.names(batch.bucket))[batch.entries.numpy()]]
    assert {name: trained.count(name) for name in own} == {
        "3_sks toy/wide.png": 3,
        "1_sks toy/high.png": 1,
        "see.png": 1,
    }
