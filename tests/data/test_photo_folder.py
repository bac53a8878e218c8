"""Tests that find photos, captions and masks in a folder; the folder is only read."""

import json
import os
from pathlib import Path

import marked
import pytest

from lorakit.core.errors import LorakitError
from lorakit.data import photo_folder


def fill(place: Path, *names: str) -> None:
    """Write small pictures with these names."""
    for number, name in enumerate(names):
        marked.save(place / name, marked.picture(number, 16, 16))


def captions(result: photo_folder.Folder) -> dict[str, str | None]:
    return {photo.relative: photo.caption for photo in result.photos}


def test_a_plain_folder_is_a_data_set(photos: Path) -> None:
    fill(photos, "b.jpg", "a.PNG", "c d.webp", "e.mask.png", "._b.jpg", ".hidden.jpg")
    (photos / "Thumbs.db").write_bytes(b"x")
    (photos / "clip.mov").write_bytes(b"x")
    before = marked.digests(photos)
    result = photo_folder.scan(photos)
    assert [photo.relative for photo in result.photos] == ["a.PNG", "b.jpg", "c d.webp"]
    assert result.warnings == ["not used, as no photo has this name: e.mask.png"]
    assert result.notes == ["not pictures, ignored: 1 .db, 1 .mov"]
    assert marked.digests(photos) == before


@pytest.mark.parametrize("ending", photo_folder.FORMATS)
def test_every_format_is_found(photos: Path, ending: str) -> None:
    (photos / f"a.{ending}").write_bytes(b"x")
    assert len(photo_folder.scan(photos).photos) == 1


def test_one_level_of_subfolders_is_read_with_kohyas_repeats(photos: Path) -> None:
    fill(photos, "top.jpg", "10_sks dog/a.jpg", "10_sks dog/b.jpg", "other/c.jpg", "other/deep/d.jpg", "__MACOSX/x.jpg")
    result = photo_folder.scan(photos)
    assert [p.relative for p in result.photos] == ["top.jpg", "10_sks dog/a.jpg", "10_sks dog/b.jpg", "other/c.jpg"]
    assert result.warnings == ["pictures more than one folder down are not read: other/deep/ (1)"]
    assert result.notes == [
        "subfolders: 10_sks dog/ (2), other/ (1)",
        "repeats: an epoch shows each photo of 10_sks dog/ 10 times",
    ]


def test_names_in_every_language_are_read(tmp_path: Path) -> None:
    place = tmp_path / "фото" / "ソク"
    fill(place, "x y.jpg")
    (place / "x y.txt").write_text("кот и 猫", encoding="utf-8")
    assert captions(photo_folder.scan(tmp_path / "фото")) == {"ソク/x y.jpg": "кот и 猫"}


def test_captions_of_every_kind_are_read(photos: Path) -> None:
    fill(photos, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "sub/f.jpg", "g.jpg")
    (photos / "a.txt").write_text("one\n", encoding="utf-8")
    (photos / "b.caption").write_text("two\n  lines", encoding="utf-8")
    rows = [{"file_name": "c.jpg", "text": "three"}, {"file_name": "./d.jpg", "caption": "four"}]
    rows.append({"file_name": "sub/h.jpg", "text": "seven"})
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    (photos / "e.jpg.txt").write_text("five", encoding="utf-8")
    marked.save(photos / "sub/h.jpg", marked.picture(9, 16, 16))
    (photos / "sub/metadata.jsonl").write_text(json.dumps({"file_name": "f.jpg", "prompt": "six"}), encoding="utf-8")
    result = photo_folder.scan(photos)
    assert captions(result) == {
        "a.jpg": "one", "b.jpg": "two lines", "c.jpg": "three", "d.jpg": "four", "e.jpg": "five", "g.jpg": None,
        "sub/f.jpg": "six", "sub/h.jpg": "seven",
    }  # fmt: skip
    assert [photo.caption_source for photo in result.photos] == [
        "a.txt", "b.caption", "metadata.jsonl", "metadata.jsonl", "e.jpg.txt", None, "sub/metadata.jsonl",
        "metadata.jsonl",
    ]  # fmt: skip
    assert result.warnings == []
    assert result.notes == ["subfolders: sub/ (2)"]


def test_captions_that_disagree_are_reported(photos: Path) -> None:
    fill(photos, "a.jpg", "b.jpg")
    (photos / "a.txt").write_text("one")
    (photos / "a.caption").write_text("two")
    (photos / "b.txt").write_text("same")
    fill(photos, "c.jpg")
    rows = [{"file_name": "b.jpg", "text": "same"}, {"file_name": "c.jpg", "text": "x"}]
    rows.append({"file_name": "c.jpg", "text": "y"})
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = photo_folder.scan(photos)
    assert captions(result) == {"a.jpg": "one", "b.jpg": "same", "c.jpg": "x"}
    assert result.warnings == [
        "c.jpg: metadata.jsonl line 3 says something else than before; not used",
        "a.jpg: a.txt and a.caption say different things; a.txt is used",
    ]


def test_empty_and_unused_captions_are_reported(photos: Path) -> None:
    fill(photos, "a.jpg")
    (photos / "a.txt").write_text(" \n")
    (photos / "b.txt").write_text("whose?")
    (photos / "metadata.jsonl").write_text('{"file_name": "z.jpg", "text": "gone"}')
    result = photo_folder.scan(photos)
    assert captions(result) == {"a.jpg": None}
    assert result.warnings == [
        "a.jpg: its caption in a.txt is empty",
        "not used, as no photo has this name: b.txt",
        "metadata.jsonl names files that are not there: z.jpg",
    ]


@pytest.mark.parametrize(
    ("raw", "text", "guess"),
    [
        ("\ufeffcafé".encode(), "café", ""),
        ("café".encode("utf-16"), "café", ""),
        ("café".encode("utf-32"), "café", ""),
        ("café".encode("cp1252"), "café", "Windows-1252"),
        ("Straße, größe".encode("cp1252"), "Straße, größe", "Windows-1252"),
        ("sks 狗在沙滩上".encode("gbk"), "sks 狗在沙滩上", "GBK"),
        ("人物 红色".encode("gbk"), "人物 红色", "GBK"),
        ("빨간 개가 해변에".encode("euc_kr"), "빨간 개가 해변에", "EUC-KR"),
        ("sks собака на пляже".encode("cp1251"), "sks собака на пляже", "Windows-1251"),
        ("狗在沙灘上".encode("big5"), "狗在沙灘上", "Big5"),
        ("可愛い犬".encode("cp932"), "可愛い犬", "Shift JIS"),
        ("a dog".encode("utf-16-le"), "a dog", "UTF-16 without a byte-order mark"),
        ("a 狗".encode("utf-16-be"), "a 狗", "UTF-16 without a byte-order mark"),
    ],
)
def test_captions_in_other_encodings_are_read_and_reported(photos: Path, raw: bytes, text: str, guess: str) -> None:
    fill(photos, "a.jpg")
    (photos / "a.txt").write_bytes(raw)
    result = photo_folder.scan(photos)
    assert captions(result) == {"a.jpg": text}
    line = f'a.txt: not UTF-8, read as {guess}: "{text}"; if that is wrong, save it as UTF-8'
    assert result.warnings == ([line] if guess else [])


@pytest.mark.parametrize("raw", [b"\x81\x8d\xff", b"sks\0\0\0\0 dog"])
def test_a_caption_that_is_not_text_is_refused(photos: Path, raw: bytes) -> None:
    fill(photos, "a.jpg")
    (photos / "a.txt").write_bytes(raw)
    message = r"^a\.txt: not text in an encoding that lorakit reads; save it as UTF-8$"
    with pytest.raises(LorakitError, match=message):
        photo_folder.scan(photos)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"metadata\.jsonl line 2: not JSON \(.+\); each line is one object"),
        ("[]", r'metadata\.jsonl line 2: needs "file_name", the name of a picture beside it'),
        ('{"text": "x"}', r'metadata\.jsonl line 2: needs "file_name", the name of a picture beside it'),
        (
            '{"file_name": "a.jpg"}',
            r"metadata\.jsonl line 2: needs one of text, caption, prompt, description, tags, tag_string",
        ),
    ],
)
def test_wrong_metadata_is_refused_with_its_line(photos: Path, line: str, message: str) -> None:
    fill(photos, "a.jpg")
    (photos / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "fine"}\n' + line)
    with pytest.raises(LorakitError, match=f"^{message}$"):
        photo_folder.scan(photos)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.jsonl", '{"file_name": "a.jpg", "caption": "one"}\n{"image": "sub\\\\b.jpg", "text": "two"}\n'),
        ("meta_cap.json", '{"/data/a": {"caption": "one"}, "C:\\\\x\\\\sub\\\\b.jpg": {"tags": "two"}}'),
        ("captions.json", '{"a.jpg": "one", "./sub/b": "two"}'),
        ("rows.json", '[{"path": "a.jpg", "prompt": "one"}, {"path": "sub/b.jpg", "prompt": "two"}]'),
        ("captions.csv", 'file_name,caption\n"a.jpg","one"\nsub\\b.jpg,two\n'),
        ("table.csv", "a.jpg;one\nsub/b.jpg;two\n"),
        ("table.tsv", "image\ttext\na.jpg\tone\nsub/b.jpg\ttwo\n"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "one"}\n{"file_name": ".\\\\sub\\\\b.jpg", "text": "two"}'),
    ],
)
def test_captions_are_read_from_tables_of_other_programs(photos: Path, name: str, content: str) -> None:
    fill(photos, "a.jpg", "sub/b.jpg")
    (photos / name).write_text(content, encoding="utf-8")
    result = photo_folder.scan(photos)
    assert captions(result) == {"a.jpg": "one", "sub/b.jpg": "two"}
    assert result.warnings == [] and result.notes == ["subfolders: sub/ (1)"]


def test_captions_are_read_from_a_json_beside_each_photo(photos: Path) -> None:
    fill(photos, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    (photos / "a.json").write_text('{"caption": "sks dog", "tags": ["grass", "sun"]}')
    (photos / "b.jpg.json").write_text('{"tags": ["sks", "tree"]}')
    (photos / "c.json").write_text('{"width": 3}')
    (photos / "d.json").write_text("damaged")
    result = photo_folder.scan(photos)
    assert captions(result) == {"a.jpg": "sks dog, grass, sun", "b.jpg": "sks, tree", "c.jpg": None, "d.jpg": None}
    keys = "text, caption, prompt, description, tags, tag_string"
    assert result.notes == [f"{name}.json: not read, it has no caption ({keys})" for name in "cd"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", "config.json line 1: not JSON (Expecting property name enclosed in double quotes)"),
        ("log.jsonl", "[]", 'log.jsonl line 1: needs "file_name", the name'),
        ("numbers.json", "[1]", 'numbers.json line 1: needs "file_name", the name'),
        ("sizes.json", '[{"image": "a.jpg"}]', "sizes.json line 1: needs one of text, caption"),
    ],
)
def test_tables_that_are_not_read_are_listed(photos: Path, name: str, content: str, reason: str) -> None:
    fill(photos, "a.jpg")
    (photos / name).write_text(content)
    (note,) = photo_folder.scan(photos).notes
    assert note.startswith(f"not read as captions: {reason}")


def test_masks_belong_to_their_photos(photos: Path) -> None:
    fill(photos, "a.jpg", "a.mask.png", "b.jpg")
    assert [photo.mask and photo.mask.name for photo in photo_folder.scan(photos).photos] == ["a.mask.png", None]


def test_the_digest_follows_photos_masks_captions_and_names(photos: Path) -> None:
    fill(photos, "a.jpg", "b.jpg")

    def digest() -> str:
        return photo_folder.digest(photo_folder.scan(photos).photos)

    digests = [digest()]
    marked.save(photos / "a.jpg", marked.picture(9, 16, 16))
    digests.append(digest())
    (photos / "a.txt").write_text("red")
    digests.append(digest())
    fill(photos, "a.mask.png")
    digests.append(digest())
    (photos / "b.jpg").rename(photos / "c.jpg")
    digests.append(digest())
    assert len(set(digests)) == 5
    assert digest() == digests[-1]
    result = photo_folder.scan(photos).photos
    (photos / "c.jpg").unlink()
    with pytest.raises(LorakitError, match=r"^c\.jpg: cannot be read any more \(No such file or directory\)$"):
        photo_folder.digest(result)


ENDINGS = "looked for jpg, jpeg, jpe, jfif, png, webp, bmp, tif, tiff, avif, mpo, heic, heif, gif"


def test_the_error_for_an_empty_folder_lists_endings_and_files(photos: Path) -> None:
    with pytest.raises(LorakitError) as error:
        photo_folder.scan(photos)
    assert str(error.value) == f"0 images in {photos}; {ENDINGS}; found nothing"
    for name in ("a.cr2", "b.CR2", "notes.txt", "README"):
        (photos / name).write_bytes(b"x")
    fill(photos, "one/two/c.jpg")
    with pytest.raises(LorakitError) as error:
        photo_folder.scan(photos)
    assert str(error.value) == (
        f"0 images in {photos}; {ENDINGS}; found 2 .cr2, 1 .txt, 1 without an ending; "
        "1 in one/two/ (only one level of subfolders is read)"
    )


def test_a_path_that_is_not_a_folder_is_refused(photos: Path) -> None:
    fill(photos, "a.jpg")
    (photos / "notes.txt").write_text("x")
    with pytest.raises(LorakitError) as error:
        photo_folder.scan(photos / "a.jpg")
    assert str(error.value) == f"{photos / 'a.jpg'} is one picture; give the folder it is in: {photos}"
    with pytest.raises(LorakitError) as error:
        photo_folder.scan(photos / "notes.txt")
    assert str(error.value) == f"{photos / 'notes.txt'} is a file; give a folder of photos"
    with pytest.raises(LorakitError) as error:
        photo_folder.scan(photos.parent / "photo")
    assert str(error.value) == f"folder {photos.parent / 'photo'} does not exist (did you mean {photos}?)"
    with pytest.raises(LorakitError) as error:
        photo_folder.scan(photos / "zzz" / "deep")
    assert str(error.value) == f"folder {photos / 'zzz' / 'deep'} does not exist"


@pytest.mark.parametrize(
    ("photo", "mask"),
    [
        ("a.jpg", "a-masklabel.png"),
        ("a.jpg", "a_mask.png"),
        ("a.jpg", "a-mask.jpg"),
        ("a.jpg", "a.mask.webp"),
        ("a.png", "a.mask.png"),
        ("a.jpg", "a.jpg.mask.png"),
        ("a.jpg", "mask/a.png"),
        ("a.jpg", "masks/a.jpg"),
        ("a.jpg", "masks/a_mask.png"),
        ("10_sks dog/a.jpg", "10_sks dog/masks/a.png"),
        ("images/a.jpg", "masks/a.png"),
    ],
)
def test_masks_of_other_programs_are_not_photos(tmp_path: Path, photo: str, mask: str) -> None:
    for name in (photo, photo.replace("a.", "b."), mask):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        marked.save(tmp_path / name, marked.picture(3))
    result = photo_folder.scan(tmp_path)
    assert {p.relative: p.mask for p in result.photos} == {photo: tmp_path / mask, photo.replace("a.", "b."): None}
    assert result.warnings == []


def test_a_mask_without_its_photo_is_a_photo_or_reported(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for name in ("bull_mask.png", "a.png", "masks/a.png", "masks/c.png"):
        marked.save(tmp_path / name, marked.picture(3))
    result = photo_folder.scan(tmp_path)
    assert [photo.relative for photo in result.photos] == ["a.png", "bull_mask.png"]
    assert result.warnings == ["not used, as no photo has this name: masks/c.png"]


def test_the_exact_name_comes_first(tmp_path: Path) -> None:
    """Names may differ in case alone: each photo gets the files with its exact name."""
    for name in ("a.png", "A.png", "b.png", "B.png", "c.png"):
        marked.save(tmp_path / name, marked.picture(3))
    for name in ("a.txt", "A.txt", "B.txt", "C.TXT", "A.mask.png", "B.mask.png", "b.mask.png"):
        (tmp_path / name).write_text(name)
    photos = {photo.relative: photo for photo in photo_folder.scan(tmp_path).photos}
    assert {name: photo.caption for name, photo in photos.items()} == {
        "a.png": "a.txt", "A.png": "A.txt", "B.png": "B.txt", "b.png": None, "c.png": "C.TXT",
    }  # fmt: skip
    masks = {name: photo.mask and photo.mask.name for name, photo in photos.items()}
    assert masks == {
        "a.png": None, "A.png": "A.mask.png", "B.png": "B.mask.png", "b.png": "b.mask.png", "c.png": None,
    }  # fmt: skip


def test_links_outside_the_folder_are_reported_and_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "photos", tmp_path / "outside"
    (root / "below").mkdir(parents=True)
    outside.mkdir()
    for place in (root, root / "below", outside):
        marked.save(place / "a.png", marked.picture(3))
    (outside / "secret").write_text("a secret")
    links = {
        "b.png": outside / "a.png", "a.txt": outside / "secret", "a.mask.png": outside / "a.png", "away": outside,
        "c.png": tmp_path / "gone.png", "d.png": "d.png", "up": "..", "here": ".", "within.png": "below/a.png",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.jpg")
    result = photo_folder.scan(root)
    assert [(photo.relative, photo.caption, photo.mask) for photo in result.photos] == [
        ("a.png", None, None), ("within.png", None, None), ("below/a.png", None, None),
    ]  # fmt: skip
    assert sorted(result.warnings) == [
        "a.mask.png, a.txt, away, b.png: links out of the folder of photos; not followed, copy the files into it",
        "c.png, d.png: links to a file that does not exist; not read",
        "here, up: links to a folder above them; not followed",
        "pipe.jpg: cannot be opened: neither a file nor a folder",
    ]
    link = tmp_path / "link"
    link.symlink_to(root)
    assert len(photo_folder.scan(link).photos) == 3
    (outside / "a.png").unlink()
    (outside / "e.png").symlink_to(root / "a.png")
    with pytest.raises(LorakitError, match=r"^0 images in .*; e\.png: links out of the folder of photos; not followed"):
        photo_folder.scan(outside)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        (b"caf\xe9.png", "caf\\xe9.png"),
        (b"new\nline.png", "new\\nline.png"),
        (b"esc\x1b[31m\x07.png", "esc\\x1b[31m\\x07.png"),
        ("\u202egnp.png".encode(), "\\u202egnp.png"),
        ("\U0001f468\u200d\U0001f469.png".encode(), "\U0001f468\u200d\U0001f469.png"),
    ],
)
def test_unprintable_names_are_read_and_escaped(tmp_path: Path, name: bytes, label: str) -> None:
    marked.save(tmp_path / "a.png", marked.picture(3))
    path = tmp_path / os.fsdecode(name)
    (tmp_path / "a.png").rename(path)
    path.with_suffix(".txt").write_text("a zib")
    photos = photo_folder.scan(tmp_path).photos
    assert [(p.relative, p.path, p.caption, p.caption_source) for p in photos] == [
        (label, path, "a zib", label.replace(".png", ".txt"))
    ]
    assert len(photo_folder.digest(photos)) == 64


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["0.png"], ["1.png", "a[1].png", "a1.png", "old/2.png"]),
        (["old/*"], ["0.png", "1.png", "a[1].png", "a1.png"]),
        # "a[1].png" is the name of a file before it is a pattern
        (["a[1].png"], ["0.png", "1.png", "a1.png", "old/2.png"]),
        (["?.png", "a1.png"], ["a[1].png", "old/2.png"]),
        (["old/2.PNG"], ["0.png", "1.png", "a[1].png", "a1.png", "old/2.png"]),
    ],
)
def test_photos_are_excluded_by_name_or_pattern(photos: Path, exclude: list[str], left: list[str]) -> None:
    fill(photos, "0.png", "1.png", "a[1].png", "a1.png", "old/2.png")
    (photos / "0.png").write_bytes(b"broken")
    result = photo_folder.scan(photos, exclude=exclude)
    assert {photo.relative for photo in result.photos} == set(left)
    everything = {"0.png", "1.png", "a[1].png", "a1.png", "old/2.png"}
    names = ", ".join(sorted(everything - set(left)))
    assert [n for n in result.notes if "left out" in n] == ([f"left out by data.exclude: {names}"] if names else [])
    missing = [line for line in result.warnings if line.startswith("data.exclude")]
    assert missing == ([] if names else ["data.exclude: no photo is called old/2.PNG"])


def test_excluding_every_photo_is_refused(photos: Path) -> None:
    fill(photos, "0.png", "1.png")
    with pytest.raises(LorakitError, match=r"data\.exclude leaves out every photo of"):
        photo_folder.scan(photos, exclude=["*"])
