"""Tests of the check of a folder: each finding has one folder with the fault and one without."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import marked
import numpy as np
import pytest
from PIL import Image, ImageFilter

from lorakit.config import DataConfig
from lorakit.core.errors import LorakitError
from lorakit.data import checks, decode, duplicates, time_limit
from lorakit.data.checks.texts import NO_CAPTIONS

CONFIG = DataConfig(name="sks toy", resolution=64)


def texture(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Return coloured blobs of several sizes: a sharp picture that differs for each seed."""
    draw = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(draw.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((width, height), 0), float)
        for n in (3, 12, 48)
    ]
    return Image.fromarray((sum(layers) / 3).astype(np.uint8))


def fill(photos: Path, count: int = 5, width: int = 96, height: int = 96) -> None:
    for number in range(count):
        texture(number, width, height).save(photos / f"{number}.png")


def report_of(photos: Path, base, **changes: object) -> checks.Report:
    return checks.check(DataConfig(**{"folder": str(photos), "name": "sks toy", "resolution": 64} | changes), base)


def test_a_good_folder_has_no_findings(photos: Path, base) -> None:
    fill(photos)
    before = marked.digests(photos)
    report = report_of(photos, base)
    assert (report.errors, report.warnings) == ([], [])
    assert report.notes == [f'no captions: every photo is trained as "a photo of a sks toy"{NO_CAPTIONS}']
    assert "`lorakit caption`" in NO_CAPTIONS
    assert "write a caption for each photo" in NO_CAPTIONS
    assert [photo.relative for photo in report.photos] == [f"{n}.png" for n in range(5)]
    assert report.buckets == {(64, 64): 5}
    assert marked.digests(photos) == before
    assert (
        report.table()
        == f"""\
{photos}: 5 photos, each "a photo of a sks toy"

  photo  size   trained at  cropped  scaled  tokens
  0.png  96x96  64x64       -        -       6
  1.png  96x96  64x64       -        -       6
  2.png  96x96  64x64       -        -       6
  3.png  96x96  64x64       -        -       6
  4.png  96x96  64x64       -        -       6"""
    )


def test_columns_align_with_wide_characters_in_names(photos: Path, base) -> None:
    texture(1, 96, 96).save(photos / "狗 在 沙發.png")
    texture(2, 96, 96).save(photos / "cafe\u0301.png")
    (photos / "狗 在 沙發.txt").write_text("a photo of a sks toy in the snow", encoding="utf-8")
    assert report_of(photos, base).table().splitlines()[2:] == [
        "  photo           size   trained at  cropped  scaled  tokens  text",
        "  cafe\u0301.png        96x96  64x64       -        -       6       a photo of a sks toy",
        "  狗 在 沙發.png  96x96  64x64       -        -       15      a photo of a sks toy in the snow",
    ]


def test_each_photo_has_its_row(photos: Path, base) -> None:
    marked.save(photos / "turned.jpg", marked.as_camera_stores(marked.picture(1, 96, 64), 6), 6)
    texture(1, 90, 40).save(photos / "wide.png")
    texture(2, 32, 32).save(photos / "small.png")
    Image.fromarray(np.dstack([np.asarray(texture(3)), np.zeros((96, 96), np.uint8)])).save(photos / "clear.png")
    (photos / "wide.txt").write_text("sks toy, on a table")
    report = report_of(photos, base)
    rows = {item.relative: item for item in report.items}
    turned, wide, small = rows["turned.jpg"], rows["wide.png"], rows["small.png"]
    assert (turned.width, turned.height, turned.orientation) == (96, 64, "turned 90° right")
    assert (turned.bucket, turned.text, turned.tokens) == ((80, 48), "a photo of a sks toy", 6)
    assert (wide.text, wide.photo.caption_source) == ("sks toy, on a table", "wide.txt")
    assert small.scale == 2
    assert rows["clear.png"].transparent
    assert "rotated by their EXIF tag: turned.jpg" in report.notes
    assert "transparent parts are shown on white: clear.png" in report.notes
    lines = report.table().splitlines()
    assert lines[0] == f"{photos}: 4 photos"
    assert lines[2].split("  ")[-1] == "text"
    small_row = next(line for line in lines if "small.png" in line)
    assert " ".join(small_row.split()) == "small.png 32x32 64x64 - 2x up 6 a photo of a sks toy"


def test_json_is_stable(photos: Path, base) -> None:
    fill(photos, 1)
    (photos / "bad.jpg").write_bytes(b"")
    document = json.loads(json.dumps(report_of(photos, base).to_json()))
    assert list(document) == ["folder", "photos", "buckets", "errors", "warnings", "notes"]
    assert document["buckets"] == [{"width": 64, "height": 64, "photos": 1}]
    good, bad = document["photos"]
    assert list(good) == [
        "file", "width", "height", "orientation", "transparent", "cropped", "scale", "text", "tokens", "cut",
        "sharpness", "findings", "caption_source", "mask", "bucket", "lower_buckets",
    ]  # fmt: skip
    assert good["bucket"] == {"width": 64, "height": 64}
    assert bad["bucket"] is None
    assert bad["findings"] == ["empty, 0 bytes; copy it again from its source"]


def test_unreadable_files_are_errors_grouped_by_cause(photos: Path, base) -> None:
    fill(photos)
    for name in ("x.jpg", "y.jpg"):
        (photos / name).write_bytes(b"")
    (photos / "text.jpg").write_text("hello")
    half = (photos / "0.png").read_bytes()
    (photos / "half.png").write_bytes(half[: len(half) // 2])
    report = report_of(photos, base)
    assert len(report.errors) == 3
    assert "x.jpg, y.jpg: empty, 0 bytes; copy it again from its source" in report.errors
    assert any(line.startswith("half.png: damaged or cut off (") for line in report.errors)
    assert any(line.startswith("text.jpg: text, not a picture") for line in report.errors)
    assert len(report.photos) == 5
    assert sum("  unreadable  " in line for line in report.table().splitlines()) == 4


def test_without_a_name_no_text_of_a_photo_is_reported(photos: Path, base) -> None:
    fill(photos)
    assert report_of(photos, base, name="").notes == []
    (photos / "0.txt").write_text("a red toy")
    report = report_of(photos, base, name="")
    assert not any("are trained as" in line for line in report.warnings)


def test_photos_that_cannot_be_read_give_errors_only(photos: Path, base) -> None:
    """The number of photos and their captions are known only once they can be read."""
    for number in range(3):
        (photos / f"{number}.jpg").write_bytes(b"")
    report = report_of(photos, base)
    assert report.errors == ["0.jpg, 1.jpg, 2.jpg: empty, 0 bytes; copy it again from its source"]
    assert report.warnings == report.notes == []
    fill(photos, 1)
    report = report_of(photos, base)
    assert report.warnings == [] and len(report.notes) == 1


def test_many_files_with_one_cause_are_one_line(photos: Path, base) -> None:
    for number in range(8):
        (photos / f"{number}.jpg").write_bytes(b"")
    assert report_of(photos, base).errors == [
        "0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 3 more: empty, 0 bytes; copy it again from its source"
    ]


def test_a_mask_of_another_size_is_an_error(photos: Path, base) -> None:
    fill(photos)
    Image.new("L", (10, 10)).save(photos / "0.mask.png")
    assert report_of(photos, base).errors == ["0.png: 0.mask.png: mask is 10 x 10, its photo 96 x 96: make them equal"]
    Image.new("L", (96, 96)).save(photos / "0.mask.png")
    assert "photos with a mask: 1 of 5; train.masked_loss = true uses the masks" in report_of(photos, base).notes


def test_duplicates_are_reported(photos: Path, base) -> None:
    fill(photos)
    (photos / "copy.png").write_bytes((photos / "0.png").read_bytes())
    texture(1).resize((192, 192), Image.Resampling.LANCZOS).save(photos / "small.jpg", quality=60)
    report = report_of(photos, base)
    assert report.warnings == [
        "0.png, copy.png: the same file, counted 2 times",
        "1.png, small.jpg: look almost the same",
    ]
    findings = {item.relative: item.findings for item in report.items if item.findings}
    assert findings == {"copy.png": ["same as 0.png"], "small.jpg": ["almost the same as 1.png"]}


def test_flat_pictures_of_other_colours_are_not_duplicates(photos: Path, base) -> None:
    for number, colour in enumerate(["red", "green", "blue", "white", "black"]):
        Image.new("RGB", (96, 96), colour).save(photos / f"{number}.png")
    assert report_of(photos, base).warnings == []


def test_blur_is_judged_at_the_trained_size(photos: Path, base) -> None:
    fill(photos, 5, 512, 512)
    texture(9, 512, 512).filter(ImageFilter.GaussianBlur(30)).save(photos / "far.png")
    texture(8, 512, 512).filter(ImageFilter.GaussianBlur(3)).save(photos / "near.png")
    blurred = "look blurred at the size they are trained at"
    assert report_of(photos, base).warnings == [f"far.png (blurred): {blurred}"]
    assert report_of(photos, base, resolution=512).warnings == [f"far.png (blurred), near.png (blurred): {blurred}"]


def test_small_and_cropped_photos_are_reported(photos: Path, base) -> None:
    fill(photos)
    texture(6, 40, 40).save(photos / "small.png")
    texture(7, 400, 64).save(photos / "strip.png")
    report = report_of(photos, base)
    assert report.warnings == [
        "small.png (scaled up 1.6x): smaller than the size they are trained at",
        "strip.png (36% cropped away): lose much to the crop; crop them yourself to choose what stays",
    ]
    assert "mixed aspect ratios: trained at 64x64 (6), 128x32 (1); a batch holds one size" in report.notes


def test_missing_captions_and_triggers_are_reported(photos: Path, base) -> None:
    fill(photos)
    (photos / "0.txt").write_text("a photo of a sks toy")
    (photos / "1.txt").write_text("on a table")
    report = report_of(photos, base)
    assert [item.text for item in report.items][:3] == [
        "a photo of a sks toy", "sks toy, on a table", "a photo of a sks toy",
    ]  # fmt: skip
    assert report.warnings == [
        'photos without a caption: 3 of 5, trained as "a photo of a sks toy": 2.png, 3.png, 4.png',
        'captions without the trigger sks: 1 of 2; "sks toy, " is put in front: 1.png',
    ]
    assert report.items[1].findings == ["caption without the trigger"]
    assert report.items[2].findings == ["no caption"]


def test_text_that_does_not_fit_is_shown(photos: Path, base) -> None:
    fill(photos)
    (photos / "0.txt").write_text("sks toy " + "photo " * 80 + "of")
    assert not [line for line in report_of(photos, base).warnings if "tokens" in line]
    report = report_of(photos, base, max_tokens=75)
    (line,) = [line for line in report.warnings if "tokens" in line]
    assert line == ('0.png: its text has 83 tokens, 75 fit; cut off: "photo photo photo photo photo photo photo of"')
    assert (report.items[0].tokens, report.items[0].cut) == (83, "photo " * 7 + "of")


def test_flip_with_left_or_right_in_a_text_is_an_error(photos: Path, base) -> None:
    fill(photos)
    (photos / "0.txt").write_text("sks toy, its left ear is red")
    report = report_of(photos, base, flip=True, variants=2)
    assert report.errors == [
        "0.png: its text says left or right, which data.flip makes untrue; set data.flip = false or change the text"
    ]
    assert "data.flip: the subject is learned mirrored too; leave it off where its sides differ" in report.notes
    assert report_of(photos, base).errors == []


def test_few_photos_and_poor_names_are_reported(photos: Path, base) -> None:
    fill(photos, 1)
    assert report_of(photos, base).warnings == ["only 1 photo: 5 to 20 from different sides and places teach more"]
    fill(photos, 3)
    assert report_of(photos, base).warnings == ["only 3 photos: 5 to 20 from different sides and places teach more"]
    style = report_of(photos, base, kind="style", name="sks style")
    assert style.warnings == ["only 3 photos: 15 to 40 of different things teach more"]
    fill(photos, 5)
    assert report_of(photos, base, name="sks").warnings == [
        'data.name = "sks" is one word: give a rare word and what it is, such as "sks dog"'
    ]


def test_notes_of_decoding_are_reported(photos: Path, base) -> None:
    fill(photos)
    frames = [texture(n) for n in (11, 12)]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    assert report_of(photos, base).notes[-1] == "moving.gif: holds 2 pictures: the first is used"


def test_a_missing_folder_is_refused(base) -> None:
    with pytest.raises(LorakitError, match=r"^no folder of photos: name one \(data\.folder\)$"):
        checks.check(DataConfig(), base)


def test_the_check_imports_no_torch_and_prints_nothing(photos: Path, base) -> None:
    """In a new process, `check` imports no torch and prints no warnings of Pillow."""
    fill(photos)
    texture(7).save(photos / "odd.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    script = f"""
import sys
from types import SimpleNamespace
from pathlib import Path
from lorakit.config import DataConfig
from lorakit.data import checks, decode, duplicates, time_limit
from lorakit.data.checks.texts import NO_CAPTIONS
tokenizer = Path({str(base.path)!r}) / "tokenizer"
base = SimpleNamespace(tokenizers={{"tokenizer": tokenizer}}, downscale=8, max_tokens=77, bucket_multiple=8,
    chunked_texts=True)
report = checks.check(DataConfig(folder={str(photos)!r}, name="sks toy", resolution=64), base)
assert len(report.photos) == 6 and not report.errors
print(sorted(m for m in ("torch", "transformers", "diffusers", "peft", "matplotlib") if m in sys.modules))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"LC_ALL": "C"})
    assert (process.returncode, process.stdout, process.stderr) == (0, "[]\n", "")


def brute_force(hashes: np.ndarray, colours: np.ndarray) -> dict[int, int]:
    """Compare every pair by the definition."""
    matches = {}
    for at in range(len(hashes)):
        near = [
            n
            for n in range(at)
            if np.count_nonzero(hashes[n] != hashes[at]) <= 24 and np.abs(colours[n] - colours[at]).mean() <= 4.0
        ]
        if near:
            matches[at] = near[0]
    return matches


@pytest.mark.parametrize("kinds", [1, 20, 200])
def test_near_duplicates_equal_a_comparison_of_every_pair(kinds: int) -> None:
    rng = np.random.default_rng(kinds)
    kind = rng.integers(0, kinds, 300)
    hashes = rng.random((kinds, 256))[kind] > 0.5
    hashes ^= rng.random((300, 256)) < rng.choice([0.0, 0.04, 0.06], (300, 1))
    colours = rng.uniform(0, 255, (kinds, 16, 16, 3))[kind] + rng.choice([0.0, 3.9, 4.1], (300, 1, 1, 1))
    colours = colours.astype(np.float32)
    matches = duplicates.first_matches(hashes, colours)
    assert matches == brute_force(hashes, colours) and matches
    assert duplicates.first_matches(hashes[:0], colours[:0]) == {}


def test_many_near_duplicates_are_abridged(photos: Path, base) -> None:
    for number in range(9):
        texture(number).save(photos / f"{number}a.png")
        texture(number).save(photos / f"{number}b.jpg", quality=60)
    report = checks.check(DataConfig(folder=str(photos), name="sks toy", resolution=64), base)
    lines = [line for line in report.warnings if "look almost the same" in line]
    assert lines[0] == "0a.png, 0b.jpg: look almost the same" and len(lines) == 6
    assert lines[-1] == "lorakit check --json has the other lines like the last (4): look almost the same"
    assert sum(bool(item.findings) for item in report.items) == 9


def test_a_picture_that_takes_too_long_is_skipped(photos: Path, base, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(photos)
    texture(3).save(photos / "slow.png")
    release, calls, read = threading.Event(), [], decode.read

    def slow_read(path: Path, name: str) -> bytes:
        if name == "slow.png":
            release.wait(20)
        return read(path, name)

    monkeypatch.setattr(decode, "read", slow_read)
    monkeypatch.setattr(time_limit, "SECONDS", 0.5)
    monkeypatch.setattr(time_limit, "POLL_SECONDS", 0.05)
    config = DataConfig(folder=str(photos), name="sks toy", resolution=64)
    report = checks.check(config, base, progress=lambda *count: calls.append(count))
    release.set()
    assert report.errors == ["slow.png: takes longer than 0 s to read; save it again"]
    assert len(report.photos) == len(report.items) - 1 and calls[-1] == (len(report.items),) * 2


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        time_limit.for_each([1, 0, 2], lambda job: 1 // job, lambda job: -1)
    assert time_limit.for_each([], lambda job: job, lambda job: job) == []


def test_a_grey_copy_of_a_photo_is_reported(photos: Path, base) -> None:
    fill(photos)
    texture(3).save(photos / "cat.png")
    texture(4).save(photos / "7.png")
    for name in ("cat_bw.png", "mask-of-cat.png", "dog.png", "7_shape.png"):
        texture(len(name)).convert("L").resize(texture(3).size).save(photos / name)
    report = checks.check(DataConfig(folder=str(photos), name="sks toy", resolution=64), base)
    line = "7_shape.png, cat_bw.png, mask-of-cat.png: grey, with the name and size of a photo in colour"
    assert [warning for warning in report.warnings if "grey" in warning] == [
        f"{line}; name.mask.png is read as a mask, this is trained as a photo"
    ]


def test_a_text_with_a_lone_surrogate_is_an_error(photos: Path, base) -> None:
    fill(photos)
    name = min(path.name for path in photos.iterdir())
    (photos / "metadata.jsonl").write_text(f'{{"file_name": "{name}", "text": "a sks toy \\ud800"}}\n')
    report = checks.check(DataConfig(folder=str(photos), name="sks toy", resolution=64), base)
    assert report.errors == [f"{name}: its text has invalid characters: a sks toy \\ud800; write them again"]


@pytest.mark.parametrize(("blur", "is_blurred"), [(0, False), (60, True)])
def test_a_large_jpeg_is_measured_from_a_part_of_its_pixels(photos: Path, base, blur: int, is_blurred: bool) -> None:
    picture = texture(5).resize((1440, 960), Image.Resampling.NEAREST).filter(ImageFilter.GaussianBlur(blur))
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6
    picture.save(photos / "large.jpg", quality=92, exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(photos / "upright.png")
    items = {item.relative: item for item in report_of(photos, base, resolution=128).items}
    large, upright = items["large.jpg"], items["upright.png"]
    assert (large.width, large.height, large.bucket, large.cropped, large.scale) == (
        *(upright.width, upright.height, upright.bucket, upright.cropped, upright.scale),
    )
    assert large.sharpness == pytest.approx(upright.sharpness, rel=0.1, abs=0.002)
    assert ("blurred" in large.findings, "blurred" in upright.findings) == (is_blurred, is_blurred)
    assert any("almost the same" in finding for finding in upright.findings)
