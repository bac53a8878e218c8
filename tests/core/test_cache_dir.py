"""Tests that all modules share one cache folder."""

from pathlib import Path

import pytest

from lorakit.cli import doctor
from lorakit.core.cache_dir import cache_dir
from lorakit.data import latents
from lorakit.inference import class_images


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        ("/data/kept", "/data/kept"),
        ("~/kept", "{home}/kept"),
        ("", "{home}/.cache/lorakit"),
        (None, "{home}/.cache/lorakit"),
    ],
)
def test_the_variable_takes_precedence_over_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None, place: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LORAKIT_CACHE", raising=False)
    if variable is not None:
        monkeypatch.setenv("LORAKIT_CACHE", variable)
    assert cache_dir() == Path(place.format(home=tmp_path))


def test_all_modules_use_the_same_function() -> None:
    assert doctor.cache_dir is class_images.cache_dir is latents.cache_dir is cache_dir
