"""Run long events in threads. The request returns at once, and the page polls for the progress and the result.

A proxy between the browser and this program may close a request after some seconds without data.
"""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import gradio as gr

from lorakit.core.errors import LorakitError
from lorakit.ui import widgets
from lorakit.ui.texts import Say
from lorakit.ui.widgets import FOLLOW, say_for

# Seconds that a request waits for its task, seconds between polls, maximum number of running tasks, and maximum number
# of stored tasks.
PATIENCE, EVERY, WORKERS, MAX_TASKS = 0.7, 1.0, 8, 50
Progress = Callable[[int, int], object]


class Steps(Protocol):
    """A progress callback that can also name the current step."""

    def __call__(self, count: int, total: int, doing: str = "") -> object:
        """Set the progress. `doing` is the key of the step's name in the texts."""


# Values of an event: component -> value.
Values = dict[Any, Any]
# Arguments: component -> value, the texts, the progress callback. Result: the values of the outputs.
Work = Callable[[Values, Say, Steps], Sequence[Any]]
# A listener of Gradio, such as `button.click`, and the work to do on its event.
Event = tuple[Callable[..., Any], Work]


class Task:
    """Work that runs in a thread, and its progress."""

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[[Steps], Sequence[Any]]):
        self.count, self.total, self.doing, self.begin = 0, 0, "", time.monotonic()
        self.future: Future[Sequence[Any]] = pool.submit(work, self.progress)

    def progress(self, count: int, total: int, doing: str = "") -> None:
        """Set the progress, see `Steps`. `total` is 0 if it is unknown."""
        self.count, self.total, self.doing = count, total, doing

    def line(self, say: Say) -> str:
        """The progress as HTML."""
        seconds = widgets.duration(time.monotonic() - self.begin, say)
        if not self.count:
            return widgets.quiet(say("task.working", time=seconds))
        if not self.total:
            return widgets.quiet(say("task.so_far", count=self.count, time=seconds))
        if self.doing:
            step = say(self.doing)
            return widgets.quiet(say("task.step", doing=step, count=self.count, total=self.total, time=seconds))
        return widgets.quiet(say("task.progress", count=self.count, total=self.total, time=seconds))


class Tasks:
    """The tasks of a front end by number. Thread-safe."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="task")
        self._tasks: OrderedDict[int, Task] = OrderedDict()
        self._numbers, self._lock = itertools.count(1), threading.Lock()

    def start(self, work: Callable[[Steps], Sequence[Any]]) -> int:
        """Start a task and return its number. The oldest tasks are dropped if there are more than `MAX_TASKS`."""
        task = Task(self._pool, work)
        with self._lock:
            number = next(self._numbers)
            self._tasks[number] = task
            while len(self._tasks) > MAX_TASKS:
                self._tasks.popitem(last=False)
        return number

    def look(self, number: int, say: Say) -> tuple[Sequence[Any] | None, str, bool]:
        """Wait up to `PATIENCE` seconds for a task.

        Returns:
            The result or None, the progress or an error message as HTML, and whether to poll again.
        """
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
            if isinstance(error, OSError):
                return None, widgets.problem(widgets.system_error(error, say)), False
            return None, widgets.problem(say("task.failed", error=type(error).__name__)), False
        return task.future.result(), "", False


@dataclass
class Ticket:
    """The number of the task that a page waits for, and of the last task whose result the page has received."""

    number: int = 0
    last: int = 0


def polled(
    tasks: Tasks,
    events: Sequence[Event],
    inputs: set[Any],
    outputs: Sequence[Any],
    **more: Any,
) -> Callable[..., Any]:
    """On each event, do its work in a thread and show the progress in the first output, which is an HTML component.

    If an event arrives during the work of an earlier one, only the later result is shown.

    Args:
        events: listeners with their work.
        inputs: components whose values the work gets.
        outputs: components that show the result.
        more: options of the events that override `FOLLOW`.

    Returns:
        A listener to the end of the work.
    """
    # Without Gradio's queue, the change of a State triggers no event. The change of an HTML component does, so the end
    # is a comment in `ends`, which is invisible.
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
            return [gr.skip()] * len(everything)  # a newer task runs, or an earlier poll has returned this result
        if result is None:
            return [line, *[gr.skip()] * len(outputs), gr.Timer(active=more)]
        holder.last = number
        return [*result, f"<!-- {number} -->", gr.Timer(active=False)]

    for listen, work in events:
        wire(listen, work)
    timer.tick(look, {ticket}, everything, **FOLLOW)
    listener: Callable[..., Any] = ends.change
    return listener
