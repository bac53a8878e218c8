"""What a process may take of a CUDA device's memory, what it has taken, and what it can still get."""

from __future__ import annotations

import os
import sys

import torch

from lorakit.core.messages import Message

GIB = 2**30
# Variables in which a user sets up torch's allocator.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# Device index -> bytes that this process may reserve.
_limits: dict[int, int] = {}


def prepare(device: torch.device) -> str:
    """Limit this process to the memory that is free on a CUDA device now; a line that says how much it is.

    Drivers on Windows and WSL move what goes beyond it to the host's memory, where a step takes ten times as long.
    Torch raises OutOfMemoryError instead. On Linux the allocator's segments may grow, which avoids fragments, unless a
    variable of the environment sets up the allocator.
    """
    is_set = any(os.environ.get(name) for name in ALLOCATOR_VARIABLES)
    if sys.platform == "linux" and not is_set and not torch.cuda.is_initialized():
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if device.index:
        torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    # Unlike its neighbours this function does not take a device without an index.
    torch.cuda.set_per_process_memory_fraction(min(available / total, 1.0), device.index or 0)
    _limits[device.index or 0] = available
    return Message(
        "device memory: {free:.1f} of {total:.1f} GiB are free, and the run stays within them",
        available / GIB,
        total / GIB,
    )


def available(device: torch.device) -> int | None:
    """Bytes of a CUDA device that this process may reserve in all, as `prepare` left them; None for other devices."""
    return _limits.get(device.index or 0) if device.type == "cuda" else None


def free_bytes(device: torch.device) -> int:
    """Bytes that a CUDA device can still give to this process outside the memory pools of CUDA graphs."""
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
    """Most bytes in use so far: on CUDA those reserved, with what the pools of CUDA graphs hold; elsewhere those of the
    whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        # accelerate brings psutil; `resource` exists only on Unix.
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024
