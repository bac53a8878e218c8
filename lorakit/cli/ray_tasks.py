"""Train a batch on a Ray cluster. Each run is a task, with one GPU unless it trains on the CPU.

All run folders are on a disk that the machines share.

If a worker or a machine is lost, Ray starts the task again, and the task resumes the run.
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

# How often Ray starts a task again after its worker is lost. More losses probably have their cause in the task itself,
# for example too little memory.
RETRIES = 5


def run(
    runs: Path,
    rows: Sequence[batch.Row],
    address: str,
    say: Callable[[str], object],
    end: Callable[[str], object] = lambda name: None,
) -> None:
    """Train all rows that are not done, and return when all tasks have ended.

    Args:
        address: as for `ray.init`: "auto", "host:port" or "ray://host:port"; "local" starts Ray on this machine.
        say: called with a line of text for each task that ends.
        end: called with the name of each run whose task ends.

    Raises:
        LorakitError: ray is not installed, or no cluster answers at the address.
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
    # With max_calls=1 each run has its own process, whose end frees the GPU memory.
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
            problem = Message("lost, tries: {count} ({error})", RETRIES + 1, type(error).__name__)
        say(Message("{name}: {result}; {count} left", names[ended], problem or "done", len(left)))
        end(names[ended])


def work(runs: str, name: str) -> int:
    """Start or resume a run in a Ray worker. Return the exit code.

    Raises:
        LorakitError: this machine does not see the shared folder.
    """
    from lorakit.cli.main import main

    if not Path(runs, batch.MANIFEST).is_file():
        raise LorakitError(
            "{folder} does not exist on {machine}: all machines need the shared folder", runs, platform.node()
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
