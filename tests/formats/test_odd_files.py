"""Tests of files and folders of unexpected kinds: each is identified and gets advice."""

import json
import re
import sqlite3
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.formats import inspect, read
from lorakit.formats.compatibility import read_report
from lorakit.formats.facts import health, strength
from lorakit.formats.facts.strength import Strength

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PEFT = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"{PEFT}.lora_{side}.weight": torch.ones(shape) for side, shape in (("A", (4, 64)), ("B", (64, 4)))}
CONFIG = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4})


def database(path):
    with sqlite3.connect(path) as connection:
        connection.execute("create table tensors (name text)")


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("lora.safetensors", b"")


def folder(path, *, weights="", config=True):
    path.mkdir()
    if config:
        (path / "adapter_config.json").write_text(CONFIG)
    if weights:
        torch.save(PAIR, path / weights)


KINDS = {
    "Draw Things": (database, "this is a database, as Draw Things keeps its models: give the file that was imported"),
    "zip": (archive, "this is a zip archive: unpack it and give the file in it"),
    "pickle": (lambda path: torch.save(PAIR, path), r"this is a pickle .*: lorakit convert FILE"),
    "cloneofsimo": (
        lambda path: save_file(
            {f"unet:{n}:{side}": torch.ones(4, 4) for n in range(2) for side in ("up", "down")}, path
        ),
        r"cloneofsimo's lora, whose layers have numbers and no names: merge it .* lorakit extract",
    ),
    "PEFT's file alone": (
        lambda path: save_file(PAIR, path),
        "adapter_config.json, which has its alpha, is not beside it: put the two together",
    ),
    "config alone": (folder, "has adapter_config.json and no adapter_model.safetensors: the weights are missing"),
    "pickled PEFT": (lambda path: folder(path, weights="adapter_model.bin"), r"lorakit convert .*adapter_model\.bin"),
    "pickle in a folder": (
        lambda path: folder(path, weights="pytorch_lora_weights.bin", config=False),
        r"0 \.safetensors files.*, and pytorch_lora_weights.bin, a pickle \(convert it once",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_unexpected_file_is_identified(tmp_path, kind):
    write, words = KINDS[kind]
    path = tmp_path / "x.safetensors"
    write(path)
    with pytest.raises(LorakitError, match=words):
        read(path)
    if kind == "cloneofsimo":
        assert "cloneofsimo" in inspect.inspect(path).description
    else:
        with pytest.raises(LorakitError, match=words):
            inspect.inspect(path)


BROKEN = {
    "its factors .* do not fit together": {"lora_down.weight": (4, 64), "lora_up.weight": (64, 5)},
    "its up factor is missing": {"lora_down.weight": (4, 64)},
    "its alpha is not one number": {"lora_down.weight": (4, 64), "lora_up.weight": (64, 4), "alpha": (4,)},
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_modules_are_reported(tmp_path, words):
    save_file(
        {f"{STEM}.{part}": torch.ones(shape) for part, shape in BROKEN[words].items()}, tmp_path / "x.safetensors"
    )
    text = inspect.inspect(tmp_path / "x.safetensors").to_text()
    assert re.search(f"healthy +NO: broken modules: 1 of 1, {STEM}: {words}", text)
    assert "(<lora:" not in text


def test_the_strength_of_integer_factors_is_computed(tmp_path):
    integers = {f"{STEM}.lora_down.weight": torch.ones(4, 64), f"{STEM}.lora_up.weight": torch.ones(64, 4)}
    save_file({name: tensor.to(torch.int8) for name, tensor in integers.items()}, tmp_path / "x.safetensors")
    assert next(iter(inspect.inspect(tmp_path / "x.safetensors").strength.modules.values())) == 256.0


def test_words_in_a_folders_name_come_first():
    tags = {"5_zib toy": {"1girl": 118, "zib": 90, "solo": 7}, "1_reg": {"1girl": 50}}
    assert health.words({"ss_tag_frequency": json.dumps(tags)}) == ["zib", "1girl", "solo"]


def test_an_outlier_does_not_compress_the_plot(tmp_path):
    sizes = {f"layer {n}": 1.0 for n in range(5)} | {"odd": 100.0}
    strength.plot(Strength(sizes, {"mid": list(sizes.values())}, [], {"odd": 100.0}), tmp_path / "x.png", "x")
    with Image.open(tmp_path / "x.png") as picture:
        colors = [picture.getpixel((x, strength.TOP + 20)) for x in (strength.LEFT + 20, strength.WIDTH - 20)]
    assert colors == [strength.BAR, strength.CUT]


def test_diffusers_reads_a_text_projection_beside_its_encoder():
    """diffusers 0.42 was seen to refuse the projection alone, because nothing then identifies the dialect."""

    def pair(stem):
        return {f"{stem}.lora_down.weight": (4, 32), f"{stem}.lora_up.weight": (32, 4), f"{stem}.alpha": ()}

    alone = pair("lora_te2_text_projection")
    both = alone | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1")
    assert read_report(alone, "sdxl")["diffusers"].refused and read_report(both, "sdxl")["diffusers"].complete


@pytest.mark.parametrize(
    ("names", "shape", "words"),
    [
        (["version"], (), "names of no layer of Stable Diffusion and of no part that lorakit reads: 1"),
        (["emb_params", "extra"], (2, 8), "names of no layer of Stable Diffusion and of no part that lorakit reads: 2"),
        (["unet.unet.mid_block.attentions.0.proj_in.lora_A.weight"], (2, 8), "names of no layer"),
    ],
)
def test_inspect_notes_layers_that_export_refuses(tmp_path, names, shape, words):
    tensors = {f"{STEM}.lora_down.weight": torch.ones(4, 8), f"{STEM}.lora_up.weight": torch.ones(8, 4)}
    file = tmp_path / "x.safetensors"
    save_file(tensors | {name: torch.ones(shape) for name in names}, file)
    assert f"lorakit does not read {len(names)} of its tensors, e.g. {names[0]}" in " ".join(
        inspect.inspect(file).notes
    )
    with pytest.raises(LorakitError, match=words):
        read(file)


def test_a_few_controlnet_layers_do_not_identify_a_controlnet():
    model = {f"model.diffusion_model.input_blocks.{n}.0.weight": (4, 4) for n in range(9)}
    control = {f"control_model.input_blocks.{n}.0.weight": (4, 4) for n in range(6)}
    assert safetensors_header.kind(model | dict(list(control.items())[:2])) == "checkpoint"
    assert safetensors_header.kind(model | control) == "controlnet"


def test_integer_factors_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    down = torch.ones(4, 8, dtype=torch.int8)
    save_file({f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": torch.ones(8, 4)}, file)
    with pytest.raises(LorakitError, match=r"lora_down\.weight holds whole numbers \(int8\), a quantization"):
        read(file)


@pytest.mark.parametrize(
    ("parts", "method", "words"),
    [
        # Names as LyCORIS' package writes them.
        (
            ("q_layer.weight", "p_layer.weight", "lambda_layer", "alpha"),
            "T-LoRA",
            "tensors of T-LoRA, which lorakit does not read: 3",
        ),
        (("vera_lambda_b", "vera_lambda_d", "alpha"), "unknown", "tensors of no method that lorakit reads: 2"),
        (("lora_down.weight", "lora_up.weight", "gate"), "lora", "tensors of no method that lorakit reads: 1"),
    ],
)
def test_parts_of_unsupported_methods_are_not_called_damaged(tmp_path, parts, method, words):
    file = tmp_path / "x.safetensors"
    save_file({f"{STEM}.{part}": torch.ones(()) if part == "alpha" else torch.ones(4, 4) for part in parts}, file)
    report = inspect.inspect(file)
    assert (report.method, report.defects) == (method, "")
    count = words.rpartition(" ")[2]
    assert f"lorakit does not read {count} of its tensors, e.g. {STEM}." in " ".join(report.notes)
    assert method == "lora" or not any(reading.is_used for reading in report.readers.values())
    with pytest.raises(LorakitError, match=words):
        read(file)
