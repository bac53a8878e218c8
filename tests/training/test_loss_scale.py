"""Tests that an overflow of gradients in fp16 skips a step and changes nothing else but the scale."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import short_run
import torch

from lorakit.families import loading
from lorakit.training import run as train
from lorakit.training.loss_scale import LossScale
from lorakit.training.optimizers import Lion

GRADIENTS = [torch.tensor([1.0, -2.0]), torch.tensor([float("inf"), 1.0]), torch.tensor([0.5, 3.0])]
OPTIMIZERS = {
    "fused": lambda weights: torch.optim.AdamW([weights], lr=0.1, fused=True),
    "adamw": lambda weights: torch.optim.AdamW([weights], lr=0.1, capturable=False, foreach=False),
    "lion": lambda weights: Lion([weights], lr=0.1, weight_decay=0.1),
    "momentum": lambda weights: torch.optim.SGD([weights], lr=0.1, momentum=0.9),
}


def trained(name: str, order: list[int]) -> tuple[torch.Tensor, list[Any], float]:
    """Return weights, state and scale after steps with the gradients at these indices."""
    weights = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = OPTIMIZERS[name](weights)
    scale = LossScale(SimpleNamespace(gradient_scale=2.0**13, device=torch.device("cpu")))
    for index in order:
        weights.grad = GRADIENTS[index].clone()
        scale.step(optimizer, weights.grad.norm(), [weights.grad])
    return weights.detach(), list(optimizer.state[weights].values()), scale.scale.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [0, 2, 1, 1]])
def test_a_step_that_overflows_changes_only_the_scale(name: str, order: list[int]) -> None:
    weights, state, scale = trained(name, order)
    expected, states, _ = trained(name, [index for index in order if index != 1])
    assert torch.equal(weights, expected)
    assert all(torch.equal(a, b) for a, b in zip(state, states, strict=True))
    assert scale == 2.0 ** (13 - order.count(1))


def test_weights_stay_after_an_overflow_in_the_first_step() -> None:
    for name in OPTIMIZERS:
        assert trained(name, [1])[0].tolist() == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("scale", "ends"), [(2.0**29, True), (2.0**80, False)])
def test_a_run_in_fp16_continues_and_reports_skipped_steps(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, ends: bool
) -> None:
    monkeypatch.setattr(loading, "FP16_GRADIENT_SCALE", scale)
    (tmp_path / "photos").mkdir()
    photos = short_run.noise(tmp_path / "photos", 1)
    settings = short_run.run_config(tiny_sd1, photos, tmp_path / "run", 20, memory__mixed_precision="fp16")
    if ends:
        train.train(settings)
    else:
        with pytest.raises(train.NotFinite, match=r"step 14: the gradient is not finite .*mixed_precision = 'fp32'"):
            train.train(settings)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [entry["message"] for entry in log if entry["event"] == "warning" and "overflow" in entry["message"]]
    assert lines[0].startswith("step 1: gradients overflow in fp16, so the step is skipped (1 so far); their scale is ")
    steps = [entry["step"] for entry in log if entry["event"] == "step"]
    assert len(lines) + len(steps) == 20 if ends else len(lines) == 13
    if ends:
        states = sorted((tmp_path / "run" / "checkpoints").glob("*/state.json"))
        assert json.loads(states[-1].read_text())["extra"]["gradient_scale"] == scale / 2 ** len(lines)
