"""Tests that a file is complete or absent, and that the leftovers of killed processes are removed."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from lorakit.core import atomic


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_swept", set())


def test_writers_with_the_same_process_id_do_not_conflict(tmp_path: Path) -> None:
    """Processes in two containers can have one number, as threads of one process do; their temporary names differ."""
    problems: list[Exception] = []

    def write() -> None:
        try:
            for number in range(100):
                atomic.write(tmp_path / "shared", str(number))
        except OSError as error:
            problems.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    stale, fresh, foreign = (
        atomic.temporary_path(tmp_path / "x"),
        atomic.temporary_path(tmp_path / "x"),
        tmp_path / ".a.tmp",
    )
    for path in (stale, fresh, foreign):
        path.touch()
    for path in (stale, foreign):
        os.utime(path, (time.time() - 2 * atomic.STALE,) * 2)
    atomic._swept.clear()
    atomic.write(tmp_path / "y", "text")
    assert not stale.exists() and fresh.exists() and foreign.exists()


def test_an_older_folder_is_removed_after_the_new_one_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, target = tmp_path / "new", tmp_path / "model"
    for folder in (new, target):
        folder.mkdir()
        (folder / "weights").write_text(folder.name)
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path == new:
            raise PermissionError(13, "Permission denied")
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "rename", fail)
        atomic.replace_folder(new, target)
    assert (target / "weights").read_text() == "model" and (new / "weights").read_text() == "new"

    def there(folder: Path, **_: object) -> None:
        assert (target / "weights").read_text() == "new" and (folder / "weights").read_text() == "model"

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", there)
        atomic.replace_folder(new, target)
    assert (target / "weights").read_text() == "new" and not new.exists()
