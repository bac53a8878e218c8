"""Tests of the choice of GPU, precision and kernels, and of faults of single GPUs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from lorakit import config
from lorakit.config import MemoryConfig, TrainConfig
from lorakit.core.errors import LorakitError
from lorakit.engine import device as devices, device_memory, weight_offload
from lorakit.runs import nvidia, plan
from lorakit.training import out_of_memory, selfcheck

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(nvidia, "cards", lambda: [nvidia.Card("A", "580.1"), nvidia.Card("B", "580.1")])
    monkeypatch.setattr(plan, "_no_cuda", lambda: False)


@pytest.mark.usefixtures("two_cards")
def test_a_gpu_is_chosen_by_its_number() -> None:
    settings = config.load(None, {"memory.device": "cuda:1", "train.steps": 1}).memory
    assert devices.device(settings) == torch.device("cuda:1")
    assert plan.guess_device("cuda:1") == "cuda" and plan.may_be_cuda("cuda:1") and not plan.device_problem("cuda:1")
    with pytest.raises(LorakitError, match=r"memory.device = 'cuda:2': torch .* finds no such device here"):
        devices.device(MemoryConfig(device="cuda:2"))
    assert "memory.device = 'cuda:2'" in str(plan.device_problem("cuda:2"))


@pytest.mark.parametrize("value", ["cuda:", "cuda:x", "cpu:0", "cuda:-1", "gpu"])
def test_an_invalid_device_name_is_refused(value: str) -> None:
    with pytest.raises(config.ConfigError, match=r"choose one of auto, cuda, mps, cpu or cuda:1"):
        config.load(None, {"memory.device": value, "train.steps": 1})


@pytest.mark.parametrize("card", ["NVIDIA GeForce RTX 3060", "NVIDIA GeForce GTX 1660 Ti"])
@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_follows_the_option(monkeypatch: pytest.MonkeyPatch, card: str, tf32: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: card)
    monkeypatch.setattr(device_memory, "prepare", lambda _: "memory")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        lines = devices.prepare(MemoryConfig(tf32=tf32, mixed_precision="fp32"), CUDA)
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert devices.uses_tf32(CUDA, torch.float32) is tf32
        assert not devices.uses_tf32(CPU, torch.float32) and not devices.uses_tf32(CUDA, torch.bfloat16)
        expected = "float32 products: " + ("in TF32 where the card has it" if tf32 else "in full precision")
        assert lines[:2] == ["memory", expected]
        assert torch.backends.cudnn.benchmark is ("GTX 16" in card) and (len(lines) == 3) is ("GTX 16" in card)
        assert devices.prepare(MemoryConfig(), CPU) == []
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]
    assert selfcheck.ROUNDING[torch.float16] > selfcheck.ROUNDING[torch.float32]


# -- attention ------------------------------------------------------------------------------------------------------


def broken_sdpa(monkeypatch: pytest.MonkeyPatch, broken: set[str]) -> None:
    """Simulate SDPA, which uses the first enabled kernel. The broken kernels are wrong for lengths that are not
    multiples of 128."""
    on = ["cudnn", "flash", "mem_efficient", "math"]
    right = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any) -> torch.Tensor:
        wrong = on[0] in broken and key.shape[2] % 128
        return right(query, key, value) * (1 + 0.5 * bool(wrong))

    for name in on[:3]:
        monkeypatch.setattr(torch.backends.cuda, f"enable_{name}_sdp", lambda _, name=name: on.remove(name))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    # The test's tensors are on the CPU.
    monkeypatch.setattr(
        devices,
        "attention_problem",
        lambda candidate, device, dtype, problem=devices.attention_problem: problem(candidate, CPU, dtype),
    )


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (set(), "attention: sdpa"),
        (
            {"cudnn"},
            "attention: sdpa without cuDNN, because its self-test failed (output is off by 50% at head size 40)",
        ),
        (
            {"cudnn", "flash"},
            "attention: sdpa without cuDNN, flash, because its self-test failed (output is off by 50% at head size 40)",
        ),
    ],
)
def test_wrong_attention_kernels_are_disabled(monkeypatch: pytest.MonkeyPatch, broken: set[str], line: str) -> None:
    broken_sdpa(monkeypatch, broken)
    family: Any = SimpleNamespace(device=CUDA, dtype=torch.float32)
    assert devices.attention(MemoryConfig(), family) == line


def test_a_run_is_refused_if_every_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_sdpa(monkeypatch, {"cudnn", "flash", "mem_efficient", "math"})
    with pytest.raises(
        LorakitError, match=r"every attention kernel fails its self-test .*: update torch or the driver"
    ):
        devices.attention(MemoryConfig(), SimpleNamespace(device=CUDA, dtype=torch.float32))


# -- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", ["MPS backend out of memory (MPS allocated: 17.5 GB", "Invalid buffer size: 9 GB"])
def test_out_of_memory_on_mps_is_explained(message: str) -> None:
    def fails() -> None:
        raise RuntimeError(message)

    settings = config.load(None, {"train.steps": 1, "memory.device": "cpu"})
    explained = out_of_memory.explain_out_of_memory("step 3", settings)
    with pytest.raises(LorakitError, match="step 3: not enough memory on the device; cheapest first, set"), explained:
        fails()
    freed: list[bool] = []
    with pytest.raises(RuntimeError, match=message[:11]):
        out_of_memory.retry_after_freeing(lambda: freed.append(True) or False, fails)
    assert freed == [True]
    with pytest.raises(RuntimeError, match="no such thing"), out_of_memory.explain_out_of_memory("step 3", settings):
        raise RuntimeError("no such thing")


def test_memory_beyond_the_pinning_limit_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """WSL, for example, pins only 0.5 to 1 GiB."""
    empty, pins = torch.empty, [True, False]

    def limited(*size: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        if pin_memory and not pins.pop(0):
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **named)

    monkeypatch.setattr(torch, "empty", limited)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: len(pins) == 1)
    size = weight_offload.weight_storage.WINDOW_BYTES
    offloader = weight_offload.WeightOffloader([size, size], CPU)
    offloader.pinned = True
    weights = [torch.full((1000,), float(number)) for number in range(2)]
    offloader.sizes = [weight.nbytes for weight in weights]
    for number, weight in enumerate(weights):
        offloader.put(number, [weight])
        assert offloader.pinned is (number == 0)
    assert pins == []
    assert all(torch.equal(offloader.fetch(number, [weight])[0], weight) for number, weight in enumerate(weights))


# -- deterministic kernels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", [True, False])
def test_deterministic_kernels_are_used_only_during_a_run(switch: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    with devices.deterministic(TrainConfig(deterministic=switch)):
        assert torch.are_deterministic_algorithms_enabled() is switch
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not (switch and torch.backends.cuda.cudnn_sdp_enabled())
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled())


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    message = "upsample_bilinear2d_backward_out_cuda does not have a deterministic implementation, but you set it. More"
    deterministic = devices.deterministic(TrainConfig(deterministic=True))
    pattern = r"train.deterministic = true: upsample_bi.*you set it; set it to false$"
    with pytest.raises(LorakitError, match=pattern), deterministic:
        raise RuntimeError(message)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match=r"^else$"), devices.deterministic(TrainConfig(deterministic=True)):
        raise RuntimeError("else")
