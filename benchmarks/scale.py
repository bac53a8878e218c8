"""Calculate the cost of data parallel training: the bytes of a gradient sum, its time, and the efficiency.

    python benchmarks/scale.py                                                 prints the table of docs/scale.md
    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --measure     times a sum on this machine

The bytes are exact: they are the float32 gradients of an adapter of the true UNet. The time of a step is its FLOP at
half of a card's matrix peak. The time of a sum is its bytes at the rate of the link, plus a latency.
"""

from __future__ import annotations

import argparse
import time

import common
import torch
from diffusers import UNet2DConditionModel

from lorakit import config
from lorakit.adapters import targets
from lorakit.runs import plan
from lorakit.training import parallel

# Name -> number of cards, bf16 FLOP/s of the data sheet, bytes/s of a sum. NVLink 4: the bus bandwidth of nccl-tests.
# PCIe 4.0: without peer to peer, through the host's memory.
MACHINES = {"8 x H100, NVLink": (8, 989e12, 300e9), "2 x 4090, PCIe": (2, 165e12, 10e9)}
SIDES = {"sd15": ("sd1", 64), "sdxl": ("sdxl", 128)}
RANKS = (16, 128)
# Share of the matrix peak that a step reaches; seconds to start a sum and to agree on whether to stop.
SHARE, LATENCY = 0.5, 3e-4


def layers_of(kind: str) -> dict[str, tuple[int, ...]]:
    """Return canonical name -> weight shape of the UNet's layers, from a model on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**common.unet_config(kind))
    return {
        f"unet.{name}": tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }


def table() -> list[str]:
    """Return a table in Markdown: bytes, times and efficiency."""
    lines = [
        "| Base, rank | Machine | Sum a step | Step, batch 1 | Sum | Efficiency, batch 1 | batch 4 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, (family, side) in SIDES.items():
        layers = layers_of(kind)
        flop = plan.PASSES * plan.forward_flop(family, layers, side, side)
        for rank in RANKS:
            adapter = config.load(None, {"train.steps": 1, "adapter.rank": rank}).adapter
            selected = targets.adapted(family, layers, adapter)
            size = 4 * sum(weights for _, weights in plan.count_weights(selected, layers, adapter).values())
            for machine, (count, peak, rate) in MACHINES.items():
                step, total = flop / (SHARE * peak), LATENCY + 2 * (count - 1) / count * size / rate
                shares = [batch * step / (batch * step + total) for batch in (1, 4)]
                lines.append(
                    f"| {kind}, {rank} | {machine} | {size / 1e6:.1f} MB | {step * 1e3:.0f} ms "
                    f"| {total * 1e3:.1f} ms | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
                )
    return lines


def measure(rounds: int = 20) -> list[str]:
    """Time sums of 1, 10 and 100 MB of float32 gradients over the processes of the launcher."""
    lines = []
    with parallel.join() as group:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for megabytes in (1, 10, 100):
            gradient = torch.zeros(megabytes * 250_000, device=device)
            times = []
            for _ in range(rounds):
                group.any(False)
                began = time.perf_counter()
                group.add_up([gradient])
                float(gradient[0])
                times.append(time.perf_counter() - began)
            seconds = sorted(times)[rounds // 2]
            lines.append(f"{megabytes} MB over {group.count} processes on {device}: {seconds * 1e3:.2f} ms")
        return lines if group.rank == 0 else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="time a sum over the processes of torchrun")
    print("\n".join(measure() if parser.parse_args().measure else table()))
