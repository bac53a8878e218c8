"""Free memory of a card, memory in the pools of graphs, and how a run uses both."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lorakit.engine import cuda_graphs, device_memory, weight_storage
from lorakit.engine.weight_offload import WeightOffloader

card: Any = getattr(torch.cuda, "card", None)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(card is None, reason="needs the make-believe card, whose room can be set"),
]
CUDA, MIB, TOTAL = torch.device("cuda"), 2**20, 2**34


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device_memory, "_limits", {})
    torch.cuda.empty_cache()
    yield
    card.set_room(-1)


def graph_with_pool(size: int) -> Any:
    """Return the replay of a graph whose pool reserves twice `size` bytes and uses none of them between replays."""

    def compute() -> torch.Tensor:
        return torch.ones(size, dtype=torch.uint8, device="cuda").mul(2).sum()

    return cuda_graphs.CudaCapturer()(compute, ())


def test_a_run_stays_within_the_memory_that_is_free_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit, a card can provide more memory: drivers on Windows use the host's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 * MIB, TOTAL))
    before = torch.cuda.memory_reserved()
    line = device_memory.prepare(CUDA)
    available = 64 * MIB + before
    assert line == f"device memory: {available / 2**30:.1f} of 16.0 GiB are free, and the run stays within them"
    assert device_memory.available(CUDA) == available and device_memory.available(torch.device("cpu")) is None
    some = torch.empty(60 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (32 * MIB, TOTAL))
    assert device_memory.free_bytes(CUDA) <= 4 * MIB + before
    del some


def test_the_pool_of_a_graph_is_not_free_and_counts_in_the_peak() -> None:
    device_memory.prepare(CUDA)
    gc.collect()  # graphs of earlier tests
    torch.cuda.empty_cache()
    before = device_memory.free_bytes(CUDA)
    torch.cuda.reset_peak_memory_stats()
    replay = graph_with_pool(32 * MIB)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    replay()
    assert before - 65 * MIB <= device_memory.free_bytes(CUDA) <= before - 64 * MIB
    assert device_memory.peak(CUDA) >= 64 * MIB
    del replay
    torch.cuda.empty_cache()
    assert device_memory.free_bytes(CUDA) >= before - MIB


@pytest.mark.parametrize(("limit", "all_pinned", "has_ring"), [(99, True, False), (5, False, True), (1, False, False)])
def test_weights_are_copied_if_little_memory_can_be_pinned(
    monkeypatch: pytest.MonkeyPatch, limit: int, all_pinned: bool, has_ring: bool
) -> None:
    """Weights in memory that is not pinned go through a pinned ring, whose slots are not overwritten too early."""
    size, empty, slabs = 2**16, torch.empty, []

    def limited(*shape: Any, pin_memory: bool = False, **named: Any) -> Any:
        if pin_memory and len(slabs) == limit:
            raise RuntimeError("CUDA error: out of memory")
        slabs.extend([shape] * pin_memory)
        return empty(*shape, pin_memory=pin_memory, **named)

    monkeypatch.setattr(torch, "empty", limited)
    monkeypatch.setattr(weight_storage, "SLAB_BYTES", size)
    # The last weight is larger than a slot of the ring.
    sizes = [size] * 8 + [2 * size]
    offloader = WeightOffloader(sizes, CUDA, window=4 * size)
    parts = [offloader.put(n, [torch.full((each // 4,), float(n + 1))]) for n, each in enumerate(sizes)]
    assert (offloader.pinned, offloader._ring is not None) == (all_pinned, has_ring)
    order = [*range(9), *reversed(range(9))]
    for _ in range(3):
        for number in order:
            (weight,) = offloader.fetch(number, parts[number])
            assert weight.cpu().unique().tolist() == [number + 1]
    assert offloader.misses <= len(order) + 4
