"""CUDA graphs after failed captures, and after their memory was released."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from lorakit.engine import cuda_graphs

MIB = 2**20
# The make-believe card has counters that a real card does not have.
card: Any = getattr(torch.cuda, "card", None)
counted = pytest.mark.skipif(card is None, reason="needs the make-believe card, which counts")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")]


@dataclass(frozen=True)
class Row:
    """A batch of one tensor."""

    values: torch.Tensor


class Step:
    """A training step with activations of some MiB and its own random generator."""

    def __init__(self, hidden: Callable[[torch.Tensor], Any] = lambda loss: None):
        self.weight, self.hidden = torch.nn.Parameter(torch.ones(MIB, device="cuda")), hidden
        self.generator = torch.Generator("cuda")
        self.capture = cuda_graphs.CudaCapturer()
        self.graphed = cuda_graphs.GraphedBackward(self.backward, [self.weight], self.capture, [self.generator])

    def backward(self, row: Row) -> torch.Tensor:
        noise = torch.randn(MIB, generator=self.generator, device="cuda")
        hidden = self.weight * noise * row.values
        for _ in range(10):
            hidden = hidden.sin()
        loss = hidden.sum()
        loss.backward()
        self.hidden(loss)
        return loss.detach()

    def begin(self, seed: int = 0, count: int = 1) -> Row:
        self.generator.manual_seed(seed)
        return Row(torch.ones(count, 1, device="cuda"))

    def values(self, way: Callable[..., torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
        self.weight.grad = torch.zeros_like(self.weight) if self.weight.grad is None else self.weight.grad.zero_()
        return [way(lambda: self.begin(seed)).clone(), self.weight.grad.clone()]


def wait_in_a_capture(loss: torch.Tensor) -> None:
    """Synchronize with the card, but only during a capture."""
    if torch.cuda.is_current_stream_capturing():
        loss.item()


def break_in_a_capture(loss: torch.Tensor) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("no such luck")


@pytest.fixture(autouse=True)
def torch_in_order() -> Iterator[None]:
    """After each test, torch must draw random numbers, release memory and use its first stream."""
    stream = torch.cuda.current_stream()
    yield
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.cuda.empty_cache()
    torch.randn(4, device="cuda")
    if card is not None:
        card.set_room(-1)


@pytest.mark.parametrize("hidden", [wait_in_a_capture, break_in_a_capture])
def test_torch_works_without_the_graph_after_a_failed_capture(hidden) -> None:
    """Generators draw, memory is released, steps have their usual results, and other captures succeed."""
    step = Step(hidden)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.raises(cuda_graphs.CaptureFailed):
        step.values(step.graphed)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 8 * MIB  # the gradient and the allocator's rounding
    first, second = (step.values(lambda begin: step.backward(begin())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = Step()
    for seed in range(3):
        expected = other.values(lambda begin: other.backward(begin()), seed)
        for a, b in zip(other.values(other.graphed, seed), expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_earlier_graphs_work_after_a_failed_capture() -> None:
    switch: list[bool] = []
    step = Step(lambda loss: wait_in_a_capture(loss) if switch else None)
    expected = step.values(step.graphed)
    switch.append(True)
    with pytest.raises(cuda_graphs.CaptureFailed):
        step.graphed(lambda: step.begin(0, 2))
    for a, b in zip(step.values(step.graphed), expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    switch.clear()
    assert step.graphed(lambda: step.begin(0, 2)).isfinite()


@counted
def test_a_synchronization_is_found_before_the_capture() -> None:
    step, captures = Step(lambda loss: loss.item()), card.captures()
    with pytest.raises(cuda_graphs.CaptureFailed, match="synchroniz"):
        step.values(step.graphed)
    assert card.captures() == captures


def test_graphs_are_captured_again_after_their_memory_was_released() -> None:
    """Results of earlier steps are still referenced and stay right."""
    step = Step()
    weights = [torch.zeros(4, device="cuda")]
    optimizer_step = cuda_graphs.GraphedOptimizerStep(lambda: weights[0].add_(1).sum(), lambda: weights, step.capture)
    results = [optimizer_step() for _ in range(3)]
    for round_ in range(3):
        expected = step.values(lambda begin: step.backward(begin()), round_)
        loss = step.graphed(partial(step.begin, round_))
        assert (loss - expected[0]).abs() <= 1e-5 * expected[0].abs()
        results += [loss, optimizer_step()]
        reserved = torch.cuda.memory_reserved()
        assert step.graphed.discard_graphs() and optimizer_step.discard_graphs()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= reserved - 8 * MIB
    assert weights[0].tolist() == [6.0] * 4 and [result.item() for result in results[:3]] == [4.0, 8.0, 12.0]


@counted
def test_the_first_step_holds_one_set_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test measures the memory before the capture, because graphs of the make-believe card keep all results."""
    graph, peaks = torch.cuda.CUDAGraph, list[int]()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: peaks.append(torch.cuda.max_memory_reserved()) or graph())
    step = Step()
    step.values(lambda begin: step.backward(begin()))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    step.values(lambda begin: step.backward(begin()))
    activations = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step.values(step.graphed)
    copies = 5 * step.weight.nbytes  # copies of gradients for the comparison
    assert copies < activations / 2
    assert peaks[0] - before <= activations + copies
