"""Weights in host memory, each copied to the device before or when its layer runs.

In training the order of accesses repeats from step to step, including backward passes and recomputed blocks.
`AccessOrder` learns that order. A wrong prediction costs a copy; it never changes a result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lorakit.core.errors import LorakitError
from lorakit.engine import weight_storage

# The most weights that are prefetched ahead; except for tiny weights the window is full before.
MAX_LOOKAHEAD = 64
# After this many accesses (400 steps of SDXL) the history is cleared, so that it takes at most 8 MB.
MAX_HISTORY = 2**20
# Pinned buffers for copies from memory that is not pinned: one is filled while another is copied.
RING_SLOTS = 2


class AccessOrder:
    """Predicts the next accesses from the last time that the same two numbers followed each other."""

    def __init__(self) -> None:
        self._history: list[int] = []
        # (number, next number) -> index of the latter in the history, the last time. `_position` is the index that the
        # current access repeats.
        self._last_position: dict[tuple[int, int], int] = {}
        self._position: int | None = None

    def observe(self, number: int) -> list[int]:
        """Record an access. Return the numbers that followed it last time, in order, or an empty list."""
        if len(self._history) == MAX_HISTORY:
            self._history, self._last_position, self._position = [], {}, None
        history, pair = self._history, (self._history[-1] if self._history else -1, number)
        if self._position is not None and history[self._position + 1] == number:
            self._position += 1
        else:
            self._position = self._last_position.get(pair)
        self._last_position[pair] = len(history)
        history.append(number)
        return [] if self._position is None else history[self._position + 1 : self._position + 1 + MAX_LOOKAHEAD]


class PinnedRing:
    """A small pinned buffer for copies from other host memory, so that they overlap with computation.

    Raises:
        RuntimeError: the system refuses to pin it.
    """

    def __init__(self) -> None:
        size = weight_storage.SLAB_BYTES
        self._slots = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(RING_SLOTS)]
        self._events: list[Any] = [None] * RING_SLOTS
        self._next = 0

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy bytes from the host to the device on the current stream. Copies larger than a slot bypass the ring."""
        if source.numel() > len(self._slots[0]):
            target.copy_(source, non_blocking=True)
            return
        slot, self._next = self._next, (self._next + 1) % RING_SLOTS
        if self._events[slot] is not None:
            self._events[slot].synchronize()
        target.copy_(self._slots[slot][: source.numel()].copy_(source), non_blocking=True)
        self._events[slot] = torch.cuda.current_stream(target.device).record_event()


class WeightOffloader:
    """Weights in host memory, by number, and copies of some of them on the device.

    Host memory is allocated in slabs, each when its first weight arrives. Slabs are pinned, so that copies to a CUDA
    device are asynchronous. They hold many weights, because torch rounds each pinned allocation up to a power of two.

    Args:
        sizes: bytes of each weight.
        device: where the weights are used.
        window: bytes on the device for the weight in use and the prefetched ones together; None: `WINDOW_BYTES`.

    Attributes:
        requests: number of calls of `fetch`.
        misses: number of fetches whose weight was not prefetched.
        bytes_copied: bytes copied to the device.
        host_bytes: bytes of host memory in use.
        pinned: whether all of it is pinned. Systems limit that (WSL to about 1 GiB); copies from the rest use a
            `PinnedRing`.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str, window: int | None = None):
        self.sizes, self.device = list(sizes), torch.device(device)
        self.window = weight_storage.WINDOW_BYTES if window is None else window
        self.requests = self.misses = self.bytes_copied = self.host_bytes = 0
        self._slots, self._lengths = weight_storage.pack_into_slabs(sizes)
        self._slabs: dict[int, torch.Tensor] = {}
        self._order = AccessOrder()
        # Number -> its bytes on the device, and the event at the end of the copy (None: it is finished).
        self._on_device: dict[int, tuple[torch.Tensor, Any]] = {}
        # Without CUDA there are no streams: a copy is finished when it returns.
        cuda = self.device.type == "cuda" and torch.cuda.is_available()
        self._copy_stream: Any = torch.cuda.Stream(self.device) if cuda else None
        self._compute_stream: Any = None
        self.pinned = self._copy_stream is not None
        self._ring: PinnedRing | None = None

    def put(self, number: int, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy a weight, given as its parts, to host memory. Return the parts in host memory.

        Raises:
            LorakitError: there is not enough host memory.
        """
        slab = self._slots[number][0]
        if slab not in self._slabs:
            self._reserve_ring()
            self._slabs[slab] = _host_memory(self._lengths[slab], pinned=self.pinned)
            self.pinned = self.pinned and self._slabs[slab].is_pinned()
            self.host_bytes += self._lengths[slab]
        host_parts = _split(self._host_view(number), parts)
        for host_part, part in zip(host_parts, parts, strict=True):
            host_part.copy_(part)
        return host_parts

    def _reserve_ring(self) -> None:
        """Allocate the ring before the first slab, because later the system may refuse to pin it. It is freed for the
        last slabs if all slabs could be pinned."""
        left = len(self._lengths) - len(self._slabs)
        if self.pinned and not self._slabs and left > RING_SLOTS:
            try:
                self._ring = PinnedRing()
            except RuntimeError:
                self.pinned = False
        elif self.pinned and left <= RING_SLOTS:
            self._ring = None

    def fetch(self, number: int, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the parts (as `put` returned them) on the device, ready for the current CUDA stream."""
        if self._copy_stream is not None:
            current, before = torch.cuda.current_stream(self.device), self._compute_stream
            if before is None or current != before:  # torch: `stream != None` is False for every stream
                # Freed memory returns to the stream that allocated it; it must wait for the copies first.
                self.release_all()
                self._compute_stream = current
        self.requests += 1
        expected = self._order.observe(number)
        if number not in self._on_device:
            self.misses += 1
            self._on_device[number] = self._copy(number, ahead=False)
        data = self._wait(number)
        self._prefetch(number, expected)
        return _split(data, parts)

    def release_all(self) -> None:
        """Free all copies on the device."""
        self._release(list(self._on_device))

    def __del__(self) -> None:
        """Wait for running copies before their memory is freed."""
        self.release_all()

    def _prefetch(self, number: int, expected: Sequence[int]) -> None:
        """Start copies of the weights expected next, as many as fit in the window, and free the others."""
        room = self.window - self.sizes[number]
        next_weights: dict[int, None] = {}
        for other in expected:
            if other in next_weights:
                continue
            if other != number:
                room -= self.sizes[other]
            if room < 0:
                break
            next_weights[other] = None
        self._release(self._on_device.keys() - next_weights.keys())
        for other in next_weights:
            if other not in self._on_device:
                self._on_device[other] = self._copy(other, ahead=True)

    def _copy(self, number: int, *, ahead: bool) -> tuple[torch.Tensor, Any]:
        """Start to copy a weight. Return its bytes on the device and the event at the end of the copy. With `ahead` the
        copy overlaps with computation."""
        self.bytes_copied += self.sizes[number]
        data = torch.empty(self.sizes[number], dtype=torch.uint8, device=self.device)
        if not ahead or self._copy_stream is None:
            self._start(number, data)
            return data, None
        # The memory may have just been freed by the computation, whose queued operations still use it.
        self._copy_stream.wait_stream(self._compute_stream)
        with torch.cuda.stream(self._copy_stream):
            self._start(number, data)
            return data, self._copy_stream.record_event()

    def _start(self, number: int, data: torch.Tensor) -> None:
        """Start the copy on the current stream."""
        source = self._host_view(number)
        if self._ring is None or self._slabs[self._slots[number][0]].is_pinned():
            data.copy_(source, non_blocking=True)
        else:
            self._ring.copy(source, data)

    def _wait(self, number: int) -> torch.Tensor:
        """The bytes of a weight on the device. The compute stream waits for their copy."""
        data, event = self._on_device[number]
        if event is not None:
            self._compute_stream.wait_event(event)
            self._on_device[number] = data, None
        return data

    def _release(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._wait(number)
            del self._on_device[number]

    def _host_view(self, number: int) -> torch.Tensor:
        slab, start = self._slots[number]
        return self._slabs[slab].narrow(0, start, self.sizes[number])


def _split(data: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of consecutive bytes, with the dtypes and shapes of `parts`."""
    views, start = [], 0
    for part in parts:
        views.append(data.narrow(0, start, part.nbytes).view(part.dtype).view(part.shape))
        start += part.nbytes
    return views


def _host_memory(size: int, *, pinned: bool) -> torch.Tensor:
    """Allocate bytes of host memory, pinned if asked for and if the system allows it."""
    if pinned:
        with contextlib.suppress(RuntimeError):
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    except RuntimeError:
        raise LorakitError(
            "memory.stream_base: the host has no {size:.0f} MiB of memory left for the base's weights; close "
            "other programs, or keep the weights smaller with memory.base_storage",
            size / 2**20,
        ) from None
