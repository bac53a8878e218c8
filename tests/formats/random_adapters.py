"""Adapters with random weights, and reference formulas of delta W in numpy that are independent of lorakit."""

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch

from lorakit.adapters.weights import AdapterWeights, AnyLayer, LohaLayer, LokrLayer, LoraLayer

LISTS = {"sd1": "sd15", "sd2": "sd2", "sdxl": "sdxl"}
GROUPS = {"attn": "attention", "conv3x3+time_emb (resnet/samplers)": "conv"}


def frozen(family: str) -> list[tuple[str, str, str, str, tuple[int, ...]]]:
    """Return the frozen list: canonical name, kohya name by diffusers blocks, by sgm blocks, group, weight shape."""
    path = Path(__file__).parent / "keys" / f"{LISTS[family]}.tsv.gz"
    rows = [line.split("\t") for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    return [(c, d, s, g, tuple(int(n) for n in shape.split("x"))) for c, d, s, g, shape in rows]


def layer(
    shape: tuple[int, ...], rank: int, alpha: float, generator: torch.Generator, magnitude: bool = False
) -> LoraLayer:
    """Return a layer of normally distributed weights; no factor is zero."""
    outputs, inputs, *kernel = shape
    down = torch.randn(rank, inputs, *kernel, generator=generator) / inputs**0.5
    up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=generator) * 0.1
    scales = torch.rand(1, inputs, *(1 for _ in kernel), generator=generator) + 0.5 if magnitude else None
    return LoraLayer(down, up, alpha, scales)


def loha(shape: tuple[int, ...], rank: int, alpha: float, generator: torch.Generator) -> LohaLayer:
    """Return a LoHa layer of normally distributed weights."""
    out, columns = shape[0], int(np.prod(shape[1:]))
    sides = [torch.randn(out, rank, generator=generator), torch.randn(rank, columns, generator=generator)] * 2
    w1_a, w1_b, w2_a, w2_b = (0.3 * torch.randn(side.shape, generator=generator) for side in sides)
    return LohaLayer(w1_a, w1_b, w2_a, w2_b, alpha)


def lokr(shape: tuple[int, ...], rank: int, alpha: float, generator: torch.Generator) -> LokrLayer:
    """Return a LoKr layer of normally distributed weights, divided as in LyCORIS."""
    (a, b), (c, d) = cut(shape[0]), cut(shape[1])
    kernel = tuple(shape[2:])
    columns, is_full = d * int(np.prod(kernel)), rank >= max(b, d) / 2
    sizes = [(b, columns)] if is_full else [(b, rank), (rank, columns)]
    w2 = tuple(0.3 * torch.randn(size, generator=generator) for size in sizes)
    return LokrLayer((torch.randn(a, c, generator=generator),), w2, alpha, kernel if is_full else ())


@cache
def cut(width: int) -> tuple[int, int]:
    """Return the two factors of `width` that are nearest to each other."""
    return min(((n, width // n) for n in range(1, width + 1) if width % n == 0 and n * n <= width), key=lambda p: p[1])


def adapter(
    shapes: dict[str, tuple[int, ...]],
    family: str,
    *,
    rank: int | dict[str, int] = 4,
    alpha: float | dict[str, float] = 4.0,
    method: str = "lora",
    seed: int = 0,
) -> AdapterWeights:
    """Return random weights for `shapes`; a dict of `rank` or `alpha` has a value for each suffix of layer names."""
    generator = torch.Generator().manual_seed(seed)

    def of(value, name):
        return (
            next((v for suffix, v in value.items() if name.endswith(suffix)), 4) if isinstance(value, dict) else value
        )

    factories = {"loha": loha, "lokr": lokr}
    layers = {
        name: factories[method](shape, of(rank, name), float(of(alpha, name)), generator)
        if method in factories
        else layer(shape, of(rank, name), float(of(alpha, name)), generator, method == "dora")
        for name, shape in shapes.items()
    }
    return AdapterWeights(family, method, layers)


def reference_delta(entry: AnyLayer) -> np.ndarray:
    """Return delta W by the method's formula in float64; for LoHa and LoKr always as a matrix."""
    part = {name: tensor.double().numpy() for name, tensor in entry.factors().items()}
    if "hada_w1_a" in part:
        product = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
        return product * entry.alpha / part["hada_w1_a"].shape[1]
    if "lokr_w1" in part:
        full = part.get("lokr_w2")
        if full is not None:
            return np.kron(part["lokr_w1"], full.reshape(len(full), -1))
        return (
            np.kron(part["lokr_w1"], part["lokr_w2_a"] @ part["lokr_w2_b"]) * entry.alpha / part["lokr_w2_a"].shape[1]
        )
    down, up = entry.down.double().numpy(), entry.up.double().numpy()
    rank = down.shape[0]
    product = up.reshape(up.shape[0], rank) @ down.reshape(rank, -1)
    return (product * entry.alpha / rank).reshape(up.shape[0], *down.shape[1:])


def one_of_each_kind(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the first layer of each kind in each component: it stands for all of them and saves time."""
    shapes_by_kind: dict[str, tuple[int, ...]] = {}
    kinds = set()
    for name, shape in shapes.items():
        kind = (name.partition(".")[0], *name.replace("to_out.0", "to_out").split(".")[-2:], len(shape))
        if kind not in kinds:
            kinds.add(kind)
            shapes_by_kind[name] = shape
    return shapes_by_kind


def pipeline_shapes(pipeline, *, conv: bool = True, text: bool = True) -> dict[str, tuple[int, ...]]:
    """Canonical name -> weight shape of every portable layer of a diffusers pipeline, from its modules."""
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
    """Canonical name -> delta W that a pipeline's PEFT layers add after loading a file."""
    deltas: dict[str, torch.Tensor] = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for path, module in getattr(pipeline, part).named_modules() if getattr(pipeline, part, None) else ():
            factors = [getattr(module, part, ()) for part in ("lora_A", "hada_w1_a", "lokr_w1")]
            for adapter in getattr(module, "active_adapters", ()) if any(len(names) for names in factors) else ():
                if any(adapter in names for names in factors):
                    prefix = "text_model." if part != "unet" and not path.startswith("text_model.") else ""
                    deltas[f"{part}.{prefix}{path}"] = module.get_delta_weight(adapter).detach().float().cpu()
    return deltas


def kohya_shapes(family: str, *, rank: int = 4, conv: bool = True, sgm: bool | None = None) -> dict[str, tuple]:
    """Tensor name -> shape of a complete kohya file at true dimensions, from the frozen list alone."""
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
