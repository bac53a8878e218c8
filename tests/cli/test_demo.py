"""The demo: its photos, and a short run of the command."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lorakit.cli import demo, main as cli
from lorakit.core.errors import LorakitError
from lorakit.families.pocket import scene_captions, spec, subjects


def test_photos_show_the_subject_on_no_scene_of_the_comparison(tmp_path: Path) -> None:
    demo.write_photos("zib", tmp_path / "photos")
    pictures = sorted((tmp_path / "photos").glob("*.png"))
    assert len(pictures) == demo.PHOTOS
    unseen = [words for scene in demo.UNSEEN for words in scene_captions.SCENE_WORDS[scene]]
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.size == (64, 64)
        text = picture.with_suffix(".txt").read_text(encoding="utf-8")
        assert text.startswith("a photo of a sks toy ")
        assert not any(words in text for words in unseen)


def test_the_scenes_of_the_comparison_exist_and_leave_some_to_learn_from() -> None:
    assert set(demo.UNSEEN) < set(spec.SCENES)
    assert len(spec.SCENES) - len(demo.UNSEEN) >= 5


@pytest.mark.parametrize("name", subjects.SUBJECTS)
def test_every_bundled_subject_has_photos(name: str, tmp_path: Path) -> None:
    demo.write_photos(name, tmp_path / name)
    digests = {file.read_bytes() for file in (tmp_path / name).glob("*.png")}
    assert len(digests) == demo.PHOTOS


def test_a_folder_that_is_not_empty_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "mine.png").touch()
    with pytest.raises(LorakitError, match="is not empty; give another folder with --output"):
        demo.write_photos("zib", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.png"]


@pytest.mark.slow
@pytest.mark.usefixtures("short_validation")
def test_a_short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "PICTURES_PER_SCENE", 1)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    short = {"train.steps": 2, "train.prior": "none", "train.holdout": 0, "sample.steps": 2, "memory.device": "cpu"}
    short |= {"train.batch_size": 2, "optimizer.warmup_steps": 0, "sample.every": 1000, "train.validate_every": 1000}
    sets = [part for key, value in short.items() for part in ("--set", f"{key}={value}")]
    assert cli.main(["demo", "--output", "out", "--json", *sets]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["subject"] == "zib"
    assert 0 <= report["before"] <= 1 and 0 <= report["after"] <= 1
    width, height = Image.open(report["grid"]).size
    assert width > 5 * 64 and height > 3 * 64
    assert Path(report["adapter"]).is_file()
    for line in (
        "comparing 10/10\n",
        "the bundled picture classifier finds ",
        "before and after: out/before-after.png",
        "done in ",
    ):
        assert line in captured.err
