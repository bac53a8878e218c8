"""SIGINT (Ctrl-C), SIGTERM and the end of the terminal as a request to stop a run."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

# Launchers pass signals to each process of a run, sometimes twice, and end a process that seems to have failed.
SEVERAL = int(os.environ.get("WORLD_SIZE") or 1) > 1
NOTICE = b"lorakit: stopping, and saving what there is; Ctrl-C again ends at once\n"
# Sent when the terminal is closed; Windows has no SIGHUP.
HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal came. A second signal raises KeyboardInterrupt, but in a run of
    several processes, which their launcher ends.

    Outside the main thread, where Python takes no handlers, the function returns False.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number != HANGUP and not SEVERAL:  # terminal and shell may both send that one
            raise KeyboardInterrupt
        received.append(number)
        if SEVERAL:
            return
        # `print` is not reentrant, and the handler may interrupt one.
        with contextlib.suppress(OSError):
            os.write(2, b"\n" * os.isatty(2) + NOTICE)  # below the bar

    try:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(HANGUP)
        before = {number: signal.signal(number, receive) for number in numbers}
    except ValueError:
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items() if not SEVERAL else ():
            signal.signal(number, handler)
