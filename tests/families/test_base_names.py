"""Tests of base names as users type them: misspelt hub ids, quotes, spaces, and unknown home folders."""

from pathlib import Path

import pytest

from lorakit import config, families
from lorakit.core.errors import LorakitError
from lorakit.core.names import expand
from lorakit.families import hub
from lorakit.runs import quickstart

FORMS = ": give a .safetensors file, a folder in diffusers layout or a hub id, owner/name"


@pytest.mark.parametrize(
    "base",
    [
        "a/b:main",
        "a / b",
        "a/b/",
        "models/a/b",
        "a/b@",
        "a//b",
        "a/b/unet",
        "hf:a/b",
        "git@hf.co:a/b",
        "models--a--b",
        "a/b#main",
        "a/b?x=1",
    ],
)
def test_a_misspelt_hub_id_is_answered_with_the_right_one(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LorakitError, match=r"does not exist; as a hub id it is a/b, and a/b@REVISION"):
        families.describe(base)


@pytest.mark.parametrize("base", ["sdxl", "/a/b", "C:/models/x.safetensors", "models/x.SAFETENSORS", "~nobody-here/x"])
def test_a_missing_base_is_answered_with_the_possible_forms(base: str) -> None:
    assert hub.absence(base).endswith(FORMS)
    with pytest.raises(LorakitError, match="does not exist: give a"):
        families.describe(base)


def test_git_links_file_links_and_empty_names_are_handled() -> None:
    assert hub.parse("https://huggingface.co/a/b.git") == hub.HubId("a/b")
    with pytest.raises(LorakitError, match=r"is a link: give its path, /tmp/x y\.safetensors"):
        families.describe("file:///tmp/x%20y.safetensors")
    with pytest.raises(LorakitError, match=r"model\.base is empty: name a base, or leave it out"):
        families.describe(" ")


def test_quotes_spaces_and_home_folders_in_paths_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    steps = {"train.steps": 1}
    for typed, path in {
        "'POCKET'": "pocket",
        " a/b ": "a/b",
        '"~/m"': str(tmp_path / "m"),
        "~no-one/x": "~no-one/x",
    }.items():
        assert config.load(None, {"model.base": typed, **steps}).model.base == path
        assert quickstart.model_of({"model.base": typed}).base == path
    read = config.load(
        None, {"data.folder": "~/photos", "output.folder": "~/runs", "train.init_from": "'x y'", **steps}
    )
    assert (read.data.folder, read.output.folder) == (str(tmp_path / "photos"), str(tmp_path / "runs"))
    assert read.train.init_from == "x y"
    odd = tmp_path / "'odd'"
    odd.mkdir()
    assert config.load(None, {"data.folder": str(odd), **steps}).data.folder == str(odd)
    assert expand("~no-one/x") == Path("~no-one/x")
