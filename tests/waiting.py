"""Wait for what other processes do."""

import time
from collections.abc import Callable

# The machine may have other things to do; where all is well nobody waits so long.
SECONDS = 600.0


def wait_for(condition: Callable[[], object]) -> None:
    """Return once `condition` holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "the wait was in vain"
        time.sleep(0.1)
