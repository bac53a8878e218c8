"""Tests that the base of an adapter is found by its content, never fetched, and never replaced by another base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorakit import config, families
from lorakit.core.errors import LorakitError
from lorakit.families import adapter_base


def test_a_base_is_found_in_the_runs_config_or_beside_the_adapter(tiny_sd1, tiny_sd1_v, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    adapter = run / "toy.safetensors"
    facts = {"lorakit.base": families.describe(str(tiny_sd1)).hash, "ss_sd_model_name": "model"}
    settings = config.load(None, {"model.base": str(tiny_sd1), "train.steps": 1})
    (run / "config.toml").write_text(config.to_toml(settings), encoding="utf-8")
    assert adapter_base.find(adapter, facts) == str(tiny_sd1)
    (run / "config.toml").unlink()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_sd1_v, tmp_path / "model")  # another base with the same name
    with pytest.raises(LorakitError, match=r"toy.safetensors was trained on model, which is not found here"):
        adapter_base.find(adapter, facts)
    shutil.copytree(tiny_sd1, run / "model")
    assert adapter_base.find(adapter, facts) == str(run / "model")
    assert adapter_base.find(adapter, {"ss_sd_model_name": r"C:\models\model"}) == str(run / "model")


def test_the_bundled_base_is_taken_only_for_its_own_adapters(tmp_path):
    adapter = tmp_path / "toy.safetensors"
    pocket = families.describe("pocket")
    assert adapter_base.find(adapter, {"lorakit.base": pocket.hash, "ss_sd_model_name": "pocket"}) == "pocket"
    with pytest.raises(LorakitError, match="was trained on pocket, which is not found here"):
        adapter_base.find(adapter, {"lorakit.base": "0" * 64, "ss_sd_model_name": "pocket"})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "toy.safetensors does not say what base it was trained on: give it with --base"),
        ({"ss_sd_model_name": "sd15.safetensors"}, "was trained on sd15.safetensors, .*: give --base and its path"),
        ({"ss_sd_model_name": "nobody/nothing"}, "was trained on nobody/nothing, .*: give --base nobody/nothing"),
        (
            {"ss_sd_model_name": "nothing", "lorakit.base_source": "nobody/nothing@0123"},
            "was trained on nothing, .*: give --base nobody/nothing@0123",
        ),
    ],
)
def test_a_missing_base_is_reported_by_name(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(LorakitError, match=message):
        adapter_base.find(tmp_path / "toy.safetensors", metadata)
