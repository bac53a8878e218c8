from pathlib import Path

import pytest

from lorakit.core.errors import LorakitError
from lorakit.ui import access
from lorakit.ui.access import Roots


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "allowed" / "dogs").mkdir(parents=True)
    (tmp_path / "allowed" / ".ssh").mkdir()
    (tmp_path / "allowed" / ".ssh" / "id").write_text("secret")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("not yours")
    return tmp_path


def test_paths_below_a_root_are_resolved(home: Path):
    roots = Roots([home / "allowed"])
    for typed in ("dogs", "./dogs", "dogs/../dogs", str(home / "allowed/dogs"), f'"{home}/allowed/dogs"'):
        assert roots.resolve(typed) == home / "allowed" / "dogs"


@pytest.mark.parametrize(
    "typed", ["..", "../other", "dogs/../../other/file.txt", "/etc/passwd", "{home}/other", "link"]
)
def test_everything_else_is_outside(home: Path, typed: str):
    (home / "allowed" / "link").symlink_to(home / "other")
    with pytest.raises(LorakitError, match=r"is outside of .*allowed; start the front end with --root FOLDER"):
        Roots([home / "allowed"]).resolve(typed.format(home=home))


@pytest.mark.parametrize("typed", [".ssh", ".ssh/id", "dogs/../.ssh/id"])
def test_hidden_files_are_not_opened(home: Path, typed: str):
    with pytest.raises(LorakitError, match="hidden files and folders are not opened"):
        Roots([home / "allowed"]).resolve(typed)


@pytest.mark.parametrize("typed", ["", "  ", "a\0b"])
def test_an_empty_text_is_no_path(home: Path, typed: str):
    with pytest.raises(LorakitError, match="enter the path of a folder or a file"):
        Roots([home]).resolve(typed)


def test_a_loop_of_links_is_named(tmp_path: Path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(LorakitError):
        Roots([tmp_path]).resolve("a/c")


def test_folders_of_photos_are_suggested(home: Path):
    for place in ("dogs", ".ssh"):
        (home / "allowed" / place / "1.JPG").write_bytes(b"")
    assert Roots([home / "allowed"]).photo_folders() == [home / "allowed" / "dogs"]
    # A root inside another one, as the folder of runs is, adds no folder twice.
    assert Roots([home / "allowed", home / "allowed" / "dogs"]).photo_folders() == [home / "allowed" / "dogs"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_no_password(host: str):
    access.require_password(host, False, "")
    with pytest.raises(LorakitError, match="--share lets others in"):
        access.require_password(host, True, "")


@pytest.mark.parametrize(
    ("host", "share"), [("0.0.0.0", False), ("192.168.1.4", False), ("box.lan", False), ("127.0.0.1", True)]
)
def test_others_are_let_in_only_with_a_password(host: str, share: bool):
    with pytest.raises(LorakitError, match="set a password in LORAKIT_PASSWORD"):
        access.require_password(host, share, "")
    with pytest.raises(LorakitError, match="8 characters or more"):
        access.require_password(host, share, "short")
    access.require_password(host, share, "long enough")
