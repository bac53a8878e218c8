"""Wait for conditions that other processes or threads fulfil."""

import time
from collections.abc import Callable

# Time limit, long enough for a busy machine.
SECONDS = 600.0
# Seconds that a request of the front end may take.
REQUEST_SECONDS = 5.0


def wait_for(condition: Callable[[], object]) -> None:
    """Return as soon as `condition()` is true. Fail after the time limit."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "the wait was in vain"
        time.sleep(0.1)
