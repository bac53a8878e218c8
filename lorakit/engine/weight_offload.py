"""Weights that wait in the host's memory, each copied to the device when its layer computes, or before that.

In training, layers are asked for in an order that repeats from step to step, backward passes and what checkpointing
recomputes included. The order is learned as it happens; a guess that proves wrong costs a copy, never a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lorakit.core.errors import LorakitError
from lorakit.engine import weight_storage

# How many weights ahead are considered; the window ends sooner but for tiny ones.
FAR = 64
# Weights asked for after which all that was learned is forgotten, so that it takes 8 MB at most: in SDXL, 400 steps.
MOST = 2**20


class Order:
    """Learns in which order numbers come, by reading along where the same was seen before."""

    def __init__(self) -> None:
        self._seen: list[int] = []
        # Where each pair of numbers was last seen, one after the other; and where in what was seen we are again.
        self._pairs: dict[tuple[int, int], int] = {}
        self._place: int | None = None

    def follow(self, number: int) -> list[int]:
        """`number` has come; what came next the last time, soonest first. Empty where nothing is known."""
        if len(self._seen) == MOST:
            self._seen, self._pairs, self._place = [], {}, None
        seen, pair = self._seen, (self._seen[-1] if self._seen else -1, number)
        if self._place is not None and seen[self._place + 1] == number:
            self._place += 1
        else:
            self._place = self._pairs.get(pair)
        self._pairs[pair] = len(seen)
        seen.append(number)
        return [] if self._place is None else seen[self._place + 1 : self._place + 1 + FAR]


class Stream:
    """Weights in the host's memory, by number, and those of them that are on the device.

    Memory of the host is taken in slabs, each when its first weight comes: pinned, so that a copy to a CUDA card needs
    nobody's help, and many weights in one, as torch rounds every pinned allocation up to a power of two.

    Args:
        sizes: bytes of each weight.
        device: where they are needed.
        window: bytes on the device that the weight in use and those copied ahead of it share.

    Attributes:
        asked, late: times that a weight was asked for; that it had not been copied ahead.
        copied: bytes copied to the device.
        host: bytes of the host's memory that are taken.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str, window: int = weight_storage.WINDOW):
        self.sizes, self.device, self.window = list(sizes), torch.device(device), window
        self.asked = self.late = self.copied = self.host = 0
        self._places, self._lengths = weight_storage.packed(sizes)
        self._slabs: dict[int, torch.Tensor] = {}
        self._order = Order()
        # Number -> its bytes on the device, and what a computation has to wait for before it reads them.
        self._there: dict[int, tuple[torch.Tensor, Any]] = {}
        # Without CUDA there are no streams: a copy is done when it returns.
        cuda = self.device.type == "cuda" and torch.cuda.is_available()
        self._side: Any = torch.cuda.Stream(self.device) if cuda else None
        self._main: Any = None

    def put(self, number: int, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Keep a weight that is made of `parts`, together as many bytes as was said; the parts as they lie there.

        Raises:
            LorakitError: the host has no memory left.
        """
        slab = self._places[number][0]
        if slab not in self._slabs:
            self._slabs[slab] = _host_memory(self._lengths[slab], pinned=self._side is not None)
            self.host += self._lengths[slab]
        kept = _apart(self._bytes(number), parts)
        for place, part in zip(kept, parts, strict=True):
            place.copy_(part)
        return kept

    def fetch(self, number: int, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`parts`, as `put` gave them, on the device; ready for what is computed on the current CUDA stream."""
        if self._side is not None and self._main != (current := torch.cuda.current_stream(self.device)):
            self.drop()  # memory goes back to the stream that it was taken on, and that must know of it
            self._main = current
        self.asked += 1
        expected = self._order.follow(number)
        if number not in self._there:
            self.late += 1
            self._there[number] = self._copy(number, ahead=False)
        bytes = self._arrived(number)
        self._look_ahead(number, expected)
        return _apart(bytes, parts)

    def drop(self) -> None:
        """Give back what is on the device."""
        self._let_go(list(self._there))

    def __del__(self) -> None:
        """Copies may still be under way."""
        self.drop()

    def _look_ahead(self, number: int, expected: Sequence[int]) -> None:
        """Copy what should come next, as far as the window holds it beside what is in use, and let go of the rest."""
        room = self.window - self.sizes[number]
        wanted: dict[int, None] = {}
        for other in expected:
            if other in wanted:
                continue
            if other != number:
                room -= self.sizes[other]
            if room < 0:
                break
            wanted[other] = None
        self._let_go(self._there.keys() - wanted.keys())
        for other in wanted:
            if other not in self._there:
                self._there[other] = self._copy(other, ahead=True)

    def _copy(self, number: int, *, ahead: bool) -> tuple[torch.Tensor, Any]:
        """Begin to copy a weight: its bytes on the device, and what says when they are there. `ahead`: beside what the
        device computes meanwhile."""
        self.copied += self.sizes[number]
        made = torch.empty(self.sizes[number], dtype=torch.uint8, device=self.device)
        if not ahead or self._side is None:
            return made.copy_(self._bytes(number), non_blocking=True), None
        # The memory may be what the computation has just let go of: whatever it was told before comes first.
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            made.copy_(self._bytes(number), non_blocking=True)
            return made, self._side.record_event()

    def _arrived(self, number: int) -> torch.Tensor:
        """The bytes of a weight, which whatever is computed from now on waits for: to read them, or to be given their
        memory."""
        made, event = self._there[number]
        if event is not None:
            self._main.wait_event(event)
            self._there[number] = made, None
        return made

    def _let_go(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._arrived(number)
            del self._there[number]

    def _bytes(self, number: int) -> torch.Tensor:
        slab, start = self._places[number]
        return self._slabs[slab].narrow(0, start, self.sizes[number])


def _apart(bytes: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors like `parts` in a row of bytes, one behind the other."""
    found, start = [], 0
    for part in parts:
        found.append(bytes.narrow(0, start, part.nbytes).view(part.dtype).view(part.shape))
        start += part.nbytes
    return found


def _host_memory(size: int, *, pinned: bool) -> torch.Tensor:
    """Bytes of the host's memory, which can be pinned only where there is CUDA."""
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    except RuntimeError:
        raise LorakitError(
            f"memory.stream_base: the host has no {size / 2**20:.0f} MiB of memory left for the base's weights; close "
            "other programs, or keep the weights smaller with memory.base_storage"
        ) from None
