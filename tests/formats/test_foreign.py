"""Tests of methods that lorakit reads but does not train: merged weights equal those of the method's own program."""

import pytest
import random_adapters
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import load_file, save_file

from lorakit import adapters
from lorakit.core.errors import LorakitError
from lorakit.formats import diffusers, keys, kohya, peft, read, save
from lorakit.formats.edit.merge_folder import Merger
from lorakit.formats.edit.resize_combine import combine, resize

CONV = "lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"
LINEAR = (
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
)
NORM = "lora_unet_mid_block_resnets_0_norm1", "unet.mid_block.resnets.0.norm1"
ROWS, COLUMNS = ({"weight_decompose": True, "wd_on_out": rows} for rows in (True, False))
MODULES = {
    "IA3": (IA3Module, {}),
    "IA3 on input": (IA3Module, {"train_on_input": True}),
    "OFT": (DiagOFTModule, {}),
    "OFT with a constraint": (DiagOFTModule, {"constraint": 0.01}),
    "OFT rescaled": (DiagOFTModule, {"rescaled": True}),
    "BOFT": (ButterflyOFTModule, {}),
    "GLoRA": (GLoRAModule, {}),
    "GLoRA tucker": (GLoRAModule, {"use_tucker": True}),
    "LoRA rows": (LoConModule, ROWS),
    "LoHa rows": (LohaModule, ROWS),
    "LoKr rows": (LokrModule, ROWS),
    "LoHa columns": (LohaModule, COLUMNS),
}


def theirs(kind: str, layer: torch.nn.Module, stem: str) -> torch.nn.Module:
    cls, options = MODULES[kind]
    module = cls(stem, layer, lora_dim=4, alpha=options.get("alpha", 2.0), **options)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return module


def save_tensors(folder, stem, tensors):
    path = folder / "theirs.safetensors"
    save_file({f"{stem}.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_the_merged_weight_equals_the_packages(tmp_path, kind, conv):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(24, 32, 3, padding=1) if conv else torch.nn.Linear(24, 32)
    stem, name = CONV if conv else LINEAR
    module = theirs(kind, layer, stem)
    path = save_tensors(tmp_path, stem, module.state_dict())
    weights = read(path)
    x = torch.randn(2, 24, 5, 5) if conv else torch.randn(2, 24)
    with torch.no_grad():
        expected = module(x)
        layer.weight.copy_(Merger(weights, 1.0)("unet", f"{name.removeprefix('unet.')}.weight", layer.weight))
        assert torch.allclose(layer(x), expected, atol=2e-5)
    (copy,) = kohya.write(weights, tmp_path / "ours.safetensors", dtype="fp32", metadata={})
    before, after = load_file(path), load_file(copy)
    assert after.keys() >= {key for key in before if not key.endswith(".alpha")}
    for key in before.keys() & after.keys() - {f"{stem}.alpha"}:
        assert torch.equal(after[key].float().flatten(), before[key].float().flatten()), key
    if kind[:3] in ("IA3", "OFT", "BOF", "GLo"):
        for writer in diffusers, peft:
            with pytest.raises(LorakitError, match="format cannot carry"):
                writer.tensors(weights, "fp16")
        with pytest.raises(LorakitError, match="computed from the weights of a base"):
            resize(weights, rank=1)
    elif "LoRA" in kind:
        assert torch.allclose(resize(weights, energy=1).layers[name].delta(), weights.layers[name].delta(), atol=1e-5)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_glora_of_the_older_form_is_merged(tmp_path, kernel):
    """LyCORIS before version 2, like ComfyUI, computes `W a2 a1 + b2 b1`. lorakit writes the present form."""
    draw, ones = torch.Generator().manual_seed(2), tuple(1 for _ in kernel)
    shapes = {"a1": (4, 24, *ones), "a2": (24, 4, *ones), "b1": (4, 24, *kernel), "b2": (24, 4, *ones)}
    tensors = {f"{name}.weight": 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    a1, a2, b1, b2 = (tensor.flatten(1) for tensor in tensors.values())
    weight = torch.randn(24, 24, *kernel, generator=draw)
    turned = torch.einsum("oi...,ij->oj...", weight, a2 @ a1)
    stem, name = CONV if kernel else LINEAR
    path = save_tensors(tmp_path, stem, tensors | {"alpha": torch.tensor(2.0)})
    merger = Merger(read(path), 1.0)
    expected = weight + 0.5 * (turned + (b2 @ b1).reshape(weight.shape))
    merged = merger("unet", f"{name.removeprefix('unet.')}.weight", weight)
    assert torch.allclose(merged, expected, atol=1e-5)
    assert kohya.tensors(read(path), "fp32")[f"{stem}.a1.weight"].shape[:2] == (24, 4)


def test_oft_of_the_older_form_is_merged(tmp_path):
    """LyCORIS before version 3 stores the rotations themselves, and A1111 reads them as rotations."""
    draw = 0.3 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))
    turns = torch.linalg.matrix_exp(draw - draw.mT)
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(3))
    path = save_tensors(tmp_path, LINEAR[0], {"oft_diag": turns})
    expected = torch.block_diag(*turns).T @ weight
    merged = Merger(read(path), 1.0)("unet", f"{LINEAR[1].removeprefix('unet.')}.weight", weight)
    assert torch.allclose(merged, expected, atol=1e-4)
    assert f"{LINEAR[0]}.oft_blocks" in kohya.tensors(read(path), "fp32")


def test_every_command_keeps_biases_beside_lora(tmp_path):
    """ComfyUI's nodes write such biases."""
    draw = torch.Generator().manual_seed(1)
    down, up = torch.randn(4, 24, generator=draw), torch.randn(32, 4, generator=draw)
    bias = torch.randn(32, generator=draw)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "diff_b": bias}
    weights = read(save_tensors(tmp_path, LINEAR[0], tensors))
    path = LINEAR[1].removeprefix("unet.")
    merger = Merger(weights, 0.5)
    assert torch.allclose(merger("unet", f"{path}.bias", torch.ones(32)), 1 + 0.5 * bias)
    assert torch.allclose(merger("unet", f"{path}.weight", torch.ones(32, 24)), 1 + 0.5 * up @ down, atol=1e-5)
    assert torch.equal(kohya.tensors(resize(weights, rank=2), "fp32")[f"{LINEAR[0]}.diff_b"], bias)
    both = combine([(weights, 1.0), (weights, 0.5)])
    assert torch.allclose(kohya.tensors(both, "fp32")[f"{LINEAR[0]}.diff_b"], 1.5 * bias)
    with pytest.raises(LorakitError, match="cannot carry changes of biases"):
        diffusers.tensors(weights, "fp16")


TOPS = ("unet.conv_in", "unet.time_embedding.linear_1", "text_encoder_2.text_projection", "unet.conv_norm_out",
        "unet.up_blocks.0.resnets.0.norm2", "unet.down_blocks.1.attentions.0.transformer_blocks.0.norm3",
        "unet.down_blocks.1.attentions.0.norm", "text_encoder.text_model.encoder.layers.0.layer_norm1",
        "text_encoder.text_model.final_layer_norm")  # fmt: skip


@pytest.mark.parametrize("name", TOPS)
def test_top_level_layers_and_norms_have_names(name):
    stem = keys.to_kohya_name([name], "sdxl")[name]
    assert keys.from_kohya(stem) == name and keys.is_canonical(name) and not keys.is_read_everywhere(name)


def test_a_style_and_lcm_are_combined_into_one_file(tmp_path):
    """LCM-LoRA also adapts `conv_in` and the time embedding."""
    style = random_adapters.adapter({LINEAR[1]: (32, 24)}, "sd1")
    lcm = random_adapters.adapter({LINEAR[1]: (32, 24), "unet.conv_in": (16, 4, 3, 3)}, "sd1", seed=1)
    messages = []
    both = combine([(style, 1.0), (resize(lcm, rank=4), 0.5)])
    path = save(both, tmp_path, "both", ["kohya"], "fp32", {}, say=messages.append)["kohya"]
    assert "export: layers that not every program reads: 1, such as unet.conv_in" in messages[0]
    assert torch.allclose(
        read(path).layers["unet.conv_in"].delta(), 0.5 * lcm.layers["unet.conv_in"].delta(), atol=1e-6
    )


def test_norms_are_merged_and_exported(tmp_path):
    """LyCORIS' `train_norm` writes them into a LoCon file."""
    norm = NormModule(NORM[0], torch.nn.GroupNorm(4, 32), 1)
    with torch.no_grad():
        norm.w_norm.add_(torch.rand(32)), norm.b_norm.add_(torch.rand(32))
    tensors = {f"{NORM[0]}.{name}": tensor.detach() for name, tensor in norm.state_dict().items() if "norm" in name}
    tensors |= {f"{LINEAR[0]}.lora_down.weight": torch.ones(4, 24), f"{LINEAR[0]}.lora_up.weight": torch.ones(32, 4)}
    save_file({k: t for k, t in tensors.items() if "org" not in k}, tmp_path / "x.safetensors")
    weights = read(tmp_path / "x.safetensors")
    merger, path = Merger(weights, 1.0), NORM[1].removeprefix("unet.")
    for kind, expected in zip(("weight", "bias"), norm.get_merged_weight(), strict=True):
        before = getattr(norm.org_module[0], kind).detach()
        assert torch.allclose(merger("unet", f"{path}.{kind}", before), expected)
    resized = kohya.tensors(resize(weights, rank=2), "fp32")
    assert torch.equal(resized[f"{NORM[0]}.w_norm"], norm.w_norm) and torch.equal(
        resized[f"{NORM[0]}.b_norm"], norm.b_norm
    )


def test_full_differences_are_read(tmp_path):
    layer = torch.nn.Linear(24, 32)
    draw = torch.Generator().manual_seed(2)
    weights = read(
        save_tensors(tmp_path, LINEAR[0], {"diff": torch.randn(32, 24, generator=draw), "diff_b": torch.ones(32)})
    )
    delta = weights.layers[LINEAR[1]].delta()
    module = FullModule("x", layer)
    module.load_state_dict({"diff": delta, "diff_b": torch.ones(32)})
    merged = Merger(weights, 1.0)("unet", f"{LINEAR[1].removeprefix('unet.')}.weight", layer.weight.detach())
    assert torch.allclose(merged, layer.weight + delta)
    assert torch.allclose(resize(weights, energy=1).layers[LINEAR[1]].delta(), delta, atol=1e-4)


def test_a_merge_that_is_not_finite_is_refused():
    path = LINEAR[1].removeprefix("unet.")
    weights = random_adapters.adapter({LINEAR[1]: (32, 24)}, "sd1")
    broken = torch.full((32, 24), float("nan"))
    with pytest.raises(
        LorakitError, match=rf"unet\.{path}\.weight of the base holds NaN or infinity: the base is damaged"
    ):
        Merger(weights, 1.0)("unet", f"{path}.weight", broken)
    words = rf"{LINEAR[1]} would hold NaN or infinity in torch\.float16 at strength 1e\+08"
    with pytest.raises(LorakitError, match=words):
        Merger(weights, 1e8)("unet", f"{path}.weight", torch.ones(32, 24, dtype=torch.float16))


@pytest.mark.parametrize(
    ("what", "words"), [("bias", "biases"), ("rows", "DoRA per output row"), ("diff", "full difference")]
)
def test_parts_that_only_a_merge_applies_are_refused_elsewhere(tmp_path, sd1, what, words):
    tensors = {"lora_down.weight": torch.ones(4, 24), "lora_up.weight": torch.ones(32, 4)}
    tensors |= {"bias": {"diff_b": torch.ones(32)}, "rows": {"dora_scale": torch.ones(32, 1)}}.get(what, {})
    weights = read(save_tensors(tmp_path, LINEAR[0], {"diff": torch.ones(32, 24)} if what == "diff" else tensors))
    with pytest.raises(
        LorakitError, match=f"the adapter has {words}, which lorakit does not put into a model in use: merge it"
    ):
        adapters.apply(sd1, weights)
