"""The command probe-rate: find a learning rate for a folder of photos in one short run with a rising rate."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lorakit.cli import threads
from lorakit.cli.imports import model_imports
from lorakit.cli.signals import stop_on_signals
from lorakit.cli.terminal import Terminal, print_json, print_lines
from lorakit.cli.train_commands import Command, add_run_options, exclusion, resolve
from lorakit.core.errors import ConfigError, StopRequested
from lorakit.core.events import Events, StopRequest
from lorakit.core.messages import Message
from lorakit.core.registry import optimizer as optimizer_spec

if TYPE_CHECKING:
    from lorakit.config import OptimizerConfig
    from lorakit.runs.preflight import Ready

# Number of steps and of validations. The learning rate rises geometrically from LOWEST to HIGHEST times the config's.
STEPS, LOOKS, LOWEST, HIGHEST = 60, 12, 0.01, 30.0
# Proposed rate, divided by the rate with the lowest error.
SHARE = 1 / 3
WIDTH = 40


def add(command: Command) -> None:
    """Add the command of this page by `command(name, run, help)`."""
    probe = command("probe-rate", run_probe_rate, "find a learning rate in one short run with a rising rate")
    add_run_options(probe)
    probe.add_argument(
        "--steps", type=int, default=STEPS, metavar="COUNT", help=f"number of steps of the run (default: {STEPS})"
    )


def run_probe_rate(args: argparse.Namespace) -> int:
    """`lorakit probe-rate`. The exit code is 1 if no rate reduced the error, and 130 if the command was stopped."""
    if args.steps < LOOKS:
        raise ConfigError([Message("--steps must be {least} or more", LOOKS)])
    threads.use_idle_cores()
    terminal = Terminal(sys.stderr if args.json else sys.stdout)
    from lorakit.runs.preflight import preflight

    config = resolve(args, terminal)
    if optimizer_spec(config.optimizer.name).learning_rate is not None:
        raise ConfigError([Message("{name} sets its learning rate itself: nothing to probe", config.optimizer.name)])
    if config.adapter.whole_model:
        raise ConfigError([Message("probe-rate is for adapters; adapter.method is {method}", config.adapter.method)])
    result = preflight(config, fetch=True)
    ready = result.or_raise(exclusion(result))
    events = Events(terminal)
    try:
        with stop_on_signals() as stop:
            rows = list(_measure(ready, args.steps, events, StopRequest(events, stop)))
    except StopRequested:
        return 130
    finally:
        terminal.close()
    best = max(rows, key=lambda row: row[1])
    proposal = best[0] * SHARE if best[1] > 0 else None
    if args.json:
        print_json({"rates": [{"learning_rate": rate, "gain": gain} for rate, gain in rows], "proposal": proposal})
    else:
        print_lines(*_lines(rows, proposal))
    return 0 if proposal else 1


def _measure(ready: Ready, steps: int, events: Events, stop: StopRequest) -> Iterator[tuple[float, float]]:
    """Train with a rising rate and yield (learning rate, gain) at each validation, until the error is not finite.

    The gain is the share of the base's error that the adapter removes, as the median of the photos.
    """
    with model_imports():
        from lorakit import families
        from lorakit.training import precompute
        from lorakit.training.trainable import trainable

    config = ready.config
    family, lines = families.load_as_configured(ready.info, config)
    for line in lines:
        events.say(line)
    poll = partial(stop.poll, "nothing was written")
    inputs = precompute.precompute(config, family, None, ready.report, events, poll)
    family.release("vae", "text_encoders")
    model = trainable(family, inputs, ready, events.say)
    for step in range(steps):
        poll()
        multiple = HIGHEST * (LOWEST / HIGHEST) ** (1 - step / (steps - 1))
        model.optimizer_step.config = replace(config, optimizer=_rates(config.optimizer, multiple))
        model.optimizer_step(step)
        if (step + 1) * LOOKS // steps == step * LOOKS // steps:
            continue
        texts = None if inputs.tokens is None else precompute.embed(family, inputs.tokens)
        model.adapter.train(False)
        gain = statistics.median(model.photo_validation.gains(model.adapter, texts).values())
        model.adapter.train(True)
        if not math.isfinite(gain):
            return  # the training has diverged
        yield multiple * config.optimizer.learning_rate, gain


def _rates(config: OptimizerConfig, multiple: float) -> OptimizerConfig:
    """The config with its learning rates multiplied by `multiple`, no schedule, and all parts from the start."""
    names = ("learning_rate", "text_encoder_learning_rate", "text_encoder_2_learning_rate")
    rates = {name: rate * multiple for name in names if (rate := getattr(config, name)) is not None}
    return replace(config, lr_scheduler="constant", warmup_steps=0, warmup_ratio=0.0, unet_start=0.0, **rates)


def _lines(rows: Sequence[tuple[float, float]], proposal: float | None) -> Iterator[str]:
    """Lines of text: a bar for each rate, then the proposal."""
    best = max(gain for _, gain in rows)
    yield "learning rate   reduction of the base's error on the photos"
    for rate, gain in rows:
        yield f"{rate:>13.2g}   {gain:>7.1%}  {'#' * round(WIDTH * max(gain, 0) / max(best, 1e-30))}".rstrip()
    if proposal is None:
        yield Message("no rate reduced the base's error: check the photos and their captions")
    else:
        yield Message(
            "proposal: optimizer.learning_rate = {rate:.2g}, a third of the rate at which the error was lowest",
            proposal,
        )
