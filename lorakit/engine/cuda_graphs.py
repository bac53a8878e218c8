"""A training step as two CUDA graphs, so that the host issues a dozen operations instead of 2,000.

The first graph, one for each batch shape, draws noise and timesteps, runs forward and backward, and adds to the
gradients. Before its replay, the inputs of the batch are copied into static tensors and the generators are seeded. The
second graph clips gradients and steps the optimizer, after the accumulated batches of any shapes. Each graph is checked
once against the same step without a graph, and is used only if the results agree.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.config import Config
from lorakit.config.graphs import graphs_off
from lorakit.core.messages import Message

if TYPE_CHECKING:
    from lorakit.data.dataset import Batch

# The most batch shapes with a graph: each graph takes memory. Other shapes run without one.
MAX_GRAPHS = 16

SLOWER = "Training is correct, only slower."

Compute = Callable[[], torch.Tensor]
# Captures a computation, given the generators that it draws from. Returns its replay, which draws from the generators
# in their current state.
Capture = Callable[[Compute, Sequence[torch.Generator]], Compute]


class CaptureFailed(RuntimeError):
    """The step could not be captured, or its replay has another result."""


class ReferenceNotFinite(CaptureFailed):
    """The step's own gradients are not finite, say after an overflow in fp16, so there is nothing to compare with."""


def capturer(config: Config, device: torch.device) -> tuple[Capture | None, str]:
    """The function that captures steps on this device, or None; and a message about it with the reason (empty on a
    CPU)."""
    if device.type != "cuda":
        return None, ""
    if reason := graphs_off(config):
        return None, Message("CUDA graphs are off: {problem}. {slower}", reason, SLOWER)
    return CudaCapturer(), Message(
        "CUDA graphs are on: each batch shape is captured at its first step, at most {max_graphs}", MAX_GRAPHS
    )


class CudaCapturer:
    """Captures computations on its own stream. Graphs share one memory pool, because only one runs at a time."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, compute: Compute, generators: Sequence[torch.Generator]) -> Compute:
        """Capture a computation and return the function that replays it.

        Raises:
            RuntimeError: `compute` waits for the device or cannot be captured; torch's state is restored.
        """
        current = torch.cuda.current_stream()
        if not self._graphs:
            # torch refuses a pool whose graphs are all freed while a tensor in it is alive.
            self._pool = torch.cuda.graph_pool_handle()
        # Memory that an earlier pass cached belongs to another stream; this stream would allocate all of it again.
        torch.cuda.empty_cache()
        # Run once on the capture stream first: during the capture, kernels cannot be chosen and workspaces cannot be
        # allocated. An operation that waits for the device fails here, where it does no harm.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _waiting_is_an_error():
            compute()
        current.wait_stream(self._stream)
        gc.collect()  # a backward graph that a cycle keeps alive remembers another stream
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        try:
            # Other threads may use CUDA at the same time, as in notebooks and web UIs.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = compute()
        except BaseException:
            self._clean_up(graph, current, generators)
            raise
        self._graphs.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return result.clone()  # outside the pool, which is freed only when empty

        return replay

    def _clean_up(self, graph: Any, current: Any, generators: Sequence[torch.Generator]) -> None:
        """Restore torch's state after a failed capture.

        torch leaves the capture stream as the current one and the pool in use. Before torch 2.13 the allocator also
        frees nothing, and generators refuse to draw.
        """
        torch.cuda.set_stream(current)
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(current.device_index, self._pool)
        try:
            graph.pool()  # a capture that ended, in spite of an error in Python, frees its pool itself
        except RuntimeError:
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_releasePool(current.device_index, self._pool)
        self._graphs, self._pool = weakref.WeakSet(), None
        # A successful capture restores the state of its generators, including the default one.
        tiny, number = torch.cuda.CUDAGraph(), torch.zeros((), device=current.device)
        with contextlib.suppress(RuntimeError):
            for generator in generators:
                tiny.register_generator_state(generator)
            with torch.cuda.graph(tiny, stream=self._stream, capture_error_mode="thread_local"):
                number.add_(0)
        torch.cuda.set_stream(current)


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch warns once that it does not notice all waits
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class Tolerance:
    """How much two computations of a step may differ, relative to the norm of the reference.

    Attributes:
        loss: the loss.
        gradients: all gradients together.
        single: the gradient of a single parameter that is not negligible.
    """

    loss: float
    gradients: float
    single: float


# Kernels that add in varying order differ in the last bits; a graph that reads a wrong tensor differs completely.
SAME_KERNELS = Tolerance(1e-2, 1e-2, 0.2)
# In half precision these last bits have a larger effect on the gradients. A graph's difference may be up to
# NOISE_FACTOR times the difference between two passes without it, but at most NOISE_LIMIT times the tolerance.
NOISE_FACTOR, NOISE_LIMIT = 3.0, 10.0
# A gradient with less than this share of the norm of all gradients is mostly rounding.
NEGLIGIBLE_SHARE = 1e-2


@dataclass(frozen=True)
class _Graph:
    """A captured graph and its static input tensors."""

    inputs: list[torch.Tensor]
    replay: Compute


class GraphedBackward:
    """Run `backward(begin())` by replaying a graph: return the loss and add to the gradients of `parameters`.

    Args:
        backward: computes the loss of a batch and adds to the gradients.
        parameters: the trained parameters. Each gets a gradient, whose address does not change.
        capture: see `capturer`.
        generators: the generators that `backward` draws from.
    """

    def __init__(
        self,
        backward: Callable[[Batch], torch.Tensor],
        parameters: Sequence[torch.Tensor],
        capture: Capture,
        generators: Sequence[torch.Generator] = (),
    ):
        self._backward, self._parameters, self._capture, self._generators = backward, parameters, capture, generators
        self._graphs: dict[Any, _Graph] = {}
        self._addresses: list[int] = []

    def __call__(self, begin: Callable[[], Batch]) -> torch.Tensor:
        """The loss of a batch.

        Args:
            begin: seeds the generators and returns the batch, a dataclass. One graph serves batches whose tensors have
                equal shapes and whose other values are equal.

        Raises:
            CaptureFailed: see there; the gradients are unchanged.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        tensors = [tensor for p in self._parameters if p.grad is not None for tensor in (p, p.grad)]
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses:  # the first call, or the model was moved: a graph holds addresses, not tensors
            self._addresses, self._graphs = addresses, {}
        batch = begin()
        inputs, shape = _inputs(batch), _shape(batch)
        if shape not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                return self._backward(batch)
            self._graphs[shape] = self._capture_verified(batch, begin)
            begin()
        graph = self._graphs[shape]
        torch._foreach_copy_(graph.inputs, list(inputs.values()))
        return graph.replay()

    def discard_graphs(self) -> bool:
        """Free the graphs, because the model was moved or memory is needed. Return whether there were any. Later steps
        capture new ones."""
        graphs, self._graphs = self._graphs, {}
        return bool(graphs)

    def _capture_verified(self, batch: Batch, begin: Callable[[], Batch]) -> _Graph:
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in _inputs(batch).items()}
        static = replace(batch, **copies)

        def compute() -> torch.Tensor:
            return self._backward(static)

        replay = verified(self._parameters, compute, lambda: self._capture(compute, self._generators), begin=begin)
        return _Graph(list(copies.values()), replay)


class GraphedOptimizerStep:
    """Run `step()`, which clips gradients and steps the optimizer, by replaying a graph.

    Args:
        step: changes only `tensors()`, and has the same result, to the bit, each time.
        tensors: returns all tensors that `step` reads or changes, float32.
        capture: see `capturer`.
    """

    def __init__(self, step: Compute, tensors: Callable[[], list[torch.Tensor]], capture: Capture):
        self._step, self._tensors, self._capture = step, tensors, capture
        self._replay: Compute | None = None
        self._addresses: list[int] = []

    def __call__(self) -> torch.Tensor:
        """The result of `step`.

        Raises:
            CaptureFailed: see there; the tensors are unchanged.
        """
        if self._current_addresses() != self._addresses:
            # The first step allocates the optimizer's state; later, another state was loaded. A graph holds addresses.
            self._replay, result, self._addresses = None, self._step(), self._current_addresses()
            return result
        if self._replay is None:
            self._replay = self._capture_verified()
        return self._replay()

    def discard_graphs(self) -> bool:
        """Free the graph. Return whether there was one. The next step captures a new one."""
        replay, self._replay = self._replay, None
        return replay is not None

    def _current_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors()]

    def _capture_verified(self) -> Compute:
        tensors = [tensor.detach() for tensor in self._tensors()]
        # On the host: the device may have no memory for a second copy of weights, gradients and state.
        before = [tensor.to("cpu", copy=True) for tensor in tensors]

        def restore() -> None:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)

        try:
            expected = _bits([self._step(), *tensors])
            replay = self._capture(self._step, ())
            restore()
            if not torch.equal(_bits([replay(), *tensors]), expected):
                raise ValueError("the replayed optimizer step gives other bits")
        except Exception as problem:
            raise _capture_failed(problem) from problem
        finally:
            restore()
        return replay


def _bits(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A checksum of each float32 tensor, which compares tensors without copies."""
    return torch.stack([tensor.detach().reshape(-1).view(torch.int32).sum() for tensor in tensors])


def _capture_failed(problem: Exception) -> CaptureFailed:
    return CaptureFailed((str(problem).splitlines() or [type(problem).__name__])[0])


def verified(
    parameters: Sequence[torch.Tensor],
    reference: Compute,
    candidate: Callable[[], Compute],
    tolerance: Tolerance = SAME_KERNELS,
    begin: Callable[[], Any] = lambda: None,
) -> Compute:
    """Return `candidate()` after a check: it and `reference` each run once, after `begin()`, and their losses and
    gradients must agree within `tolerance`.

    Args:
        parameters: the parameters to whose gradients both add. The gradients must exist; they are restored afterwards.

    Raises:
        CaptureFailed: `candidate` fails, or does not agree; ReferenceNotFinite: the result of `reference` is not
            finite.
    """
    gradients: list[torch.Tensor] = [p.grad for p in parameters if p.grad is not None]
    before = [gradient.clone() for gradient in gradients]
    try:
        torch._foreach_zero_(gradients)
        begin()
        expected = [reference().clone(), *(gradient.clone() for gradient in gradients)]
        if not torch.stack(torch._foreach_norm(expected)).isfinite().all():
            raise ReferenceNotFinite("the step's gradients are not finite")
        compute = candidate()

        def difference(compute: Compute) -> Difference:
            torch._foreach_zero_(gradients)
            begin()
            return _difference([compute(), *gradients], expected)

        actual = difference(compute)
        if not actual.is_within(tolerance) and not actual.is_within(tolerance, noise := difference(reference)):
            values = actual.message(), noise.message()
            raise ValueError(Message("{difference} (two passes without it: {noise})", *values))
    except ReferenceNotFinite:
        raise
    except (
        Exception
    ) as problem:  # compilers raise anything; an error of the step itself will be raised again without us
        raise _capture_failed(problem) from problem
    finally:
        torch._foreach_copy_(gradients, before)
    return compute


class Difference(NamedTuple):
    """The differences of a loss and of gradients from the expected ones; see `Tolerance`."""

    loss: float
    gradients: float
    single: float

    def is_within(self, tolerance: Tolerance, noise: Sequence[float] = (0.0, 0.0, 0.0)) -> bool:
        """Whether each difference is within its tolerance, or explained by `noise`, the difference between two
        references."""
        limits = (tolerance.loss, tolerance.gradients, tolerance.single)
        return all(
            value <= max(limit, min(NOISE_FACTOR * natural, NOISE_LIMIT * limit))
            for value, limit, natural in zip(self, limits, noise, strict=True)
        )

    def message(self) -> Message:
        """The differences as a message."""
        template = "its loss differs by {loss:.1e}, its gradients by {gradients:.1e}, a single gradient by {worst:.1e}"
        return Message(template, *self)


def _difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> Difference:
    """Compare a loss and gradients with the expected ones."""
    actual, expected = ([tensor.detach().float() for tensor in group] for group in (actual, expected))
    differences = torch.stack(torch._foreach_norm(torch._foreach_sub(actual, expected)))
    norms = torch.stack(torch._foreach_norm(expected))
    total = norms[1:].norm().clamp(min=torch.finfo(torch.float32).tiny)
    single = (differences[1:] / (norms[1:] + NEGLIGIBLE_SHARE * total)).max()
    return Difference(*torch.stack([differences[0] / norms[0], differences[1:].norm() / total, single]).tolist())


def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _shape(batch: Batch) -> tuple[Any, ...]:
    """A key that is equal for batches which one graph can replay."""
    values = [getattr(batch, field.name) for field in fields(batch)]
    return tuple((value.shape, value.dtype) if isinstance(value, torch.Tensor) else value for value in values)
