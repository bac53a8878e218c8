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
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if asked.quick else asked.rounds
    rows = []
    for kind in [asked.only] if asked.only else KINDS:
        rows += counted(kind, asked) + timed(kind, asked, rounds)
    common.finish(rows, asked.json)


def loops(kind: str, asked: Any, dtype: torch.dtype) -> dict[str, common.Loop]:
    """The plain loop and ours on their own models."""
    device = torch.device("cpu")

    def model() -> tuple[Any, Any]:
        family = common.base(kind, device, dtype, width=asked.width)
        return family, common.encoded(family, asked.side, asked.width)

    half = dtype is torch.bfloat16
    chosen = common.settings(1, asked.rank)
    return {
        "peft, autocast" if half else "peft": common.peft_loop(*model(), 1, asked.rank, autocast=half),
        "lorakit": common.lorakit_loop(*model(), chosen, device="cuda"),
    }


def counted(kind: str, asked: Any) -> list[common.Row]:
    """Operations of a step in bf16. On a CPU attention is computed in float32; its casts are not what a card gets."""
    rows, first = [], 0
    with common.attention_as_on_a_card():
        for name, loop in loops(kind, asked, torch.bfloat16).items():
            loop(1)
            with common.Launches() as launches:
                loop(1)
            first = first or launches.count
            rows.append(common.row(f"{kind} {name} operations", launches.count, "a step", first / launches.count))
    return rows


def timed(kind: str, asked: Any, rounds: int) -> list[common.Row]:
    """Milliseconds of CPU a step."""
    rows: list[common.Row] = []
    for dtype, title in ((torch.bfloat16, f"{kind} bf16"), (torch.float32, f"{kind} fp32")):
        compared = loops(kind, asked, dtype)
        if dtype is torch.bfloat16:
            compared["lorakit, outside the graph"] = outside(kind, asked)
        for loop in compared.values():
            loop(2)
        times = common.alternate(compared, rounds, 1, clock=time.process_time)
        rows += [r for r in common.timing_rows(title, times, 1, next(iter(compared))) if r["unit"] == "ms"]
    return rows


def outside(kind: str, asked: Any) -> common.Loop:
    """Our step with nothing where the replays would be: seeding generators, copying which photos and texts."""
    family = common.base(kind, torch.device("cpu"), torch.bfloat16, width=asked.width)
    data = common.encoded(family, asked.side, asked.width)

    def record(compute: cuda_graphs.Compute, generators: Any) -> cuda_graphs.Compute:
        loss, waits = compute(), [compute]

        def replay() -> torch.Tensor:
            # The first replay is compared with the step; those after it would be the card's.
            return waits.pop()() if waits else loss

        return replay

    before = cuda_graphs.capturer
    cuda_graphs.capturer = lambda *given: (record, "")  # type: ignore[assignment]
    try:
        return common.lorakit_loop(family, data, common.settings(1, asked.rank), device="cuda")
    finally:
        cuda_graphs.capturer = before


if __name__ == "__main__":
    main()
