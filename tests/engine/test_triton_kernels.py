"""GEGLU in one kernel each way, by Triton's interpreter: outputs and gradients of torch's own, in fewer bytes."""

import os
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch.nn import functional

from lorakit.config import MemoryConfig
from lorakit.engine import device, kernels, recompute

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
def test_geglu_gives_what_torch_gives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    draw = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=draw)).to(dtype).requires_grad_()
    towards = torch.randn(*shape[:-1], shape[-1] // 2, generator=draw).to(dtype)
    forward, backward = recompute._geglu_kernels(x)
    assert (forward, backward) != (recompute.plain_geglu, recompute.plain_geglu_backward)
    exact = x.detach().double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    (value * functional.gelu(gate)).backward(towards.double())
    # The interpreter cuts bf16 off where a card rounds.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    expected = recompute.plain_geglu(exact.detach())
    torch.testing.assert_close(forward(x.detach()).double(), expected, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(backward(towards, x.detach()).double(), exact.grad, rtol=rtol, atol=1e-5)


@interpreted
def test_a_layer_learns_the_same_with_it_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    torch.manual_seed(0)
    layer, x = GEGLU(48, 64), torch.randn(2, 5, 48)
    recompute.save_less(layer)
    results = []
    for triton in (True, False):
        device.prepare(MemoryConfig(triton=triton), CPU)
        given = x.clone().requires_grad_()
        result = layer(given)
        result.square().sum().backward()
        again = recompute.get_recompute(result)
        assert torch.equal(again.function(*again.inputs), result)
        results.append((result.detach(), given.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_memory_triton_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_is_installed", lambda package: True)
    card = torch.device("cuda")
    assert kernels.uses_triton(card)
    device.prepare(MemoryConfig(triton=False), CPU)
    assert not kernels.uses_triton(card)
    assert recompute._geglu_kernels(torch.zeros(1)) == (recompute.plain_geglu, recompute.plain_geglu_backward)
