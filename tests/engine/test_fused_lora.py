"""Tests of the fused forward and backward pass against PEFT's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import Conv2d, Linear
from torch import nn

from lorakit.adapters import lora
from lorakit.config import LoraConfig
from lorakit.engine import fused_lora

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 40),
    "linear without bias": lambda: nn.Linear(24, 40, bias=False),
    "conv 3x3": lambda: nn.Conv2d(24, 40, 3, padding=1),
    "conv 3x3 stride 2": lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1),
    "conv 1x1": lambda: nn.Conv2d(24, 40, 1),
}


def layers(kind: str, alpha: float, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return our layer and PEFT's on one base with the same float32 factors."""
    torch.manual_seed(0)
    base = KINDS[kind]().requires_grad_(False)
    base.weight.data = base.weight.data.to(dtype)
    if base.bias is not None:
        base.bias.data = base.bias.data.to(dtype)
    config = lora.lora(LoraConfig(rank=4, alpha=alpha), ["x"])
    classes = (fused_lora.FusedLinear, Linear) if isinstance(base, nn.Linear) else (fused_lora.FusedConv2d, Conv2d)
    result = [cls(base, "default", config=config, r=4, lora_alpha=alpha).eval() for cls in classes]
    for factor in ("lora_A", "lora_B"):
        shape = getattr(result[0], factor)["default"].weight.shape
        weight = 0.3 * torch.randn(shape)
        for layer in result:
            getattr(layer, factor)["default"].weight = nn.Parameter(weight.clone())
    return result[0], result[1]


def images(kind: str, dtype: torch.dtype) -> torch.Tensor:
    shape = (2, 9, 24) if kind.startswith("linear") else (2, 24, 7, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def outcome(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, and the gradients of x, A and B for a fixed output gradient."""
    y = layer(x)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [y, *torch.autograd.grad(y, inputs, towards)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [4.0, 1.0])
def test_outputs_and_gradients_equal_pefts(kind: str, alpha: float) -> None:
    ours, theirs = layers(kind, alpha, torch.float32)
    x = images(kind, torch.float32)
    for a, b in zip(outcome(ours, x), outcome(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_factor_gradients_are_float32_and_close(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = layers(kind, 2.0, dtype)
    actual, expected = outcome(ours, images(kind, dtype)), outcome(theirs, images(kind, dtype))
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32, torch.float32]
    for a, b in zip(actual, expected, strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < (0.01 if dtype is torch.bfloat16 else 0.002)


@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
def test_an_input_without_gradient_works(kind: str) -> None:
    ours, theirs = layers(kind, 4.0, torch.float32)
    x = images(kind, torch.float32).detach()
    for layer in (ours, theirs):
        layer(x).square().mean().backward()
    for factor in ("lora_A", "lora_B"):
        mine, peft = (getattr(layer, factor)["default"].weight.grad for layer in (ours, theirs))
        torch.testing.assert_close(mine, peft, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
def test_merging_and_other_special_cases_use_pefts_forward(kind: str) -> None:
    ours, theirs = layers(kind, 2.0, torch.float32)
    x = images(kind, torch.float32).detach()
    plain = ours(x)
    ours.merge()
    torch.testing.assert_close(ours(x), plain, rtol=1e-5, atol=1e-5)
    ours.unmerge()
    ours._disable_adapters = True
    assert torch.equal(ours(x), ours.base_layer(x))
    ours._disable_adapters = False

    ours.update_layer("second", 2, lora_alpha=2, config=lora.lora(LoraConfig(rank=2), ["x"]))
    nn.init.ones_(ours.lora_A["second"].weight)
    nn.init.ones_(ours.lora_B["second"].weight)
    torch.testing.assert_close(ours(x), plain, rtol=1e-5, atol=1e-5)
    ours.set_adapter(["default", "second"])
    both = theirs(x) + ours.lora_B["second"](ours.lora_A["second"](x))
    torch.testing.assert_close(ours(x), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
def test_a_trained_base_and_autocast_use_pefts_forward(kind: str) -> None:
    ours, theirs = layers(kind, 2.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (outcome(layer, images(kind, torch.float32)) for layer in (ours, theirs))
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b)
    ours.base_layer.requires_grad_(True)
    ours(images(kind, torch.float32)).square().mean().backward()
    assert ours.base_layer.weight.grad.abs().sum() > 0


def test_dropout_acts_on_the_adapters_input_alone() -> None:
    torch.manual_seed(0)
    config = lora.lora(LoraConfig(rank=4, dropout=0.5), ["x"])
    layer = fused_lora.FusedLinear(nn.Linear(24, 40), "default", config=config, r=4, lora_alpha=4).eval()
    nn.init.ones_(layer.lora_B["default"].weight)
    x = torch.randn(3, 24)
    still = layer(x)
    assert torch.equal(layer(x), still)
    layer.lora_dropout["default"].train()
    torch.manual_seed(1)
    dropped = layer(x)
    torch.manual_seed(1)
    dropped_out = torch.nn.functional.dropout(x, 0.5)
    expected = layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](dropped_out))
    torch.testing.assert_close(dropped, expected)
    assert not torch.equal(dropped, still)
