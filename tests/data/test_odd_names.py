"""Tests of masks, captions and tables with unusual names: other case, other words or another form."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lorakit.data import photo_folder


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


@pytest.mark.parametrize(
    "mask",
    [
        "a.masklabel.png", "a mask.png", "a-matte.png", "a_alpha.png", "a_seg.png", "a.segmentation.png", "mask_a.png",
        "Mask-a.PNG", "alpha/a.png", "segmentations/a.png", "Mattes/a.jpg.png",
    ],
)  # fmt: skip
def test_masks_of_other_programs_belong_to_their_photos(photos: Path, mask: str) -> None:
    fill(photos, "a.jpg", "b.jpg", mask)
    result = photo_folder.scan(photos)
    assert [photo.relative for photo in result.photos] == ["a.jpg", "b.jpg"]
    assert result.photos[0].mask == photos / mask and result.photos[1].mask is None


@pytest.mark.parametrize("names", [("maskot.png", "ot.png"), ("a.png", "alphabet.png"), ("mask.png", "a.png")])
def test_a_photo_with_a_mask_like_name_is_a_photo(photos: Path, names: tuple[str, ...]) -> None:
    fill(photos, *names)
    assert len(photo_folder.scan(photos).photos) == 2


def test_a_side_file_in_capitals_belongs_to_its_photo(photos: Path) -> None:
    fill(photos, "B.png", "b.png", "b.MASK.png")
    (photos / "b.TXT").write_text("of the small one")
    result = photo_folder.scan(photos)
    assert {photo.relative: photo.caption for photo in result.photos} == {"B.png": None, "b.png": "of the small one"}
    assert [photo.mask for photo in result.photos] == [None, photos / "b.MASK.png"] and result.warnings == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("annotations.json", '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}'),
        ("empty.jsonl", "\n"),
        ("list.json", "[]"),
        ("head.csv", "file,caption\n"),
    ],
)
def test_a_table_without_rows_is_listed(photos: Path, name: str, content: str) -> None:
    fill(photos, "a.png")
    (photos / name).write_text(content)
    assert f"not read as captions: {name}: no row of it has a picture and a text" in photo_folder.scan(photos).notes
