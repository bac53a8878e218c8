"""Tests of which layers an adapter targets, on UNets of the true architecture on the meta device."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lorakit.adapters import targets

SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def layer_names(unet: dict, text_layers: list[int]) -> list[str]:
    """Return the names of all layers with a weight, as in published checkpoints, from the models' state dicts."""
    with torch.device("meta"):
        names = [f"unet.{key}" for key in UNet2DConditionModel(**unet).state_dict()]
        for number, count in enumerate(text_layers):
            config = CLIPTextConfig(num_hidden_layers=count, hidden_size=8, num_attention_heads=2, intermediate_size=8)
            component = "text_encoder" if number == 0 else "text_encoder_2"
            keys = [key.removeprefix("text_model.") for key in CLIPTextModel(config).state_dict()]
            names += [f"{component}.text_model.{key}" for key in keys]
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


@pytest.fixture(scope="module")
def sd15() -> list[str]:
    return layer_names(SD15, [12])


@pytest.fixture(scope="module")
def sdxl() -> list[str]:
    return layer_names(SDXL, [12, 32])


@pytest.mark.parametrize(
    ("target_modules", "text", "count"),
    [
        ("attention", False, 128),
        ("attention", True, 128 + 48),
        ("linear", False, 192),
        ("linear", True, 264),
        ("linear+conv", False, 192 + 86),
        ("linear+conv", True, 350),
    ],
)
def test_sd15_has_as_many_layers_as_sd_scripts_trains(
    sd15: list[str], target_modules: str, text: bool, count: int
) -> None:
    selected = targets.select("sd1", sd15, target_modules, text)
    assert len(selected) == len(set(selected)) == count


@pytest.mark.parametrize(
    ("target_modules", "text", "count"),
    [("attention", False, 560), ("linear", False, 722), ("linear", True, 986), ("linear+conv", True, 1052)],
)
def test_sdxl_has_as_many_layers_as_sd_scripts_trains(
    sdxl: list[str], target_modules: str, text: bool, count: int
) -> None:
    assert len(targets.select("sdxl", sdxl, target_modules, text)) == count


def test_layers_that_programs_lose_are_not_targeted(sd15: list[str]) -> None:
    selected = targets.select("sd1", sd15, "linear+conv", True)
    for name in ("unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"):
        assert name in sd15
        assert name not in selected
    assert not [name for name in selected if "norm" in name or "embeddings" in name]


def test_attention_means_q_k_v_and_out(sd15: list[str]) -> None:
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    selected = [name for name in targets.select("sd1", sd15, "attention", True) if name.startswith(block)]
    assert [name.removeprefix(block) for name in selected] == [
        f".{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    first = "text_encoder.text_model.encoder.layers.0."
    text = {
        name.removeprefix(first) for name in targets.select("sd1", sd15, "attention", True) if name.startswith(first)
    }
    assert text == {f"self_attn.{layer}_proj" for layer in ("q", "k", "v", "out")}


def test_selection_keeps_the_order_of_the_layers(sd15: list[str]) -> None:
    selected = targets.select("sd1", sd15, "linear", True)
    assert selected == [name for name in sd15 if name in set(selected)]
