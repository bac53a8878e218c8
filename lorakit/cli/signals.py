"""Stop a run on SIGINT (Ctrl-C), SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

# Whether a launcher started this process and others. Launchers send a signal to each process, sometimes twice, and end
# processes that seem to have failed.
SEVERAL = int(os.environ.get("WORLD_SIZE") or 1) > 1
NOTICE = b"lorakit: stopping and saving; press Ctrl-C again to end at once\n"
# The signal of a closed terminal. Windows has no SIGHUP.
HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal was received. A second SIGINT or SIGTERM raises KeyboardInterrupt,
    except in a run of several processes, because their launcher ends them.

    Outside the main thread, Python accepts no signal handlers, and the function always returns False.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number != HANGUP and not SEVERAL:  # terminal and shell may both send SIGHUP
            raise KeyboardInterrupt
        received.append(number)
        if SEVERAL:
            return
        # `print` is not reentrant, and the signal may interrupt a call of it.
        with contextlib.suppress(OSError):
            os.write(2, b"\n" * os.isatty(2) + NOTICE)  # the newline ends the line of the progress bar

    try:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:  # nohup sets SIG_IGN
            numbers.append(HANGUP)
        before = {number: signal.signal(number, receive) for number in numbers}
    except ValueError:
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items() if not SEVERAL else ():
            signal.signal(number, handler)
