"""Tests of other programs' files: every naming scheme in use, the right strength, and errors that name the layer."""

import json
import math

import pytest
import random_adapters
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

from lorakit.core.errors import LorakitError
from lorakit.formats import diffusers, kohya, peft, read

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
TEXT = "text_encoder.text_model.encoder.layers.0."
SHAPES = {f"{UNET}{part}": (16, 16) for part in ("to_q", "to_out.0")}
SHAPES |= {f"{TEXT}self_attn.{part}_proj": (12, 12) for part in ("q", "k", "v", "out")}
STEM = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.fixture
def weights():
    return random_adapters.adapter(SHAPES, "sd1", alpha=4)


def save_tensors(tmp_path, tensors, metadata=None):
    path = tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def assert_same(actual, weights, factor=1.0):
    assert set(actual.layers) == set(weights.layers)
    for name, layer in weights.layers.items():
        assert torch.allclose(actual.layers[name].delta(), layer.delta() * factor, atol=1e-6), name


def test_names_of_diffusers_training_script_are_read(tmp_path, weights):
    """diffusers' train_dreambooth_lora.py writes these names; the test uses diffusers' own converter."""
    tensors = convert_state_dict_to_diffusers(diffusers.tensors(weights, "fp32"))
    assert any(".lora.down.weight" in name or "lora_linear_layer" in name for name in tensors)
    assert_same(read(save_tensors(tmp_path, tensors)), weights)


def test_names_of_old_diffusers_are_read(tmp_path, weights):
    tensors = {}
    for name, tensor in diffusers.tensors(weights, "fp32").items():
        name = name.replace("lora_A", "down").replace("lora_B", "up")
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            name = name.replace(f"attn1.{part}.", f"attn1.processor.{part.removesuffix('.0')}_lora.")
        for part in "q", "k", "v", "out":
            name = name.replace(f"self_attn.{part}_proj.", f"self_attn.to_{part}_lora.")
        tensors[name] = tensor
    assert_same(read(save_tensors(tmp_path, tensors)), weights)


def test_text_encoder_names_of_new_transformers_are_read(tmp_path, weights):
    tensors = {
        name.replace("text_encoder.text_model.", "text_encoder."): tensor
        for name, tensor in diffusers.tensors(weights, "fp32").items()
    }
    assert_same(read(save_tensors(tmp_path, tensors)), weights)


def test_names_with_an_adapter_name_are_read(tmp_path, weights):
    tensors = {name.replace(".weight", ".default.weight"): t for name, t in diffusers.tensors(weights, "fp32").items()}
    assert_same(read(save_tensors(tmp_path, tensors)), weights)


@pytest.mark.parametrize(("extra", "factor"), [({}, 2.0), ({"unet.use_rslora": True}, 4.0)])
def test_alpha_is_read_from_the_header(tmp_path, weights, extra, factor):
    """diffusers' lora_adapter_metadata has alpha 8 at rank 4, once with use_rslora."""
    numbers = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 8} | extra
    if "unet.use_rslora" in extra:
        numbers["text_encoder.use_rslora"] = True
    path = save_tensors(tmp_path, diffusers.tensors(weights, "fp32"), {"lora_adapter_metadata": json.dumps(numbers)})
    assert_same(read(path), weights, factor)


def test_alpha_patterns_are_read_from_the_header(tmp_path, weights):
    numbers = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 12}}
    path = save_tensors(tmp_path, diffusers.tensors(weights, "fp32"), {"lora_adapter_metadata": json.dumps(numbers)})
    actual = read(path)
    assert actual.layers[f"{UNET}to_q"].alpha == 12 and actual.layers[f"{UNET}to_out.0"].alpha == 4


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [("attn1.to_q", 12), ("tn1.to_q", 4), (r"attn\d\.to_q", 12), (r"^down_blocks\.0.*to_q", 12), ("to_v|to_q", 12)],
)
def test_alpha_patterns_match_as_in_peft(tmp_path, weights, pattern, alpha):
    from peft.utils.other import get_pattern_key

    numbers = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 12}}
    path = save_tensors(tmp_path, diffusers.tensors(weights, "fp32"), {"lora_adapter_metadata": json.dumps(numbers)})
    name = f"{UNET}to_q".removeprefix("unet.")
    assert read(path).layers[f"{UNET}to_q"].alpha == alpha == (12 if get_pattern_key([pattern], name) == pattern else 4)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("([a-z0-9_.]+)+X", "could take forever"),
        (".*.*.*.*.*X", "could take forever"),
        ("(", "no regular expression"),
    ],
)
def test_a_dangerous_pattern_is_refused(tmp_path, weights, pattern, message):
    numbers = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 8}}
    path = save_tensors(tmp_path, diffusers.tensors(weights, "fp32"), {"lora_adapter_metadata": json.dumps(numbers)})
    with pytest.raises(LorakitError, match=message):
        read(path)


def test_a_rank_stabilised_peft_folder_is_read(tmp_path):
    weights = random_adapters.adapter(SHAPES, "sd1", rank=16, alpha=16)
    peft.write(weights, tmp_path / "p", dtype="fp32", metadata={})
    for config in (tmp_path / "p").glob("*/adapter_config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}))
    assert_same(read(tmp_path / "p"), weights, math.sqrt(16))


def test_one_component_of_a_peft_folder_is_read(tmp_path, weights):
    peft.write(weights, tmp_path / "p", dtype="fp32", metadata={})
    assert set(read(tmp_path / "p" / "unet").layers) == {name for name in SHAPES if name.startswith("unet.")}
    assert set(read(tmp_path / "p" / "text_encoder").layers) == {n for n in SHAPES if n.startswith("text")}


def test_a_missing_alpha_equals_the_rank(tmp_path, weights):
    tensors = {name: t for name, t in kohya.tensors(weights, "fp32").items() if not name.endswith(".alpha")}
    assert_same(read(save_tensors(tmp_path, tensors)), weights)


@pytest.mark.parametrize("alpha", [torch.tensor([2.0]), torch.tensor(2, dtype=torch.int64), torch.tensor(2.0).half()])
def test_alphas_of_every_dtype_and_shape_are_read(tmp_path, alpha):
    tensors = {f"{STEM}.lora_down.weight": torch.ones(4, 8), f"{STEM}.lora_up.weight": torch.ones(8, 4)}
    actual = read(save_tensors(tmp_path, tensors | {f"{STEM}.alpha": alpha}))
    assert actual.layers["unet.mid_block.attentions.0.proj_in"].alpha == 2.0


def test_sgm_names_at_another_depth_are_read_back(tmp_path):
    names = ["down_blocks.1.attentions.0.", "up_blocks.0.attentions.0.", "up_blocks.0.attentions.1."]
    shapes = {f"unet.{name}transformer_blocks.0.attn2.to_k": (8, 16) for name in names}
    weights = random_adapters.adapter(shapes, "sdxl")
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k.alpha" in load_file(path)
    assert_same(read(path), weights)


DOWN, UP = f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight"
GOOD = {DOWN: torch.ones(4, 8), UP: torch.ones(8, 4)}
UP1 = torch.ones(1)
REFUSED = {
    "names of no layer of Stable Diffusion and of no part that lorakit reads: 1, e.g. lora_unet_flux_blocks_0": {
        **GOOD,
        "lora_unet_flux_blocks_0.lora_down.weight": torch.ones(4, 8),
    },
    f"{STEM} has no up factor": {DOWN: torch.ones(4, 8)},
    f"the factors of {STEM} do not fit together": {DOWN: torch.ones(4, 8), UP: torch.ones(8, 3)},
    f"the alpha of {STEM} is not one number": {**GOOD, f"{STEM}.alpha": torch.ones(2)},
    f"the DoRA magnitude of {STEM} does not fit": {**GOOD, f"{STEM}.dora_scale": torch.ones(7, 1)},
    f"tensors of no method that lorakit reads: 1, e.g. {STEM}.lora_extra": {**GOOD, f"{STEM}.lora_extra": UP1},
    f"{STEM}.lora_up.weight holds NaN or infinity": {DOWN: GOOD[DOWN], UP: GOOD[UP] * float("nan")},
    f"{STEM}.alpha holds NaN or infinity": {**GOOD, f"{STEM}.alpha": torch.tensor(float("inf"))},
    "is there twice, the second time as lora_unet_middle_block_1_proj_in": {
        **GOOD,
        "lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(4, 8),
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_malformed_adapter_is_refused_by_name(tmp_path, message):
    with pytest.raises(LorakitError) as error:
        read(save_tensors(tmp_path, REFUSED[message]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_metadata_that_is_not_json_is_refused(tmp_path, weights):
    path = save_tensors(tmp_path, diffusers.tensors(weights, "fp32"), {"lora_adapter_metadata": "{"})
    with pytest.raises(LorakitError, match="its lora_adapter_metadata is no JSON object"):
        read(path)
