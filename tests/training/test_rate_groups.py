"""Tests of LoRA+: factor B learns at a multiple of A's rate, in flat tensors as in separate parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exercise import predict, randomize

from lorakit import adapters, config, families
from lorakit.config import ConfigError, LoraConfig, OptimizerConfig
from lorakit.core import registry
from lorakit.engine import flat_parameters
from lorakit.runs import preflight
from lorakit.training import optimizers

DTYPES = [torch.float32, torch.bfloat16]


def settings(**changes: object) -> config.Config:
    return config.load(None, {"train.steps": 1} | {name.replace("__", "."): value for name, value in changes.items()})


def expected_multiple(name: str, rates: OptimizerConfig) -> float:
    return rates.loraplus_lr_ratio if name.endswith(".up") else 1.0


def compare_with_torch(base: Any, dtype: torch.dtype, rates: OptimizerConfig, adapter_config: LoraConfig) -> None:
    """Two steps on flat tensors equal torch's AdamW over separate parameters with explicit rates."""

    def attached() -> tuple[Any, Any]:
        family = families.load(families.describe(base), "cpu", dtype)
        adapter = adapters.attach(family, adapter_config, seed=0, trigger="sks")
        randomize(adapter)
        return family, adapter

    plain, reference = attached()
    family, adapter = attached()
    start = adapter.state()
    adapters.optimize_blocks(family)
    groups, multiples = optimizers.rate_groups(rates, adapter.parameters())
    flats = adapters.flatten(family, adapter, groups=groups)
    optimizer = optimizers.build(rates, [(each.name, [each.weights]) for each in flats], multiples)
    theirs = [
        {"params": [parameter], "lr": rates.learning_rate * expected_multiple(name, rates)}
        for name, parameter in reference.parameters().items()
    ]
    torch_optimizer = torch.optim.AdamW(theirs, weight_decay=rates.weight_decay)
    for _ in range(2):
        optimizers.set_learning_rate(optimizer, rates, 0, 10)
        for each in flats:
            each.gradient.zero_()
        with flat_parameters.half_precision_pass(flats):
            predict(family, grad=True).float().square().mean().backward()
        predict(plain, grad=True).float().square().mean().backward()
        for parameter in reference.parameters().values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizers.step(optimizer)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    mine, allowed = adapter.state(), 1e-3 if dtype is torch.float32 else 0.3  # gradients near 0 may change their sign
    for name, tensor in reference.state().items():
        assert (mine[name] - tensor).norm() <= allowed * (tensor - start[name]).norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_b_learns_at_a_multiple_of_the_rate_of_a(tiny_sd1: Any, dtype: torch.dtype) -> None:
    rates = OptimizerConfig(learning_rate=1e-3, loraplus_lr_ratio=16.0)
    compare_with_torch(tiny_sd1, dtype, rates, LoraConfig(rank=4, alpha=2.0))


def test_a_schedule_keeps_the_multiple() -> None:
    rates = OptimizerConfig(learning_rate=1e-3, loraplus_lr_ratio=16.0, lr_scheduler="linear", warmup_steps=2)
    parameters = {f"unet.x.{factor}": torch.nn.Parameter(torch.zeros(2, 2)) for factor in ("down", "up")}
    optimizer = optimizers.build(rates, *optimizers.rate_groups(rates, parameters))
    for step in range(10):
        optimizers.set_learning_rate(optimizer, rates, step, 10)
        a, b = (group["lr"] for group in optimizer.param_groups)
        assert b == pytest.approx(16 * a)


@pytest.mark.parametrize(
    ("method", "why"), [("pissa", "both of them begin from the base"), ("loha", "has others"), ("lokr", "has others")]
)
def test_methods_without_such_factors_are_refused(method: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        settings(adapter__method=method, optimizer__loraplus_lr_ratio=16.0)
    assert settings(adapter__method="dora", optimizer__loraplus_lr_ratio=16.0)


@pytest.mark.parametrize("name", ["prodigy", "prodigyopt:Prodigy"])
def test_optimizers_with_a_single_rate_are_refused(name: str) -> None:
    lines = preflight._optimizer_problems(settings(optimizer__name=name, optimizer__loraplus_lr_ratio=4.0))
    assert [line for line in lines if "has one rate" in line and "loraplus_lr_ratio" in line]
    # The missing package is reported first.
    assert registry.unmet_needs("dadaptation:DAdaptAdam", has_cuda=False, one_rate=False)
    assert not registry.optimizer("torch.optim:Adadelta").single_rate
