"""Adapters with random numbers for tests, and delta W by ten lines of numpy that know nothing of lorakit's formulas."""

import gzip
from pathlib import Path

import numpy as np
import torch

from lorakit.weights import AdapterWeights, Layer

LISTS = {"sd1": "sd15", "sd2": "sd2", "sdxl": "sdxl"}
GROUPS = {"attn": "attention", "conv3x3+time_emb (resnet/samplers)": "conv"}


def frozen(family: str) -> list[tuple[str, str, str, str, tuple[int, ...]]]:
    """Rows of the frozen list: canonical name, kohya name by diffusers blocks, by sgm blocks, group, weight shape."""
    path = Path(__file__).parent / "keys" / f"{LISTS[family]}.tsv.gz"
    rows = [line.split("\t") for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    return [(c, d, s, g, tuple(int(n) for n in shape.split("x"))) for c, d, s, g, shape in rows]


def layer(
    shape: tuple[int, ...], rank: int, alpha: float, generator: torch.Generator, magnitude: bool = False
) -> Layer:
    """A layer with normal numbers, both factors non-zero."""
    outputs, inputs, *kernel = shape
    down = torch.randn(rank, inputs, *kernel, generator=generator) / inputs**0.5
    up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=generator) * 0.1
    scales = torch.rand(1, inputs, *(1 for _ in kernel), generator=generator) + 0.5 if magnitude else None
    return Layer(down, up, alpha, scales)


def adapter(
    shapes: dict[str, tuple[int, ...]],
    family: str,
    *,
    rank: int | dict[str, int] = 4,
    alpha: float | dict[str, float] = 4.0,
    method: str = "lora",
    seed: int = 0,
) -> AdapterWeights:
    """Random weights for `shapes`; `rank` and `alpha` may differ by the name's last letter-run (any suffix)."""
    generator = torch.Generator().manual_seed(seed)

    def of(value, name):
        return (
            next((v for suffix, v in value.items() if name.endswith(suffix)), 4) if isinstance(value, dict) else value
        )

    layers = {
        name: layer(shape, of(rank, name), float(of(alpha, name)), generator, method == "dora")
        for name, shape in shapes.items()
    }
    return AdapterWeights(family, method, layers)


def reference_delta(entry: Layer) -> np.ndarray:
    """delta W = alpha / rank * up @ down, in float64."""
    down, up = entry.down.double().numpy(), entry.up.double().numpy()
    rank = down.shape[0]
    product = up.reshape(up.shape[0], rank) @ down.reshape(rank, -1)
    return (product * entry.alpha / rank).reshape(up.shape[0], *down.shape[1:])


def pipeline_shapes(pipeline, *, conv: bool = True, text: bool = True) -> dict[str, tuple[int, ...]]:
    """Canonical name -> weight shape of every portable layer of a diffusers pipeline, as its modules tell."""
    shapes: dict[str, tuple[int, ...]] = {}
    blocks = ("attentions", "resnets", "downsamplers", "upsamplers") if conv else ("attentions",)
    for path, module in pipeline.unet.named_modules():
        inside = len(path.split(".")) > 2 and (path.split(".")[1] in blocks or path.split(".")[2] in blocks)
        if inside and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            shapes[f"unet.{path}"] = tuple(module.weight.shape)
    for part in ("text_encoder", "text_encoder_2") if text else ():
        for path, module in getattr(pipeline, part).named_modules() if getattr(pipeline, part, None) else ():
            if ".layers." in path and isinstance(module, torch.nn.Linear):
                shapes[f"{part}.text_model.{path.removeprefix('text_model.')}"] = tuple(module.weight.shape)
    return shapes


def applied_deltas(pipeline) -> dict[str, torch.Tensor]:
    """Canonical name -> delta W that the PEFT layers of a pipeline really add, after a program has loaded a file."""
    found: dict[str, torch.Tensor] = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for path, module in getattr(pipeline, part).named_modules() if getattr(pipeline, part, None) else ():
            for adapter in getattr(module, "active_adapters", ()) if hasattr(module, "lora_A") else ():
                if adapter in module.lora_A:
                    prefix = "text_model." if part != "unet" and not path.startswith("text_model.") else ""
                    found[f"{part}.{prefix}{path}"] = module.get_delta_weight(adapter).detach().float().cpu()
    return found


def kohya_shapes(family: str, *, rank: int = 4, conv: bool = True, sgm: bool | None = None) -> dict[str, tuple]:
    """Tensor name -> shape of a whole kohya file at true dimensions, from the frozen list alone."""
    shapes = {}
    for name, by_blocks, by_sgm, group, (out, into, *kernel) in frozen(family):
        if group.startswith("top") or "text_projection" in group or (group.startswith("conv") and not conv):
            continue
        use_sgm = (family == "sdxl") if sgm is None else sgm
        stem = by_sgm if use_sgm and name.startswith("unet.") else by_blocks
        shapes[f"{stem}.lora_down.weight"] = (rank, into, *kernel)
        shapes[f"{stem}.lora_up.weight"] = (out, rank, *(1 for _ in kernel))
        shapes[f"{stem}.alpha"] = ()
    return shapes
