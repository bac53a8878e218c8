"""Tests of optimizers that average the weights themselves and set the average in eval mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.adapters.average import OptimizerAverage
from lorakit.config import OptimizerConfig, optimizer_builder

# Gradient descent whose eval mode sets the mean of all weights. Like schedule-free optimizers, it needs train mode.
MODULE = """
import torch

class Mean(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.training = None

    def step(self):
        assert self.training, "not in train mode"
        super().step()
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["sum"], state["count"] = state.get("sum", 0) + p.detach(), state.get("count", 0) + 1

    def train(self):
        if self.training is False:
            for p in self.param_groups[0]["params"]:
                p.data.copy_(self.state[p]["last"] + 1e-7)  # rounds otherwise
        self.training = True

    def eval(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["last"] = p.detach().clone()
            p.data.copy_(self.state[p]["sum"] / self.state[p]["count"])
        self.training = False
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OptimizerConfig:
    (tmp_path / "mean_sgd.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return OptimizerConfig(name="mean_sgd:Mean", learning_rate=0.1)


def test_the_optimizers_average_is_copied_without_changing_weights(config: OptimizerConfig) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 5, generator=draw))
    gradients = [torch.randn(3, 5, generator=draw) for _ in range(4)]
    optimizer = optimizer_builder.build(config, [{"params": [weight], "name": "unet", "lr": 0.1}])
    average = OptimizerAverage({"a": weight}, optimizer)
    expected, mean = weight.detach().clone(), torch.zeros(3, 5)
    for number, gradient in enumerate(gradients):
        weight.grad = gradient
        optimizer.step()
        average.update(number)
        expected = expected - 0.1 * gradient
        mean += expected / len(gradients)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(average.tensors["a"], mean)
    last = weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(weight.detach(), mean)
    assert torch.equal(weight, last)


def test_a_trial_step_uses_train_mode_and_two_averages_are_refused(config: OptimizerConfig) -> None:
    assert optimizer_builder.problem(config, has_cuda=False) is None
    line = "train.ema_decay: mean_sgd:Mean keeps an average itself: leave it out"
    assert optimizer_builder.problem(config, has_cuda=False, has_ema=True) == line
