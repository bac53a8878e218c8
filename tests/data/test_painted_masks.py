"""Masks that are painted over photos: where they are when photos are turned and cropped, and what the loss counts."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.config import ConfigError, from_tables, load
from lorakit.config.photo_edits import NO_EDIT, PhotoEdit, parse
from lorakit.core.errors import LorakitError
from lorakit.data import checks, decode, latents, masks, photo_folder
from lorakit.training import objective

SIZE = (120, 80)


def capsule(size: tuple[int, int], width: float, x1: float, y1: float, x2: float, y2: float) -> np.ndarray:
    """The pixels no further than half a width from a line, by their distance; all in pixels."""
    y, x = np.mgrid[: size[1], : size[0]] + 0.0
    along = ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / max(1e-9, (x2 - x1) ** 2 + (y2 - y1) ** 2)
    along = along.clip(0, 1)
    return np.hypot(x - x1 - along * (x2 - x1), y - y1 - along * (y2 - y1)) <= width / 2


def difference(mask: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean((mask > 127) != expected))


@pytest.mark.parametrize("before", ["", "turn 90, ", "turn 180, ", "turn 270, ", "crop 0 25 50 100, ",
                                    "turn 90, crop 10 0 100 60, "])  # fmt: skip
def test_a_stroke_stays_on_what_it_covers(before: str) -> None:
    edit = parse(f"{before}paint 20 25 50 75 50, erase 5 50 50")
    assert parse(str(edit)) == edit and str(edit).startswith(before)
    expected = capsule(SIZE, 24, 30, 40, 90, 40) & ~capsule(SIZE, 6, 60, 40, 60, 40)
    turned = np.rot90(expected, -edit.turn // 90)
    left, top, right, bottom = edit.geometry.box(SIZE)
    mask = decode.painted_mask(edit, SIZE)
    assert mask.shape == (bottom - top, right - left) and set(np.unique(mask)) == {0, 255}
    assert difference(mask, turned[top:bottom, left:right]) < 0.02


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_what_is_painted_on_the_page_is_where_the_page_shows_it(turn: int) -> None:
    """A dot on a part of a turned photo, then the photo turned and cropped further."""
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
    """Two photos of noise, the second with a mask file of its lower half."""
    for number, name in enumerate("ab"):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{name}.png")
    half = np.zeros((64, 64), np.uint8)
    half[32:] = 255
    Image.fromarray(half).save(photos / "b.mask.png")
    return photos


def build(photos: Path, base: Any, say: Any = print, **data: object) -> tuple[checks.Report, Any]:
    options = {"folder": str(photos), "name": "sks toy", "resolution": 64, "cache": "disk", **data}
    config = from_tables({"data": options, "train": {"steps": 1, "holdout": 0, "masked_loss": True}})
    report = checks.check(config.data, base)
    dataset, _ = latents.build(
        report, config.data, config.train,
        encode_images=partial(map, lambda pixels: (torch.nn.functional.avg_pool2d(pixels, 4), pixels[..., ::4, ::4])),
        size_conditions=lambda *sizes: {}, device="cpu", identity="base", say=say,
    )  # fmt: skip
    return report, dataset.buckets[0]


def test_the_loss_counts_what_is_painted_and_nothing_else(
    photos: Path, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    lines = list[str]()
    _, plain = build(photos, base)
    # All to the left of the middle, and all but the upper half: the second takes the place of a file that says so too.
    edits = {"a.png": "paint 50 25 0 25 100", "b.png": "turn 180, erase 50 0 75 100 75"}
    report, bucket = build(photos, base, lines.append, edits=edits)
    assert "with a mask painted in data.edits: a.png, b.png" in report.notes
    assert "1 hits, 1 encoded" in lines[-1]  # the mask is no part of the latent, the turn is
    rows = {int(photo): row for row, photo in enumerate(bucket.photo)}
    mask = torch.stack([bucket.mask[rows[0], 0], bucket.mask[rows[1], 0]])
    side = mask.shape[-1]
    assert mask[0, :, : side // 2 - 1].min() > 0.7 and mask[0, :, side // 2 + 1 :].max() == 0
    assert mask[1, side // 2 + 1 :].min() > 0.7 and mask[1, : side // 2 - 1].max() == 0
    prediction = torch.zeros(2, 4, side, side, requires_grad=True)
    target = torch.ones(2, 4, side, side)
    target[0, :, :, side // 2 + 1 :] = 100.0  # far off, where nothing is learned
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
    assert masks.problems(report.items) == ["a.png: its mask is black all over, so nothing of it would be learned"]
    assert [row["mask"] for row in report.to_json()["photos"]] == [True, False]
    assert "1 of 2 photos have a mask; train.masked_loss = true uses it" in report.notes
    with pytest.raises(LorakitError, match=r"a\.png: its mask is black all over"):
        build(photos, base, edits=edits)
    painted, other = (photo_folder.scan(photos, edits={"a.png": e}).photos for e in ("paint 9 5 5", "paint 9 5 6"))
    assert photo_folder.digest(painted) != photo_folder.digest(other)


@pytest.mark.parametrize(
    "text", ["paint", "paint 5", "paint 5 1", "paint 5 1 2 3", "paint 0 1 2", "erase 5 1 101", "paint 5 -1 2",
             "blur 5 1 2", "paint 5 1 2, turn 45", "paint 5" + " 1 2" * 2001, ", ".join(["paint 5 1 2"] * 501)]
)  # fmt: skip
def test_what_is_no_stroke_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.edits\.a\.jpg = .* paint or erase SIZE X Y"):
        load(None, {"train.steps": 1, "data.edits": {"a.jpg": text}})
