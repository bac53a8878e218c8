"""A batch on the machines of a Ray cluster: each run is a task with a GPU, whose run folder is on a shared disk.

Ray places the tasks. If a worker or a machine is lost, Ray starts the task again, and the task resumes the run.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from lorakit.core import install
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.runs import batch

# If the worker of a task is lost more often than this, the task itself is probably the cause, for example too little
# memory.
RETRIES = 5


def run(
    runs: Path,
    rows: Sequence[batch.Row],
    address: str,
    say: Callable[[str], object],
    end: Callable[[str], object] = lambda name: None,
) -> None:
    """Train all rows that are not done, and return when no task is left; `say` has a line for each that ends, `end` its
    name.

    Args:
        address: as `ray.init` takes it: "auto", "host:port", "ray://host:port"; "local" starts Ray on this machine.

    Raises:
        LorakitError: ray is not installed, or there is no cluster.
    """
    if find_spec("ray") is None:
        raise LorakitError("--ray needs ray; {hint}", install.hint("ray"))
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            line = (str(error).splitlines() or [""])[0]
            raise LorakitError(
                "--ray {address}: no cluster answers there ({problem}); start one with: ray start", address, line
            ) from None
    # A separate process for each run, so that its GPU memory is freed at its end.
    task = ray.remote(max_calls=1, max_retries=RETRIES)(work)
    names = {
        task.options(num_gpus=0 if row.config.memory.device == "cpu" else 1).remote(str(runs), row.name): row.name
        for row in rows
    }
    left = list(names)
    while left:
        (ended,), left = ray.wait(left)
        try:
            problem = (
                ""
                if (code := ray.get(ended)) == 0
                else Message("ended with code {code}, see {name}.log", code, names[ended])
            )
        except ray.exceptions.RayError as error:
            problem = Message("lost {count} times ({error})", RETRIES + 1, type(error).__name__)
        say(Message("{name}: {result}; {count} left", names[ended], problem or "done", len(left)))
        end(names[ended])


def work(runs: str, name: str) -> int:
    """Begin or resume a run in a worker of Ray. Return the exit code."""
    from lorakit.cli.main import main

    if not Path(runs, batch.MANIFEST).is_file():
        raise LorakitError(
            "{folder} is not there on {machine}: all machines need the shared folder", runs, platform.node()
        )
    arguments = batch.command(Path(runs), name)
    if arguments is None:
        return 0
    with (
        Path(runs, f"{name}.log").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return main(arguments)
