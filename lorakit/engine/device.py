"""Where a run computes, in what precision, and with which attention kernel."""

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
# Head sizes of SD1.5 (40 to 160) and of SD2 and SDXL (64); a backward pass broke for some only (diffusers #1954).
HEAD_SIZES = (40, 64, 80, 160)


def device(config: MemoryConfig) -> torch.device:
    """The device to train on; "auto" takes CUDA, else MPS, else the CPU.

    Raises:
        LorakitError: the one that was asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if config.device == "auto":
        return torch.device(next(name for name, is_available in available.items() if is_available))
    kind, _, number = config.device.partition(":")
    if not available[kind] or (number and int(number) >= torch.cuda.device_count()):
        raise LorakitError(DEVICE_MISSING, config.device, torch.__version__)
    return torch.device(config.device)


def prepare(config: MemoryConfig, device: torch.device) -> list[str]:
    """Set up torch for a CUDA device, before its first use; a line for each thing that a person would want to know."""
    kernels.allow_triton(config.triton)
    if device.type != "cuda":
        return []
    lines = [device_memory.prepare(device)]
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.mixed_precision == "fp32":
        where = "in TF32 where the card has it" if config.tf32 else "in full"
        lines.append(Message("float32 products: {where}", where))
    if "GTX 16" in torch.cuda.get_device_name(device):
        # Their convolutions in fp16 give NaN unless cuDNN tries its kernels (pytorch issue 58123).
        torch.backends.cudnn.benchmark = True
        lines.append("cuDNN tries its kernels for each size, because a GTX 16 needs that in fp16")
    return lines


def uses_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products on the device have the precision of fp16, though the base is in float32."""
    return device.type == "cuda" and dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"


@contextlib.contextmanager
def deterministic(config: TrainConfig) -> Iterator[None]:
    """Inside, kernels give the same bits in each run, where the config asks for that.

    Raises:
        LorakitError: an operation has no such kernel.
    """
    if not config.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, cudnn_attention = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing reads memory that nobody wrote
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has no such kernel
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
    """Precision of the frozen base; adapters are float32 always. "auto": on CUDA bf16 where the card computes in it,
    else fp16; fp32 elsewhere.

    Raises:
        LorakitError: bf16 on a card that only emulates it.
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
    """Whether pictures inside the UNet are channels last, as convolutions in half precision read them on a card. Norms
    keep that layout by kernels of Triton."""
    if config.channels_last != "auto":
        return config.channels_last == "on"
    is_whole = config.base_storage == "full" and not config.stream_base
    is_half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and is_half and is_whole and not config.compile and kernels.uses_triton(device)


def streams(config: MemoryConfig, device: torch.device) -> bool:
    """Whether the base's weights stay in the host's memory.

    Raises:
        LorakitError: they are to, and are computed with there too.
    """
    if config.stream_base and device.type != "cuda":
        raise LorakitError(OFFLOAD_NEEDS_CUDA, device.type)
    return config.stream_base


def attention(config: MemoryConfig, family: Family) -> str:
    """Give the UNet its attention kernel, and say which in one line. Kernels are tested first, SDPA's on a card; those
    that fail are not used, and SDPA takes the place of xformers.

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
    """Test SDPA, and switch off its kernels, in torch's order, until it passes; which ones, and why.

    Raises:
        LorakitError: it never passes.
    """
    cuda = torch.backends.cuda
    kernels = {"cuDNN": cuda.enable_cudnn_sdp, "flash": cuda.enable_flash_sdp}
    kernels["memory-efficient"] = cuda.enable_mem_efficient_sdp
    wrong, first = [], ""
    with contextlib.suppress(torch.OutOfMemoryError):  # which a later phase explains
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
    """Compare an attention function with attention written out, output and all three gradients; the problem, or None.

    Args:
        candidate: takes query, key and value `[B, T, heads, size]`, as xformers has them.
    """
    # A tolerance for tensor cores' shortened float32. Broken kernels are wrong by far more.
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
    """Recompute these blocks of the UNet in the backward pass instead of keeping what they computed. The text encoders
    are left alone: 77 tokens take next to nothing.

    Args:
        blocks: their paths in the UNet, see `memory_estimate.recomputed_blocks`.
        random: they draw random numbers, which must come again.
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
