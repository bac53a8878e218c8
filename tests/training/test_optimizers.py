"""Tests that optimizers follow their papers, and that the learning rate is a closed form of the step."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lorakit.config import OptimizerConfig
from lorakit.core import install, registry
from lorakit.core.errors import LorakitError
from lorakit.training import optimizers

NAMES = [name for name in registry.OPTIMIZERS if name != "paged_adamw8bit"]


def parameters(count: int = 3, size: int = 32) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn((size, size), generator=draw)) for _ in range(count)]


def goal(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter - 0.5).square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_reduces_the_loss(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=1.0 if name == "prodigy" else 1e-2)
    mine = parameters(size=64)
    optimizer = optimizers.build(config, [("unet", mine)])
    first = sum(goal(p) for p in mine).item()
    # Prodigy starts at a rate of 1e-6 and finds its rate in a few hundred steps.
    total = 300 if name == "prodigy" else 60
    for step in range(total):
        optimizers.set_learning_rate(optimizer, config, step, total)
        sum(goal(p) for p in mine).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(goal(p) for p in mine).item() < 0.8 * first


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_optimizer_continues_bit_by_bit(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=1e-2)

    def steps(mine: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimizers.set_learning_rate(optimizer, config, step, 6)
            (sum(goal(p) for p in mine) * (step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = parameters()
    steps(straight, optimizers.build(config, [("unet", straight)]), 0, 6)
    begun = parameters()
    optimizer = optimizers.build(config, [("unet", begun)])
    steps(begun, optimizer, 0, 3)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in begun]
    restored = optimizers.build(config, [("unet", resumed)])
    restored.load_state_dict(optimizer.state_dict())
    steps(resumed, restored, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_keeps_parameters_without_gradient(name: str) -> None:
    mine = parameters(2)
    optimizer = optimizers.build(OptimizerConfig(name=name, learning_rate=1e-2), [("unet", mine)])
    before = [p.detach().clone() for p in mine]
    goal(mine[0]).backward()
    optimizer.step()
    assert not torch.equal(mine[0], before[0])
    assert torch.equal(mine[1], before[1])


def test_adamw_follows_the_papers_formula() -> None:
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    mine = parameters(1)
    weight = mine[0].detach().double().numpy().copy()
    optimizer = optimizers.build(config, [("unet", mine)])
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 5):
        goal(mine[0]).backward()
        gradient = 2 * (weight - 0.5) / weight.size
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight = weight * (1 - 1e-2 * 0.1)
        weight -= 1e-2 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        optimizer.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(mine[0].detach().numpy(), weight, rtol=1e-4, atol=1e-6)


def test_lion_follows_the_papers_formula() -> None:
    config = OptimizerConfig(name="lion", learning_rate=1e-2, weight_decay=0.1)
    mine = parameters(1)
    weight = mine[0].detach().double().numpy().copy()
    optimizer = optimizers.build(config, [("unet", mine)])
    momentum = np.zeros_like(weight)
    for step in range(5):
        (goal(mine[0]) * (-1) ** step).backward()
        gradient = 2 * (weight - 0.5) / weight.size * (-1) ** step
        update = np.sign(0.9 * momentum + 0.1 * gradient)
        weight -= 1e-2 * (update + 0.1 * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
        optimizer.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(mine[0].detach().numpy(), weight, rtol=1e-4, atol=1e-6)


def test_adafactor_moves_a_parameter_that_begins_at_zero() -> None:
    zero = torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = optimizers.build(OptimizerConfig(name="adafactor", learning_rate=1e-3), [("unet", [zero])])
    goal(zero).backward()
    optimizer.step()
    assert zero.abs().mean().item() == pytest.approx(1e-3, rel=0.1)


def test_text_encoders_may_have_their_own_rate() -> None:
    groups = [(name, parameters(1)) for name in ("unet", "text_encoder", "text_encoder_2")]
    config = OptimizerConfig(learning_rate=1e-3, text_encoder_learning_rate=1e-5, warmup_steps=4)
    optimizer = optimizers.build(config, groups)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [
        ("unet", 1e-3),
        ("text_encoder", 1e-5),
        ("text_encoder_2", 1e-5),
    ]
    optimizers.set_learning_rate(optimizer, config, 0, 10)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2.5e-4, 2.5e-6, 2.5e-6])
    shared = replace(config, text_encoder_learning_rate=None)
    assert {g["lr"] for g in optimizers.build(shared, groups).param_groups} == {1e-3}


def test_weight_decay_is_applied_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        optimizer = optimizers.build(OptimizerConfig(name=name, weight_decay=0.37), [("unet", parameters(1))])
        assert optimizer.param_groups[0]["weight_decay"] == 0.37, name
    assert capsys.readouterr().out == ""


# -- the schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_rate_equals_the_closed_form(scheduler: str, warmup: int) -> None:
    total, peak = 40, 3e-4
    config = OptimizerConfig(learning_rate=peak, lr_scheduler=scheduler, warmup_steps=warmup)
    rates = [optimizers.learning_rate(config, step, total) for step in range(total + 1)]
    for step, rate in enumerate(rates):
        progress = (step - warmup) / (total - warmup)
        shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[scheduler]
        assert rate == pytest.approx(peak * ((step + 1) / warmup if step < warmup else shape), abs=1e-12)
    assert rates[0] > 0
    assert max(rates) == peak
    assert rates[total] == pytest.approx(peak if scheduler == "constant" else 0, abs=1e-15)


def test_the_rate_depends_only_on_step_and_total() -> None:
    # Accumulation and batch size are not arguments, so they cannot change the rate.
    config = OptimizerConfig(lr_scheduler="cosine", warmup_steps=3)
    forward = [optimizers.learning_rate(config, step, 20) for step in range(20)]
    assert [optimizers.learning_rate(config, step, 20) for step in reversed(range(20))] == forward[::-1]


def test_a_long_warm_up_and_steps_past_the_end_give_finite_rates() -> None:
    config = OptimizerConfig(learning_rate=1.0, lr_scheduler="linear", warmup_steps=10)
    assert optimizers.learning_rate(config, 4, 5) == 0.5
    assert optimizers.learning_rate(config, 10, 10) == 1.0
    assert optimizers.learning_rate(config, 99, 20) == 0
    assert optimizers.learning_rate(replace(config, lr_scheduler="cosine"), 99, 20) == pytest.approx(0, abs=1e-15)


# -- missing packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("adamw8bit", "bitsandbytes", "bnb"), ("prodigy", "prodigyopt", "prodigy")]
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    # None in sys.modules lets an import fail as if the package were missing.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LorakitError) as caught:
        optimizers.build(OptimizerConfig(name=name), [("unet", parameters(1))])
    assert str(caught.value) == f"optimizer.name = {name!r} needs {package}; {install.hint(extra)}"


def test_paged_state_needs_cuda() -> None:
    with pytest.raises(LorakitError, match="needs a CUDA device: choose 'adamw8bit' or 'adamw'"):
        optimizers.build(OptimizerConfig(name="paged_adamw8bit"), [("unet", parameters(1))])


def test_any_installed_optimizer_is_built_with_its_arguments() -> None:
    config = OptimizerConfig(name="torch.optim:RAdam", args={"betas": [0.8, 0.95]}, weight_decay=0.37)
    optimizer = optimizers.build(config, [("unet", parameters(1))])
    assert type(optimizer) is torch.optim.RAdam
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ([0.8, 0.95], 0.37, 1e-4)


def test_named_optimizers_take_arguments() -> None:
    for name in NAMES:
        betas = {} if name == "adafactor" else {"betas": [0.8, 0.95]}
        optimizer = optimizers.build(OptimizerConfig(name=name, args=betas), [("unet", parameters(1))])
        assert list(optimizer.param_groups[0].get("betas") or [0.8, 0.95]) == [0.8, 0.95], name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            OptimizerConfig(name="no_such_package.optim:Best"),
            "optimizer.name = 'no_such_package.optim:Best': the package no_such_package is not installed",
        ),
        (
            OptimizerConfig(name="torch.no_such_module:Best"),
            "optimizer.name = 'torch.no_such_module:Best': torch.no_such_module cannot be imported: "
            "No module named 'torch.no_such_module'",
        ),
        (OptimizerConfig(name="torch.optim:Best"), "optimizer.name = 'torch.optim:Best': torch.optim has no Best"),
        (
            OptimizerConfig(name="torch.nn:Linear"),
            "optimizer.name = 'torch.nn:Linear': Linear is not a torch.optim.Optimizer",
        ),
        (
            OptimizerConfig(name="math:sqrt"),
            "optimizer.name = 'math:sqrt': sqrt is not a torch.optim.Optimizer",
        ),
        (
            OptimizerConfig(name="torch.optim:Rprop", args={"beta": 1}),
            "optimizer.args.beta: Rprop has no such argument; it has lr, etas, step_sizes, capturable, foreach, "
            "maximize, differentiable",
        ),
        (
            OptimizerConfig(name="torch.optim:RAdam", args={"betas": [2.0, 0.9]}),
            "optimizer.args: RAdam refuses them: Invalid beta parameter at index 0: 2.0",
        ),
        (
            OptimizerConfig(name="torch.optim:Rprop", weight_decay=0.2),
            "optimizer.weight_decay: Rprop has no weight decay: leave it out",
        ),
        (
            OptimizerConfig(args={"beta": 1}),
            "optimizer.args: adamw does not take them: AdamW.__init__() got an unexpected keyword argument 'beta'",
        ),
    ],
)
def test_an_invalid_optimizer_is_refused_in_one_line(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(LorakitError) as caught:
        optimizers.build(config, [("unet", parameters(1))])
    assert str(caught.value) == message


def test_prodigy_has_one_rate() -> None:
    config = OptimizerConfig(name="prodigy", learning_rate=1.0, text_encoder_learning_rate=0.5)
    with pytest.raises(LorakitError, match=r"leave optimizer\.text_encoder_learning_rate, .* unset$"):
        optimizers.build(config, [("unet", parameters(1)), ("text_encoder", parameters(1))])
