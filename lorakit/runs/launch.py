"""Several processes for one run: which one this is, whether a config suits so many, and the launcher of one machine.

The launchers are torch's and accelerate's (`torchrun`, `accelerate launch`); what they say is in the environment. No
torch is imported before `start`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorakit import config as configuration
from lorakit.config import Config
from lorakit.core import units
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.runs import nvidia

if TYPE_CHECKING:
    from lorakit.runs.plan import Plan

# Fewer steps than this for one pass over the photos: the gradient of a step is nearly that of all photos already.
MIN_STEPS_PER_PASS = 16
THREADS = "OMP_NUM_THREADS"
PARTS = "train.gradient_accumulation_steps"
TOO_MANY = (
    "{option} = {own} on each of {processes} processes makes {all} batches a step; the limit is {limit:g}: lower it"
)


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: 0 is the first, which alone writes and reports.
        local_rank: among those of this machine; the number of its card.
        count: processes of all machines.
    """

    rank: int = 0
    local_rank: int = 0
    count: int = 1


def world() -> World:
    """The process's rank and number of processes, as the launcher set them. Without a launcher, there is one
    process."""
    values = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return World(*map(int, values)) if all(value.isdecimal() for value in values) else World()


def prepare(config: Config, gpus: int | None, *, resume: bool) -> tuple[Config, int, list[str]]:
    """The config of a run in several processes, their number, and what keeps them from it.

    Args:
        gpus: as `--gpus` asks for them; None: those that the launcher has started.
    """
    problems = [gpus_problem(config, gpus)] if gpus is not None else [_mpi_problem()]
    count = max(1, gpus or world().count)
    if resume:
        return config, count, list(filter(None, [*problems, resume_problem(config, count)]))
    config, problem = share(config, count)
    return config, count, list(filter(None, [*problems, problem]))


def share(config: Config, processes: int) -> tuple[Config, str | None]:
    """The config of a run of so many processes, and the reason why it cannot be one, or None.

    A step has the batches of all processes, like one process that accumulates as many times more. So one option has the
    size of a step, whatever number of processes resumes the run.
    """
    own = config.train.gradient_accumulation_steps
    limit = next(option.high for option in configuration.options() if option.key == PARTS)
    if limit is not None and own * processes > limit:
        return config, Message(TOO_MANY, PARTS, own, processes, own * processes, limit)
    return replace(config, train=replace(config.train, gradient_accumulation_steps=own * processes)), None


def resume_problem(config: Config, processes: int) -> str | None:
    """Why so many processes cannot go on with a run, or None: each has to take as many batches of a step."""
    parts = config.train.gradient_accumulation_steps
    if parts % processes == 0:
        return None
    counts = [str(count) for count in range(1, parts + 1) if parts % count == 0]
    return Message(
        "a step of this run has {parts} batches of {batch_size}, which {processes} processes cannot share "
        "evenly: go on with {counts}",
        parts,
        config.train.batch_size,
        processes,
        " or ".join(counts),
    )


def divide(plan: Plan | None, config: Config, processes: int, warn: Callable[[str], object]) -> Plan | None:
    """The plan, if there is one, of so many processes. `warn` gets a line if they are of no use."""
    if plan is None or processes == 1:
        return plan
    if useless := _uselessness(plan, config, processes):
        warn(useless)
    parts = config.train.gradient_accumulation_steps
    photos = plan.rows / plan.batches * parts
    line = Message(
        "processes: {processes}, each with {parts} of the {all} batches ({photos:.3g} photos) of a step; "
        "length and learning rate are per optimizer step and stay as they are",
        processes,
        parts // processes,
        parts,
        photos,
    )
    seconds = None if plan.seconds is None else plan.seconds / processes
    return replace(plan, notes=(*plan.notes, line), seconds=seconds)


def _uselessness(plan: Plan, config: Config, processes: int) -> str | None:
    """Why several processes are of no use for so few photos, or None."""
    steps_per_pass = plan.batches / config.train.gradient_accumulation_steps
    if steps_per_pass >= MIN_STEPS_PER_PASS:
        return None
    photos = units.count(plan.photo_count, "photo")
    what = "processes" if config.memory.device == "cpu" else "GPUs"
    steps = "a step goes" if steps_per_pass <= 1 else Message("{count:.2g} steps go", steps_per_pass)
    same = "the run is as long as on one" if config.train.epochs is None else "few steps remain"
    return Message(
        "{processes} {what} are of no use for {photos}: {steps} through all of them, and {same}; train on "
        "one, and use the others for other runs",
        processes,
        what,
        photos,
        steps,
        same,
    )


def _mpi_problem() -> str | None:
    """Why processes that MPI has started cannot train together, or None: each would take itself for the only one."""
    size = next(filter(None, (os.environ.get(name) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))), "1")
    if world().count > 1 or not size.isdecimal() or int(size) == 1:
        return None
    return Message(
        "mpirun has started {size} processes, which are not connected: start them with torchrun (docs/scale.md)", size
    )


def gpus_problem(config: Config, gpus: int) -> str | None:
    """Why `--gpus` cannot have so many processes on this machine, or None. With `memory.device = "cpu"` it can."""
    if gpus < 1:
        return Message("--gpus {gpus}: give the number of cards to train on", gpus)
    if (count := world().count) not in (1, gpus):
        return Message("--gpus {gpus}: the launcher started the processes ({count}); leave --gpus out", gpus, count)
    if config.memory.device == "cpu" or gpus == 1 or count > 1:
        return None
    cards = len(nvidia.visible())
    if gpus <= cards:
        return None
    what = "no NVIDIA card" if cards == 0 else units.count(cards, "NVIDIA card")
    return Message("--gpus {gpus}: this machine has {what} that torch may use", gpus, what)


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(processes: int, arguments: Sequence[str]) -> int:
    """Run `lorakit ARGUMENTS` in so many processes of this machine by torch's launcher; their exit code.

    The first one reports. Where it was killed, that is reported here.
    """
    os.environ.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // processes)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It logs tracebacks of the launcher's own where a process ends with an error.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        1, 1, processes, run_id="lorakit", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "lorakit", *arguments)
    except SignalException:
        return 130
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if codes.get(0, 0) < 0:
            raise LorakitError(
                "process 0 of {processes} was killed (signal {codes}); checkpoints are intact, continue "
                "with: lorakit resume",
                processes,
                -codes[0],
            ) from None
        return max(1, *codes.values())
    return 0
