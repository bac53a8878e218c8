"""Tests that an inpainting UNet predicts as in diffusers' inpainting pipeline with a full mask."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from PIL import Image

from lorakit import config, families, formats
from lorakit.config import ModelConfig
from lorakit.training import run as train


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder and single file of a small SD1 inpainting model."""
    room = tmp_path_factory.mktemp("inpainting")
    pipeline = small_models.small("sd1", room / "base", in_channels=9)
    return room / "base", small_models.write(room / "base.safetensors", "sd1", pipeline)


def test_an_inpainting_model_is_recognized_in_both_layouts(bases: tuple[Path, Path]) -> None:
    for base, tokenizer in ((bases[0], ""), (bases[1], str(bases[0]))):
        info = families.describe(ModelConfig(base=str(base), tokenizer=tokenizer))
        assert info.notes[-1] == (
            "inpainting model: trained and drawn with the whole picture masked, that is from text alone"
        )
        assert (info.latent_channels, info.prediction_type) == (4, "epsilon")
        assert families.load(info, "cpu", torch.float32).denoiser.config.in_channels == 9


def test_a_prediction_equals_the_pipelines_with_a_full_mask(bases: tuple[Path, Path]) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    family = families.load(families.describe(bases[0]), "cpu", torch.float32)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(bases[0], local_files_only=True, safety_checker=None)
    mask, grey = pipeline.prepare_mask_latents(
        torch.ones((1, 1, 64, 48)), torch.zeros((1, 3, 64, 48)), 1, 64, 48, torch.float32, "cpu", None, False
    )
    noisy, steps = torch.randn((2, 4, 8, 6)), torch.tensor([3, 900])
    condition = family.encode_text(["a", "b"])
    # The pipeline samples the latent of grey from the posterior; this test uses the posterior's mean.
    mean = family.encode_image(torch.zeros((1, 3, 64, 48)))[0]
    assert (grey - mean).abs().max() < 6 * family.encode_image(torch.zeros((1, 3, 64, 48)))[1].max()
    inputs = torch.cat([noisy, mask.expand(2, -1, -1, -1), mean.expand(2, -1, -1, -1)], dim=1)
    with torch.no_grad():
        expected = pipeline.unet(inputs, steps, condition["encoder_hidden_states"]).sample
        torch.testing.assert_close(family.predict(noisy, steps, condition), expected, rtol=1e-5, atol=1e-6)
        # An input with nine channels is passed on unchanged.
        actual = family.denoiser(inputs, steps, condition["encoder_hidden_states"]).sample
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_inpainting_model_is_trained_checked_and_sampled(bases: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number in range(2):
        picture = draw.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "photos" / f"{number}.png")
    options: dict[str, Any] = {
        "model.base": str(bases[1]),
        "model.tokenizer": str(bases[0]),
        "data.folder": str(tmp_path / "photos"),
        "data.name": "sks toy",
        "data.resolution": 128,
        "adapter.rank": 2,
        "optimizer.learning_rate": 1e-2,
        "train.steps": 2,
        "train.validate_every": 2,
        "sample.every": 2,
        "sample.at_start": False,
        "train.validate_at_end": False,
        "sample.steps": 1,
        "sample.prompts": ("a photo of sks toy",),
        "memory.device": "cpu",
        "output.folder": str(tmp_path / "run"),
    }
    result = train.train(config.load(None, options))
    assert all(finding.passed for finding in result.findings)
    assert len(formats.read(result.adapter).layers) == 128
    assert "inpainting model: trained and drawn" in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8")
