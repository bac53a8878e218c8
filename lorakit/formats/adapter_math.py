"""LoRA brought into the one shape that every reader understands: one rank and one alpha for each component.

diffusers reads a mix of ranks or alphas wrongly, stable-diffusion.cpp reads rank 1 wrongly, and several programs drop
or refuse a text encoder that lacks some of q, k, v and out. All three are mended here without changing delta W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from lorakit.adapters.weights import AdapterWeights, AnyLayer, ForeignLayer, LoraLayer
from lorakit.core.errors import LorakitError
from lorakit.formats import keys
from lorakit.formats.facts.consumers import BIAS, DORA_ROWS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIN_RANK = 2  # stable-diffusion.cpp takes in_features for the rank of a rank-1 file
MIN_NONZERO_SHARE = 0.99  # share of non-zero numbers that must survive the cast to a half precision
MAX_ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7}  # of a factor's norm; twice what normal numbers can lose


def require_finite(weights: AdapterWeights) -> None:
    """Raise LorakitError, naming the layer, where a number is NaN or infinite; or where there is no layer at all."""
    if not weights.layers:
        raise LorakitError("the adapter has no layers: there is nothing to export")
    for name, layer in weights.layers.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in layer.factors().values()):
            raise LorakitError(f"layer {name} is not finite (NaN or infinity): the adapter is not written")


def require_writable(weights: AdapterWeights, check: Callable[[str, str], str | None]) -> None:
    """Raise LorakitError where a format's `check` refuses a kind of layer, or one is not portable or not finite."""
    for kind in kinds(weights):
        if refusal := check(kind, weights.family):
            raise LorakitError(refusal)
    keys.require_canonical((*weights.layers, *weights.biases))
    require_finite(weights)


def kinds(weights: AdapterWeights) -> list[str]:
    """What the tensors are, whatever the weights are labelled; what is plain LoRA is called as it was trained."""
    result = {_kind(layer) for layer in weights.layers.values() if not layer.is_lora}
    result |= {BIAS} if weights.biases else set()
    return sorted(result) or [weights.method]


def _kind(layer: AnyLayer) -> str:
    if layer.magnitude is None or isinstance(layer, ForeignLayer):
        return layer.method
    if not isinstance(layer, LoraLayer):
        return f"DoRA over {layer.method}"
    return "dora" if layer.magnitude.shape[0] == 1 else DORA_ROWS


def uniform(weights: AdapterWeights) -> dict[str, AnyLayer]:
    """The layers, those with LoRA with one rank (2 or more) and one alpha in each component; every delta W as it was.

    Ranks are evened out with zero rows; where scales differ they are folded into `up`, and alpha = rank then.
    """
    result: dict[str, AnyLayer] = {}
    for part in keys.COMPONENTS:
        inside = {name: layer for name, layer in weights.layers.items() if keys.component(name) == part}
        lora_layers = {name: layer for name, layer in inside.items() if isinstance(layer, LoraLayer)}
        rank = max((MIN_RANK, *(layer.rank for layer in lora_layers.values())))
        padded = {name: _padded(layer, rank) for name, layer in lora_layers.items()}
        if len({layer.alpha for layer in padded.values()}) > 1:
            padded = {name: layer.rescaled(1) for name, layer in padded.items()}
        result |= inside | padded
    return result


def _padded(layer: LoraLayer, rank: int) -> LoraLayer:
    """The same layer with zero rows in `down` and zero columns in `up` up to `rank`; alpha / rank stays."""
    if layer.rank == rank:
        return layer
    down = layer.down.new_zeros(rank, *layer.down.shape[1:])
    down[: layer.rank] = layer.down
    up = layer.up.new_zeros(layer.up.shape[0], rank, *layer.up.shape[2:])
    up[:, : layer.rank] = layer.up
    return replace(layer, down=down, up=up, alpha=layer.alpha * rank / layer.rank)


def fill_ins(layers: Mapping[str, AnyLayer]) -> dict[str, LoraLayer]:
    """Zero layers for the text-encoder projections that are missing beside an adapted q, k, v or out of theirs.

    diffusers raises, and A1111 and stable-diffusion.cpp drop layers in silence, where one of the four is not there.
    """
    missing: dict[str, LoraLayer] = {}
    for name, layer in layers.items():
        if not isinstance(layer, LoraLayer):
            continue
        for sibling in keys.text_attention_siblings(name):
            if sibling not in layers:
                zeros = replace(layer, down=torch.zeros_like(layer.down), up=torch.zeros_like(layer.up), magnitude=None)
                missing[sibling] = zeros
    return missing


def complete(weights: AdapterWeights) -> dict[str, AnyLayer]:
    """`uniform` with its `fill_ins`, in the order UNet, text encoder, second text encoder."""
    layers = uniform(weights)
    layers.update(fill_ins(layers))
    order = {part: number for number, part in enumerate(keys.COMPONENTS)}
    return dict(sorted(layers.items(), key=lambda item: order[keys.component(item[0])]))


def cast(tensors: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Contiguous CPU copies in a file's dtype ("fp16", "bf16" or "fp32"); PEFT's magnitudes stay float32."""
    return {
        name: t.detach().to("cpu", DTYPES["fp32" if "magnitude" in name else dtype], copy=True).contiguous()
        for name, t in tensors.items()
    }


def lossy(weights: AdapterWeights, dtype: str) -> str | None:
    """Why `dtype` would lose the adapter, or None: a number overflows, over 1 % of a factor's numbers become 0, or
    they are so small that they are rounded coarsely.

    fp16 knows nothing below 6e-8 and is coarse below 6e-5, and a short or gentle run leaves whole layers there. The
    factors are judged as they are written, with the scale folded in and without.
    """
    if dtype == "fp32":
        return None
    for name, layer in uniform(weights).items():
        for tensor in (*layer.factors().values(), *layer.rescaled(1).factors().values()):
            rounded = tensor.to(DTYPES[dtype])
            if not bool(torch.isfinite(rounded).all()):
                return f"{name} has numbers too large for {dtype}"
            before, after = int(torch.count_nonzero(tensor)), int(torch.count_nonzero(rounded))
            if after < MIN_NONZERO_SHARE * before:
                return f"{100 - 100 * after // before} % of the numbers of {name} would become 0 in {dtype}"
            error = float(torch.linalg.vector_norm(rounded.float() - tensor))
            if error > MAX_ROUNDING[dtype] * float(torch.linalg.vector_norm(tensor)):
                return f"the numbers of {name} are too small for {dtype}"
    return None
