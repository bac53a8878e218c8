"""What a step asks of the host: how many operations it issues, and how long that takes, without a GPU.

    python benchmarks/host.py [--width 32] [--rounds 9] [--quick] [--json FILE]

SD1.5 and SDXL in their true depth, so narrow that arithmetic is next to nothing: what is left is what a card at batch 1
waits for. Operations are counted as a card would get them in bf16. Time is this process's own CPU time, on one thread;
"outside the graph" is what the host still does in a step that is replayed as CUDA graphs.
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
    """Count, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--side", type=int, default=8, help="latent cells along a side")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if args.quick else args.rounds
    rows = []
    for kind in [args.only] if args.only else KINDS:
        rows += counted(kind, args) + timed(kind, args, rounds)
    common.finish(rows, args.json)


def loops(kind: str, args: Any, dtype: torch.dtype) -> dict[str, common.Loop]:
    """The plain loop and ours on their own models."""
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
    """Operations of a step in bf16. On a CPU attention is computed in float32; its casts are not what a card gets."""
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
    """Milliseconds of CPU a step."""
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
    """Our step with nothing where the replays would be: seeding generators, copying which photos and texts."""
    family = common.base(kind, torch.device("cpu"), torch.bfloat16, width=args.width)
    data = common.encoded(family, args.side, args.width)

    def record(compute: cuda_graphs.Compute, generators: Any) -> cuda_graphs.Compute:
        loss, waits = compute(), [compute]

        def replay() -> torch.Tensor:
            # The first replay is compared with the step; those after it would be the card's.
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
