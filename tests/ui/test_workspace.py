import base64
import errno
import hashlib
import io
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from waiting import SECONDS, wait_for

from lorakit.core.errors import LorakitError
from lorakit.data import photo_folder
from lorakit.data.photo_folder import Photo
from lorakit.runs import quickstart
from lorakit.ui import workspace as workspace_module
from lorakit.ui.thumbnails import Thumbnails
from lorakit.ui.workspace import Workspace


def photo(path: Path, size: tuple[int, int] = (60, 40), colour: str = "red", **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **more)
    return path


def opened(address: str) -> Image.Image:
    head, _, data = address.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_thumbnails_are_upright_small_and_the_photos_colour(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated: the photo is shown with 400 x 600 px
    path = photo(tmp_path / "a.jpg", (600, 400), "#c08040", exif=exif)
    thumbnail = Thumbnails().get(path, 90)
    assert thumbnail.size == (400, 600) and thumbnail.problem == ""
    picture = opened(thumbnail.address)
    assert picture.size == (60, 90)
    assert all(abs(a - b) < 12 for a, b in zip(picture.getpixel((30, 45)), (0xC0, 0x80, 0x40), strict=True))


def test_a_thumbnail_is_rendered_once_and_again_when_the_photo_changes(tmp_path: Path):
    thumbnails = Thumbnails()
    path = photo(tmp_path / "a.png")
    first = thumbnails.get(path)
    assert thumbnails.get(path) is first
    photo(path, (30, 30), "blue")
    assert thumbnails.get(path).size == (30, 30)


@pytest.mark.parametrize("raw", [b"", b"just text", b"\xff\xd8\xff\xe0 cut"])
def test_a_bad_photo_has_its_reason_instead(tmp_path: Path, raw: bytes):
    path = tmp_path / "bad.jpg"
    path.write_bytes(raw)
    thumbnail = Thumbnails().get(path)
    assert thumbnail.address == "" and thumbnail.problem
    assert Thumbnails().get(tmp_path / "gone.jpg").problem


def test_a_page_of_large_photos_is_quick(tmp_path: Path):
    paths = [tmp_path / f"{n}.jpg" for n in range(8)]
    noise = Image.effect_noise((1000, 750), 60).convert("RGB").resize((4000, 3000))
    for path in paths:
        noise.save(path, quality=85)
    start = time.process_time()
    thumbnail = Thumbnails().several([Photo(path, path.name) for path in paths])
    # Decoding 12 megapixels in full and scaling them takes more than half a second.
    assert (time.process_time() - start) / len(paths) < 0.25
    assert sum(len(one.address) for one in thumbnail) / len(thumbnail) < 60_000


def test_a_caption_is_written_beside_its_photo_and_nowhere_else(tmp_path: Path):
    workspace = Workspace(tmp_path / "runs", [tmp_path / "photos"])
    path = photo(tmp_path / "photos" / "a.png")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    assert workspace.save_caption(path, " a dog\n on grass ").read_text() == "a dog on grass\n"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    (tmp_path / "outside").mkdir()
    outside = photo(tmp_path / "outside" / "b.png")
    link = tmp_path / "photos" / "b.png"
    link.symlink_to(outside)
    for file in (tmp_path / "photos" / "../outside/b.png", outside, link):
        with pytest.raises(LorakitError, match="outside of"):
            workspace.save_caption(file, "x")
    link.unlink()
    with pytest.raises(LorakitError, match=r"c\.png: no such photo"):
        workspace.save_caption(tmp_path / "photos" / "c.png", "x")
    assert sorted(p.name for p in (tmp_path / "photos").iterdir()) == ["a.png", "a.txt"]
    assert [p.name for p in outside.parent.iterdir()] == ["b.png"]


def test_a_linked_photo_has_its_caption_beside_the_link(tmp_path: Path):
    workspace = Workspace(tmp_path / "runs", [tmp_path / "photos"])
    path = photo(tmp_path / "photos" / "pool" / "a.png")
    (tmp_path / "photos" / "set").mkdir()
    link = tmp_path / "photos" / "set" / "01.png"
    link.symlink_to(path)
    assert workspace.save_caption(link, "a dog") == link.with_suffix(".txt")
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    # A caption is not written through a link that leads outside of the roots.
    link.with_suffix(".txt").unlink()
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    link.with_suffix(".txt").symlink_to(secret)
    with pytest.raises(LorakitError, match="outside of"):
        workspace.save_caption(link, "x")
    assert secret.read_text() == "secret"


def test_earlier_captions_stay_as_backups(tmp_path: Path):
    workspace = Workspace(tmp_path / "runs", [tmp_path / "photos"])
    place = photo(tmp_path / "photos" / "a.png").parent
    (place / "a.txt").write_bytes("früher\r\nzwei Zeilen".encode("latin-1"))
    for text in ("first", "first", "second", "third"):
        workspace.save_caption(place / "a.png", text)
    texts = {path.name: path.read_bytes() for path in place.iterdir() if path.name != "a.png"}
    assert texts == {
        "a.txt": b"third\n",
        "a.txt.bak": "früher\r\nzwei Zeilen".encode("latin-1"),
        "a.txt.2.bak": b"first\n",
        "a.txt.3.bak": b"second\n",
    }
    actual = photo_folder.scan(place)
    assert [item.caption for item in actual.photos] == ["third"] and actual.notes == [] and actual.warnings == []


@pytest.mark.parametrize("name", ["", "..", "../x", ".queue", "a/b", "/etc"])
def test_paths_are_no_names_of_runs(tmp_path: Path, name: str):
    with pytest.raises(LorakitError, match="is no run"):
        Workspace(tmp_path, []).run(name)


def test_photos_are_checked_once(tmp_path: Path, tiny_sd1: Path):
    workspace = Workspace(tmp_path / "runs", [tmp_path])
    for number in range(3):
        photo(tmp_path / "photos" / f"{number}.png", (64, 64), ("red", "green", "blue")[number])
    config = quickstart.config_for_answers(
        {quickstart.PHOTOS: str(tmp_path / "photos"), quickstart.BASE: str(tiny_sd1)}, "quick"
    )
    first = workspace.report(config)
    assert workspace.report(config) is first
    assert len(first.result().items) == 3
    (tmp_path / "photos" / "0.txt").write_text("a caption")
    assert workspace.report(config) is not first


def test_a_new_name_decodes_no_photo_again(tmp_path: Path, tiny_sd1: Path):
    workspace = Workspace(tmp_path / "runs", [tmp_path])
    path = photo(tmp_path / "photos" / "0.png", (64, 64))
    answers = {quickstart.PHOTOS: str(tmp_path / "photos"), quickstart.BASE: str(tiny_sd1)}
    assert (
        workspace.report(quickstart.config_for_answers(answers | {quickstart.NAME: "sks dog"}, "quick"))
        .result()
        .items[0]
        .readable
    )
    # The file has the same size and time but is no picture now. Decoding it again would fail.
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (item,) = (
        workspace.report(quickstart.config_for_answers(answers | {quickstart.NAME: "sks cat"}, "quick")).result().items
    )
    assert item.readable and item.text == "a photo of a sks cat"
    path.write_bytes(b"x")
    assert (
        not workspace.report(quickstart.config_for_answers(answers | {quickstart.NAME: "sks cat"}, "quick"))
        .result()
        .items[0]
        .readable
    )


def test_a_run_that_waits_or_never_began_is_listed(tmp_path: Path):
    workspace = Workspace(tmp_path / "runs", [])
    wrong = ["train", "none", "--preset", "subject-pocket", "--set", "adapter.rank=0"]
    failed = workspace.queue.command(wrong, workspace.runs / "one")
    workspace.queue.work()
    waiting = workspace.queue.command(["train"], workspace.runs / "two")
    (first, state), (second, problem) = workspace.runs_and_jobs()
    assert (first, state.state) == (Path(waiting.folder).name, "waiting")
    assert (second, problem.state) == (Path(failed.folder).name, "failed")
    assert problem.message == "adapter.rank = 0: must be between 1 and 1024"


def test_a_download_is_staged_once(tmp_path: Path):
    workspace = Workspace(tmp_path / "runs", [])
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"abc")
    staged = workspace.staged(file)
    assert staged.name == file.name and staged.read_bytes() == b"abc" and not staged.is_relative_to(tmp_path)
    assert workspace.staged(file) == staged


def test_a_slow_copy_for_a_download_does_not_block_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    workspace, gate, copied = Workspace(tmp_path / "runs", []), threading.Event(), threading.Event()
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")

    def copy(source: Path, target: Path) -> None:
        assert gate.wait(SECONDS)
        Path(target).write_bytes(Path(source).read_bytes())
        copied.set()

    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("another disk")))
    monkeypatch.setattr(shutil, "copyfile", copy)
    monkeypatch.setattr(workspace_module, "LINK_SECONDS", 0.01)
    assert workspace.staged_soon(file) is None and workspace.staged_soon(file) is None
    gate.set()
    assert copied.wait(SECONDS)
    wait_for(lambda: workspace.staged_soon(file) is not None)
    staged = workspace.staged_soon(file)
    assert staged is not None and staged.name == "model.safetensors" and staged.read_bytes() == b"weights"
    assert [path.name for path in staged.parent.iterdir()] == ["model.safetensors"]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard links fail, and the disk has no space for a copy."""

    def copy(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"wei")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("another disk")))
    monkeypatch.setattr(shutil, "copyfile", copy)


def test_a_copy_that_fails_says_why_and_is_tried_again(
    tmp_path: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
):
    workspace, file = Workspace(tmp_path / "runs", []), tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    place = workspace.private("gradio")
    expected = (
        "model.safetensors: no copy for the download could be made (No space left on device); "
        f"make room in {place}, or take it from {file}"
    )
    for act in (workspace.staged, workspace.staged_soon, workspace.staged_soon, lambda path: workspace.offered([path])):
        with pytest.raises(LorakitError) as problem:
            wait_for(lambda act=act: act(file) is not None)
        assert str(problem.value) == expected
    assert [path for path in place.rglob("*") if path.is_file()] == [], "no half of a file stays"
    monkeypatch.undo()
    with pytest.raises(LorakitError, match="No space left"):
        workspace.staged_soon(file)
    monkeypatch.setattr(workspace_module, "RETRY_SECONDS", 0.0)
    assert workspace.staged_soon(file).read_bytes() == b"weights"


def test_a_file_that_was_written_again_or_whose_copy_is_gone_is_staged_again(tmp_path: Path):
    workspace, file = Workspace(tmp_path / "runs", []), tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    first = workspace.staged_soon(file)
    file.unlink()
    file.write_bytes(b"the second")
    second = workspace.staged_soon(file)
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"the second")
    second.unlink()
    assert workspace.staged_soon(file).read_bytes() == b"the second"


def test_a_folder_is_offered_file_by_file(tmp_path: Path):
    workspace, folder = Workspace(tmp_path / "runs", []), tmp_path / "peft"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(name)
    offered = [Path(path) for path in workspace.offered([folder])]
    assert [path.read_text() for path in offered] == ["adapter_config.json", "adapter_model.safetensors"]
