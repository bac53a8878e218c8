"""Compare lorakit's training step on a GPU with a plain PEFT loop and the loop of diffusers' scripts.

    python benchmarks/gpu_loops.py [--quick] [--json FILE] [--device cuda|cpu] [--only sd15|sdxl]
                                   [--stream | --compile | --convolutions]

One call takes less than 8 minutes and needs no network. The models are SD1.5 at 512 px and SDXL at 1024 px with their
true architecture, random weights in bf16, and rank-16 LoRA on the attention, at batch 1 and 4. The loops (see
common.py) take turns in one process. Besides times and peak memory the table shows two shares of a step:

    share of matrix speed   the step's FLOP/s as a share of the card's bf16 matrix speed, measured in the same call
    share of the floor      the least time for the step's matrix products, as a share of the step's time

`--device cpu` uses narrow models of the same depth: it tests the script, and its times say nothing about a card.
`--compile` adds lorakit's step with compiled blocks. A second call finds them in the cache and has a shorter first
step. Two options compare variants of lorakit's step only. `--stream` uses gradient checkpointing and compares weights
on the card with weights in the host's memory. `--convolutions` adds `cudnn.benchmark` and channels first.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

from lorakit.engine import quantized_weight
from lorakit.runs import plan

# FLOP of a step / FLOP of a forward pass: 1 forward, 1.2 backward (only adapters have weight gradients).
PASSES = plan.PASSES
# (base, batch size) -> least time of a step's matrix products on an H100 / their FLOP / matrix peak. The least time is
# the sum over kernels of FLOP / peak or bytes / bandwidth, at 790 TFLOP/s and 3.0 TB/s.
FLOOR = {("sd15", 1): 3.13 / 2.26, ("sd15", 4): 10.7 / 9.1, ("sdxl", 1): 21.5 / 18.5, ("sdxl", 4): 85 / 74}
SIDES = {"sd15": 64, "sdxl": 128}
BUDGET = 8 * 60


def main() -> None:
    """Measure, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of the models; cpu uses narrow models",
    )
    parser.add_argument("--only", choices=tuple(SIDES), help="run one base only")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="batch 1 and few steps: less than a minute")
    parser.add_argument("--stream", action="store_true", help="compare weights on the card with streamed weights")
    parser.add_argument("--compile", action="store_true", help="also run lorakit with memory.compile")
    parser.add_argument("--convolutions", action="store_true", help="compare with cudnn.benchmark and channels first")
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    started = time.monotonic()
    peak = matrix_speed(device)
    rows = [common.row("matrix products, bf16", peak / 1e12, "TFLOP/s")]
    for kind in [args.only] if args.only else SIDES:
        for batch in (1,) if args.quick else (1, 4):
            if time.monotonic() - started > BUDGET - 60:
                print(f"skipped, no time left: {kind} batch {batch}")
                continue
            try:
                rows += case(kind, batch, args, device, peak)
            except torch.OutOfMemoryError:
                print(f"skipped, the models of all loops do not fit into memory: {kind} batch {batch}")
    common.finish(rows, args.json)


def case(kind: str, batch: int, args: Any, device: torch.device, peak: float) -> list[common.Row]:
    """Run all loops on one model and batch size; return their rows."""
    small = device.type == "cpu"
    width, side = (16, 8) if small else (None, SIDES[kind])
    title = f"{kind} {'narrow' if small else f'{8 * side} px'} batch {batch}"
    rounds, steps = (2, 1) if small else (3, 4) if args.quick else (7, 8)
    times: dict[str, list[float]] = {}
    rows: list[common.Row] = []
    loops, preparations = {}, {}
    for name, make in makers(kind, batch, args, device, width, side).items():
        clear(device)
        loop = make()
        start = time.perf_counter()
        loop(1)
        wait(device)
        preparations[name] = time.perf_counter() - start
        loop(1 if small else 2)
        wait(device)
        if device.type == "cuda":
            # Memory of this loop and its model only: memory of the loops before it is subtracted.
            rows += memory_rows(f"{title} {name}")
        loops[name] = loop
    times = common.alternate(loops, rounds, steps)
    flop = PASSES * batch * forward_flop(kind, width, side)
    first = next(iter(loops)) if args.stream or args.convolutions else "peft"
    rows = common.timing_rows(title, times, batch, first) + rows
    for name, values in times.items():
        seconds = statistics.median(values)
        rows.append(common.row(f"{title} {name} first step", preparations[name], "s"))
        if not small:
            rows.append(common.row(f"{title} {name} share of matrix speed", 100 * flop / seconds / peak, "%"))
            floor = FLOOR[kind, batch] * flop / peak
            rows.append(common.row(f"{title} {name} share of the floor", 100 * floor / seconds, "%"))
    return rows


def makers(
    kind: str, batch: int, args: Any, device: torch.device, width: int | None, side: int
) -> dict[str, Callable[[], common.Loop]]:
    """Return name -> function that creates the loop with its own model."""
    run_config = common.settings(batch, args.rank, **{"memory.gradient_checkpointing": args.stream})

    def model() -> tuple[Any, Any]:
        family = common.base(kind, device, torch.bfloat16, width=width)
        return family, common.encoded(family, side, width)

    def script() -> common.Loop:
        family, data = model()
        return common.peft_loop(family, data, batch, args.rank, encode=encoders(kind, family, side, width))

    def checkpointed(stream: bool) -> common.Loop:
        family, data = model()
        if stream:
            quantized_weight.store_layers(family.denoiser, "full", device, offload=True)
            if device.type == "cuda":  # the peak must not include the weights that have moved to the host
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        return common.lorakit_loop(family, data, run_config)

    def ours() -> common.Loop:
        return common.lorakit_loop(*model(), run_config)

    def searched() -> common.Loop:
        loop = ours()

        def run(count: int) -> None:
            torch.backends.cudnn.benchmark = True
            try:
                loop(count)
            finally:
                torch.backends.cudnn.benchmark = False

        return run

    def channels_first() -> common.Loop:
        changed = common.settings(batch, args.rank, **{"memory.channels_last": "off"})
        return common.lorakit_loop(*model(), changed)

    if args.convolutions:
        return {"lorakit": ours, "cudnn.benchmark": searched, "channels first": channels_first}
    if args.stream:
        return {"resident": lambda: checkpointed(False), "streamed": lambda: checkpointed(True)}
    loops = {
        "script": script,
        "peft": lambda: common.peft_loop(*model(), batch, args.rank),
        "lorakit": ours,
    }
    if args.compile:
        compiled = common.settings(batch, args.rank, **{"memory.compile": True})
        loops["compiled"] = lambda: common.lorakit_loop(*model(), compiled)
    return loops


def encoders(kind: str, family: Any, side: int, width: int | None) -> Callable[[int], Any]:
    """Return a function that encodes random photos and texts in each step, as the scripts do.

    It returns (latents, hidden states). As in the scripts, SDXL's VAE is in float32. SDXL's pooled text is not encoded.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    device, narrow = family.device, width is not None
    channels = (16, 16, 16, 16) if narrow else (128, 256, 512, 512)
    precision = torch.float32 if kind == "sdxl" or device.type == "cpu" else torch.bfloat16
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    wide = family.denoiser.config.cross_attention_dim
    sizes = [wide] if kind == "sd15" or narrow else [768, 1280]
    with torch.random.fork_rng(), torch.device(device):
        vae = AutoencoderKL(
            **blocks, block_out_channels=channels, layers_per_block=2, norm_num_groups=min(32, channels[0])
        )
        texts = [
            CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=size,
                    intermediate_size=4 * size,
                    num_hidden_layers=2 if narrow else 12 if size == 768 else 32,
                    num_attention_heads=4 if narrow else size // 64,
                )
            )
            for size in sizes
        ]
    vae = vae.to(precision).eval().requires_grad_(False)
    texts = [text.to(family.dtype).eval().requires_grad_(False) for text in texts]

    @torch.no_grad()
    def encode(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.randn(batch, 3, side * 8, side * 8, device=device, dtype=precision)
        latents = vae.encode(pixels).latent_dist.sample().float() * 0.18215
        ids = torch.randint(0, 49000, (batch, common.TOKENS), device=device)
        return latents, torch.cat([text(ids)[0] for text in texts], dim=-1)

    return encode


def forward_flop(kind: str, width: int | None, side: int) -> float:
    """Return the FLOP of a forward pass for one picture, from the layers' shapes."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**common.unet_config(kind, width))
    shapes = {
        f"unet.{name.removesuffix('.weight')}": tuple(weight.shape)
        for name, weight in unet.named_parameters()
        if name.endswith(".weight") and weight.ndim in (2, 4)
    }
    return plan.forward_flop("sdxl" if kind == "sdxl" else "sd1", shapes, side, side)


def matrix_speed(device: torch.device, seconds: float = 1.0) -> float:
    """Measure the FLOP/s of a large bf16 matrix product on the device. On a CPU this takes 0.1 s."""
    side, seconds = (8192, seconds) if device.type == "cuda" else (512, 0.1)
    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    wait(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            left @ right
        wait(device)
        count += 10
    return 2.0 * side**3 * count / (time.perf_counter() - start)


def memory_rows(title: str) -> list[common.Row]:
    """Return the peaks of allocated and reserved memory since `clear`, less what was in use then."""
    baseline = _baseline
    return [
        common.row(f"{title} peak allocated", (torch.cuda.max_memory_allocated() - baseline[0]) / 2**30, "GiB"),
        common.row(f"{title} peak reserved", (torch.cuda.max_memory_reserved() - baseline[1]) / 2**30, "GiB"),
    ]


_baseline = (0, 0)


def clear(device: torch.device) -> None:
    """Release unused memory, and start a new measurement of the peak."""
    global _baseline
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _baseline = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
