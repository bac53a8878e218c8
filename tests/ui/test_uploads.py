import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from lorakit.data import photo_folder
from lorakit.ui import archives, texts
from lorakit.ui.uploads import Upload, take_in


def files(folder: Path, *specifications: str) -> list[Path]:
    """Write files like a browser's upload, each in its own folder. A specification is "name" or "name=content"."""
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


TWINS = "several files have the name {}, so their captions are ambiguous; upload one folder at a time"


@pytest.mark.parametrize(
    ("names", "captions", "refused"),
    [
        (["a.png", "a.txt=a dog", "b.png=blue", "b.txt=a cat"], {"a.png": "a dog", "b.png": "a cat"}, []),
        # Two folders have files of the same names, so it is not clear which caption belongs to which photo.
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
        (["a.png", "b.txt=one"], {"a.png": None}, ["b.txt: the upload has no photo of this name"]),
        (["a.png", "bad.jpg=broken", "bad.txt=x"], {"a.png": None}, None),
        ([".a.png"], {"a.png": None}, []),
    ],
)
def test_a_caption_is_matched_to_its_photo_or_refused(
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


def test_uploads_replace_no_file_and_report_each_step(tmp_path: Path):
    place, steps = tmp_path / "place", []
    take_in(files(tmp_path / "up", "a.png", "a.txt=first"), place)
    paths = files(tmp_path / "more", "a.png=blue", "a.txt=second")
    assert take_in(paths, place, lambda *step: steps.append(step)) == Upload(1, [])
    assert steps == [(1, 2), (2, 2)]
    assert {p.name: p.read_text() for p in place.glob("*.txt")} == {"a.txt": "first", "a-2.txt": "second"}
    assert not any(path.exists() for path in paths), "no copy stays in the shared place"


def test_an_upload_without_photos_creates_no_folder(tmp_path: Path):
    upload = take_in(files(tmp_path / "up", "bad.jpg=broken"), tmp_path / "place")
    assert upload.photo_count == 0 and upload.refused[0].startswith("bad.jpg: ") and not (tmp_path / "place").exists()


def test_tables_of_captions_need_photos_and_replace_no_file(tmp_path: Path):
    place, line = tmp_path / "place", '{"file_name": "a.png", "text": "sks toy on a table"}'
    alone = take_in(files(tmp_path / "alone", f"metadata.jsonl={line}"), place)
    assert alone.refused == ["metadata.jsonl: the upload has no photo"] and not place.exists()
    assert take_in(files(tmp_path / "up", "a.png", f"metadata.jsonl={line}"), place).refused == []
    assert [photo.caption for photo in photo_folder.scan(place).photos] == ["sks toy on a table"]
    repeat = take_in(files(tmp_path / "again", "metadata.jsonl={}"), place)
    assert repeat.refused == ["metadata.jsonl: a file of this name already exists"]
    assert (place / "metadata.jsonl").read_text() == line


def test_a_later_caption_is_matched_to_the_photo_without_one(tmp_path: Path):
    place = tmp_path / "place"
    take_in(files(tmp_path / "up", "a.png", "b.png=blue", "b.txt=there"), place)
    upload = take_in(files(tmp_path / "later", "a.txt=a dog", "b.txt=another", "c.txt=none"), place)
    assert {path.name: path.read_text() for path in place.glob("*.txt")} == {"a.txt": "a dog", "b.txt": "there"}
    assert upload.refused == [f"{name}: the upload has no photo of this name" for name in ("b.txt", "c.txt")]


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(buffer, "png")
    return buffer.getvalue()


def zipped(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_an_archive_is_unpacked_with_its_folders_and_only_usable_files(tmp_path: Path):
    entries = {
        "dogs/5_sks dog/a.png": picture(),
        "dogs/5_sks dog/a.txt": b"sks dog on a table",
        "dogs/other/b.png": picture("blue"),
        "dogs/broken.jpg": b"no picture",
        "dogs/setup.exe": b"MZ",
        "dogs/.hidden.png": picture(),
        "__MACOSX/dogs/._a.png": b"",
        "dogs/../../outside.png": picture(),
        "/etc/absolute.png": picture(),
        "C:/drive.png": picture(),
    }
    place = tmp_path / "up" / "place"
    upload = take_in([zipped(tmp_path / "dogs.zip", entries)], place)
    there = sorted(path.relative_to(tmp_path / "up").as_posix() for path in (tmp_path / "up").rglob("*.*"))
    assert there == ["place/5_sks dog/a.png", "place/5_sks dog/a.txt", "place/other/b.png"]
    assert upload.photo_count == 2 and [line.split(":")[0] for line in upload.refused] == ["broken.jpg"]
    more = take_in([zipped(tmp_path / "more.zip", {"10_sks dog/c.png": picture()})], place)
    assert more == Upload(1, []) and (place / "more" / "10_sks dog" / "c.png").is_file()


def test_links_of_an_archive_are_left_out(tmp_path: Path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert take_in([tmp_path / "links.zip"], tmp_path / "place") == Upload(0, [])
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: b"PK no zip", "damaged, or not a zip; unpack it yourself"),
        (lambda content: content.replace(content[60:90], bytes(30), 1), "damaged, or not a zip; unpack it yourself"),
        # Set the flag of an encrypted entry in its header and in the directory.
        (
            lambda content: (content[:6] + b"\x01" + content[7:]).replace(b"PK\x01\x02\x14\x03\x14\x00\x00",
                                                                         b"PK\x01\x02\x14\x03\x14\x00\x01"),
            "locked by a password; unpack it yourself",
        ),
    ],
)  # fmt: skip
def test_an_archive_that_cannot_be_unpacked_leaves_nothing(tmp_path: Path, spoil, reason: str):
    path = zipped(tmp_path / "photos.zip", {"a.png": picture(), "b.png": picture("blue")})
    path.write_bytes(spoil(path.read_bytes()))
    upload = take_in([path], tmp_path / "place")
    assert upload == Upload(0, [f"photos.zip: {reason}"]) and not (tmp_path / "place").exists()
    assert texts.sayer("zh-Hant").translate(upload.refused[0]) != upload.refused[0]


def test_an_archive_of_too_much_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILES", 1)
    path = zipped(tmp_path / "photos.zip", {"a.png": picture(), "b.png": picture()})
    (line,) = take_in([path], tmp_path / "place").refused
    assert line == "photos.zip: more than 1 files or 4 GiB in it; unpack it yourself"
    assert not (tmp_path / "place").exists() and texts.sayer("zh-Hant").translate(line) != line
