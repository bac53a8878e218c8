"""Tests that oneDNN's matrix product gives the result of torch's own kernel."""

import copy

import pytest
import torch
from torch import nn

from lorakit.engine import onednn_linear


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24), (0, 24)])
def test_a_onednn_layer_and_its_gradient_equal_torchs(bias: bool, shape: tuple[int, ...]) -> None:
    own, quick = layer(bias), layer(bias)
    onednn_linear.use_onednn_linear(quick)
    assert isinstance(quick, onednn_linear.FrozenLinear)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for module in (own, quick):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        outcomes.append((y.detach(), gradient, module(x)))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_transposed_inputs_work() -> None:
    module = layer()
    x = torch.randn(24, 7, generator=torch.Generator().manual_seed(1)).t()
    torch.testing.assert_close(onednn_linear.linear(x, module.weight, module.bias), module(x), rtol=1e-5, atol=1e-6)
    towards = torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        onednn_linear.linear(towards, module.weight.t()), towards @ module.weight, rtol=1e-5, atol=1e-6
    )


def test_a_layer_whose_weight_is_trained_keeps_torchs_gradients() -> None:
    quick = layer().requires_grad_(True)
    onednn_linear.use_onednn_linear(quick)
    quick(torch.ones(2, 24)).sum().backward()
    assert quick.weight.grad is not None and torch.equal(quick.weight.grad, torch.full((40, 24), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_left_to_torch(dtype: torch.dtype) -> None:
    module = layer().to(dtype)
    x = torch.randn(3, 24, dtype=dtype)
    assert torch.equal(onednn_linear.linear(x, module.weight, module.bias), module(x))
    onednn_linear.use_onednn_linear(module)
    assert type(module) is nn.Linear


def test_without_onednn_torchs_own_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "_onednn_works", lambda: False)
    module = layer()
    x = torch.randn(3, 24)
    assert torch.equal(onednn_linear.linear(x, module.weight, module.bias), module(x))


def test_a_model_with_onednn_layers_can_be_copied_and_saved() -> None:
    quick = nn.Sequential(layer())
    names = list(quick.state_dict())
    onednn_linear.use_onednn_linear(quick)
    x = torch.randn(3, 24)
    assert torch.equal(copy.deepcopy(quick)(x), quick(x)) and list(quick.state_dict()) == names
