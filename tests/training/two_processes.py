"""The part of test_parallel.py that needs two processes; it writes the results as JSON.

RANK, WORLD_SIZE, ... are set as torchrun sets them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from short_run import run_config

from lorakit import config, families
from lorakit.core.errors import LorakitError
from lorakit.core.events import Events
from lorakit.families.loaded import LoadedFamily
from lorakit.inference import sampling
from lorakit.runs.preflight import preflight
from lorakit.training import run, selfcheck
from lorakit.training.loss_step import LossStep
from lorakit.training.parallel import processes as parallel
from lorakit.training.precompute import precompute
from lorakit.training.trainable import trainable

STEPS = 2
# Adapter methods combined with parts of the loss. There are three photos, so that batches of two are uneven.
CASES: dict[str, dict[str, Any]] = {
    "lora and text encoder": {"adapter__train_text_encoder": True, "train__noise_offset": 0.1},
    "rslora, accumulated": {"adapter__method": "rslora", "train__gradient_accumulation_steps": 2},
    "dora, teacher": {"adapter__method": "dora", "adapter__target_modules": "linear", "train__prior": "teacher"},
    "pissa, class images": {"adapter__method": "pissa", "train__prior": "images", "train__class_images": 2},
    "loha, ema, lion": {"adapter__method": "loha", "train__ema_decay": 0.9, "optimizer__name": "lion"},
    "lokr, plain": {"adapter__method": "lokr", "train__loss": "huber", "memory__engine": "plain"},
    "a word, dropout": {"adapter__new_tokens": 2, "adapter__train_text_encoder": True, "adapter__dropout": 0.2},
}


def steps(settings: config.Config, group: parallel.Processes) -> dict[str, torch.Tensor]:
    """Return the adapter after `STEPS` steps, with the losses and gradient norms."""
    ready = group.first(lambda: preflight(settings).or_raise())
    settings = ready.config  # a step has the batches of both processes
    family = families.load(ready.info, "cpu", torch.float32, plain=settings.memory.engine == "plain")
    inputs = group.first(lambda: precompute(settings, family, None, ready.report, Events()))
    model = trainable(family, inputs, ready, str, group)
    model.adapter.train()
    figures = [torch.stack(model.optimizer_step(number)) for number in range(STEPS)]
    return {name: tensor.clone() for name, tensor in model.adapter.state().items()} | {"figures": torch.cat(figures)}


def shared(folder: Path, group: parallel.Processes) -> dict[str, Any]:
    """Train with photos, class images and samples divided among the processes; return this process's counts. The first
    process then trains alone, so that the test can compare the files."""
    counts = Counter[str]()
    encode, draw = LoadedFamily.encode_image, sampling.draw_batch

    def counted_encode(*arguments: Any) -> Any:
        counts["encode"] += 1
        return encode(*arguments)

    def counted_draw(family: Any, pipeline: Any, text: Any, seeds: list[int], *rest: Any) -> Any:
        counts[f"draw {'samples' if seeds[0] < 2**32 else 'class images'}"] += 1
        return draw(family, pipeline, text, seeds, *rest)

    LoadedFamily.encode_image, sampling.draw_batch = counted_encode, counted_draw  # type: ignore[method-assign]
    examine, selfcheck.examine = selfcheck.examine, lambda *_, **__: ()  # type: ignore[assignment]

    def train(name: str) -> None:
        os.environ["LORAKIT_CACHE"] = str(folder / f"cache of {name}")
        # Samples precede the first step, so that they do not depend on the rounding of sums over processes.
        changes = {"train__prior": "images", "train__class_images": 19, "sample__at_start": True, "data__cache": "disk"}
        prompts = ["a photo of sks toy", "sks toy on a beach", "a toy"]
        run.train(run_config(folder / "sd1", folder / "photos", folder / name, 1, sample__prompts=prompts, **changes))

    train("shared")
    counts_of_run = dict(counts)
    if group.rank == 0:
        environment = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        train("alone")
        os.environ.update(environment)
    LoadedFamily.encode_image, sampling.draw_batch = encode, draw  # type: ignore[method-assign]
    selfcheck.examine = examine
    return counts_of_run


TASK_ERRORS = (None, ValueError("no"), torch.OutOfMemoryError("full"))


def tasks(group: parallel.Processes, error: Exception | None) -> None:
    """Divide five numbers among the processes; with `error`, the second process fails at 4."""

    def half(number: int) -> float:
        if error and number == 4:
            raise error
        return number / 2

    result = group.first(lambda: list(group.map("half", half, range(1, 6))), {"half": half})
    assert result == [0.5, 1.0, 1.5, 2.0, 2.5], result


def difference(together: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference between two results, relative to the second."""
    assert together.keys() == alone.keys()
    off = torch.cat([(together[key] - alone[key]).flatten() for key in alone])
    return float(off.norm() / torch.cat([tensor.flatten() for tensor in alone.values()]).norm())


def compare(folder: Path, group: parallel.Processes) -> dict[str, float]:
    """Return case -> difference between two processes and one process that accumulates twice as many batches."""
    differences = {}
    for number, (name, changes) in enumerate(CASES.items()):
        settings = run_config(folder / "sd1", folder / "photos", folder / "unused", STEPS, **changes)
        together = steps(settings, group)
        if number % group.count == group.rank:  # each process computes half of the cases alone too
            differences[name] = difference(together, steps(settings, parallel.SINGLE))
    return differences


def outcome(function: Callable[[], object]) -> str:
    """Return a text that states what a function returns or raises."""
    try:
        return f"returned {type(function()).__name__}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def break_once(index: int) -> None:
    """Make the loss of one batch NaN in this process until the run has gone back to a checkpoint."""
    loss = LossStep.loss

    def broken(self: LossStep, number: int) -> torch.Tensor:
        return loss(self, number) * (math.nan if number == index and not self.retry else 1.0)

    LossStep.loss = broken  # type: ignore[method-assign]


def lose_base() -> None:
    """Let this process find no base, as on a machine without the shared folder."""

    def load(*_: object) -> None:
        raise LorakitError("sd1: there is no such folder")

    families.load = load  # type: ignore[assignment]


def main(folder: Path) -> None:
    """Write this process's results to FOLDER/<rank>.json."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}

    def settings(name: str, **changes: Any) -> config.Config:
        changes = {"train__validate_every": 2, "train__save_every": 2} | changes
        return run_config(folder / "sd1", folder / "photos", folder / name, 4, **changes)

    with parallel.join() as group:
        rank, version = group.rank, parallel.__version__
        results["differences"] = compare(folder, group)
        parallel.__version__ = f"0.{rank}"
        results["versions"] = outcome(group.require_same_start)
        parallel.__version__ = version
        sys.argv.append(f"--steps={rank}")
        results["arguments"] = outcome(group.require_same_start)
        sys.argv.pop()
        results["shared"] = shared(folder, group)
        results["tasks"] = [outcome(partial(tasks, group, error)) for error in TASK_ERRORS]
        # Only the second process is asked to stop, and only it has a NaN.
        results["stop"] = outcome(lambda: run.train(settings("stopped"), stop=lambda: rank == 1))
        if rank == 1:
            break_once(index=5)
        results["rollback"] = outcome(lambda: run.train(settings("rollback", train__on_nan="rollback")))
        if rank == 1:
            lose_base()
        results["base"] = outcome(lambda: run.train(settings("base")))
        (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
        os._exit(0)  # a failed process ends like this
