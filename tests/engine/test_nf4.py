"""Tests of the kernels that dequantize NF4: equal values, and the number of bytes they read and write."""

import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.engine import kernels, quantized_kernels, quantized_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(320, 64), (32, 16, 3, 3), (64, 3, 1, 1)]


class Bytes(TorchDispatchMode):
    """Counts the bytes that operations read and write."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            outputs = [] if "empty" in str(function) else [result]
            read = [each for each in args if isinstance(each, torch.Tensor)]
            Bytes.count += sum(each.nbytes for each in read + outputs)
        return result


def traffic(weight: quantized_weight.QuantizedWeight) -> float:
    """Return the bytes read and written for each dequantized value."""
    weight.dequantize()
    Bytes.count = 0
    with Bytes():
        weight.dequantize()
    return Bytes.count / weight.numel()


def quantized(shape: tuple[int, ...], dtype: torch.dtype, scheme: str = "nf4") -> quantized_weight.QuantizedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return quantized_weight.quantize(weight, scheme)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    quantized_kernels._choose.cache_clear()
    yield
    quantized_kernels._choose.cache_clear()


def rounded_once(weight: quantized_weight.QuantizedWeight) -> torch.Tensor:
    assert weight.scales is not None
    codes = torch.stack([weight.qdata >> 4, weight.qdata & 15], 1).long()
    values = torch.tensor(quantized_kernels.NF4)[codes].view(-1, 64) * weight.scales.float()
    return values.to(weight.dtype).view(weight.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitsandbytes_kernel_is_used_and_rounds_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    weight = quantized(shape, dtype)
    assert torch.equal(weight.dequantize(), rounded_once(weight))
    assert quantized_kernels._quickest(dtype, torch.device("cpu")) is quantized_kernels.by_bitsandbytes
    if dtype is torch.bfloat16:  # includes 8.5 bytes for each scale of 64 values, because scales are cast
        assert traffic(quantized((1280, 1280), dtype)) == pytest.approx(2.66, abs=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_torch_differs_by_rounding_only(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(quantized_kernels, "_has_kernels_for", lambda device: False)
    monkeypatch.setitem(kernels._allowed, "triton", False)
    weight = quantized((320, 64), dtype)
    result, expected = weight.dequantize(), rounded_once(weight)
    assert quantized_kernels._quickest(dtype, torch.device("cpu")) is quantized_kernels.by_torch
    torch.testing.assert_close(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    if dtype is torch.bfloat16:
        assert traffic(quantized((1280, 1280), dtype)) == pytest.approx(10.5, abs=0.05)


@pytest.mark.parametrize(
    "kernel", [lambda codes, scales: quantized_kernels.by_torch(codes, scales) * 1.1, lambda codes, scales: 1 / 0]
)
def test_a_wrong_or_failing_kernel_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernel: quantized_kernels.Dequantize
) -> None:
    monkeypatch.setattr(quantized_kernels, "_has_kernels_for", lambda device: True)
    monkeypatch.setattr(quantized_kernels, "by_bitsandbytes", kernel)
    monkeypatch.setitem(kernels._allowed, "triton", False)
    assert quantized_kernels._quickest(torch.float32, torch.device("cpu")) is quantized_kernels.by_torch


def test_without_packages_and_on_other_devices_torch_dequantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantized_kernels._quickest(torch.float32, torch.device("meta")) is quantized_kernels.by_torch
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for device in ("cpu", "cuda"):
        assert not kernels.uses_triton(torch.device(device)) and not quantized_kernels._has_kernels_for(
            torch.device(device)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_dequantized_in_one_operation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = quantized(shape, dtype, "int8")
    assert weight.scales is not None
    assert torch.equal(weight.dequantize(), weight.qdata.to(dtype).mul_(weight.scales))
    if dtype is torch.bfloat16:
        assert traffic(quantized((1280, 1280), dtype, "int8")) == pytest.approx(3, abs=0.01)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (320, 640)], ids=str)
def test_tritons_kernel_rounds_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    weight = quantized(shape, dtype)
    assert weight.scales is not None
    result = quantized_kernels.by_triton(weight.qdata, weight.scales).view(shape)
    # Triton's interpreter truncates to bf16 where a GPU rounds.
    rtol = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(result, rounded_once(weight), rtol=rtol, atol=0)
    monkeypatch.setattr(quantized_kernels, "_has_kernels_for", lambda device: False)
    assert quantized_kernels._quickest(dtype, torch.device("cpu")) is quantized_kernels.by_triton
