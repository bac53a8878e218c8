"""Tests that headers are compared with configurations before loading, by the shapes that the libraries create."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors_by_hand
import small_models
import tiny
import torch
from diffusers import AutoencoderKL
from refusal import refusal
from test_single_file_forms import DISTILLED
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorakit import config, families
from lorakit.config import ModelConfig
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.families.facts import fit
from lorakit.runs import preflight

MAKERS: dict[str, Any] = {"unet": fit._unet, "vae": fit._vae}


def of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


UNETS = {
    **{family: (family, {}) for family in small_models.UNETS},
    **DISTILLED,
    "LCM": ("sd1", {"time_cond_proj_dim": 256}),
    "inpainting": ("sd1", {"in_channels": 9}),
}


@pytest.mark.parametrize("name", UNETS)
def test_unets_have_the_tensors_that_diffusers_makes(name: str) -> None:
    family, changes = UNETS[name]
    with torch.device("meta"):
        unet = small_models.unet(family, **(small_models.SMALL[family] if name in DISTILLED else {}) | changes)
    assert dict(fit._unet(unet.config)) == of(unet)


@pytest.mark.parametrize("channels", [4, 16])
def test_autoencoders_have_the_tensors_that_diffusers_makes(channels: int) -> None:
    options = {"use_quant_conv": channels == 4, "use_post_quant_conv": channels == 4, "latent_channels": channels}
    with torch.device("meta"):
        vae = AutoencoderKL.from_config({**small_models.vae("sd1").config, **options})
    assert dict(fit._vae(vae.config)) == of(vae)


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoders_have_the_tensors_that_transformers_makes(cls: Any) -> None:
    text = CLIPTextConfig(hidden_size=64, intermediate_size=96, projection_dim=48, num_attention_heads=1)
    text.architectures = [cls.__name__]
    with torch.device("meta"):
        model = cls(text)
    names = {n if n.startswith("text_") else f"text_model.{n}": shape for n, shape in of(model).items()}
    assert dict(fit._text(text.to_dict())) == {n: s for n, s in names.items() if not n.endswith("position_ids")}


def test_the_tests_bases_match_their_configurations(tiny_sdxl: Path, tiny_sd1: Path) -> None:
    for base in ("pocket", tiny_sdxl, tiny_sd1):
        configs = families.describe(base).configs
        for component in configs.keys() - {"scheduler", "model_index"}:
            assert len(dict(MAKERS.get(component, fit._text)(configs[component]))) > 30


# -- misfits are found without loading a model ------------------------------------------------------------------------


ATTENTION = "mid_block.attentions.0"
BAD: dict[str, tuple[str, str, tuple[int, ...] | None, str]] = {
    "few words": (
        "text_encoder",
        "text_model.embeddings.token_embedding.weight",
        (400, 32),
        "has text_encoder.text_model.embeddings.token_embedding.weight in the shape 400x32 where its "
        "text_encoder/config.json has 523x32",
    ),
    "few positions": (
        "text_encoder",
        "text_model.embeddings.position_embedding.weight",
        (64, 32),
        "position_embedding.weight in the shape 64x32 where its text_encoder/config.json has 77x32",
    ),
    "linear": (
        "unet",
        f"{ATTENTION}.proj_in.weight",
        (64, 64),
        f"has unet.{ATTENTION}.proj_in.weight in the shape 64x64",
    ),
    "transposed": (
        "unet",
        "down_blocks.1.resnets.0.conv1.weight",
        (32, 64, 3, 3),
        "in the shape 32x64x3x3 where its unet/config.json has 64x32x3x3",
    ),
    "cut": ("vae", "decoder.conv_in.weight", (16, 2, 3, 3), "has vae.decoder.conv_in.weight in the shape 16x2x3x3"),
    "lost": ("unet", "up_blocks.0.resnets.1.norm2.bias", None, "lacks unet.up_blocks.0.resnets.1.norm2.bias: get the"),
    "lost word": (
        "text_encoder",
        "text_model.final_layer_norm.bias",
        None,
        "lacks text_encoder.text_model.final_layer_norm.bias",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_tensor_that_does_not_fit_is_found_by_check(name: str, tiny_sd1: Path, tmp_path: Path) -> None:
    component, key, shape, words = BAD[name]
    folder = shutil.copytree(tiny_sd1, tmp_path / "base")
    (file,) = (folder / component).glob("*.safetensors")
    tensors = {n: info.shape for n, info in safetensors_header.read(file).tensors.items()}
    assert key in tensors
    safetensors_by_hand.write(file, {n: s for n, s in (tensors | {key: shape}).items() if s is not None})
    assert words in refusal(folder)
    # `check` and `train` use the same preflight.
    ready = preflight.preflight(
        config.load(None, {"model.base": str(folder), "data.folder": str(tmp_path), "train.steps": 1})
    )
    assert any(words in problem for problem in ready.problems)


def test_a_tokenizer_of_another_model_is_found_by_check(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd1, tmp_path / "base")
    shutil.rmtree(folder / "tokenizer")
    tiny.save_tokenizer(folder / "tokenizer", size=600)
    assert f"tokenizer of base {folder} knows 600 words where its text encoder has 523: get the base again" in refusal(
        folder
    )
    (folder / "tokenizer" / "vocab.json").write_text("[1]", encoding="utf-8")
    assert f"tokenizer of base {folder} is damaged: get the base again" in refusal(folder)


def test_text_encoders_of_another_model_are_found_by_check(tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd1, tmp_path / "base")
    shutil.rmtree(folder / "unet")
    shutil.copytree(tiny_sdxl / "unet", folder / "unet")
    words = "base base: its UNet attends to texts of width 64, and its text encoders make 32: get the base again"
    assert refusal(folder) == words


def test_a_vae_of_another_shape_is_found_by_check(tiny_sd1: Path, tmp_path: Path) -> None:
    vae = shutil.copytree(tiny_sd1 / "vae", tmp_path / "vae")
    (file,) = vae.glob("*.safetensors")
    tensors = {n: info.shape for n, info in safetensors_header.read(file).tensors.items()}
    safetensors_by_hand.write(file, tensors | {"encoder.conv_in.weight": (8, 4, 3, 3)})
    with pytest.raises(
        LorakitError, match=r"^model\.vae: .* has vae\.encoder\.conv_in\.weight in the shape 8x4x3x3 wh"
    ):
        families.describe(ModelConfig(base=str(tiny_sd1), vae=str(vae)))


def test_an_unusual_configuration_is_not_checked(tiny_sd1: Path) -> None:
    info = families.describe(tiny_sd1)
    for component, change in (
        ("unet", {"class_embed_type": "timestep"}),
        ("unet", {"down_block_types": ["KDownBlock2D", "DownBlock2D"]}),
        ("vae", {"down_block_types": ["Other"] * 4}),
        ("text_encoder", {"model_type": "bert"}),
    ):
        fit.require("x", component, info.configs[component] | change, {}, "y")
    with pytest.raises(LorakitError, match=r"x lacks vae\.encoder\.conv_in\.weight"):
        fit.require("x", "vae", info.configs["vae"], {}, "y")


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("unet", {"attention_head_dim": 7}, "attention_head_dim = 7, but 32 channels are no multiple"),
        ("unet", {"attention_head_dim": [8, 8, 0, 8]}, "attention_head_dim = 0, but 64 channels"),
        ("unet", {"norm_num_groups": 48}, "norm_num_groups = 48, but 32 channels"),
        ("text_encoder", {"num_attention_heads": 5}, "num_attention_heads = 5, but 64 channels"),
    ],
)
def test_a_width_that_is_not_a_multiple_of_its_heads_is_refused(part: str, changes: dict[str, Any], words: str) -> None:
    values = small_models.UNETS["sd1"] | small_models.SMALL["sd1"] | {"_class_name": "UNet2DConditionModel"}
    if part != "unet":
        values = {"model_type": "clip_text_model", "hidden_size": 64, "num_attention_heads": 1}
    with pytest.raises(LorakitError, match=f"base x: its config.json has {words}"):
        fit._require_shares("base x", values | changes, "its config.json")
    fit._require_shares("base x", values, "its config.json")
