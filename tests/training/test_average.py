"""Tests of the average of the weights: its formula, its use in export, samples and validation, and resume."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from short_run import noise, run_config

from lorakit import config
from lorakit.adapters import average
from lorakit.adapters.weights import delta_norm
from lorakit.config import ConfigError
from lorakit.core.errors import LorakitError
from lorakit.inference import sampling
from lorakit.runs import memory_estimate, plan_lines
from lorakit.runs.run_folder import RunFolder
from lorakit.training import checkpoint_export, run as train
from lorakit.training.validation import Validation

pytestmark = pytest.mark.usefixtures("copied_modules")
DECAY, STEPS, LIMIT = 0.5, 4, 0.05


def recursion(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Return the formula's result in float64: m <- d m + (1 - d) w, with d at most (1 + n) / (10 + n)."""
    mean = weights[0].double()
    for number, weight in enumerate(weights[1:]):
        share = min(decay, (1 + number) / (10 + number))
        mean = share * mean + (1 - share) * weight.double()
    return mean


@pytest.mark.parametrize("decay", [0.15, 0.999])
def test_the_average_follows_the_formula(decay: float) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 5, generator=draw) for _ in range(7)]
    parameter = torch.nn.Parameter(weights[0].clone())
    mean = average.WeightAverage({"a": parameter}, decay)
    for number, weight in enumerate(weights[1:]):
        parameter.data.copy_(weight)
        mean.update(number)
    expected = recursion(weights, decay)
    torch.testing.assert_close(mean.tensors["a"].double(), expected, rtol=1e-5, atol=1e-6)
    own = mean.tensors["a"].clone()
    with pytest.raises(KeyError), mean.in_place(), mean.in_place():
        assert torch.equal(parameter, own)
        raise KeyError
    assert torch.equal(parameter, weights[-1]) and torch.equal(mean.tensors["a"], own)


@pytest.mark.slow
def test_the_average_is_exported_sampled_validated_and_resumed(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    photos, captured = noise(tmp_path / "photos", 2), dict[str, list[torch.Tensor]]()
    draw, examine = sampling.draw_part, Validation.run

    def spied_draw(family: Any, *args: Any, **options: Any) -> Any:
        captured.setdefault("draw", []).append(lora_weight(family.denoiser))
        return draw(family, *args, **options)

    def spied_run(self: Validation, *args: Any, **options: Any) -> Any:
        captured.setdefault("validate", []).append(lora_weight(self.family.denoiser))
        return examine(self, *args, **options)

    monkeypatch.setattr(sampling, "draw_part", spied_draw)
    monkeypatch.setattr(Validation, "run", spied_run)
    every = {"train__save_every": 1, "train__keep_checkpoints": 9, "train__validate_every": 2, "sample__every": 2}
    result = train.train(
        run_config(
            tiny_sd1,
            photos,
            tmp_path / "run",
            STEPS,
            train__ema_decay=DECAY,
            train__max_weight_norm=LIMIT,
            sample__prompts=("a toy",),
            **every,
        )
    )
    folders = [result.folder / "checkpoints" / f"step-{step:06d}" for step in range(STEPS + 1)]
    states = [load_file(folder / "adapter.safetensors") for folder in folders]
    last = {name for name in states[0] if not name.startswith(average.PREFIX)}
    for name in last:
        expected = recursion([state[name] for state in states], DECAY)
        mean = states[-1][average.PREFIX + name]
        torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-6)
    (down,) = [name for name in last if name.endswith("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.up")]
    assert not torch.equal(states[2][down], states[2][average.PREFIX + down])
    assert torch.equal(captured["draw"][0], states[2][average.PREFIX + down])
    assert torch.equal(captured["validate"][0], states[2][average.PREFIX + down])

    check_norms(result.folder, states[-1], last)
    exported = load_file(result.adapter)
    kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
    assert torch.equal(exported[kohya], states[-1][average.PREFIX + down])
    weights = checkpoint_export.read(folders[2])
    assert torch.equal(weights.layers[down.removesuffix(".up")].factors()["up"], states[2][average.PREFIX + down])

    shutil.copytree(result.folder, tmp_path / "copy")
    resumed = train.resume(tmp_path / "copy", from_checkpoint="step-000002")
    repeated = load_file(resumed.adapter)
    assert all(torch.equal(exported[name], repeated[name]) for name in exported)
    with pytest.raises(LorakitError, match=r"train.ema_decay cannot change from 0.5 to 0.9"):
        train.resume(tmp_path / "copy", overrides={"train.ema_decay": 0.9})


def check_norms(folder: Path, state: dict[str, torch.Tensor], last: set[str]) -> None:
    """No layer exceeds the limit, and the log counts the layers that were scaled."""
    norms = [
        delta_norm({factor: state[f"{layer}.{factor}"] for factor in ("down", "up")}, 1.0)
        for layer in {name.rpartition(".")[0] for name in last}
    ]
    assert max(norms) == pytest.approx(LIMIT, rel=1e-4)
    assert all(event["scaled_layers"] > 0 for event in RunFolder(folder).events("step"))


def lora_weight(denoiser: torch.nn.Module) -> torch.Tensor:
    layer: Any = denoiser.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    return layer.lora_B["default"].weight.detach().clone()  # type: ignore[no-any-return]


def test_the_plan_counts_and_explains_the_average(tiny_sd1: Path) -> None:
    from lorakit import families

    def planned(decay: float) -> config.Config:
        return config.load(None, {"model.base": str(tiny_sd1), "train.steps": 100, "train.ema_decay": decay})

    info, modules = families.describe(planned(0.0).model), {"unet": (10, 1000)}
    sizes = [memory_estimate.training(planned(decay), info, modules, "cpu") for decay in (0.0, 0.9)]
    assert sizes[1]["adapter and optimizer"] - sizes[0]["adapter and optimizer"] == 4000
    assert "about the last 10 steps" in plan_lines.averaging(0.9, 1000)
    assert "about the last 12 steps" in plan_lines.averaging(0.999, 100)
    assert math.isclose(average.decay_at(0.999, 99), 100 / 109)
    with pytest.raises(ConfigError, match=r"train.ema_decay = 1.0: must be between 0 and 0.99999"):
        planned(1.0)
