"""Tests that all files are saved or none, and that a bad adapter never replaces a good file."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import random_adapters
import torch
from safetensors.torch import load_file

from lorakit.adapters.weights import AdapterWeights
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.formats import adapter_math, files, kohya, peft, read, save

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
SHAPES = {NAME: (8, 8), NAME.replace("to_k", "to_v"): (8, 8)}


def weights(**change):
    adapter = random_adapters.adapter(SHAPES, "sd1")
    layers = dict(adapter.layers)
    layers[NAME] = replace(layers[NAME], **{key: make(getattr(layers[NAME], key)) for key, make in change.items()})
    return replace(adapter, layers=layers)


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_all_formats_and_the_sidecar_are_written(tmp_path):
    metadata = {"modelspec.trigger_phrase": "sks toy"}
    paths = save(
        weights(), tmp_path, "toy", ["kohya", "diffusers", "peft", "kohya"], "fp16", metadata, preview=b"\x89PNG"
    )
    assert {key: path.name for key, path in paths.items()} == {
        "kohya": "toy.safetensors",
        "diffusers": "toy-diffusers.safetensors",
        "peft": "toy-peft",
    }
    assert json.loads((tmp_path / "toy.json").read_text())["activation text"] == "sks toy"
    assert (tmp_path / "toy.png").read_bytes() == b"\x89PNG"
    for path in paths.values():
        assert set(read(path).layers) == set(SHAPES)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_equal_adapters_give_equal_files(tmp_path):
    first = save(weights(), tmp_path / "a", "x", ["kohya"], "fp16", {"ss_seed": "1", "ss_steps": "2"})["kohya"]
    second = save(weights(), tmp_path / "b", "x", ["kohya"], "fp16", {"ss_steps": "2", "ss_seed": "1"})["kohya"]
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("fmt", ["kohya", "diffusers", "peft"])
def test_a_bad_adapter_does_not_replace_a_good_one(tmp_path, fmt, bad):
    save(weights(), tmp_path, "toy", [fmt], "fp16", {})
    before = snapshot(tmp_path)
    with pytest.raises(LorakitError, match=rf"layer {NAME} is not finite \(NaN or infinity\)"):
        save(weights(up=lambda t: t.index_fill(0, torch.tensor([1]), bad)), tmp_path, "toy", [fmt], "fp16", {})
    assert snapshot(tmp_path) == before


def test_nothing_is_written_if_one_format_cannot_carry_it(tmp_path):
    dora = random_adapters.adapter(SHAPES, "sd1", method="dora")
    with pytest.raises(LorakitError, match="the PEFT format cannot carry this DoRA"):
        save(dora, tmp_path, "toy", ["kohya", "peft"], "fp16", {})
    assert list(tmp_path.iterdir()) == []


def test_an_empty_adapter_is_refused(tmp_path):
    with pytest.raises(LorakitError, match="the adapter has no layers: there is nothing to export"):
        save(AdapterWeights("sd1", "lora", {}), tmp_path, "toy", ["kohya"], "fp16", {})


def test_a_full_disk_is_reported_and_changes_nothing(tmp_path, monkeypatch):
    save(weights(), tmp_path, "toy", ["kohya"], "fp16", {})
    before = snapshot(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LorakitError, match=r"MiB to write, 0.0 MiB free: make room, or write elsewhere with --output"):
        save(weights(), tmp_path, "toy", ["kohya"], "fp32", {})
    assert snapshot(tmp_path) == before


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    save(weights(), tmp_path, "toy", ["kohya", "peft"], "fp16", {})
    before = snapshot(tmp_path)

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for fmt in ("kohya", "peft"):
        with pytest.raises(LorakitError, match=r"cannot be written \(No space left on device\); nothing there was"):
            save(weights(), tmp_path, "toy", [fmt], "fp32", {})
    assert snapshot(tmp_path) == before


def test_a_failed_replacement_of_a_folder_leaves_the_old_one(tmp_path, monkeypatch):
    save(weights(), tmp_path, "toy", ["peft"], "fp16", {})
    before, rename = snapshot(tmp_path), Path.rename

    def fail(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(LorakitError, match=r"toy-peft: cannot be written \(Permission denied\); nothing there was"):
        save(weights(), tmp_path, "toy", ["peft"], "fp32", {})
    assert snapshot(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(LorakitError, match=r"out/toy\.safetensors: cannot be written"):
        save(weights(), tmp_path / "out", "toy", ["kohya"], "fp16", {})


def test_a_peft_folder_replaces_only_a_peft_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    with pytest.raises(LorakitError, match="photos: exists and is not a PEFT folder; choose another name"):
        peft.write(weights(), tmp_path / "photos", dtype="fp16", metadata={})
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"x"
    peft.write(weights(), tmp_path / "p", dtype="fp32", metadata={})
    doubled = weights(up=lambda t: t * 2)
    peft.write(doubled, tmp_path / "p", dtype="fp32", metadata={})
    assert torch.equal(read(tmp_path / "p").layers[NAME].up, doubled.layers[NAME].up)


@pytest.mark.parametrize("name", ["", "a/b", "../x"])
def test_a_name_with_a_slash_is_refused(tmp_path, name):
    with pytest.raises(LorakitError, match="cannot be a file name: leave out slashes"):
        save(weights(), tmp_path, name, ["kohya"], "fp16", {})


@pytest.mark.parametrize(
    ("scale", "dtype", "message"),
    [
        (2e-8, "fp16", "would become 0 in fp16; float32 is written instead"),
        (1e-5, "fp16", "too small for fp16; float32 is written instead"),
        (1e7, "fp16", "too large for fp16; float32 is written instead"),
        (2e-8, "bf16", None),
        (1.0, "fp16", None),
    ],
)
def test_weights_too_small_for_half_precision_are_written_in_float32(tmp_path, scale, dtype, message):
    """At this scale B is about 2e-8, so 87 % of it would be zero in fp16."""
    messages = []
    paths = save(weights(up=lambda t: t * scale), tmp_path, "toy", ["kohya"], dtype, {}, say=messages.append)
    dtypes = {t.dtype for n, t in load_file(paths["kohya"]).items() if not n.endswith(".alpha")}
    assert dtypes == {torch.float32 if message else adapter_math.DTYPES[dtype]}
    assert [message in line for line in messages] == ([True] if message else [])


def test_only_allowed_metadata_is_written(tmp_path):
    metadata = {
        "ss_dataset_dirs": '{"me and my photos": 1}',
        "ss_output_name": "toy",
        "ss_network_dim": "999",
        "x": "y",
    }
    path = save(weights(), tmp_path, "toy", ["kohya"], "fp16", metadata)["kohya"]
    head = safetensors_header.read(path).metadata
    assert head["ss_output_name"] == "toy" and head["ss_network_dim"] == "4"
    assert "ss_dataset_dirs" not in head and "x" not in head


def test_the_written_bytes_are_valid_safetensors(tmp_path):
    raw = files.to_bytes(kohya.tensors(weights(), "fp16"), {"ss_seed": "ü"})
    (tmp_path / "a.safetensors").write_bytes(raw)
    assert len(load_file(tmp_path / "a.safetensors")) == 6
    assert safetensors_header.read(tmp_path / "a.safetensors").metadata["ss_seed"] == "ü"
