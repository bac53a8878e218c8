"""The number of threads a command computes with: one for each idle core."""

from __future__ import annotations

import os

THREADS = "OMP_NUM_THREADS"
SAMPLE_SECONDS = 0.1


def use_idle_cores() -> None:
    """Set OMP_NUM_THREADS to the number of idle cores. Call it before torch and NumPy are imported.

    At the end of every operation all threads wait for the slowest, for example one whose core another program uses. On
    two cores, one of them busy, two threads train the bundled model at a third of the speed of one thread. A value set
    by the user does not change.
    """
    if not os.environ.get(THREADS):
        import psutil

        os.environ[THREADS] = str(idle_cores(psutil.cpu_percent(SAMPLE_SECONDS), available_cores()))


def idle_cores(busy: float, total: int) -> int:
    """Number of the `total` cores that a load of `busy` percent leaves idle, rounded; at least one."""
    return max(1, round(total * (1 - busy / 100)))


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
