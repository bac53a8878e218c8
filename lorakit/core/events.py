"""Events of a run, and the request to stop it.

Kinds and their facts:

    message, warning   message: a line for the person; in JSON also its `key`, an English template, and its `values`
    phase              phase: what begins; "training" also has `steps`
    work               doing, position, total: how far something before or after training is, where it takes seconds
    step               loss, smoothed_loss, gradient_norm, learning_rate
    progress           loss (smoothed), learning_rate, images_per_second, memory_mib, eta_s; after several steps
    validation         mse, rmse, mae, r2, prior_drift, bands, photos, source
    checkpoint         a checkpoint was written
    sample             file: name of the grid of pictures
    error, done        message; adapter: name of the checked file

`lorakit train --json` and `lorakit resume --json` write each as a line of JSON, and also these:

    start              folder: of the run; steps: its whole length
    result             folder, adapter, exports, steps, findings: it is done
    stopped            message, folder, adapter: it was stopped, and can be resumed
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from lorakit.core.errors import StopRequested
from lorakit.core.messages import Message, key_of

# Seconds between two events of the same work. Shorter work has no event.
WORK_SECONDS = 1.0


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: one of the kinds above.
        step: optimizer steps done, or None outside training.
        facts: plain values.
    """

    kind: str
    step: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The event as one table of plain values."""
        step = {} if self.step is None else {"step": self.step}
        facts = {**self.facts, **key_of(self.facts.get("message"))}
        return {"event": self.kind, **step, **{name: json_value(value) for name, value in facts.items()}}


def json_value(value: object) -> Any:
    """JSON values: paths become names (a log never contains locations on the machine), non-finite numbers null."""
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


Listener = Callable[[Event], object]


class Events:
    """Passes each event to all listeners, in order.

    An exception of a listener ends the run. An OSError does not: the listener's log cannot be written, and the other
    listeners get one warning about it. As a context manager, it closes each listener that has a `close`.
    """

    def __init__(self, *listeners: Listener):
        self.listeners = listeners
        self._unwritable: list[Listener] = []
        self._work, self._position, self._total, self._emitted = "", 0, 0, 0.0

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for listener in self.listeners:
            close = getattr(listener, "close", None)
            if close is not None:
                self._guard(listener, close)

    def emit(self, kind: str, step: int | None = None, **facts: object) -> None:
        """Pass an event to all listeners."""
        event = Event(kind, step, facts)
        for listener in self.listeners:
            self._guard(listener, listener, event)

    def _guard(self, listener: Listener, function: Callable[..., object], *arguments: Event) -> None:
        try:
            function(*arguments)
        except OSError as error:
            if listener not in self._unwritable:
                self._unwritable.append(listener)
                line = Message(
                    "a log of the run cannot be written ({reason}); the run goes on without it",
                    error.strerror or error,
                )
                for other in self.listeners:
                    if other not in self._unwritable:
                        self._guard(other, other, Event("warning", None, {"message": line}))

    def begin(self, doing: str, total: int) -> None:
        """Start work of `total` parts, such as pictures; `advance` counts them."""
        self._work, self._position, self._total, self._emitted = doing, 0, total, time.monotonic()

    def advance(self, parts: int = 1) -> None:
        """Count finished parts of the work. Listeners get an event at most once a second."""
        self._position += parts
        if self._work and time.monotonic() - self._emitted >= WORK_SECONDS:
            self._emitted = time.monotonic()
            self.emit("work", doing=self._work, position=self._position, total=self._total)

    def say(self, line: str, /, *values: object, warning: bool = False) -> None:
        """Emit a message for the user, given as text or as a template and values."""
        self.emit("warning" if warning else "message", message=Message(line, *values) if values else line)


# Returns whether the run should stop; called again and again.
Stop = Callable[[], bool]


class StopRequest:
    """Whether a stop of the run was requested; the only place that checks.

    Args:
        events: gets a message at the first request.
        sources: each returns whether it requests a stop: the stop file, a signal, the caller's function.
        agree: combines the answers of all processes of the run: True if any of them is True.
    """

    def __init__(self, events: Events, *sources: Stop, agree: Callable[[bool], bool] = bool):
        self._events, self._sources, self._agree = events, sources, agree
        self.requested = False

    def __call__(self, consequence: str) -> bool:
        """Check the sources. At the first request, say "stopping: <consequence>"."""
        return self.requested or self._note(any(source() for source in self._sources), consequence)

    def together(self, consequence: str) -> bool:
        """As a call, but by all processes of the run at the same point: all of them get the same answer."""
        return self._note(self._agree(self.requested or any(source() for source in self._sources)), consequence)

    def _note(self, requested: bool, consequence: str) -> bool:
        if requested and not self.requested:
            self.requested = True
            self._events.say("stopping: {consequence}", consequence)
        return self.requested

    def poll(self, consequence: str) -> None:
        """As a call, for work that can be interrupted.

        Raises:
            StopRequested: a stop was requested.
        """
        if self(consequence):
            raise StopRequested
