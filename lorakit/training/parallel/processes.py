"""Communication of a run that trains in several processes, one GPU each.

All processes run the same code. What only one may do, such as reading photos and writing files, the first process does
inside `Processes.first`; the others receive the result. While they wait, they compute their share of the items that the
first process passes to `Processes.map`.

Gradients are summed on the device, between the backward pass and the optimizer step. All other messages use gloo, which
notices at once when a process is lost. A run in a single process uses `SINGLE`, which communicates nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import importlib.metadata
import io
import itertools
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from lorakit import __version__
from lorakit.core import units
from lorakit.core.errors import LorakitError, Stopped, StopRequested
from lorakit.core.events import Event
from lorakit.core.messages import Message
from lorakit.runs import launch
from lorakit.runs.run_folder import RunFolder
from lorakit.training.checkpoint import NotFinite

if TYPE_CHECKING:
    from lorakit.core.protocols import Item, Trainable, Value

T = TypeVar("T")
Tasks = Mapping[str, Callable[[Any], object]]
NO_TASKS: Tasks = {}
CARDS = 64  # the most GPUs of one machine
# Timeout of gloo. The first process may draw class images for hours while the others wait; lost processes are noticed
# in another way.
PATIENCE = datetime.timedelta(days=7)
# Seconds after which a process ends if it still waits for the device after another was lost: NCCL would wait forever.
GRACE = 10
# Packages whose version must be the same in all processes: they compute, or decide what is computed.
PACKAGES = ("torch", "diffusers", "transformers", "peft")
NO_NCCL = (
    "several CUDA cards need NCCL, which torch {version} is built without (torch for Windows is): train on one card, "
    "or under Linux or WSL"
)


class ProcessLost(LorakitError):
    """Another process of the run has ended, so this one cannot go on."""


class EndedElsewhere(Exception):
    """The first process has ended the run and has reported why."""


@dataclass(frozen=True)
class _Failure:
    """Why a process gave no result; `kind` is a key of `_KINDS`."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        """The failure for an exception of the first process, or of a task in another."""
        kind = next(kind for kind, types in _KINDS.items() if isinstance(error, types))
        return cls(kind, str(error) or type(error).__name__)


_KINDS: dict[str, tuple[type[Exception], ...]] = {
    "stop": (StopRequested, Stopped),
    "not finite": (NotFinite,),
    "memory": (torch.OutOfMemoryError,),
    "other": (Exception,),
}
# The exception that the other processes raise for a failure of the first; `EndedElsewhere` for all other kinds.
_FAILURES: dict[str, type[Exception]] = {"stop": StopRequested, "not finite": NotFinite}


@dataclass(frozen=True)
class _Turn:
    """Announces that each of the first `count` processes gets an item of `task` next."""

    task: str
    count: int


class Processes:
    """The processes of a run. This class is for a run in a single process; `Group` is for several.

    Attributes:
        rank: rank of this process; 0 is the first.
        count: number of processes.
    """

    rank, count = 0, 1

    def share(self, parts: int) -> range:
        """Indices, among the `parts` batches of a step, that this process computes. Each process has the same
        number."""
        return share(parts, self.rank, self.count)

    def first(self, compute: Callable[[], T], tasks: Tasks = NO_TASKS) -> T:
        """Call `compute` in the first process only and return its result in all. If it raises, all processes raise.

        Args:
            tasks: name -> function that the other processes run for `map` while they wait.

        Raises:
            StopRequested, NotFinite: `compute` raised this (or Stopped, which becomes StopRequested).
            EndedElsewhere: `compute` raised something else. The first process raises the original exception.
        """
        return compute()

    def map(self, task: str, function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
        """Apply `function` to each item, in order, inside `first`. The other processes apply their own task of that
        name to their share of the items."""
        return map(function, items)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return flag

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes. The sum is the same in all of them, to the bit."""

    def copy_weights(self, adapter: Trainable) -> None:
        """Copy the adapter's weights from the first process: other hardware rounds differently."""


SINGLE = Processes()


def share(parts: int, rank: int, count: int) -> range:
    """See `Processes.share`."""
    assert parts % count == 0, f"{parts} batches for {count} processes"
    return range(rank, parts, count)


class Group(Processes):
    """Several processes. All of them call every method but `share`, in the same order.

    Args:
        world: rank and number of this process; its process group exists already.
    """

    def __init__(self, world: launch.World):
        self.rank, self.count, self.local_rank = world.rank, world.count, world.local_rank
        # The store of the process group holds the message that a process leaves before it ends.
        self._store = dist.distributed_c10d._get_default_store()
        self._ends = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.lost: list[int] = []
        # The first watches all others, and they watch the first: each waits for a last message, or for the connection
        # to end.
        peers = range(1, self.count) if self.rank == 0 else [0]
        self._watchers = [threading.Thread(target=self._watch, args=(peer,), daemon=True) for peer in peers]
        self._peers = list(peers)
        for watcher in self._watchers:
            watcher.start()

    def first(self, compute: Callable[[], T], tasks: Tasks = NO_TASKS) -> T:
        """See `Processes`. The result is pickled, with its tensors on the device of each process."""
        if self.rank:
            return cast(T, self.receive(tasks))
        try:
            value = compute()
        except Exception as error:
            self._send(_Failure.of(error), self._to_all)
            raise
        self._send(value, self._to_all)
        return value

    def map(self, task: str, function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
        """See `Processes`. Items and results are pickled like the result of `first`."""
        rest = iter(items)
        while turn := list(itertools.islice(rest, self.count)):
            others = range(1, len(turn))
            self._send(_Turn(task, len(turn)), self._to_all)
            for rank in others:
                self._send(turn[rank], functools.partial(dist.send, dst=rank))
            try:
                values = [function(turn[0])]
            finally:  # the others send a result in any case
                parts = [self._take(functools.partial(dist.recv, src=rank)) for rank in others]
            for rank, part in zip(others, parts, strict=True):
                if isinstance(part, _Failure):
                    error = torch.OutOfMemoryError if part.kind == "memory" else LorakitError
                    raise error(f"process {rank}: {part.text}")
                values.append(cast("Value", part))
            yield from values

    def receive(self, tasks: Tasks = NO_TASKS) -> object:
        """The counterpart of `first` in the other processes: run the tasks of `map`, then return the result of
        `first`."""
        while isinstance(value := self._take(self._to_all), _Turn):
            if self.rank < value.count:
                item = self._take(functools.partial(dist.recv, src=0))
                try:
                    part = tasks[value.task](item)
                except Exception as error:
                    part = _Failure.of(error)
                self._send(part, functools.partial(dist.send, dst=0))
        if isinstance(value, _Failure):
            raise _FAILURES.get(value.kind, EndedElsewhere)(value.text)
        return value

    @staticmethod
    def _to_all(tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, 0)

    def _take(self, receive: Callable[[torch.Tensor], object]) -> object:
        with self._connected():
            size = torch.zeros(1, dtype=torch.int64)
            receive(size)
            data = torch.empty(int(size), dtype=torch.uint8)
            receive(data)
        # Tensors from the GPU of another process, also on another machine, go to the GPU of this one.
        places = dict.fromkeys((f"cuda:{number}" for number in range(CARDS)), f"cuda:{self.local_rank}")
        # The data comes from a process of this run, so its pickle is trusted.
        return torch.load(io.BytesIO(data.numpy().tobytes()), map_location=places, weights_only=False)

    def _send(self, value: object, send: Callable[[torch.Tensor], object]) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
        with self._connected():
            send(torch.tensor([len(data)]))
            send(data)

    def any(self, flag: bool) -> bool:
        """See `Processes`. This does not wait for the device."""
        value = torch.tensor([int(flag)])
        with self._connected():
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """See `Processes`. Later work on the GPU waits for the sum; the host does not."""
        with self._connected():
            for work in [dist.all_reduce(tensor.detach(), async_op=True) for tensor in tensors]:
                work.wait()

    def copy_weights(self, adapter: Trainable) -> None:
        """See `Processes`."""
        state = self.first(lambda: dict(adapter.state()))
        if self.rank:
            adapter.load_state(state)

    def require_same_start(self) -> None:
        """Raises:
        LorakitError: a process has another version of lorakit or of what it computes with, or other arguments.
        """
        own = {"lorakit": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
        versions: list[Any] = [None] * self.count
        with self._connected():
            dist.all_gather_object(versions, (platform.node(), own, " ".join(sys.argv[1:])))
        host, expected, arguments = versions[0]
        for rank, (other, own, words) in enumerate(versions):
            if words != arguments:
                raise LorakitError(
                    "process {rank} on {other} was started with {words!r}, and process 0 on {host} with "
                    "{arguments!r}: give the same command on all machines",
                    *(rank, other, words, host, arguments),
                )
            if wrong := [name for name in expected if own[name] != expected[name]]:
                name = wrong[0]
                raise LorakitError(
                    "process {rank} on {other} has {name} {own}, and process 0 on {host} has {expected}: "
                    "install the same versions on all machines",
                    *(rank, other, name, own[name], host, expected[name]),
                )

    def say_problem(self, text: str) -> None:
        """Leave a message for the first process about why this one ends. The first reports it."""
        self._store.set(f"problem/{self.rank}", f"process {self.rank} on {platform.node()}: {text}")

    def leave(self) -> None:
        """Send the last message to the watched processes, at the end of the run."""
        with self._connected():
            for peer in self._peers:
                dist.send(torch.zeros(1), peer, group=self._ends)
        for watcher in self._watchers:
            watcher.join()

    def _watch(self, peer: int) -> None:
        try:
            dist.recv(torch.zeros(1), peer, group=self._ends)
        except RuntimeError:
            self.lost.append(peer)
            faulthandler.dump_traceback_later(GRACE, exit=True, file=os.open(os.devnull, os.O_WRONLY))

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessLost(self._problem()) from error

    def _problem(self) -> str:
        """The message that a process left before it ended; without one, that a process was lost."""
        for watcher in self._watchers:
            watcher.join(1.0 / len(self._watchers))  # the watcher's connection ends at about the same time
        ranks = sorted({*self.lost, *range(self.count)}, key=lambda rank: rank not in self.lost)
        for rank in ranks:
            if self.rank == 0 and self._store.check([f"problem/{rank}"]):
                return str(self._store.get(f"problem/{rank}"), "utf-8")
        which = Message("process {rank}", self.lost[0]) if self.lost else "a process"
        return Message("{which} of {count} was lost (killed, out of memory, or its machine is gone)", which, self.count)


class SilentFolder(RunFolder):
    """The run folder in the processes that do not write it: only the first one writes."""

    def update(self, **changes: object) -> None:
        """Do nothing."""

    def event(self, event: str, **facts: object) -> None:
        """Do nothing."""

    def record(self, event: Event) -> None:
        """Do nothing."""


@contextlib.contextmanager
def join() -> Iterator[Processes]:
    """Connect the processes that the launcher started, and yield them; without a launcher, yield `SINGLE`.

    Raises:
        LorakitError: they cannot be connected, or differ in versions or arguments.
    """
    world = launch.world()
    if world.count == 1:
        yield SINGLE
        return
    is_ours = not dist.is_initialized()
    if is_ours:
        _connect(world)
    group = Group(world)
    try:
        group.require_same_start()
        yield group
    except Exception as error:
        if group.rank and not isinstance(error, (EndedElsewhere, ProcessLost, StopRequested)):
            group.say_problem(str(error) or type(error).__name__)
        raise
    group.leave()
    if is_ours:
        dist.destroy_process_group()


def _connect(world: launch.World) -> None:
    """Select the GPU of this process and create the process group, through accelerate."""
    from accelerate import PartialState
    from accelerate.utils import check_cuda_p2p_ib_support

    has_cuda = torch.cuda.is_available()
    if problem := has_cuda and card_problem(world, torch.cuda.device_count(), dist.is_nccl_available()):
        raise LorakitError(problem)
    if has_cuda and not check_cuda_p2p_ib_support():  # these GPUs have no P2P, and NCCL would try it
        os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    try:
        with _ended_by_signals():
            PartialState(cpu=not has_cuda, backend="cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        PartialState._reset_state()  # without this, accelerate would reuse the half-made state
        _refuse(error)


def card_problem(world: launch.World, cards: int, has_nccl: bool) -> str:
    """Why this process has no GPU for a distributed run; "" if it has one."""
    if not has_nccl:
        return Message(NO_NCCL, torch.__version__)
    if world.local_rank >= cards:
        return Message(
            "process {rank} on {platform} has no card of its own: there are {many}, start as many there",
            world.rank,
            platform.node(),
            units.count(cards, "card"),
        )
    return ""


def _refuse(error: Exception) -> NoReturn:
    """Raise a LorakitError that explains a failed connection."""
    place = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '29500')}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        raise LorakitError(
            "the port of {place} is taken by another program: give another one with --master-port (torchrun) "
            "or --main_process_port (accelerate launch)",
            place,
        ) from None
    line = (str(error).splitlines() or [""])[0]
    raise LorakitError("the processes cannot connect at {place} ({line}): see docs/scale.md", place, line) from None


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Restore the default signal handlers inside, so that a signal ends the process while it waits for a connection.
    There is nothing to save yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
