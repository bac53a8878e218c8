"""Tests of the golden runs on any machine: rounding may change results, but changed formulas fail.

`record.py --check` compares every bit on the machine that recorded the results. Another processor adds in another
order. With AVX, AVX2 and AVX-512 switched off on the recording machine (ATEN_CPU_CAPABILITY=default,
ONEDNN_MAX_CPU_ISA=SSE41), the ten runs differed by at most 2.3e-7 in a loss, 7.3e-6 in a gradient norm and 4.5e-6 in
the adapter. The limits are some forty times as large.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import short_run
import torch

import runs
from lorakit.config import lr_schedule
from lorakit.families.prediction import Epsilon, Flow, VPrediction
from lorakit.training import objective
from lorakit.training.optimizer_step import OptimizerStep

# Limits of relative differences: of each loss, of each gradient norm, and of all trained weights as one vector.
LOSS, GRADIENT_NORM, ADAPTER = 1e-5, 3e-4, 2e-4
# The run that is not marked slow.
QUICK = "sd1-lora"


@pytest.fixture(scope="module")
def golden_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], runs.Golden]:
    """Return a function that runs without the self-check, and writes and reads each base only once."""
    bases = tmp_path_factory.mktemp("bases")

    @functools.cache
    def base(family: str) -> str:
        return runs.save_base(family, bases / family)

    def run(name: str, folder: Path) -> runs.Golden:
        with pytest.MonkeyPatch.context() as patch:
            short_run.unchecked(patch)
            short_run.copy_modules(patch)
            return runs.run(name, folder, base(name.split("-")[0]))

    return run


def differences(result: runs.Golden, golden: runs.Golden) -> dict[str, float]:
    """Return each result that exceeds its limit, as a multiple of the limit."""
    assert len(result.losses) == len(golden.losses) == runs.STEPS
    assert result.adapter.keys() == golden.adapter.keys()
    squares = {key: np.square(value, dtype=np.float64).sum() for key, value in golden.adapter.items()}
    errors = {
        key: np.square(result.adapter[key] - value, dtype=np.float64).sum() for key, value in golden.adapter.items()
    }
    measured = {
        "losses": _worst(result.losses, golden.losses) / LOSS,
        "gradient norms": _worst(result.gradient_norms, golden.gradient_norms) / GRADIENT_NORM,
        "adapter": float(np.sqrt(sum(errors.values()) / sum(squares.values()))) / ADAPTER,
    }
    return {what: size for what, size in measured.items() if not size <= 1}


def _worst(values: list[float], expected: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in runs.NAMES]
)
def test_a_golden_run_gives_what_was_recorded(
    name: str, golden_run: Callable[[str, Path], runs.Golden], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = runs.read(name)
    if name == QUICK:  # a run whose formulas did not change does not end early
        end_at_a_difference(monkeypatch, golden)
    assert differences(golden_run(name, tmp_path), golden) == {}


def wrong_noise_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    right = objective.sample_noise
    monkeypatch.setattr(objective, "sample_noise", lambda g, shape, device, offset: right(g, shape, device, offset**2))


def wrong_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is wrong by 0.1 %."""
    for cls in (Epsilon, VPrediction, Flow):
        right = cls.target
        monkeypatch.setattr(cls, "target", lambda *arguments, right=right: right(*arguments) * 1.001)


def wrong_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offset that spreads a batch's timesteps reaches 0.9 instead of 1."""
    right = torch.rand
    monkeypatch.setattr(
        torch, "rand", lambda size, **arguments: right(size, **arguments) * (0.9 if size == () else 1.0)
    )


def wrong_huber(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "HUBER", 0.101)


def wrong_min_snr(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of v-prediction, although the model predicts epsilon."""
    monkeypatch.setattr(Epsilon, "min_snr_weights", VPrediction.min_snr_weights)


def wrong_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule is one step ahead."""
    right = lr_schedule.factor
    monkeypatch.setattr(lr_schedule, "factor", lambda config, step, total: right(config, step + 1, total))


def wrong_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW does not apply weight decay."""
    right = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda groups, **arguments: right(groups, **arguments | {"weight_decay": 0.0})
    )


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha / rank is wrong by 1 %."""
    monkeypatch.setitem(runs.METHODS, "lora", runs.METHODS["lora"] | {"adapter.alpha": 2.02})


class Noticed(Exception):
    """A step differs from the recorded one by more than its limit."""


def end_at_a_difference(monkeypatch: pytest.MonkeyPatch, golden: runs.Golden) -> None:
    """Make a run raise `Noticed` at the first step of which the loss or the gradient norm exceeds its limit."""
    train = OptimizerStep.__call__

    def compared(self: OptimizerStep, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss, norm = train(self, number)
        for what, value, expected, limit in (
            ("loss", loss, golden.losses[number], LOSS),
            ("gradient norm", norm, golden.gradient_norms[number], GRADIENT_NORM),
        ):
            if not (size := _worst([value.item()], [expected]) / limit) <= 1:
                raise Noticed(f"step {number + 1}: the {what} differs by {size:.3g} times its limit")
        return loss, norm

    monkeypatch.setattr(OptimizerStep, "__call__", compared)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sd1-lora", wrong_scale),
        ("sd1-lora", wrong_noise_offset),
        ("sd1-lora", wrong_target),
        ("sd1-lora", wrong_timesteps),
        ("sd1-lora", wrong_decay),
        ("sd1-lokr", wrong_huber),
        ("sd1-lokr", wrong_min_snr),
        ("sd1-lokr", wrong_schedule),
    ],
)
def test_a_changed_formula_is_noticed(
    name: str,
    change: Callable[[pytest.MonkeyPatch], None],
    golden_run: Callable[[str, Path], runs.Golden],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end_at_a_difference(monkeypatch, golden := runs.read(name))
    change(monkeypatch)
    try:
        result = golden_run(name, tmp_path)
    except Noticed as difference:
        print(name, change.__name__, difference)
    else:
        assert differences(result, golden)
