"""Events that take longer than a request may: each returns at once, and the page asks how far it is. Between a browser
and this program there may be a proxy that closes a silent request after some seconds."""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lorakit.core.errors import LorakitError
from lorakit.ui import widgets
from lorakit.ui.texts import Say
from lorakit.ui.widgets import FOLLOW, say_for

# Seconds that a request waits for its work, seconds between polls, maximum number of running tasks, and number of
# remembered tasks.
PATIENCE, EVERY, WORKERS, MAX_TASKS = 0.7, 1.0, 8, 50
Progress = Callable[[int, int], object]
# Values of an event: component -> value.
Values = dict[Any, Any]
# Arguments: component -> value, the texts, the progress callback. Result: the values of the outputs.
Work = Callable[[Values, Say, Progress], Sequence[Any]]
# The listener and its work.
Event = tuple[Callable[..., Any], Work]


class Task:
    """Work in a thread, with its progress."""

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[[Progress], Sequence[Any]]):
        self.count, self.total, self.begin = 0, 0, time.monotonic()
        self.future: Future[Sequence[Any]] = pool.submit(work, self.progress)

    def progress(self, count: int, total: int) -> None:
        """So much is done, of so much (0: nobody knows)."""
        self.count, self.total = count, total

    def line(self, say: Say) -> str:
        """How far it is, for the person."""
        seconds = widgets.duration(time.monotonic() - self.begin, say)
        if not self.count:
            return widgets.quiet(say("task.working", time=seconds))
        if not self.total:
            return widgets.quiet(say("task.so_far", count=self.count, time=seconds))
        return widgets.quiet(say("task.progress", count=self.count, total=self.total, time=seconds))


class Tasks:
    """The tasks of a front end by number. Several threads may use it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="task")
        self._tasks: OrderedDict[int, Task] = OrderedDict()
        self._numbers, self._lock = itertools.count(1), threading.Lock()

    def start(self, work: Callable[[Progress], Sequence[Any]]) -> int:
        """Begin a task. Return its number."""
        task = Task(self._pool, work)
        with self._lock:
            number = next(self._numbers)
            self._tasks[number] = task
            while len(self._tasks) > MAX_TASKS:
                self._tasks.popitem(last=False)
        return number

    def look(self, number: int, say: Say) -> tuple[Sequence[Any] | None, str, bool]:
        """The result or None, the progress or an error message, and whether to poll again."""
        task = self._tasks.get(number)
        if task is None:
            return None, widgets.problem(say("task.lost")), False
        wait([task.future], PATIENCE)
        if not task.future.done():
            return None, task.line(say), True
        if error := task.future.exception():
            if isinstance(error, LorakitError):
                return None, widgets.problem(say.translate(str(error))), False
            traceback.print_exception(error)
            return None, widgets.problem(say("task.failed", error=type(error).__name__)), False
        return task.future.result(), "", False


@dataclass
class Ticket:
    """The task that a page waits for, and the last whose result it got."""

    number: int = 0
    last: int = 0


def polled(
    tasks: Tasks,
    events: Sequence[Event],
    inputs: set[Any],
    outputs: Sequence[Any],
    **more: Any,
) -> Callable[..., Any]:
    """On each event do its work in a thread, and show how far it is in the first output, which is HTML. An event that
    comes while another of them is under way takes its place.

    Args:
        events: what listens, and the work.
        more: how the events are sent, where it is not as `FOLLOW` says.

    Returns:
        Listens for the end of the work.
    """
    # A state's change is not reported to a plain request; that of HTML is, and a comment takes no room on the page.
    ticket, ends, timer = gr.State(Ticket()), widgets.html(), gr.Timer(EVERY, active=False)
    everything = [*outputs, ends, timer]

    def wire(listen: Callable[..., Any], work: Work) -> None:
        def begin(data: Values, request: gr.Request) -> list[Any]:
            say = say_for(request)
            data[ticket].number = tasks.start(lambda progress: work(data, say, progress))
            return result_of(data[ticket], say)

        listen(begin, inputs | {ticket}, everything, **FOLLOW | more)

    def look(data: Values, request: gr.Request) -> list[Any]:
        return result_of(data[ticket], say_for(request))

    def result_of(holder: Ticket, say: Say) -> list[Any]:
        number = holder.number
        result, line, more = tasks.look(number, say)
        if number != holder.number or number == holder.last != 0:
            return [gr.skip()] * len(everything)  # something newer is under way, or another look brought it
        if result is None:
            return [line, *[gr.skip()] * len(outputs), gr.Timer(active=more)]
        holder.last = number
        return [*result, f"<!-- {number} -->", gr.Timer(active=False)]

    for listen, work in events:
        wire(listen, work)
    timer.tick(look, {ticket}, everything, **FOLLOW)
    listener: Callable[..., Any] = ends.change
    return listener
