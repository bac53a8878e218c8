"""Tests of the check at the end of a run: a right file has no findings, and each kind of fault has one or more."""

import math

import pytest
import random_adapters
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.formats import diffusers, kohya, peft
from lorakit.formats.verify import verify_effect, verify_file

TEXT = "text_encoder.text_model.encoder.layers.0."
SHAPES = {
    "unet.down_blocks.0.attentions.0.proj_in": (16, 16, 1, 1),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (16, 12),
    "unet.down_blocks.0.resnets.0.conv1": (16, 8, 3, 3),
    **{f"{TEXT}self_attn.{part}_proj": (12, 12) for part in ("q", "k", "v", "out")},
    f"{TEXT}mlp.fc1": (24, 12),
}
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def changed(path, change):
    """Rewrite a file after `change(tensors)`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def rename(old, new):
    def change(tensors):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def replaced(name, make):
    def change(tensors):
        tensors[name] = make(tensors[name]).contiguous()

    return change


def removed(*names):
    def change(tensors):
        for name in [n for n in tensors if any(part in n for part in names)]:
            del tensors[name]

    return change


def zeroed(stem):
    return lambda tensors: tensors[f"{stem}.lora_up.weight"].zero_()


MUTATIONS = {
    "one key renamed": (rename(f"{STEM}.lora_down", f"{STEM}.lora_dwn"), "has no down factor"),
    "one module renamed to nothing": (rename("attn2_to_k", "attn2_to_kk"), "of no layer of Stable Diffusion"),
    "one module renamed to another": (rename("attn2_to_k", "attn2_to_v"), "attn2.to_k: announced, but not in the file"),
    "one alpha missing": (removed(f"{STEM}.alpha"), f"{STEM}.alpha: missing"),
    "one alpha not a number": (replaced(f"{STEM}.alpha", lambda t: t * math.nan), "attn2_to_k.alpha holds NaN"),
    "one alpha doubled": (replaced(f"{STEM}.alpha", lambda t: t * 2), "attn2.to_k: delta W is off by 100 %"),
    "down transposed": (replaced(f"{STEM}.lora_down.weight", torch.t), "do not fit together"),
    "up transposed": (replaced(f"{STEM}.lora_up.weight", torch.t), "do not fit together"),
    "convolution flattened": (
        replaced("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", lambda t: t.flatten(1)),
        "do not fit together",
    ),
    "wrong text-encoder prefix": (rename("lora_te_", "lora_te1_"), "self_attn_q_proj.lora_down.weight: missing"),
    "text_model dropped": (rename("te_text_model_", "te_"), "self_attn_q_proj.lora_down.weight: missing"),
    "text encoder dropped": (removed("lora_te_"), "mlp.fc1: announced, but not in the file"),
    "a layer is zero": (zeroed(STEM), "attn2.to_k: zero: it has no effect"),
    "not finite": (replaced(f"{STEM}.lora_up.weight", lambda t: t * math.nan), "lora_up.weight holds NaN"),
    "one number off": (replaced(f"{STEM}.lora_up.weight", lambda t: t * 1.01), "attn2.to_k: delta W is off by 1 %"),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("alpha", [2, 4])
def test_each_fault_of_a_file_is_detected(tmp_path, name, alpha):
    change, expected = MUTATIONS[name]
    weights = random_adapters.adapter(SHAPES, "sd1", alpha=alpha)
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
    assert verify_file(path, weights, SHAPES) == []
    changed(path, change)
    findings = [str(finding) for finding in verify_file(path, weights, SHAPES)]
    assert any(expected in finding for finding in findings), findings


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_passes_and_an_error_of_10_percent_fails(tmp_path, dtype):
    weights = random_adapters.adapter(SHAPES, "sd1")
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype=dtype, metadata={})
    assert verify_file(path, weights, SHAPES) == []
    changed(path, replaced(f"{STEM}.lora_up.weight", lambda t: t * 1.1))
    assert [finding.where for finding in verify_file(path, weights, SHAPES)] == [
        name for name in SHAPES if "to_k" in name
    ]


def test_an_unscaled_rank_stabilised_adapter_is_detected(tmp_path):
    """The scale of rsLoRA is alpha / sqrt(rank). At rank 16 a file with plain alpha is four times too weak."""
    weights = random_adapters.adapter(SHAPES, "sd1", rank=16, alpha=16 * math.sqrt(16), method="rslora")
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
    changed(path, lambda tensors: [t.fill_(16) for name, t in tensors.items() if name.endswith(".alpha")])
    findings = verify_file(path, weights, SHAPES)
    assert len(findings) == len(SHAPES) and all("off by 75 %" in f.problem for f in findings)


def test_every_tensor_of_diffusers_and_peft_files_is_checked(tmp_path):
    weights = random_adapters.adapter(SHAPES, "sd1", alpha=2)
    (path,) = diffusers.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
    changed(path, rename("text_encoder.text_model.", "text_encoder."))
    assert any("not expected" in str(f) for f in verify_file(path, weights, SHAPES))
    peft.write(weights, tmp_path / "folder", dtype="fp32", metadata={})
    config = tmp_path / "folder" / "unet" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 8'))
    findings = verify_file(tmp_path / "folder", weights, SHAPES)
    assert {f.problem for f in findings} == {"delta W is off by 300 %"} and len(findings) == 4
    config.unlink()
    assert any("announced, but not in the file" in str(f) for f in verify_file(tmp_path / "folder", weights, SHAPES))


def test_dora_magnitudes_are_compared(tmp_path):
    weights = random_adapters.adapter(SHAPES, "sd1", method="dora")
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp16", metadata={})
    assert verify_file(path, weights, SHAPES) == []
    changed(path, replaced(f"{STEM}.dora_scale", lambda t: t + 0.01))
    assert [f.problem for f in verify_file(path, weights, SHAPES)] == ["DoRA magnitude differs"]
    changed(path, removed(f"{STEM}.dora_scale"))
    assert "DoRA magnitude missing" in [f.problem for f in verify_file(path, weights, SHAPES)]


def test_an_untrained_adapter_is_detected(tmp_path):
    """An untrained adapter: `up` is zero everywhere."""
    layers = {
        name: LoraLayer(layer.down, torch.zeros_like(layer.up), layer.alpha)
        for name, layer in random_adapters.adapter(SHAPES, "sd1").layers.items()
    }
    weights = AdapterWeights("sd1", "lora", layers)
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp16", metadata={})
    findings = verify_file(path, weights, SHAPES)
    assert len(findings) == len(SHAPES) and all("zero" in f.problem for f in findings)


def test_a_missing_layer_is_detected(tmp_path):
    weights = random_adapters.adapter(SHAPES, "sd1")
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp16", metadata={})
    layers = [*SHAPES, f"{TEXT}mlp.fc2"]
    assert [str(f) for f in verify_file(path, weights, layers)] == [f"{TEXT}mlp.fc2: announced, but not trained"]


def test_a_file_that_does_not_open_is_one_finding(tmp_path):
    weights = random_adapters.adapter(SHAPES, "sd1")
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp16", metadata={})
    path.write_bytes(path.read_bytes()[:-100])
    (finding,) = verify_file(path, weights, SHAPES)
    assert "cut off" in finding.problem


def test_a_missing_or_changed_effect_is_detected():
    base = {"unet": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    memory = {"unet": base["unet"] + 0.1}
    assert verify_effect(base, memory, {"unet": memory["unet"] + 1e-6}) == []
    assert "no effect" in str(verify_effect(base, base, base)[0])
    assert "off by" in str(verify_effect(base, memory, {"unet": base["unet"] + 0.09})[0])
    assert "off by" in str(verify_effect(base, memory, base)[0])
    assert "not finite" in str(verify_effect(base, memory, {"unet": memory["unet"] * math.nan})[0])
