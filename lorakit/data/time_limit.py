"""Process many files in threads, with a time limit for each."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

# A picture takes a second or two, the largest about ten; on a busy machine ten times as long.
SECONDS = 120.0
# Interval at which running work is checked.
POLL_SECONDS = 0.5

Job = TypeVar("Job")
Result = TypeVar("Result")


def for_each(
    jobs: Sequence[Job],
    function: Callable[[Job], Result],
    late: Callable[[Job], Result],
    *,
    progress: Callable[[int, int], object] = lambda count, total: None,
) -> list[Result]:
    """The results of `function(job)` in order, or `late(job)` for jobs that take longer than `SECONDS`.

    A decoder cannot be stopped. A late thread is abandoned; as a daemon it does not keep the program alive. Another
    thread replaces it.

    Args:
        progress: called with the number of results and the number of jobs.
    """
    queue, running, changed = deque(enumerate(jobs)), dict[int, float](), threading.Condition()
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def work() -> None:
        while True:
            with changed:
                if not queue:
                    return
                at, job = queue.popleft()
                running[at] = time.monotonic()
            try:
                result = function(job)
            except BaseException as error:  # raised again in the caller's thread
                errors.append(error)
                return
            with changed:
                if running.pop(at, None) is None:
                    return
                results[at] = result
                changed.notify()

    def start() -> None:
        threading.Thread(target=work, daemon=True, name="decoder").start()

    try:
        for _ in range(min(len(jobs), 4, os.cpu_count() or 1)):
            start()
        with changed:
            while len(results) < len(jobs):
                changed.wait(POLL_SECONDS)
                if errors:
                    raise errors[0]
                for at in [at for at, since in running.items() if time.monotonic() - since > SECONDS]:
                    del running[at]
                    results[at] = late(jobs[at])
                    start()
                progress(len(results), len(jobs))
    finally:
        queue.clear()
    return [results[at] for at in range(len(jobs))]
