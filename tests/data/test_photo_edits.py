"""Tests of photos that are turned and cropped, and of several folders as several concepts; no file changes."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.config import ConfigError, from_tables, load, to_toml, with_absolute_paths, without_paths
from lorakit.config.photo_edits import NO_EDIT, PhotoEdit, parse
from lorakit.core.errors import LorakitError
from lorakit.data import checks, concepts, decode, latents, photo_folder

SIZE = (96, 64)


def averages(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation as a VAE would."""
    mean = torch.nn.functional.avg_pool2d(pixels, 4)
    return mean, torch.full_like(mean, 0.01)


@pytest.fixture
def picture(photos: Path) -> Image.Image:
    """Write a.png, noise that identifies each pixel's place, and a mask of its left half; return the photo."""
    colours = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(colours).save(photos / "a.png")
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[:, :48] = 255
    Image.fromarray(mask).save(photos / "a.mask.png")
    return Image.fromarray(colours)


@pytest.mark.parametrize(
    ("text", "pillow", "box"),
    [
        ("turn 90", Image.Transpose.ROTATE_270, None),
        ("turn 180", Image.Transpose.ROTATE_180, None),
        ("turn 270", Image.Transpose.ROTATE_90, None),
        ("crop 25 0 75 50", None, (24, 0, 72, 32)),
        ("turn 90, crop 25 0 100 50", Image.Transpose.ROTATE_270, (16, 0, 64, 48)),
        ("turn 270,crop 0 0 100 12.5", Image.Transpose.ROTATE_90, (0, 0, 64, 12)),
    ],
)
def test_an_edit_equals_pillows_result(
    photos: Path, picture: Image.Image, text: str, pillow: Image.Transpose | None, box: tuple[int, ...] | None
) -> None:
    expected = picture if pillow is None else picture.transpose(pillow)
    expected = expected if box is None else expected.crop(box)
    edit, before = parse(text), (photos / "a.png").read_bytes()
    assert np.array_equal(decode.decode(photos / "a.png", edit=edit).pixels, np.asarray(expected))
    assert decode.measure(photos / "a.png", edit=edit) == expected.size
    half = Image.open(photos / "a.mask.png")
    half = half if pillow is None else half.transpose(pillow)
    half = half if box is None else half.crop(box)
    assert np.array_equal(decode.decode_mask(photos / "a.mask.png", expected.size, edit), np.asarray(half))
    assert (photos / "a.png").read_bytes() == before


def test_successive_edits_combine_into_one(picture: Image.Image, photos: Path) -> None:
    edit = NO_EDIT.cropped((25, 0, 100, 50)).turned(90).cropped((0, 50, 100, 100))
    step = picture.crop((24, 0, 96, 32)).transpose(Image.Transpose.ROTATE_270).crop((0, 36, 32, 72))
    assert np.array_equal(decode.decode(photos / "a.png", edit=edit).pixels, np.asarray(step))
    assert parse(str(edit)) == edit
    assert str(edit.turned(270).turned(-270).turned(360)) == str(edit)
    assert str(NO_EDIT) == "" == str(PhotoEdit().turned(180).turned(180))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "turn",
        "turn 45",
        "turn 0",
        "crop 1 2 3",
        "crop 50 0 40 90",
        "crop 0 0 101 50",
        "mirror",
        "turn 90 crop 0 0 9 9",
    ],
)
def test_an_invalid_edit_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.edits\.a\.jpg = .*write turn 90, 180 or 270, crop LEFT TOP"):
        load(None, {"train.steps": 1, "data.edits": {"a.jpg": text}})


def test_an_edited_photo_is_checked_and_encoded_as_another_photo(
    photos: Path, picture: Image.Image, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))

    def encoded(**data: object) -> tuple[checks.Report, torch.Tensor, str]:
        options = {"folder": str(photos), "name": "sks toy", "resolution": 64, "cache": "disk", **data}
        config = from_tables({"data": options, "train": {"steps": 1, "holdout": 0, "masked_loss": True}})
        report, lines = checks.check(config.data, base), list[str]()
        dataset, _ = latents.build(
            report, config.data, config.train, encode_images=partial(map, averages),
            size_conditions=lambda *sizes: {}, device="cpu", identity="base", say=lines.append,
        )  # fmt: skip
        return report, dataset.buckets[0].mean, lines[-1]

    first, pixels, _ = encoded()
    second, other, line = encoded(edits={"a.png": "crop 25 0 75 50", "c.png": "turn 90"})
    assert "0 from the cache, 1 encoded" in line  # the latent of the whole photo is not used for its part
    assert "1 from the cache" in encoded()[2]
    assert not torch.equal(pixels, other)
    assert (second.items[0].width, second.items[0].height) == (48, 32)
    assert "turned or cropped by data.edits: a.png" in second.notes
    assert "data.edits: no photo is called c.png" in second.warnings
    photos_of = [report.photos for report in (first, second)]
    assert photo_folder.digest(photos_of[0]) != photo_folder.digest(photos_of[1])


def test_more_folders_are_concepts_with_names_and_weights(photos: Path, picture: Image.Image, tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.png", "mug/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    (tmp_path / "cat" / "1.txt").write_text("a cat")
    more = {"3_zib cat": str(tmp_path / "cat"), "ohwx mug": str(tmp_path / "mug")}
    options = {"folder": str(photos), "name": "sks toy", "concepts": "folders", "more_folders": more}
    more_options = {"exclude": ["ohwx mug/*"], "edits": {"3_zib cat/1.png": "turn 90"}}
    config = from_tables({"data": options | more_options, "train": {"steps": 1}})
    result = photo_folder.of_config(config.data)
    assert [(p.relative, p.subject, p.repeats, p.caption) for p in result.photos] == [
        ("a.png", "", 1, None),
        ("3_zib cat/1.png", "zib cat", 3, "a cat"),
        ("3_zib cat/deep/2.png", "zib cat", 3, None),
    ]
    assert result.photos[1].edit == parse("turn 90")
    assert [each.name for each in concepts.of_photos(result.photos, config.data)] == ["sks toy", "zib cat"]
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load(tmp_path / "config.toml") == config
    assert {"edits", "more_folders", "folder"}.isdisjoint(without_paths(config)["data"])  # paths on the user's machine


def test_paths_of_more_folders_are_resolved_like_other_paths(
    photos: Path, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = tmp_path / "own.toml"
    preset.write_text("[data]\nconcepts = 'one'\nmore_folders = {x = 'photos', y = 'gone'}\n[train]\nsteps = 1\n")
    monkeypatch.chdir("/")
    config = load(preset)
    assert config.data.more_folders == {"x": str(photos), "y": "gone"}
    monkeypatch.chdir(tmp_path)
    relative = load(None, {"train.steps": 1, "data.concepts": "one", "data.more_folders": {"x": "photos"}})
    assert with_absolute_paths(relative).data.more_folders == {"x": str(photos)}


@pytest.mark.parametrize(
    ("name", "path", "changes", "message"),
    [
        ("zib cat", "gone", {}, r"folder .*gone does not exist"),
        ("0_zib cat", "cat", {}, r"data\.more_folders: 0_zib cat/ would not be trained \(0 repeats\)"),
        ("reg", "cat", {}, r"data\.more_folders: reg/ would not be trained \(class images; name their folder in data"),
        ("a.png", "cat", {}, r"data\.more_folders: .* has a\.png already; give another name"),
        ("a/b", "cat", {}, r"data\.more_folders\.a/b: the name must be one of a folder"),
        ("", "cat", {}, r"data\.more_folders\.: the name must be one of a folder"),
        ("zib cat", "", {}, r"data\.more_folders\.zib cat: give the path of a folder"),
        ("zib cat", "cat", {"concepts": "ask"}, r"data\.more_folders needs data\.concepts = 'folders'"),
    ],
)
def test_unusable_more_folders_are_refused(
    photos: Path, picture: Image.Image, tmp_path: Path, name: str, path: str, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "cat").mkdir()
    picture.save(tmp_path / "cat" / "1.png")
    more = {name: str(tmp_path / path) if path else ""}
    data = {"folder": str(photos), "name": "sks toy", "concepts": "folders", "more_folders": more} | changes
    with pytest.raises(LorakitError, match=message):
        photo_folder.of_config(from_tables({"data": data, "train": {"steps": 1}}).data)
