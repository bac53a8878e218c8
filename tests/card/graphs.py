"""Streams, events and graphs of the make-believe card (`card.py`), with the interface of torch's Python classes."""

from __future__ import annotations

import itertools
from typing import Any

import torch

card: Any = torch.cuda.card
numbers = itertools.count(1)


class Event:
    def __init__(self) -> None:
        self.at = card.promised()

    def synchronize(self) -> None:
        card.keep_promises(self.at)


class Stream:
    """The main stream runs everything at once. Other streams delay their copies from the host until a wait."""

    device_index = 0
    device = torch.device("cuda", 0)

    def __init__(self, device: Any = None, main: bool = False):
        self.main, self.number = main, 0 if main else next(numbers)

    __hash__ = object.__hash__

    def __ne__(self, other: object) -> bool:
        return other is not None and self is not other  # torch's streams compare like this with None

    def wait_stream(self, other: Stream) -> None:
        if not other.main:
            card.keep_promises(card.promised())

    def wait_event(self, event: Event) -> None:
        card.keep_promises(event.at)

    def record_event(self) -> Event:
        return Event()


current = [Stream(main=True)]
sync_debug_mode = [0]


def set_stream(stream: Stream) -> None:
    current[0] = stream
    card.aside(not stream.main)
    card.on_stream(stream.number)


class On:
    def __init__(self, stream: Stream):
        self.stream = stream

    def __enter__(self) -> None:
        self.before = current[0]
        set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        set_stream(self.before)


class Graph:
    def __init__(self) -> None:
        self.number: int | None = None
        self.handle = 0
        self.generators: list[Any] = []

    def register_generator_state(self, generator: Any) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        card.replay(self.number)

    def pool(self) -> int:
        if self.number is None:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self.handle

    def __del__(self) -> None:
        if self.number is not None:
            card.forget(self.number)
            card.release_pool(self.handle)


class Capture:
    """As in torch, a failed capture does not restore its stream, pool and generators."""

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"):
        self.graph, self.on = graph, On(stream or Stream())
        graph.handle = pool or next(numbers)

    def __enter__(self) -> None:
        card.empty_cache()
        self.on.__enter__()
        for generator in self.graph.generators:
            card.register_generator(id(generator))
        card.begin(self.graph.handle)

    def __exit__(self, *_: object) -> None:
        self.graph.number = card.end(self.graph.handle)
        self.on.__exit__()


def snapshot() -> list[dict[str, Any]]:
    return [{"segment_pool_id": (0, pool), "total_size": a, "allocated_size": b} for pool, a, b in card.pools()]


def set_sync_debug_mode(mode: str | int) -> None:
    sync_debug_mode[0] = ["default", "warn", "error"].index(mode) if isinstance(mode, str) else mode
    card.waiting_is_an_error(sync_debug_mode[0] == 2)
