"""Tests of matrix products in int8 with quantized activations: exact sums of codes, forward and backward, and the cases
in which the weight is dequantized instead."""

import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lorakit.core.errors import LorakitError
from lorakit.engine import kernels, onednn_linear, quantized_kernels, quantized_weight

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(dtype: torch.dtype, sides: tuple[int, int] = (64, 48), bias: bool = True, scheme: str = "w8a8") -> nn.Linear:
    torch.manual_seed(0)
    result = nn.Linear(*sides, bias=bias).to(dtype).requires_grad_(False)
    result.weight = nn.Parameter(quantized_weight.quantize(result.weight, scheme), requires_grad=False)
    return result


def codes_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes of the rows as float64, and the rows' scales."""
    scale = x.double().abs().amax(1, keepdim=True) / 127
    return (x.double() / scale + 0.5).floor(), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40, 64), (2, 20, 64)], ids=str)
def test_a_layer_multiplies_codes_forward_and_backward(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    linear = layer(dtype, bias=bias)
    weight: Any = linear.weight
    x = torch.randn(shape).to(dtype).requires_grad_()
    towards = torch.randn(*shape[:-1], 48).to(dtype)
    y = linear(x)
    y.backward(towards)
    codes, scale = codes_of(x.detach().view(-1, 64))
    scales = weight.scales.double()
    expected = (codes @ weight.qdata.double().t()) * scale * scales.t()
    if bias:
        expected = expected + linear.bias.double()
    allowed = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y.detach().view(-1, 48).double(), expected, **allowed)
    codes, scale = codes_of(towards.view(-1, 48).double() * scales.t())
    if dtype is torch.float32:  # in half precision a code may be rounded differently
        allowed = {"rtol": 1e-5, "atol": 1e-5}
    expected = (codes @ weight.qdata.double()) * scale
    close = (x.grad.view(-1, 64).double() - expected).norm() / expected.norm()
    assert close < (1e-5 if dtype is torch.float32 else 5e-3)
    # The exact product differs by the quantization error.
    plain = functional.linear(x.detach(), weight.dequantize(), linear.bias)
    assert 1e-4 < (y - plain).float().norm() / plain.float().norm() < 2e-2


def test_each_row_has_its_own_scale() -> None:
    linear, x = layer(torch.float32, bias=False), torch.zeros(32, 64)
    x[1], x[2, 5] = torch.randn(64), 1e6
    expected = functional.linear(x, linear.weight.dequantize())
    torch.testing.assert_close(linear(x), expected, rtol=5e-2, atol=2e-2)
    assert not linear(x)[0].any()


@pytest.mark.parametrize(("rows", "sides"), [(16, (64, 48)), (40, (60, 64)), (40, (64, 50))], ids=str)
def test_unsupported_shapes_are_dequantized(rows: int, sides: tuple[int, int]) -> None:
    linear, x = layer(torch.float32, sides), torch.randn(rows, sides[0])
    assert torch.equal(linear(x), functional.linear(x, linear.weight.dequantize(), linear.bias))


def test_onednns_product_is_in_int8_but_plain_int8_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    product = quantized_kernels.int8_product

    def counted(*args: Any, transposed: bool) -> torch.Tensor:
        calls.append(transposed)
        return product(*args, transposed=transposed)

    monkeypatch.setattr(quantized_kernels, "int8_product", counted)
    x = torch.randn(128, 64, requires_grad=True)
    for scheme, expected in (("w8a8", [True, False]), ("int8", [])):
        linear = layer(torch.float32, (64, 128), scheme=scheme)
        onednn_linear.use_onednn_linear(linear)
        linear(x).sum().backward()
        assert calls == expected
        calls.clear()


def test_a_device_without_int8_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized_kernels.require_int8(CPU)
    block = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    for problem in (lambda *_: 1 / 0, lambda a, b: torch.zeros(32, 24, dtype=torch.int32)):

        def broken(a: torch.Tensor, b: torch.Tensor, problem: Any = problem) -> torch.Tensor:
            try:
                return problem(a, b)
            except ZeroDivisionError:
                raise RuntimeError("not on this card\nmore") from None

        monkeypatch.setattr(torch, "_int_mm", broken)
        with pytest.raises(LorakitError, match=r"products in int8 do not work on cpu .*: set 'int8'"):
            quantized_weight.store_layers(block, "w8a8", "cpu")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_tritons_kernels_equal_torchs(transposed: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    quantized_kernels._choose_product.cache_clear()
    weight: Any = layer(dtype, (72, 48)).weight
    x = torch.randn(33, 72 if transposed else 48).to(dtype)
    assert kernels.uses_triton(CPU)
    assert quantized_kernels._choose_product(dtype, CPU) is quantized_kernels.triton_int8_product
    result = quantized_kernels.int8_product(x, weight.qdata, weight.scales, transposed=transposed)
    expected = quantized_kernels.torch_int8_product(x, weight.qdata, weight.scales, transposed)
    # Triton's interpreter truncates to bf16 where a GPU rounds.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result, expected, rtol=eps, atol=eps * expected.abs().max().item() if eps < 1e-5 else 0)
