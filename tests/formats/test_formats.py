"""Tests of exported files, and that diffusers and PEFT apply the same delta W when they load them."""

import json

import numpy as np
import pytest
import random_adapters
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from lycoris.modules.locon import LoConModule
from safetensors import safe_open
from safetensors.torch import load_file

from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.core.errors import LorakitError
from lorakit.formats import adapter_math, diffusers, kohya, peft, read
from lorakit.formats.edit.merge_folder import merged
from lorakit.formats.verify import verify_file

TEXT_LAYER = "text_encoder.text_model.encoder.layers.0.self_attn."
PIPELINES = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def tiny(request):
    """Family, pipeline, and the shapes of all its portable layers."""
    folder = request.getfixturevalue(f"tiny_{request.param}")
    pipeline = PIPELINES[request.param].from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    return request.param, pipeline, random_adapters.pipeline_shapes(pipeline)


def applied(pipeline, path):
    """Return delta W of each layer after diffusers has loaded a file, and unload the file again."""
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    deltas = random_adapters.applied_deltas(pipeline)
    pipeline.unload_lora_weights()
    return deltas


def assert_equal(actual, weights, tolerance=1e-5):
    extra = [name for name in actual if name not in weights.layers and actual[name].abs().sum() > 0]
    assert extra == []
    for name, layer in weights.layers.items():
        expected = random_adapters.reference_delta(layer)
        assert np.abs(actual[name].double().numpy().reshape(expected.shape) - expected).max() <= tolerance, name


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("conv", [False, True])
def test_kohya_tensors_equal_the_frozen_list(family, conv):
    layer_rows = [
        row for row in random_adapters.frozen(family) if not row[3].startswith(("top", "text_encoder_2 text"))
    ]
    rows = [row for row in layer_rows if conv or not row[3].startswith("conv")]
    layers = {}
    for name, _, _, _, (out, into, *kernel) in rows:
        layers[name] = LoraLayer(torch.zeros(2, into, *kernel), torch.zeros(out, 2, *(1 for _ in kernel)), 2.0)
    tensors = kohya.tensors(AdapterWeights(family, "lora", layers), "fp16")
    expected = {}
    for name, by_blocks, by_sgm, _, (out, into, *kernel) in rows:
        stem = by_sgm if family == "sdxl" and name.startswith("unet.") else by_blocks
        expected[f"{stem}.lora_down.weight"] = (2, into, *kernel)
        expected[f"{stem}.lora_up.weight"] = (out, 2, *(1 for _ in kernel))
        expected[f"{stem}.alpha"] = ()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    counts = {("sd1", False): 264, ("sd1", True): 350, ("sd2", False): 330, ("sd2", True): 416}
    assert len(tensors) == 3 * (counts | {("sdxl", False): 986, ("sdxl", True): 1052})[family, conv]
    assert all(t.dtype == (torch.float32 if n.endswith(".alpha") else torch.float16) for n, t in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("writer", [kohya, diffusers])
def test_diffusers_applies_what_was_trained(tiny, tmp_path, writer):
    """This test has every layer of a model; test_methods.py tests the other methods and alphas."""
    family, pipeline, shapes = tiny
    weights = random_adapters.adapter(shapes, family, alpha=2)
    (path,) = writer.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
    assert_equal(applied(pipeline, path), weights)


@pytest.mark.slow
@pytest.mark.parametrize("writer", [kohya, diffusers])
@pytest.mark.parametrize(
    ("rank", "alpha"),
    [
        # ranks and alphas both differ by layer
        ({"to_q": 3, "fc1": 2, "conv1": 8}, {"to_q": 1.5, "q_proj": 16, "conv1": 1}),
        (4, {"to_k": 1, "k_proj": 8}),
        ({"to_q": 2, "v_proj": 6}, 4),
        (1, 0.5),
    ],
)
def test_mixed_ranks_and_alphas_are_exact(tiny, tmp_path, writer, rank, alpha):
    family, pipeline, shapes = tiny
    weights = random_adapters.adapter(shapes, family, rank=rank, alpha=alpha)
    (path,) = writer.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
    assert_equal(applied(pipeline, path), weights)
    assert verify_file(path, weights, weights.layers) == []
    ranks = {t.shape[0] for n, t in load_file(path).items() if n.endswith(("lora_down.weight", "lora_A.weight"))}
    assert min(ranks) >= 2


def test_peft_opens_the_folder(tiny, tmp_path):
    from peft import PeftModel

    family, pipeline, shapes = tiny
    weights = random_adapters.adapter(shapes, family, rank={"to_q": 2}, alpha=2.5)
    folder = peft.write(weights, tmp_path / "folder", dtype="fp32", metadata={})
    assert all(path.is_file() for path in folder)
    parts = sorted({path.parent.name for path in folder})
    assert parts == sorted({name.partition(".")[0] for name in shapes})

    class Opened:
        pass

    opened = Opened()
    for part in parts:
        model = PeftModel.from_pretrained(getattr(pipeline, part), tmp_path / "folder" / part)
        setattr(opened, part, model.base_model.model)
        assert model.peft_config["default"].base_model_name_or_path is None
    actual = random_adapters.applied_deltas(opened)
    for part in parts:
        setattr(pipeline, part, getattr(opened, part))
    try:
        assert_equal(actual, weights)
    finally:
        for part in parts:
            unload(getattr(pipeline, part))


def unload(model):
    """Replace PEFT's wrappers by the original layers."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.get_base_layer())
    del model.peft_config


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("fmt", ["kohya", "diffusers", "peft"])
def test_every_format_is_read_back(tiny, tmp_path, fmt, dtype):
    family, _, shapes = tiny
    weights = random_adapters.adapter(shapes, family, alpha=2)
    path = tmp_path / ("a" if fmt == "peft" else "a.safetensors")
    {"kohya": kohya, "diffusers": diffusers, "peft": peft}[fmt].write(weights, path, dtype=dtype, metadata={})
    back = read(path)
    assert (back.family, back.method, set(back.layers)) == (family, "lora", set(shapes))
    assert verify_file(path, weights, shapes) == []
    if dtype == "fp32":
        assert_equal({name: layer.delta() for name, layer in back.layers.items()}, weights, 1e-6)


@pytest.mark.parametrize("first", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("second", ["kohya", "diffusers", "peft"])
def test_conversions_lose_nothing(tiny, tmp_path, first, second):
    writers = {"kohya": kohya, "diffusers": diffusers, "peft": peft}
    family, _, shapes = tiny
    weights = random_adapters.adapter(shapes, family, alpha={"to_q": 1, "fc2": 3}, rank={"to_v": 2})
    ends = {"kohya": ".safetensors", "diffusers": ".safetensors", "peft": ""}
    writers[first].write(weights, tmp_path / f"one{ends[first]}", dtype="fp32", metadata={})
    copy = read(tmp_path / f"one{ends[first]}")
    writers[second].write(copy, tmp_path / f"two{ends[second]}", dtype="fp32", metadata={})
    back = read(tmp_path / f"two{ends[second]}")
    assert_equal({name: layer.delta() for name, layer in back.layers.items()}, weights, 1e-6)


def test_only_kohyas_format_carries_dora(tiny, tmp_path):
    family, _, shapes = tiny
    weights = random_adapters.adapter(shapes, family, method="dora", alpha=2, rank=1)
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp16", metadata={})
    scales = {name: t for name, t in load_file(path).items() if name.endswith(".dora_scale")}
    assert len(scales) == len(shapes)
    assert all(t.dtype == torch.float32 and t.shape[0] == 1 and t.shape[1] == t.numel() for t in scales.values())
    back = read(path)
    assert back.method == "dora"
    for name, layer in weights.layers.items():
        assert torch.equal(back.layers[name].magnitude, layer.magnitude), name
    assert verify_file(path, weights, shapes) == []
    for writer in (diffusers, peft):
        with pytest.raises(LorakitError, match=r"format cannot carry this DoRA: .* export it as kohya"):
            writer.write(weights, tmp_path / "b", dtype="fp16", metadata={})
    assert not (tmp_path / "b").exists()
    assert kohya.check("dora", family) is None and "DoRA" in str(peft.check("dora", family))


@pytest.mark.slow
def test_text_projections_are_written_four_at_a_time(tiny, tmp_path):
    family, pipeline, shapes = tiny
    some = {n: s for n, s in shapes.items() if n.startswith("unet.") or n.endswith(("q_proj", "v_proj"))}
    weights = random_adapters.adapter(some, family, alpha=2)
    for writer in (kohya, diffusers):
        (path,) = writer.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
        actual = applied(pipeline, path)
        assert {n for n in actual if "self_attn" in n} == {n for n in shapes if "self_attn" in n}
        assert_equal(actual, weights)
        assert verify_file(path, weights, some) == []


def test_rank_one_is_padded_without_a_change_of_scale():
    shapes = {"unet.mid_block.attentions.0.proj_in": (8, 8)}
    weights = random_adapters.adapter(shapes, "sd2", rank=1, alpha=0.5)
    tensors = kohya.tensors(weights, "fp32")
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    assert tensors[f"{stem}.lora_down.weight"].shape == (2, 8) and tensors[f"{stem}.alpha"] == 1.0
    assert torch.count_nonzero(tensors[f"{stem}.lora_down.weight"][1]) == 0


@pytest.mark.parametrize("writer", [kohya, diffusers, peft])
def test_rank_one_is_read_as_rank_one(tmp_path, writer):
    """Padding for stable-diffusion.cpp is removed when a file is read, so that a run of rank 1 can start from it."""
    shapes = {"unet.mid_block.attentions.0.proj_in": (8, 8), "unet.mid_block.attentions.0.proj_out": (8, 8)}
    weights = random_adapters.adapter(shapes, "sd2", rank={"proj_in": 1, "proj_out": 3}, alpha=0.5)
    path = tmp_path / ("a" if writer is peft else "a.safetensors")
    writer.write(weights, path, dtype="fp32", metadata={})
    back = read(path).layers
    assert [layer.rank for layer in back.values()] == [1, 3]
    assert_equal({name: layer.delta() for name, layer in back.items()}, weights, 1e-6)


def test_a_single_alpha_is_not_changed():
    shapes = {f"unet.mid_block.attentions.0.{n}": (8, 8) for n in ("proj_in", "proj_out")}
    weights = random_adapters.adapter(shapes, "sd2", rank=3, alpha=0.1)
    for name, layer in adapter_math.uniform(weights).items():
        assert layer is weights.layers[name]


def test_pefts_config_contains_no_path(tmp_path):
    shapes = {TEXT_LAYER + p: (8, 8) for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
    peft.write(random_adapters.adapter(shapes, "sd1", alpha=2), tmp_path / "p", dtype="fp16", metadata={})
    peft_config = json.loads((tmp_path / "p/text_encoder/adapter_config.json").read_text())
    assert (peft_config["r"], peft_config["lora_alpha"], peft_config["base_model_name_or_path"]) == (4, 2, None)
    assert "encoder.layers.0.self_attn.q_proj" in peft_config["target_modules"]
    with safe_open(tmp_path / "p/text_encoder/adapter_model.safetensors", "pt") as file:
        for path in ("encoder", "text_model.encoder"):  # the module's name in new and in old transformers
            name = f"base_model.model.{path}.layers.0.self_attn.q_proj.lora_A.weight"
            assert torch.equal(file.get_tensor(name), file.get_tensor(name.replace("text_model.", "")))


@pytest.mark.parametrize("shape", [(12, 16), (12, 8, 3, 3)])
def test_lycoris_merges_a_dora_file_equally(shape):
    """A1111 and ComfyUI share the convention of LyCORIS' module: the magnitude has one value per input."""
    layer = random_adapters.layer(shape, 4, 2.0, torch.Generator().manual_seed(3), magnitude=True)
    name = "unet.mid_block.resnets.0.conv1" if len(shape) == 4 else "unet.mid_block.attentions.0.proj_in"
    tensors = kohya.tensors(AdapterWeights("sdxl", "dora", {name: layer}), "fp32")
    stem = next(iter(tensors)).partition(".")[0]
    base = torch.nn.Conv2d(8, 12, 3) if len(shape) == 4 else torch.nn.Linear(16, 12)
    module = LoConModule(stem, base, lora_dim=4, alpha=2.0, weight_decompose=True, wd_on_out=False, bypass_mode=False)
    module.load_state_dict({key.removeprefix(f"{stem}."): value for key, value in tensors.items()}, strict=False)
    expected = merged(base.weight.detach(), layer)
    weight, _ = module.get_merged_weight()
    assert torch.allclose(weight.detach(), expected, atol=1e-5)
