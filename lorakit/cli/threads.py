"""How many cores a command computes on: those that nobody else is using."""

from __future__ import annotations

import os

THREADS = "OMP_NUM_THREADS"
SAMPLE_SECONDS = 0.1


def use_idle_cores() -> None:
    """Have torch and NumPy, not imported yet, compute with a thread for each core that is idle now.

    A thread that shares its core with another program keeps all others waiting at the end of every operation: on two
    cores, one of them busy, two threads train the bundled model at a third of the speed of one. Whoever sets
    OMP_NUM_THREADS has chosen, and is left alone.
    """
    if not os.environ.get(THREADS):
        import psutil

        os.environ[THREADS] = str(idle_cores(psutil.cpu_percent(SAMPLE_SECONDS), available_cores()))


def idle_cores(busy: float, cores: int) -> int:
    """Of `cores`, those that `busy` percent of work on all of them leaves free, rounded; at least one."""
    return max(1, round(cores * (1 - busy / 100)))


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
