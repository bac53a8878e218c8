"""Time training steps on a CPU: the bundled model, and a UNet of middle size in float32 and bf16.

    python benchmarks/cpu.py [--threads 1] [--quick] [--json FILE]

The bundled model runs two comparisons. The first is that of benchmarks/step.py: lorakit and a plain loop with PEFT and
accelerate. The second runs the preset with its prior, as the demo does, and has no plain loop. The middle UNet has 38
million weights, 32x32 latents, batch 4 and rank 16; both of its loops use cached latents and texts. Times are CPU
times of this process.
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
    """Measure, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = pocket(args) + middle(args)
    common.finish(rows, args.json)


def pocket(args: Any) -> list[common.Row]:
    """Time the bundled model with rank 8 on the attention and batch 4, then with its preset, as the demo runs it."""
    with tempfile.TemporaryDirectory() as scratch:
        photos = step_benchmark.random_photos(Path(scratch), 64)
        shared = {"data.folder": str(photos), "data.name": "sks toy", "train.holdout": 0.0}
        plain: dict[str, Any] = {"data.resolution": 64, "train.steps": 100, "train.batch_size": 4, "adapter.rank": 8}
        run_config = config.load(None, shared | plain)
        loops = {"plain": step_benchmark.plain(run_config), "lorakit": step_benchmark.ours(run_config)}
        rows = measured("pocket batch 4", loops, 4, "plain", args, 4)
        # The benchmark needs few class images, and their quality does not matter.
        quick = {"train.class_images": 16, "sample.steps": 2}
        with mock.patch.dict(os.environ, LORAKIT_CACHE=scratch):
            preset = config.load("subject-pocket", shared | quick)
            demo = {"lorakit": step_benchmark.ours(preset)}
        return rows + measured("pocket preset", demo, preset.train.batch_size, "lorakit", args, 2)


def middle(args: Any) -> list[common.Row]:
    """Time the UNet of middle size."""
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
    """Warm up the loops, run them in turns and return the rows."""
    for loop in loops.values():
        loop(1)
    rounds, steps = (2, 1) if args.quick else (9, steps)
    return common.timing_rows(title, common.alternate(loops, rounds, steps, clock=time.process_time), batch, against)


if __name__ == "__main__":
    main()
