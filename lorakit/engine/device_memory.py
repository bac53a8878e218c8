"""Memory of a CUDA device: the limit of this process, its peak, and what is left."""

from __future__ import annotations

import os
import sys

import torch

from lorakit.core.messages import Message

GIB = 2**30
# Environment variables that configure torch's allocator.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# Device index -> bytes that this process may reserve.
_limits: dict[int, int] = {}


def prepare(device: torch.device) -> str:
    """Limit this process to the memory of a CUDA device that is free now. Return a message with the size.

    Beyond that limit drivers on Windows and WSL use host memory, where a step takes ten times as long; torch now raises
    OutOfMemoryError instead. On Linux, unless the environment configures the allocator, its segments are expandable,
    which avoids fragmentation.
    """
    is_set = any(os.environ.get(name) for name in ALLOCATOR_VARIABLES)
    if sys.platform == "linux" and not is_set and not torch.cuda.is_initialized():
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if device.index:
        torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    # Unlike the functions above, this one takes no device without an index.
    torch.cuda.set_per_process_memory_fraction(min(available / total, 1.0), device.index or 0)
    _limits[device.index or 0] = available
    return Message(
        "device memory: {free:.1f} of {total:.1f} GiB are free, and the run stays within them",
        available / GIB,
        total / GIB,
    )


def available(device: torch.device) -> int | None:
    """Total bytes of a CUDA device that this process may reserve, as `prepare` set them; None for other devices."""
    return _limits.get(device.index or 0) if device.type == "cuda" else None


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that this process can still allocate outside the memory pools of CUDA graphs."""
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    if (limit := _limits.get(device.index or 0)) is not None:
        free = min(free, limit - reserved)
    segments = torch.cuda.memory_snapshot()
    pooled: int = sum(
        s["total_size"] - s["allocated_size"] for s in segments if s.get("segment_pool_id", (0, 0)) != (0, 0)
    )
    return int(max(free, 0) + reserved - allocated - pooled)


def peak(device: torch.device) -> int:
    """Peak bytes: on CUDA those reserved, including the pools of CUDA graphs; elsewhere the resident memory of the
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        # accelerate brings psutil; `resource` exists only on Unix.
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024
