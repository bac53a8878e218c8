"""A step as two CUDA graphs, so that the host issues a dozen things, not 2,000.

One for each shape of a batch draws noise and timesteps, goes forward and backward, and adds to the gradients. What
differs from batch to batch, which photos and texts, is copied into tensors that stay where they are; generators are
seeded beforehand. The other clips and steps the optimizer, after as many batches as are accumulated, whatever their
shapes. Either is believed only once it has repeated what the step gives without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from lorakit.config import Config

# A graph for each shape of a batch, up to so many: each keeps some memory. Batches of further shapes run without.
MOST = 16

Compute = Callable[[], torch.Tensor]
# Takes a computation, and the generators that it draws from, apart from its replay: called once, it gives what repeats
# it, drawing then from the generators as they are.
Record = Callable[[Compute, Sequence[torch.Generator]], Compute]


class NotCaptured(RuntimeError):
    """Nothing could be made that repeats the step."""


def recorder(config: Config, device: torch.device) -> tuple[Record | None, str]:
    """How steps are recorded on this device, or None, with a line that says so (empty on a CPU)."""
    if device.type != "cuda":
        return None, ""
    drops = getattr(config.adapter, "dropout", 0.0) > 0
    again = config.memory.gradient_checkpointing or config.memory.limit_gib is not None
    reasons = {
        "what dropout drew is drawn once more for gradient checkpointing": drops and again,
        "the base's weights are copied to the card as they are needed": config.memory.stream_base,
    }
    for reason, holds in reasons.items():
        if holds:
            return None, f"steps are issued one operation at a time: {reason}"
    return CudaRecorder(), f"each batch shape's pass becomes a CUDA graph at its first step, of {MOST} shapes at most"


class CudaRecorder:
    """Captures a computation on a stream of its own; graphs share their memory, as only one runs at a time."""

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute, generators: Sequence[torch.Generator]) -> Compute:
        """Capture; what is given back replays."""
        # Kernels are chosen and workspaces made on the stream of the capture, where neither may happen during one.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True)
class Allowed:
    """How far two computations of a step may lie apart, relative to the norm of what is right.

    Attributes:
        loss, gradients: as they say, all gradients taken together.
        one: the gradient of a single parameter, where it is more than rounding; without it is 1.
    """

    loss: float
    gradients: float
    one: float


# Kernels that add in changing order differ in the last bits; a graph that reads a wrong tensor differs altogether.
SAME_KERNELS = Allowed(1e-2, 1e-2, 0.2)
# Of the norm of all gradients: a parameter with less than this has next to no gradient, and what there is is rounding.
SMALL = 1e-2


@dataclass(frozen=True)
class _Recorded:
    inputs: list[torch.Tensor]
    replay: Compute


class Replayed:
    """Does `backward(begin())` by replay: the loss comes back, gradients are added to those of `parameters`.

    Args:
        backward: from a batch, and what is drawn from the generators, to the loss, having added to the gradients.
        parameters: what is trained; each is given a gradient that stays where it is.
        record: see `recorder`.
        generators: what `backward` draws from.
    """

    def __init__(
        self,
        backward: Callable[[Any], torch.Tensor],
        parameters: Sequence[torch.Tensor],
        record: Record,
        generators: Sequence[torch.Generator] = (),
    ):
        self._backward, self._parameters, self._record, self._generators = backward, parameters, record, generators
        self._known: dict[Any, _Recorded] = {}
        self._places: list[int] = []

    def __call__(self, begin: Callable[[], Any]) -> torch.Tensor:
        """The loss of a batch, valid until the next call.

        Args:
            begin: seeds the generators and gives the batch, a dataclass of tensors, of which a graph depends on the
                shapes, and of other things, on which it depends.

        Raises:
            NotCaptured: see there; the gradients are as they were before the call.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        places = [place for p in self._parameters if p.grad is not None for place in (p.data_ptr(), p.grad.data_ptr())]
        if places != self._places:  # the first call, or somebody moved the model: a graph knows memory, not tensors
            self._places, self._known = places, {}
        batch = begin()
        inputs, shape = _inputs(batch), _shape(batch)
        if shape not in self._known:
            if len(self._known) == MOST:
                return self._backward(batch)
            self._known[shape] = self._recorded(batch, begin)
            begin()
        recorded = self._known[shape]
        torch._foreach_copy_(recorded.inputs, list(inputs.values()))
        return recorded.replay()

    def forget(self) -> bool:
        """Record anew what comes next: the model was moved, or memory is needed. Whether anything was recorded."""
        known, self._known = self._known, {}
        return bool(known)

    def _recorded(self, batch: Any, begin: Callable[[], Any]) -> _Recorded:
        copies = {name: tensor.clone() for name, tensor in _inputs(batch).items()}
        still = replace(batch, **copies)

        def compute() -> torch.Tensor:
            return self._backward(still)

        replay = believed(self._parameters, compute, lambda: self._record(compute, self._generators), begin=begin)
        return _Recorded(list(copies.values()), replay)


class Finished:
    """Does `finish()`, what follows the passes of a step, by replay.

    Args:
        finish: changes what `held` gives, and nothing else; to the bit the same each time.
        held: float32 tensors, all that `finish` reads or changes.
        record: see `recorder`.
    """

    def __init__(self, finish: Compute, held: Callable[[], list[torch.Tensor]], record: Record):
        self._finish, self._held, self._record = finish, held, record
        self._replay: Compute | None = None
        self._places: list[int] = []

    def __call__(self) -> torch.Tensor:
        """What `finish` gives, valid until the next call.

        Raises:
            NotCaptured: see there; what is held is as it was before the call.
        """
        if self._now() != self._places:
            # The first step makes the optimizer's state. Later, somebody loaded another: a graph knows memory.
            self._replay, result, self._places = None, self._finish(), self._now()
            return result
        if self._replay is None:
            self._replay = self._recorded()
        return self._replay()

    def forget(self) -> bool:
        """Record anew at the next step. Whether anything was recorded."""
        replay, self._replay = self._replay, None
        return replay is not None

    def _now(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._held()]

    def _recorded(self) -> Compute:
        held = [tensor.detach() for tensor in self._held()]
        # On the host: with weights, gradients and state twice on it, the card may be full.
        before = [tensor.to("cpu", copy=True) for tensor in held]

        def back() -> None:
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)

        try:
            expected = _bits([self._finish(), *held])
            replay = self._record(self._finish, ())
            back()
            if not torch.equal(_bits([replay(), *held]), expected):
                raise ValueError("a step by replay has other bits")
        except Exception as problem:
            raise _not_captured(problem) from problem
        finally:
            back()
        return replay


def _bits(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A sum of each float32 tensor's words in memory: one need not keep tensors to know whether they were the same."""
    return torch.stack([tensor.detach().reshape(-1).view(torch.int32).sum() for tensor in tensors])


def _not_captured(problem: Exception) -> NotCaptured:
    return NotCaptured((str(problem).splitlines() or [type(problem).__name__])[0])


def believed(
    parameters: Sequence[torch.Tensor],
    known: Compute,
    make: Callable[[], Compute],
    allowed: Allowed = SAME_KERNELS,
    begin: Callable[[], Any] = lambda: None,
) -> Compute:
    """What `make` gives, once it has given the loss and the gradients that `known` gives.

    Args:
        parameters: what both add gradients to, none of them None; these are afterwards what they were.
        known, make: the computation that is right, and what makes another of it.
        begin: called before either is done.

    Raises:
        NotCaptured: see there.
    """
    gradients: list[torch.Tensor] = [p.grad for p in parameters if p.grad is not None]
    before = [gradient.clone() for gradient in gradients]
    try:
        torch._foreach_zero_(gradients)
        begin()
        expected = [known().clone(), *(gradient.clone() for gradient in gradients)]
        made = make()
        torch._foreach_zero_(gradients)
        begin()
        _same([made(), *gradients], expected, allowed)
    except Exception as problem:  # compilers fail in ways of their own; what the step itself raises comes again
        raise _not_captured(problem) from problem
    finally:
        torch._foreach_copy_(gradients, before)
    return made


def _same(found: list[torch.Tensor], expected: list[torch.Tensor], allowed: Allowed) -> None:
    """Compare loss and gradients, all of them at once.

    Raises:
        ValueError: something else is given than by the step that should be repeated.
    """
    one, two = ([tensor.detach().float() for tensor in group] for group in (found, expected))
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(one, two)))
    norms = torch.stack(torch._foreach_norm(two))
    whole = norms[1:].norm().clamp(min=torch.finfo(torch.float32).tiny)
    each_off = apart[1:] / (norms[1:] + SMALL * whole)
    loss_off, off, worst = torch.stack([apart[0] / norms[0], apart[1:].norm() / whole, each_off.max()]).tolist()
    if not (loss_off <= allowed.loss and off <= allowed.gradients and worst <= allowed.one):
        raise ValueError(f"its loss is off by {loss_off:.1e}, its gradients by {off:.1e}, one of them by {worst:.1e}")


def _inputs(batch: Any) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _shape(batch: Any) -> tuple[Any, ...]:
    """What batches have in common that one graph will do for."""
    values = [getattr(batch, field.name) for field in fields(batch)]
    return tuple((value.shape, value.dtype) if isinstance(value, torch.Tensor) else value for value in values)
