"""Training steps on a CPU: the bundled model, and a UNet of middle size in float32 and bf16.

    python benchmarks/cpu.py [--threads 1] [--quick] [--json FILE]

The bundled model is trained as benchmarks/step.py has it (which takes any base and photos): ours beside a plain loop
with peft and accelerate; and as its preset has it, with the prior, which is what the demo does. The middle UNet has 38
million weights and 32x32 latents, batch 4, rank 16; there both loops have their latents and texts ready. Time is this
process's own CPU time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import common
import step as step_benchmark
import torch

from lorakit import config


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = pocket(args) + middle(args)
    common.finish(rows, args.json)


def pocket(args: Any) -> list[common.Row]:
    """The bundled model, rank 8 on the attention, batch 4; and the preset's own step, as the demo runs it."""
    with tempfile.TemporaryDirectory() as scratch:
        photos = step_benchmark.random_photos(Path(scratch), 64)
        shared = {"data.folder": str(photos), "data.name": "sks toy", "train.holdout": 0.0}
        plain: dict[str, Any] = {"data.resolution": 64, "train.steps": 100, "train.batch_size": 4, "adapter.rank": 8}
        run_config = config.load(None, shared | plain)
        loops = {"plain": step_benchmark.plain(run_config), "lorakit": step_benchmark.ours(run_config)}
        rows = measured("pocket batch 4", loops, 4, "plain", args, 4)
        # A few quick class images are enough to be trained on.
        quick = {"train.class_images": 16, "sample.steps": 2}
        with mock.patch.dict(os.environ, LORAKIT_CACHE=scratch):
            preset = config.load("subject-pocket", shared | quick)
            demo = {"lorakit": step_benchmark.ours(preset)}
        return rows + measured("pocket preset", demo, preset.train.batch_size, "lorakit", args, 2)


def middle(args: Any) -> list[common.Row]:
    """The UNet of middle size."""
    rows = []
    for dtype, title in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        families = [common.base("mid", torch.device("cpu"), dtype) for _ in range(2)]
        data = [common.encoded(family, 32) for family in families]
        loops = {
            "peft": common.peft_loop(families[0], data[0], 4, 16, autocast=dtype is torch.bfloat16),
            "lorakit": common.lorakit_loop(families[1], data[1], common.settings(4, 16)),
        }
        rows += measured(f"middle {title} batch 4", loops, 4, "peft", args, 1)
    return rows


def measured(
    title: str, loops: dict[str, common.Loop], batch: int, against: str, args: Any, steps: int
) -> list[common.Row]:
    """Alternate and make rows."""
    for loop in loops.values():
        loop(1)
    rounds, steps = (2, 1) if args.quick else (9, steps)
    return common.timing_rows(title, common.alternate(loops, rounds, steps, clock=time.process_time), batch, against)


if __name__ == "__main__":
    main()
