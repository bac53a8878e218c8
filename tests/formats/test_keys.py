"""Tests of layer names against frozen lists that were made without lorakit and equal sd-scripts' names."""

import pytest
import random_adapters

from lorakit.core.errors import LorakitError
from lorakit.formats import keys

COUNTS = {"sd1": (192, 86, 72, 0), "sd2": (192, 86, 138, 0), "sdxl": (722, 66, 72, 192)}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_names_equal_the_frozen_list(family):
    rows = [row for row in random_adapters.frozen(family) if "text_projection" not in row[3]]
    kohya_names = keys.to_kohya_name([row[0] for row in rows], family)
    assert kohya_names == {
        row[0]: row[2] if family == "sdxl" and row[0].startswith("unet.") else row[1] for row in rows
    }
    portable = [row[0] for row in rows if keys.is_read_everywhere(row[0])]
    attention, conv, text, text_2 = COUNTS[family]
    assert sum(keys.group(name) == "attention" for name in portable) == attention
    assert sum(keys.group(name) == "conv" for name in portable) == conv
    assert sum(name.startswith("text_encoder.") for name in portable) == text
    assert sum(name.startswith("text_encoder_2.") for name in portable) == text_2
    assert {name for name, *_ in rows} - set(portable) == {name for name, *_, g, _ in rows if g.startswith("top")}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_both_block_spellings_are_read_back(family):
    for name, by_blocks, by_sgm, _, _ in random_adapters.frozen(family):
        assert keys.from_kohya(by_blocks) == keys.from_kohya(by_sgm) == name


def test_text_encoder_names_without_text_model_are_understood():
    expected = "text_encoder.text_model.encoder.layers.3.mlp.fc1"
    assert keys.from_kohya("lora_te1_encoder_layers_3_mlp_fc1") == expected
    assert keys.from_kohya("lora_te_text_model_encoder_layers_3_mlp_fc1") == expected


@pytest.mark.parametrize(
    "stem",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_mid",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q",
        "lora_unet_up_blocks_0_downsamplers_0_conv",
        "lora_unet_mid_block_upsamplers_0_conv",
        "lora_unet_input_blocks_4_2_proj_in",
        "lora_unet_input_blocks_3_1_op",
        "lora_te3_text_model_encoder_layers_0_mlp_fc1",
        "lora_te_text_model_encoder_layers_0_mlp_fc3",
        "lora_unet_single_blocks_0_linear1",
    ],
)
def test_a_name_without_a_layer_is_unknown(stem):
    assert keys.from_kohya(stem) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sgm_indices_follow_the_depth_of_the_blocks(count):
    names = [f"unet.down_blocks.1.attentions.{n}.proj_in" for n in range(count)]
    names += [f"unet.up_blocks.0.attentions.{n}.proj_in" for n in range(count + 1)]
    names += ["unet.down_blocks.0.downsamplers.0.conv", "unet.up_blocks.0.upsamplers.0.conv"]
    names += ["unet.up_blocks.1.upsamplers.0.conv", "unet.mid_block.attentions.0.proj_in"]
    assert keys.layers_per_block(names) == count
    kohya_names = keys.to_kohya_name(names, "sdxl")
    assert kohya_names["unet.down_blocks.1.attentions.0.proj_in"] == f"lora_unet_input_blocks_{count + 2}_1_proj_in"
    assert kohya_names["unet.down_blocks.0.downsamplers.0.conv"] == f"lora_unet_input_blocks_{count + 1}_0_op"
    assert kohya_names["unet.up_blocks.0.upsamplers.0.conv"] == f"lora_unet_output_blocks_{count}_2_conv"
    # In a block without attention, the upsampler's index is lower by one.
    assert kohya_names["unet.up_blocks.1.upsamplers.0.conv"] == f"lora_unet_output_blocks_{2 * count + 1}_1_conv"
    assert {keys.from_kohya(stem, count) for stem in kohya_names.values()} == set(names)


def test_depth_defaults_to_two():
    assert keys.layers_per_block(["unet.down_blocks.1.attentions.0.proj_in"]) == 2
    assert keys.layers_per_block(["unet.mid_block.attentions.0.proj_in"]) == 2


def test_layers_without_a_portable_name_are_refused():
    keys.require_canonical(["unet.conv_in", "unet.mid_block.resnets.0.conv1", "text_encoder_2.text_projection"])
    with pytest.raises(LorakitError, match=r"layer unet.conv_mid cannot be exported: no program has a name for it"):
        keys.require_canonical(["unet.conv_in", "unet.conv_mid"])
    with pytest.raises(LorakitError, match=r"layer unet.conv_mid is not one that a sd1 adapter can have"):
        keys.to_kohya_name(["unet.conv_mid"], "sd1")
    with pytest.raises(LorakitError, match=r"text_encoder_2.* is not one that a sd2 adapter can have"):
        keys.to_kohya_name(["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"], "sd2")


def test_siblings_of_an_attention_layer_are_its_four_projections():
    stem = "text_encoder.text_model.encoder.layers.7.self_attn."
    assert keys.text_attention_siblings(stem + "v_proj") == [
        stem + p for p in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    assert keys.text_attention_siblings("text_encoder.text_model.encoder.layers.7.mlp.fc1") == []
    assert keys.text_attention_siblings("unet.mid_block.attentions.0.proj_in") == []
