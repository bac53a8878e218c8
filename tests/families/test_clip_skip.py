"""Tests of `model.clip_skip`: texts are read at the layer of web UIs and diffusers, in plan, file and sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_sd3
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from lorakit import config, families
from lorakit.config import LoraConfig, ModelConfig
from lorakit.core.errors import LorakitError
from lorakit.formats import metadata
from lorakit.inference import sampling

TEXTS = ["a photo of sks toy", "sks"]


def load(base: Path, skip: int | None) -> Any:
    return families.load(families.describe(ModelConfig(base=str(base), clip_skip=skip)), "cpu", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_sd1_equals_diffusers_with_clip_skip_less_by_one(tiny_sd1: Path, skip: int) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    # diffusers expects the layer norm in `text_model`; this version of transformers has it in the encoder.
    pipeline.text_encoder.__dict__.setdefault("text_model", pipeline.text_encoder)
    expected = pipeline.encode_prompt(TEXTS, "cpu", 1, False, clip_skip=skip - 1)[0]
    family = load(tiny_sd1, skip)
    torch.testing.assert_close(family.encode_text(TEXTS)["encoder_hidden_states"], expected)
    # Prompts of samples are read at the same layer.
    torch.testing.assert_close(family.encode_prompt(TEXTS[0])["encoder_hidden_states"], expected[:1])
    plain = load(tiny_sd1, None).encode_text(TEXTS)["encoder_hidden_states"]
    assert torch.equal(plain, family.encode_text(TEXTS)["encoder_hidden_states"]) == (skip == 1)


def test_sdxl_defaults_to_2_and_equals_diffusers_with_less_by_two(tiny_sdxl: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    for skip, theirs in ((None, None), (2, None), (2, 0), (3, 1)):
        expected, _, pooled, _ = pipeline.encode_prompt(
            TEXTS, device="cpu", do_classifier_free_guidance=False, clip_skip=theirs
        )
        condition = load(tiny_sdxl, skip).encode_text(TEXTS)
        torch.testing.assert_close(condition["encoder_hidden_states"], expected)
        torch.testing.assert_close(condition["pooled"], pooled)


def test_clip_skip_is_refused_where_it_has_no_effect(tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    for base, skip, reason in (
        (tiny_sd1, 4, r"model\.clip_skip must be 1 \(its own\) to 3, not 4"),
        (tiny_sdxl, 1, r"model\.clip_skip must be 2 \(its own\) to 3, not 1"),
        (
            tiny_sd3.save_sd3(tmp_path / "sd3"),
            2,
            r"no program reads its texts at another layer: leave model\.clip_skip",
        ),
    ):
        with pytest.raises(LorakitError, match=reason):
            families.describe(ModelConfig(base=str(base), clip_skip=skip))
    notes = families.describe(ModelConfig(base=str(tiny_sd1), clip_skip=2)).notes
    assert "clip skip 2: texts are read at layer 2 of 3" in notes


@pytest.mark.parametrize(("skip", "untrained"), [(None, set()), (2, {2}), (3, {1, 2})])
def test_layers_after_clip_skip_get_no_gradient_and_are_listed(
    tiny_sd1: Path, skip: int | None, untrained: set[int], attach: Any
) -> None:
    family = load(tiny_sd1, skip)
    adapter = attach(family, LoraConfig(rank=2, train_text_encoder=True))
    family.encode_tokens(family.tokens(TEXTS), grad=True)["encoder_hidden_states"].square().sum().backward()
    idle = {
        int(name.split("layers.")[1].split(".")[0])
        for name, parameter in adapter.parameters().items()
        if name.startswith("text_encoder.") and name.endswith(".up") and parameter.grad is None
    }
    assert idle == untrained
    assert {int(name.split("layers.")[1].split(".")[0]) for name in family.info.untrained_layers} == untrained


def test_a_files_metadata_has_clip_skip_and_sample_uses_it(tiny_sd1: Path) -> None:
    settings = config.load(None, {"train.steps": 1, "model.clip_skip": 2, "data.name": "sks toy"})
    base = families.describe(tiny_sd1)
    facts = {"name": "a", "images": 1, "steps": 1, "epochs": 1, "times": (0.0, 1.0)}
    paths = metadata.build(settings, base, **facts)
    assert (paths["ss_clip_skip"], paths["modelspec.encoder_layer"]) == ("2", "2")
    assert "ss_clip_skip" not in metadata.build(config.load(None, {"train.steps": 1}), base, **facts)
    assert sampling._recorded(paths, {}).model.clip_skip == 2
    assert sampling._recorded(paths, {"model.clip_skip": 1}).model.clip_skip == 1


@pytest.mark.parametrize(
    ("version", "skip", "expected"),
    [("sd_v1", "2", 2), ("sd_v1", "None", None), ("sd_v1", "1", None), ("sdxl_base_v1-0", "1", None), ("", "2", None)],
)
def test_clip_skip_is_read_from_other_programs_files(version: str, skip: str, expected: int | None) -> None:
    arguments = {"ss_base_model_version": version, "ss_clip_skip": skip}
    assert sampling._recorded(arguments, {}).model.clip_skip == expected
    if expected:
        assert sampling._recorded(arguments, {"model.clip_skip": 1}).model.clip_skip == 1


def test_sample_reports_the_clip_skip_of_a_file(tiny_sd1: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    names = {f"lora_unet_mid_block_attentions_0_proj_in.{part}.weight" for part in ("lora_down", "lora_up")}
    facts = {"ss_base_model_version": "sd_v1", "ss_clip_skip": "2"}
    save_file({name: torch.ones(4, 4) for name in names}, tmp_path / "a.safetensors", metadata=facts)
    findings = sampling.findings(tmp_path / "a.safetensors", ["a"], base=str(tiny_sd1), overrides={})
    assert findings == ["clip skip 2, as the adapter or --set says"]
    assert sampling.findings(tmp_path / "a.safetensors", ["a"], base="pocket", overrides={"model.clip_skip": 1}) == [
        "clip skip 1, as the adapter or --set says"
    ]


def test_a_pictures_parameters_have_clip_skip(tiny_sd1: Path) -> None:
    from lorakit.config import SampleConfig

    (picture,) = sampling.draw(load(tiny_sd1, 2), ["a"], SampleConfig(steps=1), 64)
    assert ", Clip skip: 2, " in picture.info["parameters"]
