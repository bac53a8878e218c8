from pathlib import Path

import pytest
from PIL import Image

from lorakit.ui import texts
from lorakit.ui.uploads import Upload, take_in


def files(folder: Path, *specifications: str) -> list[Path]:
    """Files as a browser's upload leaves them, each in its own folder: "name" or "name=content"."""
    paths = []
    for number, (name, _, content) in enumerate(one.partition("=") for one in specifications):
        path = folder / str(number) / name
        path.parent.mkdir(parents=True)
        if path.suffix in (".png", ".jpg") and content != "broken":
            Image.new("RGB", (60, 40), content or "red").save(path)
        else:
            path.write_text(content)
        paths.append(path)
    return paths


TWINS = "several files are called {}, and which belong together is not known; upload one folder at a time"


@pytest.mark.parametrize(
    ("names", "captions", "refused"),
    [
        (["a.png", "a.txt=a dog", "b.png=blue", "b.txt=a cat"], {"a.png": "a dog", "b.png": "a cat"}, []),
        # Two folders with equal names: no caption is anybody's for certain.
        (
            ["00.png=red", "00.txt=a dog", "00.png=blue", "00.txt=a cat"],
            {"00.png": None, "00-2.png": None},
            ["00.txt: " + TWINS.format("00.png")] * 2,
        ),
        (
            ["00.png", "00.png=blue", "00.txt=a"],
            {"00.png": None, "00-2.png": None},
            ["00.txt: " + TWINS.format("00.png")],
        ),
        (["00.png", "00.txt=a", "00.txt=b"], {"00.png": None}, ["00.txt: " + TWINS.format("00.txt")] * 2),
        (["a.png", "a.png.txt=one", "a.mask.png=white"], {"a.png": "one", "a.mask.png": None}, []),
        (["a.png", "a.png", "a.txt=one", "a.txt=one"], {"a.png": "one"}, []),
        (["a.png", "A.TXT=one"], {"a.png": "one"}, []),
        (["a.png", "b.txt=one"], {"a.png": None}, ["b.txt: no photo of this name came with it"]),
        (["a.png", "bad.jpg=broken", "bad.txt=x"], {"a.png": None}, None),
        ([".a.png"], {"a.png": None}, []),
    ],
)
def test_a_caption_goes_to_its_photo_or_to_none(
    tmp_path: Path, names: list[str], captions: dict[str, str | None], refused: list[str] | None
):
    place = tmp_path / "place"
    upload = take_in(files(tmp_path / "up", *names), place)
    photos = {path.name: path for path in place.iterdir() if path.suffix == ".png"}
    assert set(photos) == set(captions)
    assert upload.photo_count == sum("mask" not in name for name in photos)
    assert refused is None or upload.refused == refused
    texts_there = {path.name.lower().partition(".")[0]: path.read_text() for path in place.glob("*.[tT][xX][tT]")}
    assert texts_there == {Path(name).stem: caption for name, caption in captions.items() if caption}
    say = texts.sayer("zh-Hant")
    assert all(say.translate(line) != line for line in upload.refused)


def test_the_third_photo_of_a_name_does_not_take_anothers_caption(tmp_path: Path):
    names = ["0.png", "0.png=blue", "0-2.txt=a tree", "0-2.png=green"]
    take_in(files(tmp_path / "up", *names), tmp_path / "place")
    (caption,) = (tmp_path / "place").glob("*.txt")
    assert Image.open(caption.with_suffix(".png")).getpixel((0, 0)) == (0, 128, 0)


def test_nothing_is_replaced_and_every_step_is_counted(tmp_path: Path):
    place, steps = tmp_path / "place", []
    take_in(files(tmp_path / "up", "a.png", "a.txt=first"), place)
    paths = files(tmp_path / "more", "a.png=blue", "a.txt=second")
    assert take_in(paths, place, lambda *step: steps.append(step)) == Upload(1, [])
    assert steps == [(1, 2), (2, 2)]
    assert {p.name: p.read_text() for p in place.glob("*.txt")} == {"a.txt": "first", "a-2.txt": "second"}
    assert not any(path.exists() for path in paths), "no copy stays in the shared place"


def test_nothing_that_can_be_used_makes_no_folder(tmp_path: Path):
    upload = take_in(files(tmp_path / "up", "bad.jpg=broken"), tmp_path / "place")
    assert upload.photo_count == 0 and upload.refused[0].startswith("bad.jpg: ") and not (tmp_path / "place").exists()
