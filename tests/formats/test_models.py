"""Tests that a file's model is identified by layer names, as each program's documentation and source define them."""

import json

import pytest
import random_adapters
import torch
from safetensors.torch import save_file

from lorakit.core.errors import LorakitError
from lorakit.formats import identify, keys, read
from lorakit.formats.inspect import inspect

KOHYA, OURS, DIFFUSERS = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"), "transformer."
JOINT = [f"{DIFFUSERS}transformer_blocks.0.attn.to_q", f"{DIFFUSERS}transformer_blocks.0.attn.add_q_proj"]
ONETRAINER = "lora_transformer_transformer_blocks_0_"
ATTENTION = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
FLUX, SD3, XL = "FLUX.1", "Stable Diffusion 3", "Stable Diffusion XL"
# stems, width, metadata, model
FILES = [
    (["lora_unet_double_blocks_0_img_attn_qkv"], 3072, {"ss_base_model_version": "flux1"}, FLUX),
    (["lora_unet_double_blocks_0_img_attn_qkv"], 64, {}, FLUX),
    (["lora_unet_double_blocks_0_img_attn_qkv"], 64, {"ss_base_model_version": "sdxl_base_v1-0"}, FLUX),
    ([*JOINT, f"{DIFFUSERS}single_transformer_blocks.0.attn.to_q"], 64, {}, FLUX),
    (JOINT, 3072, {}, FLUX),
    (JOINT[:1], 16, {"modelspec.architecture": "Flux.1-dev/lora"}, FLUX),
    ([f"{ONETRAINER}attn_to_q", "lora_transformer_single_transformer_blocks_0_attn_to_q"], 64, {}, FLUX),
    (["lycoris_single_transformer_blocks_0_attn_to_q", "lycoris_transformer_blocks_0_attn_to_q"], 64, {}, FLUX),
    (["diffusion_model.double_blocks.0.img_attn.qkv"], 64, {}, FLUX),
    (["diffusion_model.double_blocks.0.img_attn.qkv"], 64, {"modelspec.architecture": "chroma/lora"}, "Chroma"),
    (["lora_unet_double_blocks_0_img_attn_qkv"], 64, {"ss_base_model_version": "hunyuan_video"}, "HunyuanVideo"),
    (["transformer.double_blocks.0.img_mlp.fc1"], 64, {}, "HunyuanVideo"),
    (["lora_unet_joint_blocks_0_x_block_attn_qkv"], 64, {}, SD3),
    ([f"{ONETRAINER}ff_context_net_0_proj", "lora_te1_text_model_encoder_layers_0_mlp_fc1"], 64, {}, SD3),
    (["diffusion_model.joint_blocks.0.context_block.attn.qkv"], 64, {}, SD3),
    (JOINT, 1536, {}, SD3),
    (["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.cross_attn.k_img"], 64, {}, "Wan"),
    (["lora_unet_blocks_0_self_attn_q"], 64, {}, "Wan"),
    (["transformer.blocks.0.attn1.to_q", "transformer.blocks.0.ffn.net.0.proj"], 64, {}, "Wan"),
    (["transformer.blocks.0.attn1.to_q"], 1408, {}, "HunyuanDiT"),
    (["transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mlp.net.0.proj"], 64, {}, "Qwen-Image"),
    ([f"{DIFFUSERS}transformer_blocks.59.attn.add_q_proj"], 3072, {}, "Qwen-Image"),
    ([f"{DIFFUSERS}transformer_blocks.59.attn.to_k"], 3072, {}, "Qwen-Image"),
    (["diffusion_model.double_blocks.0.img_attn.proj", "diffusion_model.single_blocks.0.linear1"], 27648, {}, "FLUX.2"),
    (["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_mlp_fc1"], 3584, {}, "HunyuanImage"),
    (["lora_unet_blocks_0_attn_wq", "lora_unet_blocks_0_attn_gate", "lora_unet_blocks_0_mlp_up"], 6144, {}, "Krea 2"),
    (["transformer.text_fusion.refiner_blocks.0.attn.to_q"], 2560, {}, "Krea 2"),
    (["lora_unet_visual_transformer_blocks_0_self_attention_to_query"], 1792, {}, "Kandinsky 5"),
    (["down_blocks.0.motion_modules.0.temporal_transformer.proj_in"], 320, {}, "AnimateDiff's motion module"),
    (["diffusion_model.layers.0.attention.to_q"], 64, {}, "Z-Image"),
    (["diffusion_model.layers.0.attention.qkv"], 2304, {}, "Lumina Image 2"),
    ([f"{ONETRAINER}attn1_to_q", f"{ONETRAINER}attn2_to_q"], 1152, {}, "PixArt"),
    (["lora_transformer_joint_transformer_blocks_0_attn_to_q"], 64, {}, "AuraFlow"),
    (["lora_prior_unet_down_blocks_0_1_attention_to_q"], 64, {}, "Stable Cascade"),
    ([f"lora_unet_{ATTENTION}"], 64, {}, XL),
    ([f"lora_unet_{ATTENTION.replace('_blocks_0', '_blocks_3')}"], 64, {"ss_base_model_version": "sd_v1"}, XL),
]


def save_tensors(path, stems, width, metadata, parts=KOHYA):
    tensors = {f"{stem}.{part}": torch.ones(4, width) if part == parts[0] else torch.ones(width, 4)
               for stem in stems for part in parts}  # fmt: skip
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("parts", [KOHYA, OURS])
@pytest.mark.parametrize(("stems", "width", "metadata", "title"), FILES)
def test_a_files_model_is_identified(tmp_path, stems, width, metadata, title, parts):
    if parts is OURS and any(stem.startswith("lora_unet") for stem in stems):
        pytest.skip("kohya's names have kohya's parts")
    path = save_tensors(tmp_path / "x.safetensors", stems, width, metadata, parts)
    report = inspect(path)
    assert f"{title} (evidence:" in report.to_text() and report.kind == "adapter"
    if metadata.get("ss_base_model_version", "").startswith("sd"):
        assert "its metadata says" in report.family_evidence
    if title not in (SD3, XL):
        assert report.family is None
        with pytest.raises(LorakitError, match=f"this is an adapter for {title}; lorakit has no base of that kind"):
            read(path)
        with pytest.raises(LorakitError, match="does not know which programs read such"):
            report.failures(["comfyui"])
    elif title is not SD3 and not stems[0].startswith("lora_unet_input"):
        with pytest.raises(LorakitError, match="names of layers that lorakit does not read"):
            read(path)


SAME = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
SPELLINGS = {
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k": SAME,
    "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": SAME,
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    ),
    "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1": (
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    ),
}


@pytest.mark.parametrize("stem", SPELLINGS)
def test_names_of_comfyui_and_lycoris_are_identified(tmp_path, stem):
    path = save_tensors(tmp_path / "x.safetensors", [stem], 768, None)
    weights = read(path)
    assert list(weights.layers) == [SPELLINGS[stem]]
    assert torch.equal(weights.layers[SPELLINGS[stem]].delta(), torch.full((768, 768), 4.0))
    assert inspect(path).components


def test_old_attention_processor_names_without_component_are_read(tmp_path):
    stem = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora"
    path = save_tensors(tmp_path / "x.safetensors", [stem], 768, None, ("down.weight", "up.weight"))
    assert list(read(path).layers) == [SAME]


@pytest.mark.parametrize(("width", "component"), [(1280, "text_encoder_2"), (768, "text_encoder")])
def test_a_peft_folder_written_by_peft_is_identified(tmp_path, width, component):
    save_tensors(tmp_path / "adapter_model.safetensors",
           ["base_model.model.text_model.encoder.layers.0.self_attn.q_proj"], width, None, OURS)  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    for path in tmp_path, tmp_path / "adapter_model.safetensors":
        report = inspect(path)
        assert report.components[component].alphas == [8.0] and report.components[component].ranks == [4]
        assert next(iter(read(path).layers.values())).alpha == 8


XL_ALONE = ["text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "unet.add_embedding.linear_1",
            "lycoris_up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
            "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]  # fmt: skip


@pytest.mark.parametrize("stem", XL_ALONE)
def test_layers_that_only_sdxl_has_identify_it(tmp_path, stem):
    assert read(save_tensors(tmp_path / "x.safetensors", [stem], 64, None)).family == "sdxl"


@pytest.mark.parametrize("parts", [KOHYA, OURS, ("lora.down.weight", "lora.up.weight")])
def test_names_without_a_component_are_the_unets(tmp_path, parts):
    """`get_peft_model_state_dict(unet)` gives such names."""
    path = save_tensors(tmp_path / "x.safetensors", [SAME.removeprefix("unet.")], 768, None, parts)
    assert list(read(path).layers) == [SAME] and inspect(path).family == "sd1"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("spelling", ["kohya", "canonical"])
def test_no_unet_layer_is_mistaken_for_another_models(family, spelling):
    names = [name for name, *_ in random_adapters.frozen(family)]
    stems = keys.to_kohya_name(names, family).values() if spelling == "kohya" else names
    for stem in stems:
        shapes = {f"{stem}.lora_down.weight": (4, 64), f"{stem}.lora_up.weight": (64, 4)}
        assert identify.other_model(shapes, {}) is None, stem
        assert identify.misfit(shapes, {}, family, "lora") in (
            None,
            f"the adapter to start from is for sd1, this base is {family}",
        )
