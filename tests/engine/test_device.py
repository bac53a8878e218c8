"""Tests of the choice and report of the device, and that a kernel with a wrong backward pass is rejected."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from lorakit import adapters, config, families
from lorakit.config import LoraConfig, MemoryConfig
from lorakit.core.errors import LorakitError
from lorakit.engine import device as devices, device_memory
from lorakit.runs import memory_estimate
from lorakit.training import out_of_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False, bf16: bool = True) -> None:
    """Let torch report another machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    # GPUs from before 2020 emulate bf16; torch counts emulation as support by default.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_best_available_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    machine(monkeypatch, cuda=cuda, mps=mps)
    assert devices.device(MemoryConfig()).type == expected
    assert devices.device(MemoryConfig(device="cpu")) == CPU


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_missing_device_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    machine(monkeypatch)
    with pytest.raises(LorakitError, match=f"memory.device = '{name}': torch .* finds no such device here"):
        devices.device(MemoryConfig(device=name))


@pytest.mark.parametrize(
    ("device", "bf16", "precision", "expected"),
    [
        ("cuda", True, "auto", torch.bfloat16),
        ("cuda", False, "auto", torch.float16),
        ("cuda", False, "fp16", torch.float16),
        ("cuda", True, "fp32", torch.float32),
        ("cpu", True, "auto", torch.float32),
        ("mps", True, "auto", torch.float32),
        ("cpu", True, "bf16", torch.bfloat16),
    ],
)
def test_precision_follows_the_device_and_the_option(
    monkeypatch: pytest.MonkeyPatch, device: str, bf16: bool, precision: str, expected: Any
) -> None:
    machine(monkeypatch, cuda=device == "cuda", bf16=bf16)
    assert devices.dtype(MemoryConfig(mixed_precision=precision), torch.device(device)) is expected


def test_bf16_on_a_card_that_only_emulates_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=True, bf16=False)
    with pytest.raises(LorakitError, match="does not compute in bf16; choose 'fp16' or 'fp32'"):
        devices.dtype(MemoryConfig(mixed_precision="bf16"), CUDA)


# -- the self-test of attention ---------------------------------------------------------------------------------


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return attention over `[B, T, heads, size]` by its formula."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", functional.softmax(scores, dim=-1), value)


class ZeroBackward(torch.autograd.Function):
    """Right forward pass and zero gradients, as xformers 0.0.16 gave for Stable Diffusion."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return by_hand(query, key, value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(gradient) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_attention_kernel_passes(dtype: torch.dtype) -> None:
    assert devices.attention_problem(by_hand, CPU, dtype) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_of_zeros_is_detected(dtype: torch.dtype) -> None:
    problem = devices.attention_problem(ZeroBackward.apply, CPU, dtype)
    assert problem == "gradient of the query is off by 100% at head size 40"


def test_a_wrong_forward_pass_nan_and_an_error_are_detected() -> None:
    def fails(*_: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("No operator found\nfor this input")

    def one_size(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return by_hand(query, key, value) * (float("nan") if query.shape[-1] == 160 else 1.0)

    assert "output is off" in str(devices.attention_problem(lambda q, k, v: by_hand(q, k, 2 * v), CPU, torch.float32))
    assert "output is off by nan% at head size 160" in str(devices.attention_problem(one_size, CPU, torch.float32))
    assert devices.attention_problem(fails, CPU, torch.float32) == "No operator found"


def stub_xformers(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=kernel))


class UnetThatCounts:
    """A UNet that records whether xformers was enabled."""

    on = False

    def enable_xformers_memory_efficient_attention(self) -> None:
        self.on = True


def test_xformers_is_used_only_after_the_test_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = MemoryConfig(attention="xformers")
    for kernel, on, message in [
        (by_hand, True, "attention: xformers, which agrees with sdpa forward and backward"),
        (
            ZeroBackward.apply,
            False,
            "attention: sdpa, because xformers failed its self-test "
            "(gradient of the query is off by 100% at head size 40)",
        ),
    ]:
        stub_xformers(monkeypatch, kernel)
        family = SimpleNamespace(denoiser=UnetThatCounts(), device=CPU, dtype=torch.float32)
        assert devices.attention(settings, family) == message
        assert family.denoiser.on is on
    assert devices.attention(MemoryConfig(), family) == "attention: sdpa"


def test_missing_xformers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(LorakitError, match=r'needs xformers; install it with: .* -m pip install "xformers>=0\.0\.35"$'):
        devices.attention(MemoryConfig(attention="xformers"), SimpleNamespace())


def test_weights_are_streamed_to_cuda_only() -> None:
    settings = MemoryConfig(stream_base=True)
    assert devices.streams(settings, torch.device("cuda")) and not devices.streams(MemoryConfig(), CPU)
    for device in ("cpu", "mps"):
        with pytest.raises(
            LorakitError,
            match=f"memory.stream_base = true needs a CUDA card to copy weights to, and this is {device}: set it to",
        ):
            devices.streams(settings, torch.device(device))


# -- blocks, memory and peak ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("count", "dropout"), [(1, 0.0), (3, 0.3), (None, 0.3)])
def test_recomputed_blocks_give_the_same_gradients(tiny_sd1: Path, count: int | None, dropout: float) -> None:
    """Recomputed blocks run twice, all others once. The gradients have the same bits."""
    info, actual = families.describe(tiny_sd1), []
    settings = config.load(None, {"train.steps": 1, "memory.gradient_checkpointing": True})
    blocks = memory_estimate.recomputed_blocks(settings, info, {}, "cpu")[:count]
    for recomputed in ([], blocks):
        family = families.load(info, "cpu", torch.float32)
        layers = LoraConfig(rank=4, dropout=dropout, target_modules="linear+conv")
        adapter = adapters.attach(family, layers, seed=0)
        adapter.train(True)
        for parameter in adapter.parameters().values():
            parameter.data.fill_(0.01)
        adapters.optimize_blocks(family)
        runs: Counter[str] = Counter()
        paths = {path for path, _ in family.denoiser.named_modules() if memory_estimate.BLOCK.fullmatch(path)}
        for path in paths:
            first = family.denoiser.get_submodule(path).norm1
            first.register_forward_pre_hook(lambda *_, path=path, runs=runs: runs.update([path]))
        devices.gradient_checkpointing(family, recomputed, random=dropout > 0)
        torch.manual_seed(0)
        noisy, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
        predicted = family.denoiser(noisy, torch.tensor([10, 700]), text, return_dict=False)[0]
        actual.append(torch.autograd.grad(predicted.square().mean(), list(adapter.parameters().values())))
        assert set(recomputed) <= paths and runs == Counter([*paths, *recomputed])
        with torch.no_grad():
            family.denoiser(noisy, torch.tensor([10, 700]), text)
        assert runs == Counter([*paths, *paths, *recomputed])
    assert count is not None or set(blocks) == paths
    assert all(torch.equal(a, b) for a, b in zip(*actual, strict=True))


def test_memory_is_freed_once_after_an_out_of_memory_error() -> None:
    called: list[str] = []

    def compute(fails: int) -> str:
        called.append("compute")
        if called.count("compute") <= fails:
            raise torch.OutOfMemoryError("too much")
        return "done"

    def make(possible: bool) -> bool:
        called.append("make")
        return possible

    assert out_of_memory.retry_after_freeing(lambda: make(True), lambda: compute(0)) == "done" and called == ["compute"]
    called.clear()
    assert out_of_memory.retry_after_freeing(lambda: make(True), lambda: compute(1)) == "done"
    assert called == ["compute", "make", "compute"]
    for possible, fails in ((True, 2), (False, 1)):
        called.clear()
        with pytest.raises(torch.OutOfMemoryError):
            out_of_memory.retry_after_freeing(
                lambda possible=possible: make(possible), lambda fails=fails: compute(fails)
            )
        assert called.count("compute") == (2 if possible else 1)


def test_the_peak_on_a_cpu_is_the_processs_memory() -> None:
    before = device_memory.peak(CPU)
    tensor = torch.ones(64 * 2**20)
    assert device_memory.peak(CPU) >= max(before, tensor.numel() * 4)
    assert device_memory.peak(CPU) < 2**40
