"""Tests of training from a single-file base that has every block of the real models in small widths."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import short_run
import small_models
import torch
from PIL import Image
from safetensors.torch import load_file

from lorakit import config, families, formats
from lorakit.cli import main as cli
from lorakit.families.prediction import VPrediction
from lorakit.runs.run_folder import RunFolder
from lorakit.training import run as train
from lorakit.training.optimizer_step import OptimizerStep
from lorakit.training.run import Stopped

FORMATS = ("kohya", "diffusers", "peft")
pytestmark = pytest.mark.usefixtures("short_validation")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures that are cropped to 64 x 64: one at its sides, one at top and bottom."""
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate([(70, 64), (64, 72)]):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def options(base: Path, tokenizer: Path, photos: Path, folder: Path, **changes: Any) -> config.Config:
    short = {
        "model.base": str(base),
        "model.tokenizer": str(tokenizer),
        "data.folder": str(photos),
        "data.name": "sks toy",
        "data.resolution": 64,
        "adapter.rank": 2,
        "optimizer.learning_rate": 1e-2,
        "train.steps": 2,
        "train.save_every": 1,
        "train.validate_every": 2,
        "sample.every": 2,
        "sample.at_start": False,
        "train.validate_at_end": False,
        "sample.steps": 1,
        "sample.prompts": ("a photo of sks toy",),
        "memory.device": "cpu",
        "output.folder": str(folder),
        "output.dtype": "fp32",
        "output.formats": FORMATS,
    }
    return config.load(None, short | {name.replace("__", "."): value for name, value in changes.items()})


def log(folder: Path) -> str:
    return (folder / "log.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
def test_train_stop_resume_and_export_agree_in_three_formats(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is a small form of the run at full size (benchmarks/full_size.py)."""
    base = small_models.write(
        tmp_path / "base.safetensors", "sd1", small_models.small("sd1", tmp_path / "base"), torch.bfloat16
    )
    # The middle block then has 2 x 2 positions; with one position, q and k learn nothing.
    size = {"data__resolution": 128, "adapter__train_text_encoder": True}
    settings = options(base, tmp_path / "base", photos, tmp_path / "run", **size)
    step = OptimizerStep.__call__

    def step_and_stop(self: OptimizerStep, number: int) -> Any:
        RunFolder(tmp_path / "run").request_stop()
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(OptimizerStep, "__call__", step_and_stop)
        with pytest.raises(Stopped, match="stopped after step 1"):
            train.train(settings)
    result = train.resume(tmp_path / "run")
    assert result.steps == 2 and all(finding.passed for finding in result.findings)
    assert tuple(result.exports) == FORMATS
    read = {name: formats.read(path) for name, path in result.exports.items()}
    first = read["kohya"].layers
    assert sum(name.startswith("unet.") for name in first) == 16 * 8
    assert sum(name.startswith("text_encoder.") for name in first) == 3 * 4
    for weights in read.values():
        assert weights.layers.keys() == first.keys() and weights.family == "sd1"
        for name, layer in weights.layers.items():
            torch.testing.assert_close(layer.delta(), first[name].delta(), rtol=1e-6, atol=1e-8)
    assert "prediction type: epsilon, as nothing in the file says otherwise" in log(tmp_path / "run")
    # `lorakit sample` draws the last picture of the run again.
    picture_folder = tmp_path / "drawn"
    arguments = [
        "--base",
        str(base),
        "--set",
        f"model.tokenizer={tmp_path / 'base'}",
        "--set",
        "sample.prompts=a photo of sks toy",
    ]
    assert cli.main(["sample", str(result.adapter), *arguments, "--output", str(picture_folder)]) == 0
    (last,) = (tmp_path / "run" / "samples" / "step-000002").glob("*.png")
    assert np.array_equal(*(np.asarray(Image.open(path)) for path in (picture_folder / "01-strength-1.png", last)))
    short_run.unchecked(monkeypatch)
    straight = train.train(options(base, tmp_path / "base", photos, tmp_path / "straight", **size))
    one, two = load_file(straight.adapter), load_file(result.adapter)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_sdxl_with_v_prediction_and_zero_terminal_snr_is_trained(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test follows v-prediction from the keys in the file to the last timestep and the sampler's first one."""
    pipeline = small_models.small("sdxl", tmp_path / "base", "v_prediction", zero_snr=True)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    base = small_models.write(tmp_path / "base.safetensors", "sdxl", pipeline, extra=marks)
    steps: list[int] = []
    ids: list[list[int]] = []
    noised = VPrediction.add_noise

    def watch(self: Any, latents: Any, noise: Any, timesteps: Any) -> Any:
        steps.extend(timesteps.tolist())
        assert self.alphas_cumprod[999] == 0 and self.alphas_cumprod[0] == pytest.approx(1 - 0.00085, abs=1e-6)
        return noised(self, latents, noise, timesteps)

    monkeypatch.setattr(VPrediction, "add_noise", watch)
    # Draw the last of the values from 0 to 1: timestep 999 in every step.
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **how: rand(*size, **how) * 0 + (1 - 1e-7))
    from lorakit.families.sdxl.model import StableDiffusionXL

    predicted = StableDiffusionXL.predict

    def predict(self: Any, noisy: Any, timesteps: Any, condition: Any) -> Any:
        ids.extend(condition["time_ids"].tolist())
        return predicted(self, noisy, timesteps, condition)

    monkeypatch.setattr(StableDiffusionXL, "predict", predict)
    settings = options(
        base,
        tmp_path / "base",
        photos,
        tmp_path / "run",
        data__flip=True,
        data__variants=2,
        output__formats=("kohya",),
    )
    result = train.train(settings)
    assert all(finding.passed for finding in result.findings)
    assert 999 in steps
    # Original height and width, crop from top and left, and target size; also of a mirrored variant.
    assert {tuple(row) for row in ids} >= {(64, 70, 0, 3, 64, 64), (72, 64, 4, 0, 64, 64)}
    family = families.load(families.describe(settings.model), "cpu", torch.float32)
    assert family.prediction.name == "v_prediction" and family.prediction.alphas_cumprod[-1] == 0
    sampler, name = family.prediction.default_sampler(family.pipeline().scheduler)
    sampler.set_timesteps(10)
    assert name == "DDIM" and sampler.timesteps[0] == 999
    assert sampler.config.rescale_betas_zero_snr and sampler.config.timestep_spacing == "trailing"
    assert "prediction type: v_prediction with zero terminal SNR, as its key v_pred says" in log(tmp_path / "run")
    read = formats.read(result.adapter)
    assert read.metadata["modelspec.prediction_type"] == "v" and read.family == "sdxl"
