"""Set the number of threads of a command: one for each idle core."""

from __future__ import annotations

import os

from lorakit.runs.launch import THREADS, available_cores

SAMPLE_SECONDS = 0.1
# The number that `use_idle_cores` has set, if it has.
_from_load: list[str] = []


def use_idle_cores() -> None:
    """Set OMP_NUM_THREADS to the number of idle cores, unless the user has set it. Call it before torch and NumPy are
    imported.

    After every operation all threads wait for the slowest one. A thread is slow if another program uses its core.
    On two cores, one of them busy, two threads train the bundled model at a third of the speed of one thread.
    """
    if not os.environ.get(THREADS):
        import psutil

        os.environ[THREADS] = str(idle_cores(psutil.cpu_percent(SAMPLE_SECONDS), available_cores()))
        _from_load[:] = [os.environ[THREADS]]


def of_user() -> str:
    """The value of OMP_NUM_THREADS that the user has set, or ""."""
    value = os.environ.get(THREADS, "")
    return "" if [value] == _from_load else value


def idle_cores(busy: float, total: int) -> int:
    """Rounded number of idle cores, at least 1, if `total` cores have a load of `busy` percent."""
    return max(1, round(total * (1 - busy / 100)))
