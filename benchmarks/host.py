"""Measure the host's share of a training step without a GPU: the number of operations and the time to issue them.

    python benchmarks/host.py [--width 32] [--rounds 9] [--quick] [--json FILE]

SD1.5 and SDXL have their true depth, but so few channels that the arithmetic takes almost no time. The rest is the time
for which a card waits at batch 1. Operations are counted as in bf16 on a card. Times are CPU times of this process on
one thread. "outside the graph" is the host's remaining work in a step that replays CUDA graphs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import common
import torch

from lorakit.engine import cuda_graphs

KINDS = ("sd15", "sdxl")


def main() -> None:
    """Count operations, measure times, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32, help="channels of the first block (default: %(default)s)")
    parser.add_argument("--side", type=int, default=8, help="side of the latents")
    parser.add_argument("--rank", type=int, default=4, help="rank of the LoRA (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each loop (default: %(default)s)")
    parser.add_argument("--only", choices=KINDS, help="run one base only")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if args.quick else args.rounds
    rows = []
    for kind in [args.only] if args.only else KINDS:
        rows += counted(kind, args) + timed(kind, args, rounds)
    common.finish(rows, args.json)


def loops(kind: str, args: Any, dtype: torch.dtype) -> dict[str, common.Loop]:
    """Return the plain loop and lorakit's loop, each with its own model."""
    device = torch.device("cpu")

    def model() -> tuple[Any, Any]:
        family = common.base(kind, device, dtype, width=args.width)
        return family, common.encoded(family, args.side, args.width)

    half = dtype is torch.bfloat16
    run_config = common.settings(1, args.rank)
    return {
        "peft, autocast" if half else "peft": common.peft_loop(*model(), 1, args.rank, autocast=half),
        "lorakit": common.lorakit_loop(*model(), run_config, device="cuda"),
    }


def counted(kind: str, args: Any) -> list[common.Row]:
    """Count the operations of a step in bf16, without the casts that lorakit's attention adds on a CPU."""
    rows, first = [], 0
    with common.attention_as_on_a_card():
        for name, loop in loops(kind, args, torch.bfloat16).items():
            loop(1)
            with common.Launches() as launches:
                loop(1)
            first = first or launches.count
            rows.append(common.row(f"{kind} {name} operations", launches.count, "a step", first / launches.count))
    return rows


def timed(kind: str, args: Any, rounds: int) -> list[common.Row]:
    """Measure the CPU time of a step in milliseconds."""
    rows: list[common.Row] = []
    for dtype, title in ((torch.bfloat16, f"{kind} bf16"), (torch.float32, f"{kind} fp32")):
        compared = loops(kind, args, dtype)
        if dtype is torch.bfloat16:
            compared["lorakit, outside the graph"] = outside(kind, args)
        for loop in compared.values():
            loop(2)
        times = common.alternate(compared, rounds, 1, clock=time.process_time)
        rows += [r for r in common.timing_rows(title, times, 1, next(iter(compared))) if r["unit"] == "ms"]
    return rows


def outside(kind: str, args: Any) -> common.Loop:
    """Return lorakit's loop without the replays: it still seeds generators and copies indices of photos and texts."""
    family = common.base(kind, torch.device("cpu"), torch.bfloat16, width=args.width)
    data = common.encoded(family, args.side, args.width)

    def record(compute: cuda_graphs.Compute, generators: Any) -> cuda_graphs.Compute:
        loss, waits = compute(), [compute]

        def replay() -> torch.Tensor:
            # lorakit compares the first replay with the eager step. Later replays would run on the card only.
            return waits.pop()() if waits else loss

        return replay

    before = cuda_graphs.capturer
    cuda_graphs.capturer = lambda *arguments: (record, "")  # type: ignore[assignment]
    try:
        return common.lorakit_loop(family, data, common.settings(1, args.rank), device="cuda")
    finally:
        cuda_graphs.capturer = before


if __name__ == "__main__":
    main()
