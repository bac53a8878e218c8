"""The device of a run, its precision, and its attention kernel."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lorakit.config import (
    BF16_MISSING,
    DEVICE_MISSING,
    OFFLOAD_NEEDS_CUDA,
    XFORMERS_MISSING,
    MemoryConfig,
    TrainConfig,
)
from lorakit.core import install
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.engine import device_memory, kernels

if TYPE_CHECKING:
    from lorakit.families import Family

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Head sizes of SD1.5 (40 to 160) and of SD2 and SDXL (64). One bug broke the backward pass for some sizes only
# (diffusers #1954).
HEAD_SIZES = (40, 64, 80, 160)


def device(config: MemoryConfig) -> torch.device:
    """The device to train on; "auto" selects CUDA, else MPS, else the CPU.

    Raises:
        LorakitError: the configured device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if config.device == "auto":
        return torch.device(next(name for name, is_available in available.items() if is_available))
    kind, _, number = config.device.partition(":")
    if not available[kind] or (number and int(number) >= torch.cuda.device_count()):
        raise LorakitError(DEVICE_MISSING, config.device, torch.__version__)
    return torch.device(config.device)


def prepare(config: MemoryConfig, device: torch.device) -> list[str]:
    """Set up torch for a CUDA device, before its first use. Return messages about it for the user."""
    kernels.allow_triton(config.triton)
    if device.type != "cuda":
        return []
    lines = [device_memory.prepare(device)]
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.mixed_precision == "fp32":
        where = "in TF32 where the card has it" if config.tf32 else "in full precision"
        lines.append(Message("float32 products: {where}", where))
    if "GTX 16" in torch.cuda.get_device_name(device):
        # The convolutions of a GTX 16 give NaN in fp16 unless cuDNN benchmarks its kernels (pytorch issue 58123).
        torch.backends.cudnn.benchmark = True
        lines.append("cuDNN tries its kernels for each size, because a GTX 16 needs that in fp16")
    return lines


def uses_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether float32 products on the device are computed in TF32, with a mantissa as short as that of fp16."""
    return device.type == "cuda" and dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"


@contextlib.contextmanager
def deterministic(config: TrainConfig) -> Iterator[None]:
    """Inside, kernels give the same bits in each run, if `train.deterministic` is on.

    Raises:
        LorakitError: an operation has no deterministic kernel.
    """
    if not config.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, cudnn_attention = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # no code here reads uninitialized memory
    torch.backends.cuda.enable_cudnn_sdp(False)  # it has no deterministic backward pass
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LorakitError) or "deterministic" not in str(error):
            raise
        first = str(error).partition(". ")[0]
        raise LorakitError("train.deterministic = true: {problem}; set it to false", first) from None
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)


def dtype(config: MemoryConfig, device: torch.device) -> torch.dtype:
    """Precision of the frozen base; adapters are always float32.

    "auto" selects bf16 on a CUDA device that supports it, fp16 on other CUDA devices, fp32 elsewhere.

    Raises:
        LorakitError: bf16 on a GPU that only emulates it.
    """
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if config.mixed_precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if bf16 else torch.float16
    if config.mixed_precision == "bf16" and not bf16:
        raise LorakitError(BF16_MISSING)
    return PRECISIONS[config.mixed_precision]


def channels_last(config: MemoryConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether feature maps in the UNet are channels_last, the layout that half-precision convolutions use on a GPU.

    Triton kernels of the norms keep that layout.
    """
    if config.channels_last != "auto":
        return config.channels_last == "on"
    is_whole = config.base_storage == "full" and not config.stream_base
    is_half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and is_half and is_whole and not config.compile and kernels.uses_triton(device)


def streams(config: MemoryConfig, device: torch.device) -> bool:
    """Whether the base's weights stay in host memory.

    Raises:
        LorakitError: they should, but the device is not CUDA.
    """
    if config.stream_base and device.type != "cuda":
        raise LorakitError(OFFLOAD_NEEDS_CUDA, device.type)
    return config.stream_base


def attention(config: MemoryConfig, family: Family) -> str:
    """Set the UNet's attention kernel, and return a message about it.

    xformers is tested first, and so are SDPA's kernels on CUDA. Kernels that fail are disabled; if xformers fails, SDPA
    is used.

    Raises:
        LorakitError: xformers was chosen and is not installed, or every kernel fails.
    """
    if config.attention == "sdpa":
        wrong = _switch_off_wrong_kernels(family.device, family.dtype) if family.device.type == "cuda" else ""
        return Message("attention: sdpa{without}", wrong)
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        raise LorakitError(XFORMERS_MISSING, install.hint("xformers")) from None
    problem = attention_problem(lambda q, k, v: memory_efficient_attention(q, k, v), family.device, family.dtype)
    if problem:
        return Message("attention: sdpa, because xformers failed its self-test ({problem})", problem)
    family.denoiser.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
    return "attention: xformers, which agrees with sdpa forward and backward"


def _switch_off_wrong_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Test SDPA and disable its kernels, in torch's order, until it passes. Return a message with the disabled ones and
    the reason.

    Raises:
        LorakitError: SDPA fails with every kernel.
    """
    cuda = torch.backends.cuda
    kernels = {"cuDNN": cuda.enable_cudnn_sdp, "flash": cuda.enable_flash_sdp}
    kernels["memory-efficient"] = cuda.enable_mem_efficient_sdp
    wrong, first = [], ""
    with contextlib.suppress(torch.OutOfMemoryError):  # a later phase reports this error
        while problem := attention_problem(_sdpa, device, dtype):
            if not kernels:
                raise LorakitError(
                    "every attention kernel fails its self-test ({problem}): update torch or the driver", problem
                )
            name = next(iter(kernels))
            kernels.pop(name)(False)
            wrong.append(name)
            first = first or problem
    return Message(" without {wrong}, because its self-test failed ({first})", ", ".join(wrong), first) if wrong else ""


def attention_problem(candidate: Attention, device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare output and gradients of an attention function with those of a plain implementation. Return the problem,
    or None.

    Args:
        candidate: takes query, key and value `[B, T, heads, size]`, in the layout of xformers.
    """
    # Enough for TF32 on tensor cores. Broken kernels differ by far more.
    allowed = 2e-3 if dtype == torch.float32 else 2e-2
    draw = torch.Generator(device).manual_seed(0)
    for size, queries in itertools.product(HEAD_SIZES, (77, 256)):
        lengths = (queries, 77, 77, queries)
        inputs = [torch.randn((2, n, 4, size), generator=draw, device=device).to(dtype) for n in lengths]
        *qkv, towards = inputs
        expected = _outputs_and_gradients(_reference_attention, [tensor.float() for tensor in qkv], towards.float())
        try:
            results = _outputs_and_gradients(candidate, qkv, towards)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
        for name, right, got in zip(("output", "query", "key", "value"), expected, results, strict=True):
            off = ((got.float() - right).norm() / right.norm()).item()
            if not off <= allowed:
                what = "output" if name == "output" else Message("gradient of the {name}", name)
                return Message("{what} is off by {off:.0%} at head size {size}", what, off, size)
    return None


def gradient_checkpointing(family: Family, blocks: Collection[str], *, random: bool = False) -> None:
    """Recompute these blocks of the UNet in the backward pass instead of saving their activations.

    Text encoders are left out: docs/memory.md has what a text takes.

    Args:
        blocks: their paths in the UNet, see `memory_estimate.recomputed_blocks`.
        random: whether the blocks draw random numbers, which must be the same in both passes.
    """
    for path in blocks:
        block = family.denoiser.get_submodule(path)
        block.forward = functools.partial(_recomputed, block.forward, random)


def _recomputed(forward: Callable[..., Any], random: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)


def _reference_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _outputs_and_gradients(
    function: Attention, inputs: list[torch.Tensor], towards: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, towards)]
