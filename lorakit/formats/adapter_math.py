"""Bring LoRA into a form that every reader understands: one rank and one alpha for each component.

diffusers misreads a mix of ranks or alphas, stable-diffusion.cpp misreads rank 1, and several programs drop or refuse a
text encoder that lacks some of q, k, v and out. The functions here avoid these cases without changing delta W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from lorakit.adapters.weights import AdapterWeights, AnyLayer, ForeignLayer, LohaLayer, LoraLayer
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.formats import keys
from lorakit.formats.facts.consumers import BIAS, DORA_ROWS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIN_RANK = 2  # stable-diffusion.cpp takes in_features for the rank of a rank-1 file
MIN_NONZERO_SHARE = 0.99  # share of non-zero numbers that must survive the cast to a half precision
MAX_ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7}  # of a factor's norm; twice what normal numbers can lose


def require_finite(weights: AdapterWeights) -> None:
    """Raise LorakitError if a layer has NaN or infinity (the message names it), or if there are no layers."""
    if not weights.layers:
        raise LorakitError("the adapter has no layers: there is nothing to export")
    for name, layer in weights.layers.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in layer.factors().values()):
            raise LorakitError("layer {name} is not finite (NaN or infinity): the adapter is not written", name)


def require_writable(weights: AdapterWeights, check: Callable[[str, str], str | None]) -> None:
    """Raise LorakitError if a format's `check` refuses a kind of layer, or if a layer has no canonical name or is not
    finite."""
    for kind in kinds(weights):
        if refusal := check(kind, weights.family):
            raise LorakitError(refusal)
    keys.require_canonical((*weights.layers, *weights.biases))
    require_finite(weights)


def kinds(weights: AdapterWeights) -> list[str]:
    """The kinds of layers, from their tensors and not from the label `method`. Plain LoRA has the kind of its training
    method."""
    result = {_kind(layer) for layer in weights.layers.values() if not layer.is_lora}
    # The bias of a norm or of a full difference belongs to that layer; whoever reads the layer reads its bias.
    parts = {name for name, layer in weights.layers.items() if layer.method in ("norm", "full difference")}
    result |= {BIAS} if weights.biases.keys() - parts else set()
    return sorted(result) or [weights.method]


def _kind(layer: AnyLayer) -> str:
    if layer.magnitude is None or isinstance(layer, ForeignLayer):
        return layer.method
    if not isinstance(layer, LoraLayer):
        return f"DoRA over {layer.method}"
    return "dora" if layer.magnitude.shape[0] == 1 else DORA_ROWS


def uniform(weights: AdapterWeights) -> dict[str, AnyLayer]:
    """The layers; in each component the LoRA layers get one rank (2 or more) and one alpha. Every delta W stays the
    same.

    Smaller ranks are padded with zero rows. If scales differ, they are folded into `up`, and alpha = rank.
    """
    result: dict[str, AnyLayer] = {}
    for part in registry.components():
        inside = {name: layer for name, layer in weights.layers.items() if keys.component(name) == part}
        lora_layers = {name: layer for name, layer in inside.items() if isinstance(layer, LoraLayer)}
        rank = max((MIN_RANK, *(layer.rank for layer in lora_layers.values())))
        padded = {name: _padded(layer, rank) for name, layer in lora_layers.items()}
        if len({layer.alpha for layer in padded.values()}) > 1:
            padded = {name: layer.rescaled(1) for name, layer in padded.items()}
        result |= inside | padded
    return result


def _padded(layer: LoraLayer, rank: int) -> LoraLayer:
    """The same layer with zero rows in `down` and zero columns in `up` up to `rank`; alpha / rank stays the same."""
    if layer.rank == rank:
        return layer
    down = layer.down.new_zeros(rank, *layer.down.shape[1:])
    down[: layer.rank] = layer.down
    up = layer.up.new_zeros(layer.up.shape[0], rank, *layer.up.shape[2:])
    up[:, : layer.rank] = layer.up
    return replace(layer, down=down, up=up, alpha=layer.alpha * rank / layer.rank)


def fill_ins(layers: Mapping[str, AnyLayer]) -> dict[str, LoraLayer]:
    """Zero layers for the text-encoder projections that are missing although another of q, k, v and out is adapted.

    If one of the four is missing, diffusers raises, and A1111 and stable-diffusion.cpp silently drop layers.
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
    """The layers of `uniform` with `fill_ins`, in the order UNet, text encoder, second text encoder."""
    return _filled(uniform(weights))


def with_own_ranks(weights: AdapterWeights) -> dict[str, AnyLayer]:
    """As `complete`, each layer with its own rank and alpha."""
    return _filled(weights.layers)


def _filled(layers: Mapping[str, AnyLayer]) -> dict[str, AnyLayer]:
    layers = {**layers, **fill_ins(layers)}
    order = {part: number for number, part in enumerate(registry.components())}
    return dict(sorted(layers.items(), key=lambda item: order[keys.component(item[0])]))


def cast(tensors: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Contiguous CPU copies in a file's dtype ("fp16", "bf16" or "fp32"); PEFT's magnitudes stay float32."""
    return {
        name: t.detach().to("cpu", DTYPES["fp32" if "magnitude" in name else dtype], copy=True).contiguous()
        for name, t in tensors.items()
    }


def lossy(weights: AdapterWeights, dtype: str) -> str | None:
    """The reason why `dtype` would damage the adapter, or None: a value overflows, over 1 % of a factor's values become
    0, or they are so small that rounding is coarse.

    fp16 has no values below 6e-8 and is coarse below 6e-5, where a short or gentle run leaves entire layers. The
    factors are checked as they will be written, with the scale folded in and without.
    """
    if dtype == "fp32":
        return None
    for name, layer in uniform(weights).items():
        for tensor in (*layer.factors().values(), *layer.rescaled(1).factors().values()):
            rounded = tensor.to(DTYPES[dtype])
            if not bool(torch.isfinite(rounded).all()):
                return Message("{name} has numbers too large for {dtype}", name, dtype)
            before, after = int(torch.count_nonzero(tensor)), int(torch.count_nonzero(rounded))
            if after < MIN_NONZERO_SHARE * before:
                return Message(
                    "{value} % of the numbers of {name} would become 0 in {dtype}",
                    100 - 100 * after // before,
                    name,
                    dtype,
                )
            error = float(torch.linalg.vector_norm(rounded.float() - tensor))
            if error > MAX_ROUNDING[dtype] * float(torch.linalg.vector_norm(tensor)):
                return Message("the numbers of {name} are too small for {dtype}", name, dtype)
    return None


# -- q, k and v in one layer ---------------------------------------------------------------------------------------
# Files fuse them if the denoiser is not a UNet (`KohyaNames.fused`); lorakit trains three layers. Splitting and fusing
# is exact: shares of a product's rows are products of shares of its first factor's rows, and three products form one
# with block-diagonal factors.


def split(name: str, layer: AnyLayer, family: str) -> dict[str, AnyLayer]:
    """The layers in lorakit for one layer of a file; the layer itself if it is not fused.

    Raises:
        LorakitError: layers of this method cannot be split.
    """
    names = keys.fused_parts(name, family)
    if not names:
        return {name: layer}
    if layer.size[0] % len(names):
        raise LorakitError(
            "{name} has {size} rows, which are not {count} equal shares: the file is damaged",
            name,
            layer.size[0],
            len(names),
        )
    if isinstance(layer, LoraLayer) and (layer.magnitude is None or layer.magnitude.shape[0] == len(layer.up)):
        rows = layer.up.chunk(len(names))
        scales = (None,) * len(names) if layer.magnitude is None else layer.magnitude.chunk(len(names))
        shares = {n: _share(layer, up, scale) for n, up, scale in zip(names, rows, scales, strict=True)}
        # Untrained shares are zeros in such a file; if all are, they are kept.
        trained = {n: share for n, share in shares.items() if bool(share.up.any()) or share.magnitude is not None}
        return dict(trained or shares)
    if isinstance(layer, LohaLayer) and layer.magnitude is None:
        pairs = zip(names, layer.w1_a.chunk(len(names)), layer.w2_a.chunk(len(names)), strict=True)
        return {n: replace(layer, w1_a=first, w2_a=second) for n, first, second in pairs}
    if isinstance(layer, ForeignLayer) and "diff" in layer.parts:
        shares_of = layer.parts["diff"].chunk(len(names))
        return {n: replace(layer, parts={"diff": share}) for n, share in zip(names, shares_of, strict=True)}
    raise LorakitError(
        "{name} is {method} on q, k and v in one layer, which has no counterpart on each: merge it into a "
        "base with the program that made it",
        name,
        layer.method,
    )


def split_bias(name: str, bias: torch.Tensor, family: str) -> dict[str, torch.Tensor]:
    """The same for the change of a bias."""
    names = keys.fused_parts(name, family) or (name,)
    return dict(zip(names, bias.chunk(len(names)), strict=True))


def swapped(name: str, layer: AnyLayer, family: str) -> AnyLayer:
    """The layer with the halves of its rows exchanged, if it is a modulation with only shift and scale, whose order
    differs in files; else the layer itself.

    Raises:
        LorakitError: rows of this method cannot be exchanged.
    """
    if not keys.is_swapped(name, family) or layer.size[0] != 2 * layer.size[1]:
        return layer
    if isinstance(layer, LoraLayer) and (layer.magnitude is None or layer.magnitude.shape[0] == len(layer.up)):
        return replace(
            layer, up=_exchanged(layer.up), magnitude=None if layer.magnitude is None else _exchanged(layer.magnitude)
        )
    if isinstance(layer, LohaLayer) and layer.magnitude is None:
        return replace(layer, w1_a=_exchanged(layer.w1_a), w2_a=_exchanged(layer.w2_a))
    if isinstance(layer, ForeignLayer) and "diff" in layer.parts:
        return replace(layer, parts={"diff": _exchanged(layer.parts["diff"])})
    raise LorakitError(
        "{name} is {method} on shift and scale, whose order differs between programs", name, layer.method
    )


def _exchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(len(tensor) // 2, 0)


def _share(layer: LoraLayer, up: torch.Tensor, magnitude: torch.Tensor | None) -> LoraLayer:
    """One share of a factor's rows, without ranks that are zero there, as in files with three block-diagonal
    products."""
    used = up.flatten(2).any(2).any(0) if up.ndim > 2 else up.any(0)
    if not bool(used.any()):
        used = torch.ones_like(used)
    return LoraLayer(layer.down[used], up[:, used], layer.scale * int(used.sum()), magnitude)


def fuse(layers: Mapping[str, AnyLayer], weights: AdapterWeights) -> tuple[dict[str, AnyLayer], AdapterWeights]:
    """The layers as in files, and the weights with fused biases: the inverse of `split` for LoRA.

    Raises:
        LorakitError: layers of another method cannot be fused.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for name in (*layers, *weights.biases):
        if whole := keys.fused_name(name, weights.family):
            groups[whole] = keys.fused_parts(whole, weights.family)
    parts = {name for names in groups.values() for name in names}
    result = {n: swapped(n, layer, weights.family) for n, layer in layers.items() if n not in parts}
    biases = {name: bias for name, bias in weights.biases.items() if name not in parts}
    for whole, names in groups.items():
        if members := [layers.get(name) for name in names if name in layers]:
            result[whole] = _joined(whole, [layers.get(name) for name in names], members)
        if changes := [weights.biases[name] for name in names if name in weights.biases]:
            zeros = torch.zeros_like(changes[0])
            biases[whole] = torch.cat([weights.biases.get(name, zeros) for name in names])
    return result, replace(weights, biases=biases)


def _joined(name: str, layers: list[AnyLayer | None], members: list[AnyLayer | None]) -> AnyLayer:
    loras = [layer for layer in members if isinstance(layer, LoraLayer) and layer.magnitude is None]
    if all(isinstance(layer, ForeignLayer) and "diff" in layer.parts for layer in members):
        whole = [layer.parts["diff"] for layer in members if isinstance(layer, ForeignLayer)]
        zeros = torch.zeros_like(whole[0])
        shares = [layer.parts["diff"] if isinstance(layer, ForeignLayer) else zeros for layer in layers]
        first = members[0]
        assert isinstance(first, ForeignLayer)
        return replace(first, parts={"diff": torch.cat(shares)})
    if len(loras) != len(members):
        raise LorakitError("{name} holds q, k and v in one layer, which only LoRA can be put into", name)
    first_lora = loras[0]
    zeros = torch.zeros_like(first_lora.up[:, :0])
    pieces = [
        layer if isinstance(layer, LoraLayer) else replace(first_lora, down=first_lora.down[:0], up=zeros)
        for layer in layers
    ]
    if all(torch.equal(layer.down, first_lora.down) and layer.scale == first_lora.scale for layer in loras):
        # All share one first factor, as in the file that they come from.
        ups = [piece.up if piece.up.shape[1] else torch.zeros_like(first_lora.up) for piece in pieces]
        return replace(first_lora, up=torch.cat(ups))
    if len({layer.scale for layer in loras}) > 1:
        pieces = [piece.rescaled(1) if piece.rank else piece for piece in pieces]
    down = torch.cat([piece.down for piece in pieces])
    up = torch.block_diag(*(piece.up for piece in pieces))
    scale = next(piece.scale for piece in pieces if piece.rank)
    return LoraLayer(down, up, scale * len(down))
