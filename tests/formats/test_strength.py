"""Tests of the strength and history that `inspect` reports, against torch and the tensors themselves."""

import json

import numpy as np
import pytest
import random_adapters
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lorakit.cli import main as cli
from lorakit.core import safetensors_header
from lorakit.formats import read, save
from lorakit.formats.facts import health, strength
from lorakit.formats.inspect import inspect

LAYER = "unet.down_blocks.{}.attentions.{}.transformer_blocks.0.attn1.to_q"
SHAPES = {LAYER.format(block, index): (16, 16) for block in range(3) for index in range(2)}
CONV = {"unet.mid_block.resnets.0.conv1": (16, 16, 3, 3)}


@pytest.mark.parametrize("method", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_strength_of_a_layer_is_the_norm_of_its_delta(tmp_path, method, dtype):
    weights = random_adapters.adapter(SHAPES | CONV, "sd1", method=method, alpha=2)
    path = save(weights, tmp_path, "toy", ["kohya"], dtype, {})["kohya"]
    report = inspect(path)
    sizes = {name: float(torch.linalg.vector_norm(layer.delta())) for name, layer in read(path).layers.items()}
    assert len(report.strength.modules) == len(sizes)
    assert sorted(report.strength.modules.values()) == pytest.approx(sorted(sizes.values()), rel=1e-4)
    assert list(report.strength.blocks) == ["down 0", "down 1", "down 2", "mid"]
    full = np.linalg.norm([sizes[LAYER.format(1, index)] for index in range(2)])
    assert f"  {'down 1':<15} {full:<9.3g} #" in report.to_text()


def test_dead_and_outlying_layers_are_reported(tmp_path):
    weights = random_adapters.adapter(SHAPES, "sd1")
    path = save(weights, tmp_path, "toy", ["kohya"], "fp32", {})["kohya"]
    assert "every number is finite, none stands out" in inspect(path).to_text()
    tensors = load_file(path)
    ups = sorted(name for name in tensors if name.endswith("lora_up.weight"))
    tensors[ups[0]] *= 0
    tensors[ups[1]] *= 100
    save_file(tensors, path)
    text = inspect(path).to_text()
    assert f"LOOK: modules of zeros: 1 of 6, such as {ups[0].partition('.')[0]}; modules that stand out: 1 of 6" in text
    save_file({name: tensor * (not name.endswith("up.weight")) for name, tensor in tensors.items()}, path)
    assert "LOOK: every module is zero: it changes nothing" in inspect(path).to_text()


def test_layers_without_gradient_are_not_reported_as_dead(tmp_path):
    """SDXL does not use the last layer of its first text encoder, nor SD3 the text output of its last block. So these
    layers stay zero in the adapters of all programs."""
    text = [f"lora_te1_text_model_encoder_layers_{n}_mlp_fc{k}" for n in range(3) for k in (1, 2)]
    joint = [f"transformer.transformer_blocks.{n}.attn.{end}" for n in range(2) for end in ("add_q_proj", "to_k")]
    for stems, factors, zero in ((text, "lora_down lora_up", text[4:]), (joint, "lora_A lora_B", joint[2:3])):
        down, up = factors.split()
        tensors = {f"{stem}.{down}.weight": torch.ones(2, 4) for stem in stems}
        tensors |= {f"{stem}.{up}.weight": torch.full((4, 2), float(stem not in zero)) for stem in stems}
        save_file(tensors, tmp_path / "x.safetensors")
        assert inspect(tmp_path / "x.safetensors").strength.health() == ""
        save_file(tensors | {f"{stems[0]}.{up}.weight": torch.zeros(4, 2)}, tmp_path / "x.safetensors")
        assert inspect(tmp_path / "x.safetensors").strength.dead == [stems[0]]
        save_file({name: tensor * 0 for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
        assert "every module is zero" in inspect(tmp_path / "x.safetensors").strength.health()


def test_tucker_and_full_differences_have_a_norm_and_rotations_have_none(tmp_path):
    stem, draw = "lora_unet_mid_block_resnets_0_conv1", torch.Generator().manual_seed(0)
    parts = {"lora_down.weight": (4, 16, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "lora_up.weight": (16, 4, 1, 1)}
    for kind in (parts, {"diff": (16, 16, 3, 3)}, {"lokr_w1": (4, 4), "lokr_w2_a": (4, 4), "lokr_w2_b": (4, 4),
                 "lokr_t2": (4, 4, 3, 3)}):  # fmt: skip
        tensors = {f"{stem}.{name}": torch.randn(shape, generator=draw) for name, shape in kind.items()}
        save_file(tensors, tmp_path / "x.safetensors")
        (layer,) = read(tmp_path / "x.safetensors").layers.values()
        (size,) = inspect(tmp_path / "x.safetensors").strength.modules.values()
        assert size == pytest.approx(float(torch.linalg.vector_norm(layer.delta())), rel=1e-4)
    save_file(
        {f"{stem}.oft_blocks": torch.zeros(4, 4, 4), f"{stem}.alpha": torch.tensor(0.0)}, tmp_path / "x.safetensors"
    )
    assert inspect(tmp_path / "x.safetensors").strength.modules == {}


def test_the_plot_is_written_to_a_new_png(tmp_path, capsys):
    path = save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "toy", ["kohya"], "fp16", {})["kohya"]
    picture = tmp_path / "toy-sizes.png"
    assert cli.main(["inspect", str(path), "--plot", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.size == (strength.WIDTH, strength.TOP + 3 * strength.ROW)
        assert strength.BAR in {color for _, color in image.getcolors(1 << 16)}
    before = picture.read_bytes()
    for place in (picture, tmp_path / "toy.svg"):
        assert cli.main(["inspect", str(path), "--plot", str(place)]) == 1
        assert "name a new file that ends in .png" in capsys.readouterr().err
    assert picture.read_bytes() == before
    assert cli.main(["inspect", str(path), "--plot", str(tmp_path / "none" / "x.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{stem}.oft_blocks": torch.zeros(4, 4, 4)}, tmp_path / "oft.safetensors")
    assert cli.main(["inspect", str(tmp_path / "oft.safetensors"), "--plot", str(tmp_path / "oft.png")]) == 1
    assert "nothing to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64"]
)
def test_values_of_every_dtype_equal_torchs(tmp_path, dtype):
    tensor = (torch.randn(5, 3) * 4).to(getattr(torch, dtype))
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    array = health.numbers(safetensors_header.read(tmp_path / "x.safetensors"), "x")
    assert array.shape == (5, 3) and np.array_equal(array, tensor.double().numpy())


def test_the_history_of_a_file_of_sd_scripts_is_read():
    info = {"ss_sd_model_name": "v1-5.safetensors", "ss_num_train_images": "20", "ss_num_epochs": "10"}
    info |= {"ss_steps": "1500", "ss_resolution": "(512, 768)", "ss_learning_rate": "0.0001", "ss_clip_skip": "None"}
    words = "on v1-5.safetensors, 20 images, 10 epochs, 1500 steps, at 512x768, learning rate 0.0001"
    assert health.history(info) == words
    assert health.history({"ss_resolution": "512", "ss_clip_skip": "2"}) == "at 512x512, clip skip 2"


def test_metadata_that_contradicts_the_tensors_is_reported(tmp_path):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.ones(4, 16, 1, 1), f"{stem}.lora_up.weight": torch.ones(16, 4, 1, 1)}
    info = {"ss_network_dim": "4", "ss_network_alpha": "8"}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata=info)
    assert "its metadata says rank 4 and alpha 8, which is wrong" in inspect(path).to_text()
    for dtype in (torch.float32, torch.float8_e4m3fn, torch.bfloat16):
        save_file(tensors | {f"{stem}.alpha": torch.tensor(8.0).to(dtype)}, path, metadata=info)
        report = inspect(path)
        assert "metadata says" not in str(report.notes) and report.components["unet"].alphas == [8.0]
    save_file(tensors, path, metadata=info | {"ss_network_dim": "x"})
    assert "metadata says" not in str(inspect(path).notes)


def test_pefts_alpha_and_the_counts_of_ranks_are_reported(tmp_path):
    names = [LAYER.format(block, 0) for block in range(3)]
    tensors = {}
    for name, rank in zip(names, (4, 4, 8), strict=True):
        tensors |= {f"{name}.lora_A.weight": torch.ones(rank, 16), f"{name}.lora_B.weight": torch.ones(16, rank)}
    config = {"unet.r": 4, "unet.lora_alpha": 8}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    assert "3 modules; rank 4 in 2, 8 in 1; alpha 8\n" in inspect(tmp_path / "x.safetensors").to_text()


def test_embeddings_of_words_are_reported_with_their_files(tmp_path):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.ones(4, 16, 1, 1), f"{stem}.lora_up.weight": torch.ones(16, 4, 1, 1)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lorakit.words": "zib"})
    assert (
        "needs its embedding x-embedding/zib.safetensors, which is not there"
        in inspect(tmp_path / "x.safetensors").notes
    )
    (tmp_path / "x-embedding").mkdir()
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "x-embedding" / "zib.safetensors")
    assert "which is beside it" in inspect(tmp_path / "x.safetensors").to_text()
    tensors["bundle_emb.zib.string_to_param.*"] = torch.ones(2, 768)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lorakit.words": "zib"})
    assert inspect(tmp_path / "x.safetensors").notes[1:] == ["carries the word 'zib', which A1111 learns from it"]
