"""Tests of what folders mean: subjects, repeats, class images, and run folders among the photos."""

from collections import Counter
from pathlib import Path
from typing import Any

import marked
import pytest
import torch
from PIL import Image

from lorakit.config import ConfigError, DataConfig, load
from lorakit.core import image_grid
from lorakit.core.errors import LorakitError
from lorakit.data import captions, checks, concepts, photo_folder
from lorakit.data.dataset import Dataset, LatentBucket
from lorakit.data.photo_folder import Photo
from lorakit.runs.run_folder import output_problem


def fill(place: Path, *names: str) -> None:
    for number, name in enumerate(names):
        marked.save(place / name, marked.picture(number, 64, 64))


@pytest.mark.parametrize(
    ("name", "is_class"),
    [
        *((name, True) for name in ("reg", "REG", "regs", "class", "classes", "regularization", "Regularisation")),
        *((name, True) for name in ("reg_man", "1_reg", "class_images", "class images", "regularization-photos")),
        *((name, False) for name in ("region", "classic", "class reunion", "regatta 2020", "20_ohwx man", "prior")),
        *((name, True) for name in ("_reg", "prior images", "prior_photos", "1_prior-imgs")),
        *((name, False) for name in ("class_dog", "prior to the fire", "registration")),
    ],
)
def test_folders_of_class_images_are_recognized_by_name(name: str, is_class: bool) -> None:
    assert concepts.is_class_folder(Path(name)) is is_class


@pytest.mark.parametrize("below", ["", "samples", "samples/step-000002"])
def test_pictures_of_a_run_are_not_photos(tmp_path: Path, below: str) -> None:
    run = tmp_path / "run"
    fill(run / "samples" / "step-000002", "a.png")
    fill(run / "samples", "b.png")
    for name in ("config.toml", "state.json"):
        (run / name).touch()
    with pytest.raises(LorakitError, match="holds pictures of a run of lorakit; give the folder of the photos"):
        photo_folder.scan(run / below)


def test_a_picture_drawn_by_lorakit_is_reported(photos: Path, base: Any) -> None:
    fill(photos, "a.png", "b.png")
    picture = Image.fromarray(marked.picture(2, 64, 64))
    picture.info["lorakit"] = "{}"
    image_grid.save(picture, photos / "c.png")
    notes = checks.check(DataConfig(folder=str(photos), name="sks dog"), base).notes
    assert "c.png: drawn by lorakit: a model learns nothing new from what a model drew" in notes


def test_a_link_to_itself_is_refused_as_folder_and_as_output(tmp_path: Path, photos: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(LorakitError, match="does not exist"):
        photo_folder.scan(loop)
    assert "cannot write to" in str(output_problem(loop, str(photos)))
    assert output_problem(tmp_path / "out", str(loop)) is None
    assert "inside the folder of photos" in str(output_problem(photos / "out", str(photos)))


@pytest.mark.parametrize("name", ["reg", "class", "regularization", "Regularisation images"])
def test_class_images_in_the_folder_are_not_photos_of_the_subject(photos: Path, base: Any, name: str) -> None:
    fill(photos, "a.png", "b.png", f"{name}/c.png", f"{name}/1_man/d.png")
    report = checks.check(DataConfig(folder=str(photos), name="sks dog"), base)
    assert [photo.relative for photo in report.photos] == ["a.png", "b.png"]
    assert [photo.relative for photo in report.class_photos] == [f"{name}/c.png", f"{name}/1_man/d.png"]
    config = DataConfig(name="sks dog")
    texts = [captions.class_photo_text(photo, config) for photo in report.class_photos]
    assert texts == ["a photo of a dog", "a photo of a man"]


def test_a_separate_class_folder_replaces_the_one_inside(photos: Path, tmp_path: Path, base: Any) -> None:
    fill(photos, "a.png", "reg/c.png")
    fill(tmp_path / "others", "d.png")
    (tmp_path / "others/d.txt").write_text("a brown dog", encoding="utf-8")
    config = DataConfig(folder=str(photos), name="sks dog", class_folder=str(tmp_path / "others"))
    report = checks.check(config, base)
    assert [(photo.relative, photo.caption) for photo in report.class_photos] == [("others/d.png", "a brown dog")]
    assert "skipped (data.class_folder is set): reg/" in report.notes
    assert [photo.relative for photo in report.photos] == ["a.png"]
    (tmp_path / "others/e.png").write_bytes(b"broken")
    assert any(error.startswith("others/e.png") for error in checks.check(config, base).errors)
    with pytest.raises(LorakitError, match="does not exist"):
        photo_folder.scan(photos, str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("folders", "name", "refused"),
    [
        (["20_ohwx man", "5_sks dog"], "sks dog", "20_ohwx man/"),
        (["20_ohwx man"], "sks dog", "20_ohwx man/"),
        (["20_ohwx man"], "ohwx man", ""),
        (["10_ohwx"], "ohwx man", ""),
        (["10_OHWX_man close"], "ohwx man", ""),
        (["ohwx man", "sks dog"], "sks dog", "ohwx man/"),  # without numbers, next to the subject's own folder
        (["beach", "garden"], "sks dog", ""),
        (["5_sks dog"], "sks ball", "5_sks dog/"),  # one trigger with two nouns
        (["sks dog"], "sks ball", "sks dog/"),
        (["Ohwx_man", "beach"], "sks ball", "Ohwx_man/"),
        (["sks close up", "5_sks ball far"], "sks ball", ""),
        (["sks 2019"], "sks ball", ""),
        (["sks"], "sks", ""),
        (["2019_summer"], "sks dog", ""),  # 2019 is a year
    ],
)
def test_a_folder_that_names_another_subject_stops_the_run(
    photos: Path, base: Any, folders: list[str], name: str, refused: str
) -> None:
    fill(photos, *(f"{inside}/{number}.png" for number, inside in enumerate(folders)))
    errors = checks.check(DataConfig(folder=str(photos), name=name), base).errors
    assert [error.partition(": ")[0] for error in errors] == ([refused] if refused else [])
    for answer in ("one", "folders"):
        assert checks.check(DataConfig(folder=str(photos), name=name, concepts=answer), base).errors == []


def test_a_caption_with_the_trigger_is_not_a_contradiction(photos: Path, base: Any) -> None:
    fill(photos, "20_portraits/a.png")
    (photos / "20_portraits/a.txt").write_text("sks dog on a beach", encoding="utf-8")
    assert checks.check(DataConfig(folder=str(photos), name="sks dog"), base).errors == []


def test_each_folder_trains_its_own_subject(photos: Path, base: Any) -> None:
    fill(photos, "20_ohwx man/a.png", "20_ohwx man/b.png", "5_sks dog/c.png", "d.png")
    (photos / "20_ohwx man/b.txt").write_text("smiling", encoding="utf-8")
    config = DataConfig(folder=str(photos), name="zwx toy", concepts="folders", instance_prompt="a zwx toy")
    report = checks.check(config, base)
    assert {item.relative: item.text for item in report.items} == {
        "20_ohwx man/a.png": "a photo of an ohwx man",
        "20_ohwx man/b.png": "ohwx man, smiling",
        "5_sks dog/c.png": "a photo of a sks dog",
        "d.png": "a zwx toy",
    }
    assert [photo.repeats for photo in report.photos] == [1, 20, 20, 5]
    configs = concepts.of_photos(report.photos, config)
    assert [own.name for own in configs] == ["zwx toy", "ohwx man", "sks dog"]
    assert concepts.counts(report.photos, config) == {"zwx toy": 1, "ohwx man": 2, "sks dog": 1}
    assert captions.class_text_of_any("a photo of an ohwx man beside a sks dog", configs) == (
        "a photo of a man beside a dog"
    )
    assert captions.class_text_of_any("a photo of an ohwx man", configs) == "a photo of a man"
    assert captions.sample_prompts_of_all(configs)[2:5] == [
        "a photo of an ohwx man", "a photo of an ohwx man on a beach", "a photo of a sks dog",
    ]  # fmt: skip
    nameless = concepts.with_name(DataConfig(concepts="folders"), report.photos)
    assert nameless.name == "ohwx man"


def test_an_epoch_shows_a_photo_as_often_as_its_folder_says() -> None:
    photo_list = [Photo(Path(name), name, repeats=repeats) for name, repeats in (("a", 1), ("b", 3), ("c", 20))]
    latents = torch.zeros(4, 4, 8, 8)
    bucket = LatentBucket(
        64,
        64,
        latents,
        latents,
        None,
        None,
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([0, 0, 1, 0]),
        torch.arange(4),
        torch.zeros(4, dtype=torch.int64),
    )
    dataset = Dataset([bucket], photo_list, ["0", "1", "2"], [[0], [1], [2]], [0, 1, 2], 0.0)
    batches = dataset.batches(0, 0, 4)
    assert len(batches) == 6
    rows = torch.cat([batch.entries for batch in batches]).tolist()
    assert Counter(bucket.photo[rows].tolist()) == {0: 1, 1: 3, 2: 20}
    texts = torch.cat([batch.text_rows for batch in batches]).tolist()
    assert texts == bucket.photo[rows].tolist()
    counts = Counter(
        row for epoch in (0, 1) for batch in dataset.batches(0, epoch, 4) for row in batch.entries.tolist()
    )
    assert (counts[1], counts[2]) == (3, 3)  # both variants of b, equally often


def test_run_folders_among_the_photos_are_skipped(photos: Path) -> None:
    fill(photos, "a.png", "run/samples/s.png", "run/grid.png", "drawn/grid.png", "drawn/01-strength-1.png", "0_x/b.png")
    fill(photos, "runs/first/samples/s.png")
    for run in (photos / "run", photos / "runs/first"):
        (run / "config.toml").write_text("")
        (run / "state.json").write_text("{}")
    result = photo_folder.scan(photos)
    assert [photo.relative for photo in result.photos] == ["a.png"]
    assert result.warnings == []
    assert result.notes == [
        "skipped (a run of lorakit, not photos): drawn/, run/", "skipped (0 repeats): 0_x/",
    ]  # fmt: skip
    with pytest.raises(LorakitError, match="holds pictures of a run of lorakit"):
        photo_folder.scan(photos / "run")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.class_folder", "x", "data.class_folder has no effect with train.prior = 'none'"),
        ("adapter.new_tokens", 1, "adapter.new_tokens learns one trigger"),
    ],
)
def test_contradicting_options_of_folders_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, {"train.steps": 1, "data.name": "sks dog", "data.concepts": "folders", key: value})


@pytest.mark.parametrize("inside", ["out", "a/b", "."])
def test_output_inside_the_photos_is_refused(photos: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is inside the folder of photos" in (output_problem(photos / inside, str(photos)) or "")
    monkeypatch.chdir(photos.parent)
    assert "is inside the folder of photos" in (output_problem(Path("photos") / inside, str(photos)) or "")
    assert output_problem(photos.parent / "out", str(photos)) is None
