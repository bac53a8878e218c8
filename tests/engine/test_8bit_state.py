"""Tests of bitsandbytes' 8-bit optimizers on one flat tensor: one step gives the same bits as separate parameters."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.config import OptimizerConfig
from lorakit.core import registry
from lorakit.engine import flat_parameters
from lorakit.training import optimizers

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
# Multiples of 256 values, and other sizes. By default bitsandbytes uses 8 bits from 4,096 values on.
SHAPES = [(16, 320), (7,), (33, 40), (320, 16), (64, 3, 3, 3), (256,), (2, 640)]
ALL = {"min_8bit_size": 1}


def parameters() -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def built(weights: list[torch.nn.Parameter], **args: Any) -> torch.optim.Optimizer:
    return optimizers.build(
        OptimizerConfig(name="adamw8bit", learning_rate=1e-2, weight_decay=0.1, args=args), [("unet", weights)]
    )


def as_flat(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    flat = flat_parameters.FlatParameters("unet", weights, registry.OPTIMIZERS["adamw8bit"].block_size)
    optimizer = built([flat.weights])
    flat_parameters.save_per_parameter(optimizer, [flat])
    return optimizer


def step(numbers: range, weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for number in numbers:
        draw = torch.Generator().manual_seed(number + 1)
        # gradients differ in scale: a block with a large and a small one would lose the small one
        for scale, parameter in enumerate(weights):
            gradient = torch.randn(parameter.shape, generator=draw) * 10.0**-scale
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.copy_(gradient)
        optimizer.step()


def test_one_flat_step_equals_steps_over_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = parameters(), parameters()
    optimizer, other = as_flat(one), built(two, **ALL)
    calls: list[int] = []
    for each in (optimizer, other):
        update = each.update_step
        monkeypatch.setattr(each, "update_step", lambda *args, update=update: (calls.append(1), update(*args)))
    step(range(4), one, optimizer)
    assert len(calls) == 4
    step(range(4), two, other)
    assert len(calls) == 4 + 4 * len(SHAPES)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    mine, theirs = optimizer.state_dict(), other.state_dict()
    torch.testing.assert_close(mine["state"], theirs["state"], rtol=0, atol=0)
    assert mine["param_groups"] == theirs["param_groups"]


@pytest.mark.parametrize("flat_first", [True, False])
@pytest.mark.parametrize("flat_second", [True, False])
def test_a_saved_state_continues_bit_by_bit(flat_first: bool, flat_second: bool) -> None:
    straight, weights = parameters(), parameters()
    step(range(6), straight, as_flat(straight))
    first = as_flat(weights) if flat_first else built(weights, **ALL)
    step(range(3), weights, first)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in weights]
    second = as_flat(resumed) if flat_second else built(resumed, **ALL)
    second.load_state_dict(first.state_dict())
    step(range(3, 6), resumed, second)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_float32_states_of_small_parameters_become_8_bits() -> None:
    alone, together = parameters(), parameters()
    first = built(alone)  # five of the seven parameters have float32 state
    step(range(3), alone, first)
    for mine, theirs in zip(together, alone, strict=True):
        mine.data.copy_(theirs.data)
    second = as_flat(together)
    second.load_state_dict(first.state_dict())
    step(range(3, 4), alone, first)
    step(range(3, 4), together, second)
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3)  # a step changes a weight by about 1e-2


def test_shared_memory_remains_if_blocks_end_with_parameters() -> None:
    for rank, together in ((4, True), (3, False)):
        shared = torch.randn(3, rank, 320)
        flat = flat_parameters.FlatParameters("unet", [torch.nn.Parameter(part) for part in shared], 256)
        starts = [each.storage_offset() for each in flat.parameters]
        assert (starts == [0, rank * 320, 2 * rank * 320]) == together
        assert all(start % 256 == 0 for start in starts)
        assert torch.equal(torch.stack([each.detach() for each in flat.parameters]), shared)


def test_an_overflow_in_fp16_keeps_state_and_step_count() -> None:
    from lorakit.training.loss_scale import LossScale

    weights = parameters()
    optimizer, scale = as_flat(weights), LossScale(SimpleNamespace(gradient_scale=2.0**13, device=torch.device("cpu")))
    step(range(2), weights, optimizer)
    before = [weight.detach().clone() for weight in weights]
    gradients = [weight.grad for weight in weights]
    gradients[0].fill_(torch.inf)
    scale.step(optimizer, torch.tensor(torch.inf), gradients)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert {state["step"] for state in optimizer.state_dict()["state"].values()} == {2}
    assert scale.scale.item() == 2.0**12
