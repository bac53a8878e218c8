"""Tests of the fused GEGLU kernels in Triton's interpreter: torch's outputs and gradients with fewer saved bytes."""

import os
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch.nn import functional

from lorakit.config import MemoryConfig
from lorakit.engine import device, kernels, quantized_kernels, quantized_weight, recompute

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1 in the environment"
)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    recompute._choose_geglu.cache_clear()
    yield
    kernels.allow_triton(True)
    recompute._choose_geglu.cache_clear()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 96), (1, 1, 1280), (3, 640)], ids=str)
def test_geglu_equals_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    draw = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=draw)).to(dtype).requires_grad_()
    towards = torch.randn(*shape[:-1], shape[-1] // 2, generator=draw).to(dtype)
    forward, backward = recompute._geglu_kernels(x)
    assert (forward, backward) != (recompute.torch_geglu, recompute.torch_geglu_backward)
    exact = x.detach().double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    (value * functional.gelu(gate)).backward(towards.double())
    # Triton's interpreter truncates to bf16 where a GPU rounds.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    expected = recompute.torch_geglu(exact.detach())
    torch.testing.assert_close(forward(x.detach()).double(), expected, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(backward(towards, x.detach()).double(), exact.grad, rtol=rtol, atol=1e-5)


@interpreted
def test_a_layer_has_the_same_gradients_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    torch.manual_seed(0)
    layer, x = GEGLU(48, 64), torch.randn(2, 5, 48)
    recompute.save_less(layer)
    results = []
    for triton in (True, False):
        device.prepare(MemoryConfig(triton=triton), CPU)
        source = x.clone().requires_grad_()
        result = layer(source)
        result.square().sum().backward()
        second = recompute.get_recompute(result)
        assert torch.equal(second.function(*second.inputs), result)
        results.append((result.detach(), source.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_memory_triton_disables_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_is_installed", lambda package: True)
    card = torch.device("cuda")
    assert kernels.uses_triton(card)
    device.prepare(MemoryConfig(triton=False), CPU)
    assert not kernels.uses_triton(card)
    assert recompute._geglu_kernels(torch.zeros(1)) == (recompute.torch_geglu, recompute.torch_geglu_backward)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu_triton_kernels_are_used_and_equal_torchs(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    card, draw = torch.device("cuda"), torch.Generator().manual_seed(0)
    x, towards = torch.randn(64, 1280, generator=draw).to(card, dtype), torch.randn(64, 640).to(card, dtype)
    forward, backward = recompute._geglu_kernels(x)
    assert (forward, backward) != (recompute.torch_geglu, recompute.torch_geglu_backward)
    weight = quantized_weight.quantize(torch.randn(640, 1280, generator=draw).to(card, dtype), "nf4")
    assert quantized_kernels._quickest(dtype, card) is not quantized_kernels.by_torch
    eight: Any = quantized_weight.quantize(torch.randn(640, 1280, generator=draw).to(card, dtype), "w8a8")
    quantized_kernels.require_int8(card)
    assert quantized_kernels._choose_product(dtype, card) is quantized_kernels.triton_int8_product
    pairs = [
        (forward(x), recompute.torch_geglu(x)),
        (backward(towards, x), recompute.torch_geglu_backward(towards, x)),
        (weight.dequantize().view(-1), quantized_kernels.by_torch(weight.qdata, weight.scales)),
    ]
    for source, transposed in ((x, True), (towards, False)):
        arguments = source, eight.qdata, eight.scales, transposed
        pairs.append(
            (quantized_kernels.triton_int8_product(*arguments), quantized_kernels.torch_int8_product(*arguments))
        )
    for mine, theirs in pairs:
        assert (mine - theirs).float().norm() <= 4 * torch.finfo(dtype).eps * theirs.float().norm()
