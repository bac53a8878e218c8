"""Shared code of the benchmarks: true architectures with random weights, the loops to compare, tables and rows.

All loops train LoRA on a UNet's attention, from random latents and texts of the right shapes.

    lorakit   this project's step (`lorakit.training.optimizer_step`)
    peft      the fastest plain loop that we could write with PEFT: cached latents and texts, autocast in bf16, fused
              AdamW, SDPA, no synchronization with the host
    script    the loop of diffusers' training scripts: VAE and text encoders run in each step, and each step reads the
              loss
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import adapters, config
from lorakit.engine import device as devices, fused_blocks, onednn_linear
from lorakit.runs import memory_estimate
from lorakit.training.loss_step import LossStep
from lorakit.training.optimizer_step import OptimizerStep

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TOKENS, PHOTOS = 77, 8
Loop = Callable[[int], None]
Row = dict[str, Any]


def unet_config(kind: str, width: int | None = None) -> dict[str, Any]:
    """Return the UNet's configuration: SD1.5 ("sd15"), SD2.1 ("sd21"), SDXL ("sdxl"), or 38 million weights ("mid").

    Args:
        width: replaces the 320 channels of the first block. The UNet has the same layers with less arithmetic.
    """
    one = width or 320
    shared = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": min(32, one)}
    if kind == "sd15":
        return shared | {
            "block_out_channels": (one, 2 * one, 4 * one, 4 * one),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "attention_head_dim": 8,
            "cross_attention_dim": width or 768,
        }
    if kind == "sd21":
        heads = {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
        return unet_config("sd15", width) | heads | {"cross_attention_dim": width or 1024}
    if kind == "mid":
        return unet_config("sd15") | {
            "block_out_channels": (64, 128, 256, 256),
            "layers_per_block": 1,
            "cross_attention_dim": 256,
        }
    return shared | {
        "block_out_channels": (one, 2 * one, 4 * one),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (2, 4, 8) if width else (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": width or 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8 if width else 256,
        "projection_class_embeddings_input_dim": 6 * 8 + pooled_width(width) if width else 2816,
    }


def pooled_width(width: int | None) -> int:
    """Return the width of SDXL's pooled text embedding."""
    return 16 if width else 1280


def base(kind: str, device: torch.device, dtype: torch.dtype, *, width: int | None = None) -> Any:
    """Create a `families.Family` with random weights on the device in `dtype`, with all that a training step needs."""
    from diffusers import UNet2DConditionModel

    from lorakit.families.prediction import Epsilon
    from lorakit.families.sd.model import StableDiffusion
    from lorakit.families.sdxl.model import StableDiffusionXL

    cls: Any = StableDiffusionXL if kind == "sdxl" else StableDiffusion
    family = cls.__new__(cls)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            family.denoiser = UNet2DConditionModel(**unet_config(kind, width)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    onednn_linear.use_onednn_linear(family.denoiser)
    family.device, family.dtype, family.gradient_scale = device, dtype, 1.0
    family.info = SimpleNamespace(family="sdxl" if kind == "sdxl" else "sd1")
    family.text_encoders, family.vae = {}, None
    schedule = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2).cumprod(0)
    family.prediction = Epsilon(schedule)
    return family


def encoded(family: Any, side: int, width: int | None = None) -> Any:
    """Return random latents `[8, 4, side, side]` and texts on the device, as `lorakit.training.precompute` does."""
    from lorakit.data.dataset import Dataset, LatentBucket
    from lorakit.families.conditioning import Conditioning
    from lorakit.training.precompute import Precomputed, SampleInputs

    device, sized = family.device, family.info.family == "sdxl"
    draw = torch.Generator(device).manual_seed(0)
    mean = torch.randn(PHOTOS, 4, side, side, device=device, generator=draw)
    states = torch.randn(PHOTOS, TOKENS, family.denoiser.config.cross_attention_dim, device=device, generator=draw)
    texts, sizes = Conditioning(encoder_hidden_states=states), {}
    if sized:
        texts = texts.with_rows(pooled=torch.randn(PHOTOS, pooled_width(width), device=device, generator=draw))
        row = [side * 8.0, side * 8, 0, 0, side * 8, side * 8]
        sizes = {"time_ids": torch.tensor([row] * PHOTOS, device=device)}
    rows = torch.arange(PHOTOS)
    bucket = LatentBucket(
        side * 8, side * 8, mean, torch.full_like(mean, 0.1), None, sizes, rows, rows * 0, rows, rows * 0
    )
    names: Any = [SimpleNamespace(relative=f"{number}.png", repeats=1) for number in range(PHOTOS)]
    dataset = Dataset([bucket], names, [str(n) for n in range(PHOTOS)], [[n] for n in range(PHOTOS)], [0] * PHOTOS, 0.0)
    first = texts.index(torch.zeros(1, dtype=torch.int64, device=device))
    return Precomputed(
        dataset=dataset,
        holdout=None,
        conditions=texts,
        tokens=None,
        class_texts=["x"],
        class_conditions=first,
        class_tokens=None,
        class_of=torch.zeros(PHOTOS, dtype=torch.int64, device=device),
        class_latents=None,
        samples=SampleInputs([], None, None),
    )


def settings(batch: int, rank: int, **changes: Any) -> config.Config:
    """Return the config of a run in a comparison."""
    options = {"train.steps": 1000, "train.batch_size": batch, "adapter.rank": rank, "train.holdout": 0.0}
    return config.load(None, options | changes)


def lorakit_loop(
    family: Any, data: Any, run_config: config.Config, say: Callable[[str], Any] = print, *, device: str = ""
) -> Loop:
    """Return a function that runs a number of lorakit's optimizer steps.

    `device` is the device type for which activation saving is chosen, by default the family's own.
    """
    adapter = adapters.attach(family, run_config.adapter, seed=0)
    save_less = memory_estimate.use_save_less(run_config, device or family.device.type)
    channels_last = devices.channels_last(run_config.memory, family.device, family.dtype)
    adapters.optimize_blocks(family, save_less=save_less, channels_last=channels_last)
    if run_config.memory.gradient_checkpointing:
        blocks = [path for path, _ in family.denoiser.named_modules() if memory_estimate.BLOCK.fullmatch(path)]
        devices.gradient_checkpointing(family, blocks)
    adapter.train(True)
    return steps_of(OptimizerStep(run_config, LossStep(family, adapter, data, run_config.train), 1000, say))


def steps_of(update: OptimizerStep) -> Loop:
    """Return a function that runs the next `count` steps of `update`."""
    numbers = itertools.count()

    def run(count: int) -> None:
        for _ in range(count):
            update(next(numbers))

    return run


def peft_loop(
    family: Any, data: Any, batch: int, rank: int, *, autocast: bool = True, encode: Callable[[int], Any] | None = None
) -> Loop:
    """Return a function that runs a number of steps of a plain PEFT loop.

    With `encode` it is the loop of diffusers' scripts: `encode` returns new latents and texts for each batch, and each
    step reads the loss.
    """
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    unet, device, dtype = family.denoiser, family.device, family.dtype
    torchs_own(unet)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ATTENTION))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    # The scripts use AdamW's default, which is not fused.
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=encode is None)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    bucket, texts = data.dataset.buckets[0], data.conditions
    total = 0

    def step(index: int) -> None:
        rows = (torch.arange(batch, device=device) + index * batch) % PHOTOS
        latents, states = bucket.mean[rows], texts["encoder_hidden_states"][rows]
        if encode is not None:
            latents, states = encode(batch)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (batch,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        added = {}
        if bucket.sizes:
            added = {
                "text_embeds": texts["pooled"][rows].to(dtype),
                "time_ids": bucket.sizes["time_ids"][rows].to(dtype),
            }
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            predicted = unet(noisy.to(dtype), timesteps, states.to(dtype), added_cond_kwargs=added).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if encode is not None:
            loss.item()

    def run(count: int) -> None:
        nonlocal total
        for _ in range(count):
            step(total)
            total += 1

    return run


def torchs_own(unet: torch.nn.Module) -> None:
    """Replace lorakit's faster linear layers by torch's, which a plain loop would use."""
    for layer in unet.modules():
        if isinstance(layer, onednn_linear.FrozenLinear):
            layer.__class__ = torch.nn.Linear


@contextlib.contextmanager
def attention_as_on_a_card() -> Iterator[None]:
    """Compute attention in the tensors' dtype. On a CPU, lorakit uses float32 for short sequences."""
    here, fused_blocks._attention = fused_blocks._attention, torch.nn.functional.scaled_dot_product_attention
    try:
        yield
    finally:
        fused_blocks._attention = here


class Launches(TorchDispatchMode):
    """Counts the operations that run a kernel or a copy on a card: all except views and allocations."""

    VIEWS = (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "unsqueeze"),
        *(
            "squeeze",
            "slice",
            "select",
            "split",
            "split_with_sizes",
            "unbind",
            "chunk",
            "detach",
            "alias",
            "as_strided",
        ),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "unfold", "diagonal", "lift_fresh"),
        *("set_", "resize_", "_record_function_enter_new", "_record_function_exit"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation and run it."""
        name = function.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names[name] = self.names.get(name, 0) + 1
        return function(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        """Number of all operations."""
        return sum(self.names.values())


def alternate(
    loops: dict[str, Loop], rounds: int, steps: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return each loop's seconds per step in each round. The loops take turns, so changes of clock rate affect all."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            loops[name](steps)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((clock() - start) / steps)
    return times


def row(name: str, value: float, unit: str, ratio: float | None = None) -> Row:
    """Return one measured figure. `ratio` compares it with a reference; above 1 is better."""
    return {"name": name, "value": value, "unit": unit, "ratio": ratio}


def timing_rows(title: str, times: dict[str, list[float]], batch: int, against: str) -> list[Row]:
    """Return median, spread and rate of each loop. Ratios to the loop `against` are medians over the rounds."""
    rows = []
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[against], values, strict=True))
        middle = statistics.median(values)
        rows.append(row(f"{title} {name} step", middle * 1e3, "ms", ratio))
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [middle] * 3
        rows.append(row(f"{title} {name} spread (quartiles)", (quarters[2] - quarters[0]) * 1e3, "ms"))
        rows.append(row(f"{title} {name} rate", batch / middle, "images/s", ratio))
    return rows


def finish(rows: Iterable[Row], file: Path | None) -> None:
    """Print the table, and write the rows if there is a file for them."""
    rows = list(rows)
    wide = max(len(r["name"]) for r in rows)
    for r in rows:
        ratio = "" if r["ratio"] is None else f"{r['ratio']:>8.2f}x"
        print(f"{r['name']:<{wide}}{r['value']:>12.2f} {r['unit']:<10}{ratio}")
    if file:
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
