"""A training step on a GPU, beside a plain loop and beside the scripts': one call, under 8 minutes, no network.

    python benchmarks/gpu_loops.py [--quick] [--json FILE] [--device cuda|cpu] [--only sd15|sdxl]
                                   [--stream | --compile | --convolutions]

SD1.5 at 512 px and SDXL at 1024 px in their true architecture with random weights, batch 1 and 4, rank-16 LoRA on the
attention, base in bf16. The loops (see common.py) take turns in one process. Beside milliseconds and images a second
it says what share of the card's bf16 matrix speed, measured in the same minutes, a step's arithmetic comes to, how far
the step is from the time floor of its matrix products alone, and the peak of memory. With `--device cpu` the same runs
on narrow models of the same depth: it proves that the script works, and its figures mean nothing else. With `--compile`
ours runs once more, its blocks compiled; a second call finds them in the cache, and its first step shows by how much.
Two options ask another question: `--stream`, our step with gradient checkpointing, the base's weights on the card and
in the host's memory; `--convolutions`, our step as it is, with cuDNN trying its algorithms, and with channels first.
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

# Multiplications of a step in those of a forward pass: 1 forward, 1.2 backward (only adapters have weight gradients).
PASSES = plan.PASSES
# FLOP / matrix peak and bytes / bandwidth of SD1.5's and SDXL's products, as a multiple of FLOP / peak alone: what of
# an H100 (790 TFLOP/s, 3.0 TB/s) a step of nothing but products would take, kernel by kernel, at batch 1 and 4.
FLOOR = {("sd15", 1): 3.13 / 2.26, ("sd15", 4): 10.7 / 9.1, ("sdxl", 1): 21.5 / 18.5, ("sdxl", 4): 85 / 74}
SIDES = {"sd15": 64, "sdxl": 128}
BUDGET = 8 * 60


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=tuple(SIDES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="under a minute: batch 1, few steps")
    parser.add_argument("--stream", action="store_true", help="weights on the card beside weights in the host's memory")
    parser.add_argument("--compile", action="store_true", help="ours with memory.compile, too")
    parser.add_argument("--convolutions", action="store_true", help="ours with cudnn.benchmark and with channels first")
    parser.add_argument("--json", type=Path)
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
                print(f"left out for want of time: {kind} batch {batch}")
                continue
            try:
                rows += case(kind, batch, args, device, peak)
            except torch.OutOfMemoryError:
                print(f"left out, as the loops' models do not fit together: {kind} batch {batch}")
    common.finish(rows, args.json)


def case(kind: str, batch: int, args: Any, device: torch.device, peak: float) -> list[common.Row]:
    """All loops on one model and batch size."""
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
            # With its own model alone on the card, other loops' models counted off.
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
    """Name -> what makes the loop, on its own model."""
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
            if device.type == "cuda":  # what is in the host's memory now was on the card before
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
    """VAE and text encoders as the scripts run them in each step: (latents, hidden states) of random photos and texts.

    The VAE is in float32 for SDXL, as there; of SDXL's texts only the states are computed again.
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
    """Operations of a forward pass for one picture, from the layers' shapes."""
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
    """Floating-point operations a second of a large bf16 matrix product here."""
    side = 8192 if device.type == "cuda" else 512
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
    """Peak of the loop's own tensors, and of what the allocator took from the card, since `clear`."""
    baseline = _baseline
    return [
        common.row(f"{title} peak allocated", (torch.cuda.max_memory_allocated() - baseline[0]) / 2**30, "GiB"),
        common.row(f"{title} peak reserved", (torch.cuda.max_memory_reserved() - baseline[1]) / 2**30, "GiB"),
    ]


_baseline = (0, 0)


def clear(device: torch.device) -> None:
    """Give back what is unused, and begin to look for the peak."""
    global _baseline
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _baseline = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
