"""Tests that channels-last layout, from the first convolution to the last norm, keeps outputs and gradients."""

import os
from typing import Any

import pytest
import torch
from exercise import new_base, predict
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import adapters, config
from lorakit.config import LoraConfig
from lorakit.core.errors import ConfigError
from lorakit.engine import device, kernels, recompute

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1 in the environment"
)
# Shapes of pictures, and how many programs of a kernel share a picture at least.
SHAPES = [((2, 24, 4, 6), 512), ((1, 320, 16, 8), 4), ((1, 320, 16, 8), 512), ((3, 64, 3, 5), 1)]


def norm(channels: int, dtype: torch.dtype, groups: int) -> nn.GroupNorm:
    module = nn.GroupNorm(groups, channels, eps=1e-5).requires_grad_(False)
    nn.init.normal_(module.weight, 1, 0.3)
    nn.init.normal_(module.bias)
    return module.to(dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values far from 0: a sum of their squares would lose digits."""
    torch.manual_seed(0)
    x, towards = 30 + 2 * torch.randn(shape), torch.randn(shape)
    return tuple(each.to(dtype).contiguous(memory_format=torch.channels_last) for each in (x, towards))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("shape", "programs"), SHAPES, ids=str)
def test_tritons_norm_equals_torchs(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], programs: int, silu: bool, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from lorakit.engine import triton_kernels

    recompute._choose_norm.cache_clear()
    monkeypatch.setattr(triton_kernels, "PROGRAMS", programs)
    (x, towards), module = inputs(shape, dtype), norm(shape[1], dtype, 8)
    assert recompute._norm_kernels(x) == (triton_kernels.norm, triton_kernels.norm_backward)
    result, mean, rstd = triton_kernels.norm(x, module, silu)
    exact = x.double().requires_grad_()
    expected = functional.group_norm(exact, 8, module.weight.double(), module.bias.double(), module.eps)
    expected = functional.silu(expected) if silu else expected
    expected.backward(towards.double())
    gradient = triton_kernels.norm_backward(towards, x, mean, rstd, module, silu)
    # Triton's interpreter truncates to bf16 where a GPU rounds.
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for mine, theirs in ((result, expected.detach()), (gradient, exact.grad)):
        assert mine.is_contiguous(memory_format=torch.channels_last)
        assert (mine.double() - theirs).norm() <= allowed * theirs.norm()


def block() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.Conv2d(32, 32, 1))
    return layers.requires_grad_(False)


@pytest.mark.parametrize("triton", [pytest.param(True, marks=interpreted), False])
def test_layers_keep_the_layout_and_the_gradients(monkeypatch: pytest.MonkeyPatch, triton: bool) -> None:
    monkeypatch.setitem(kernels._allowed, "triton", triton)
    plain, ours, x = block(), block(), torch.randn(2, 4, 8, 8)
    recompute.use_channels_last(ours)
    for layer in ours:
        recompute.save_less(layer)
    assert type(ours[1]) is recompute.FrozenGroupNorm and not plain[0].weight.is_contiguous(
        memory_format=torch.channels_last
    )
    results: list[Any] = []
    for layers in (plain, ours):
        source = x.clone().requires_grad_()
        torch.manual_seed(1)
        hidden = recompute.norm_silu(layers(source), norm(32, torch.float32, 4))
        hidden.square().sum().backward()
        results.append((hidden.detach(), source.grad))
    assert hidden.is_contiguous(memory_format=torch.channels_last)
    second = recompute.get_recompute(hidden)
    assert torch.equal(second.function(*second.inputs), hidden)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


class Layouts(TorchDispatchMode):
    """Counts the bytes that convolutions read, forward and backward, and how many of them are channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.last = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(function):
            pictures = [each for each in args if isinstance(each, torch.Tensor) and each.ndim == 4 and each.numel() > 1]
            # An expanded scalar replaces the input if the backward pass needs only its shape.
            for each in (picture for picture in pictures if picture.stride() != (0, 0, 0, 0)):
                self.all += each.nbytes
                self.last += each.nbytes * each.is_contiguous(memory_format=torch.channels_last)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("modules", ["attention", "linear+conv"])
def test_a_unet_has_the_same_gradients_and_reads_channels_last(tiny_sd1: Any, modules: Any) -> None:
    results, shares = [], []
    for channels_last in (False, True):
        family = new_base(tiny_sd1)
        adapter = adapters.attach(family, LoraConfig(rank=4, target_modules=modules), seed=0)
        for name, parameter in adapter.parameters().items():
            if name.endswith(".up"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
        adapters.optimize_blocks(family, save_less=True, channels_last=channels_last)
        with Layouts() as layouts:
            predicted = predict(family, grad=True)
            predicted.square().mean().backward()
        shares.append(layouts.last / layouts.all)
        results.append([predicted.detach(), *(p.grad for p in adapter.parameters().values())])
    mine, theirs = (torch.cat([each.flatten() for each in result]) for result in results)
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(*results, strict=True))
    if modules == "attention":  # in float32 the factors of a convolution are merged into a weight in torch's own layout
        assert shares[0] < 0.1 and shares[1] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory.base_storage": "int8"}, "memory.channels_last = 'on' needs unquantized weights on the card"),
        ({"memory.stream_base": True}, "memory.channels_last = 'on' needs unquantized weights on the card"),
        (
            {"memory.engine": "plain"},
            "memory.channels_last = 'on' needs memory.engine = 'fused' and memory.compile = false",
        ),
        (
            {"memory.compile": True},
            "memory.channels_last = 'on' needs memory.engine = 'fused' and memory.compile = false",
        ),
    ],
)
def test_incompatible_options_are_refused(options: dict[str, object], message: str) -> None:
    steps = {"data.folder": "photos", "data.name": "sks toy", "train.steps": 10, "memory.limit_gib": None}
    with pytest.raises(ConfigError, match=message):
        config.load(None, {**steps, "memory.channels_last": "on", **options})


def test_auto_uses_channels_last_only_on_a_suitable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_is_installed", lambda package: True)
    card, bf16 = torch.device("cuda"), torch.bfloat16
    assert device.channels_last(config.MemoryConfig(), card, bf16)
    assert device.channels_last(config.MemoryConfig(channels_last="on"), torch.device("cpu"), torch.float32)
    for options, where, dtype in (
        ({"channels_last": "off"}, card, bf16),
        ({"base_storage": "nf4"}, card, bf16),
        ({"stream_base": True}, card, bf16),
        ({"compile": True}, card, bf16),
        ({}, card, torch.float32),
        ({}, torch.device("cpu"), bf16),
    ):
        assert not device.channels_last(config.MemoryConfig(**options), where, dtype)
    monkeypatch.setattr(kernels, "_is_installed", lambda package: False)
    assert not device.channels_last(config.MemoryConfig(), card, bf16)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "kernel", "size"),
    [(1, 1, 1, 3, (9, 7)), (2, 1, 1, 3, (10, 8)), (2, 0, 1, 3, (11, 9)), (1, 0, 1, 1, (5, 6)), (1, 2, 2, 3, (9, 9))],
)
def test_the_input_gradient_is_computed_from_its_shape(
    stride: int, padding: int, dilation: int, kernel: int, size: tuple[int, int]
) -> None:
    x, weight = torch.randn(2, 4, *size, requires_grad=True), torch.randn(6, 4, kernel, kernel)
    y = functional.conv2d(x, weight, None, stride, padding, dilation)
    towards = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, towards)
    geometry = (stride, stride), (padding, padding), (dilation, dilation)
    torch.testing.assert_close(recompute.input_gradient(towards, x.shape, weight, geometry), expected)
