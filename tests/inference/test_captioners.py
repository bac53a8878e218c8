"""Tests of `lorakit caption`: models of the true classes with fixed texts write captions for a folder of photos."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from captioners import TEXT, save_blip, save_llava, save_tagger
from PIL import Image

from lorakit.cli import main as cli
from lorakit.config import DataConfig, MemoryConfig
from lorakit.core.errors import LorakitError
from lorakit.data import photo_folder
from lorakit.inference.captioners import image_text, onnx_tagger, photos as caption_photos, source
from lorakit.inference.captioners.spec import CaptionOptions

CPU = MemoryConfig(device="cpu")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    save_blip(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in {"a.png": "red", "b.jpg": "blue", "c.png": "white"}.items():
        Image.new("RGB", (20, 10), colour).save(folder / name)
    (folder / "c.txt").write_text("my own words\nof two lines\n", encoding="utf-8")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def caption(*arguments: object) -> int:
    return cli.main(["caption", *map(str, arguments)])


def test_blip_captions_photos_without_captions_and_skips_broken_ones(blip, photos, capsys):
    original = (photos / "a.png").read_bytes()
    code = caption(photos, "--with", blip, "--subject", "sks cat", "--without", "on the mat", "--prefix", "photo:")
    output = capsys.readouterr()
    assert code == 1 and "lorakit: broken.jpg: no caption: " in output.err and "captions 3/3" in output.out
    assert (photos / "a.txt").read_text() == (photos / "b.txt").read_text() == "photo: a red sks cat\n"
    assert (photos / "c.txt").read_text() == "my own words\nof two lines\n" and not (photos / "broken.txt").exists()
    assert (photos / "a.png").read_bytes() == original
    by_name = {photo.relative: photo.caption for photo in photo_folder.scan(photos).photos}
    assert by_name["b.jpg"] == "photo: a red sks cat"
    assert caption(photos, "--undo", "--json") == 0
    assert json.loads(capsys.readouterr().out)["restored"] == ["a.txt", "b.txt"]
    assert not (photos / "a.txt").exists() and (photos / "c.txt").exists()


def test_a_chat_model_writes_its_answer_and_overwrites_on_request(llava, photos, capsys):
    (photos / "broken.jpg").unlink()
    assert caption(photos, "--with", llava, "--style", "sks style", "--prompt", "describe .", "--overwrite") == 0
    assert (photos / "c.txt").read_text() == f"sks style, {TEXT}\n"
    (photos / "b.txt").write_text("edited by hand")
    capsys.readouterr()
    assert caption(photos, "--undo") == 0
    assert (photos / "c.txt").read_text() == "my own words\nof two lines\n"
    assert (photos / "b.txt").read_text() == "edited by hand" and "changed later: b.txt" in capsys.readouterr().out
    assert caption(photos, "--undo") == 1
    assert "no change of captions to undo" in capsys.readouterr().err


def test_the_answer_ends_at_max_tokens_and_events_count_photos(llava, photos, capsys):
    (photos / "broken.jpg").unlink()
    assert caption(photos, "--with", llava, "--max-tokens", 2, "--dry-run", "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    work = [(event["position"], event["total"]) for event in events if event["event"] == "work"]
    assert work == [(1, 2), (2, 2)]
    assert events[-1]["captions"] == {"a.png": "a red", "b.jpg": "a red"} and events[-1]["had_one"] == 1
    assert not (photos / "a.txt").exists() and not (photos / ".lorakit").exists()


def test_a_stop_keeps_written_captions(photos):
    folder = photo_folder.scan(photos)
    numbers: list[int] = []
    with caption_photos.CaptionWriter(photos, folder.photos) as writer:
        result = caption_photos.caption(
            folder.photos,
            lambda image: "red" if image.getpixel((0, 0)) == (255, 0, 0) else "other",
            DataConfig(),
            caption_photos.Wording(),
            writer,
            report=lambda number, photo, text: numbers.append(number),
            stop=lambda: len(numbers) == 2,
        )
    assert result.stopped and result.texts == {"a.png": "red", "b.jpg": "other"}
    assert (photos / "a.txt").read_text() == "red\n" and (photos / "b.txt").read_text() == "other\n"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))), reason="needs onnx and onnxruntime"
)
def test_a_tagger_gets_the_colour_channels_in_order(photos, tmp_path, capsys):
    model = tmp_path / "tagger"
    model.mkdir()
    save_tagger(model)
    (photos / "broken.jpg").unlink()
    assert caption(photos, "--with", model, "--subject", "sks toy", "--overwrite", "--set", "memory.device=cpu") == 0
    # The picture is twice as wide as high, so half of the square input is white.
    assert (photos / "a.txt").read_text() == "sks toy, zib (toy), bright red, mostly blue, >_<\n"
    assert (photos / "b.txt").read_text() == "sks toy, zib (toy), mostly blue, >_<, bright red\n"
    tagger = onnx_tagger.load(model, CaptionOptions(threshold=0.7, character_threshold=0.95), CPU)
    assert tagger(Image.new("RGB", (8, 8), (255, 0, 0))) == "bright red"
    for network, table, message in (
        (b"no network", None, "model.onnx cannot be loaded"),
        (None, "a,b\n1,2\n", "not a table with the columns name and category"),
        (None, "name,category\none,0\n", "has another number of tags, 1, than the network, 5"),
    ):
        other = Path(shutil.copytree(model, tmp_path / message[:9]))
        (other / "model.onnx").write_bytes(network or (model / "model.onnx").read_bytes())
        (other / "selected_tags.csv").write_text(table or (model / "selected_tags.csv").read_text())
        with pytest.raises(LorakitError, match=message):
            onnx_tagger.load(other, CaptionOptions(), CPU)(Image.new("RGB", (8, 8)))


def test_without_onnxruntime_the_error_names_its_extra(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "selected_tags.csv").touch()
    monkeypatch.setattr(onnx_tagger.importlib.util, "find_spec", lambda name: None)
    assert caption(photos, "--with", tmp_path) == 1
    assert "needs onnxruntime; install it with: " in capsys.readouterr().err


def config_only(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").touch()

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no captioner there"),
        (config_only('{"model_type": "bert"}'), "a model of the type bert is no captioner"),
        (config_only('{"model_type": "moondream1", "auto_map": {}}'), "needs code of its own"),
        (config_only("{}"), "the type (none) is no captioner"),
        (config_only('{"model_type": "blip"}'), "cannot be loaded|needs more packages"),
    ],
)
def test_other_models_than_captioners_are_refused_in_one_line(make, message, photos, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    assert caption(photos, "--with", tmp_path / "model") == 1
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")) and error.count("\n") == 1, error


def test_weights_that_lack_tensors_are_refused(blip, tmp_path):
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(blip, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    del weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(LorakitError, match=r"its weights lack tensors, such as text_decoder.* \(1 in all\)"):
        image_text.load(other, CaptionOptions(), CPU)


def test_a_split_model_with_a_file_missing_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(LorakitError, match=r"model-00002-of-00002\.safetensors is not there"):
        source.find(str(tmp_path), fetch=False)


def test_nothing_is_fetched_without_permission(monkeypatch, tmp_path, blip):
    sizes = {"config.json": 1000, "model.safetensors": 989_000_000, "pytorch_model.bin": 990_000_000}
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    fetched: list[object] = []

    def snapshot(name: str, **more: object) -> str:
        if more.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        fetched.append((name, more["allow_patterns"]))
        return str(blip)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(LorakitError, match="is not in the cache and HF_HUB_OFFLINE is set"):
        source.find("owner/name", fetch=True)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    with pytest.raises(LorakitError, match=r"owner/name is not on this machine: 989 MB would be fetched; allow it"):
        source.find("owner/name", fetch=False)
    assert fetched == []
    assert source.find("owner/name", fetch=True)[0] == blip
    assert fetched == [("owner/name", ["model.safetensors", "config.json"])]
    for model, message in (("nowhere", "no such folder"), (os.fspath(blip / "config.json"), "is a file: give")):
        with pytest.raises(LorakitError, match=message):
            source.find(model, fetch=False)


def test_contradicting_arguments_are_refused_together(photos, capsys):
    wrong = ["--threshold", 2, "--max-tokens", 0, "--set", "train.steps=3"]
    assert caption(photos, "--with", "x", *wrong) == 2
    error = capsys.readouterr().err
    assert "--threshold 2: must be between 0 and 1" in error and "--max-tokens 0: must be 1 or more" in error
    assert "train.steps: captions do not depend on this option" in error


def test_the_options_set_precision_and_device(blip):
    model = image_text.load(blip, CaptionOptions(), MemoryConfig(device="cpu", mixed_precision="bf16")).model
    assert model.dtype is torch.bfloat16 and model.device.type == "cpu"
    with pytest.raises(LorakitError, match="finds no such device here"):
        image_text.load(blip, CaptionOptions(), MemoryConfig(device="cuda:77"))
