"""Arithmetic on adapters: change the rank, combine several. Pure functions on weights, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from lorakit.adapters.weights import AdapterWeights, AnyLayer, ForeignLayer, LohaLayer, LokrLayer, LoraLayer
from lorakit.core.errors import LorakitError
from lorakit.core.messages import join
from lorakit.formats import keys

# Below this ratio of the squared norm of a sum to those of its parts, the sum is only rounding.
CANCELLED = 1e-12


def resize(weights: AdapterWeights, *, rank: int | None = None, energy: float | None = None) -> AdapterWeights:
    """The best approximation of smaller rank (Eckart-Young: the largest singular values of each delta W are kept).

    LoHa and LoKr become plain LoRA, which is exact with energy 1.

    Args:
        rank: rank of every layer; layers with a smaller rank keep it.
        energy: instead of a rank: keep the fewest singular values whose squares sum to this share of the total, per
            layer.

    Returns:
        Layers with alpha = rank (the scale is in the factors): plain LoRA, or DoRA with an unchanged magnitude.

    Raises:
        LorakitError: not exactly one of rank and energy is given, or it is out of range.
    """
    if (rank is None) == (energy is None):
        raise LorakitError("resize: give a rank or an energy, one of them")
    if rank is not None and rank < 1:
        raise LorakitError("resize: rank = {rank}: must be 1 or more", rank)
    if energy is not None and not 0 < energy <= 1:
        raise LorakitError("resize: energy = {energy:g}: must be above 0 and at most 1", energy)
    layers: dict[str, AnyLayer] = {
        name: layer if isinstance(layer, ForeignLayer) else _resized(layer, rank, energy)
        for name, layer in to_lora(weights).items()
    }
    kinds = {layer.method for layer in layers.values() if not layer.is_lora}
    return replace(weights, method=min(kinds, default="lora"), layers=layers)


def to_lora(weights: AdapterWeights) -> dict[str, LoraLayer | ForeignLayer]:
    """Every layer as LoRA with the same delta W. The rank becomes rank * rank for LoHa, and the product of the ranks of
    w1 and w2 for LoKr. Changes of vectors, such as norms, stay as they are.

    Raises:
        LorakitError: the change of a layer depends on the base.
    """
    return {
        name: layer if isinstance(layer, LoraLayer) else _as_lora(layer, keys.kernel(name, weights.family))
        for name, layer in weights.layers.items()
    }


def _as_lora(layer: LohaLayer | LokrLayer | ForeignLayer, kernel: tuple[int, ...]) -> LoraLayer | ForeignLayer:
    """(A B) * (C D) has the columns a_i * c_j and the rows b_i * d_j; kron(A B, C D) = kron(A, C) kron(B, D)."""
    if isinstance(layer, ForeignLayer):
        return layer if layer.delta().ndim == 1 else full_rank(layer.delta())
    if isinstance(layer, LohaLayer):
        up = (layer.w1_a[:, :, None] * layer.w2_a[:, None, :]).flatten(1)
        down = (layer.w1_b[:, None, :] * layer.w2_b[None, :, :]).flatten(0, 1)
    else:
        (a, b), (c, d) = ([t.contiguous() for t in _pair(parts)] for parts in (layer.w1, layer.w2))
        up, down = torch.kron(a, c), torch.kron(b, d)
    rank = len(down)
    columns = down.reshape(rank, down.shape[1] // math.prod(kernel), *kernel)
    return LoraLayer(columns, up.reshape(*up.shape, *(1 for _ in kernel)), layer.scale * rank, layer.magnitude)


def full_rank(difference: torch.Tensor) -> LoraLayer:
    """A layer of full rank with delta W = `difference`: one factor is the identity."""
    outputs, inputs = difference.shape[0], difference[0].numel()
    kernel = difference.shape[2:]
    if outputs <= inputs:
        up = torch.eye(outputs).reshape(outputs, outputs, *(1 for _ in kernel))
        return LoraLayer(difference, up, float(outputs))
    up = difference.reshape(outputs, inputs, *(1 for _ in kernel))
    return LoraLayer(torch.eye(inputs).reshape(inputs, *difference.shape[1:]), up, float(inputs))


def _pair(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as a product of two factors; if it is not factorized, the identity is the smaller factor."""
    if len(parts) == 2:
        return parts[0], parts[1]
    rows, columns = parts[0].shape
    return (torch.eye(rows), parts[0]) if rows <= columns else (parts[0], torch.eye(columns))


def _resized(layer: LoraLayer, rank: int | None, energy: float | None) -> LoraLayer:
    # The singular values of a product of thin factors are those of the small core between their QR decompositions.
    left, left_core = torch.linalg.qr(layer.up.flatten(1).double())
    right, right_core = torch.linalg.qr(layer.down.flatten(1).double().T)
    core_left, values, core_right = torch.linalg.svd(left_core @ right_core.T * layer.scale)
    new_rank = min(rank or len(values), len(values))
    if energy is not None:
        squares = values.square()
        shares = squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        new_rank = min(int((shares < energy - 1e-12).sum()) + 1, len(values))
    root = values[:new_rank].sqrt()
    up = (left @ core_left[:, :new_rank] * root).float()
    down = (root[:, None] * (core_right[:new_rank] @ right.T)).float()
    return replace(
        layer,
        down=down.reshape(new_rank, *layer.down.shape[1:]),
        up=up.reshape(layer.up.shape[0], new_rank, *layer.up.shape[2:]),
        alpha=float(new_rank),
    )


def combine(parts: Sequence[tuple[AdapterWeights, float]]) -> AdapterWeights:
    """One adapter whose delta W is the sum of `strength * delta W` of several. Its ranks are the sums of theirs.

    Raises:
        LorakitError: no adapter is given, families or shapes differ, one is DoRA (not additive), or the sum changes
            nothing at these strengths.
    """
    if not parts:
        raise LorakitError("combine: give at least one adapter")
    families = sorted({weights.family for weights, _ in parts})
    if len(families) > 1:
        raise LorakitError("combine: adapters for {families} do not go together", join(" and ", families))
    if any(layer.magnitude is not None for weights, _ in parts for layer in weights.layers.values()):
        raise LorakitError("combine: DoRA adapters do not add up; merge them into a base one after the other")
    collected: dict[str, list[LoraLayer]] = {}
    biases: dict[str, torch.Tensor] = {}
    stacked: dict[str, AnyLayer] = {}
    for weights, strength in parts:
        for name, bias in weights.biases.items():
            biases[name] = biases.get(name, 0) + strength * bias
        for name, layer in to_lora(weights).items():
            if isinstance(layer, ForeignLayer):  # the change of a vector
                before = stacked.get(name)
                total = strength * layer.delta() + (0 if before is None else before.delta())
                stacked[name] = replace(layer, parts=dict.fromkeys(layer.parts, total))
                continue
            scaled = replace(layer, up=layer.up.float() * (layer.scale * strength), alpha=float(layer.rank))
            collected.setdefault(name, []).append(scaled)
    joined = {name: _stacked(name, layers) for name, layers in collected.items()}
    vectors = [*biases.values(), *(layer.delta() for layer in stacked.values())]
    stacked |= joined
    words = [(word, vectors) for weights, _ in parts for word, vectors in weights.embeddings.items()]
    if len({word for word, _ in words}) < len(words):
        raise LorakitError("combine: several adapters have an embedding of their own for {words!r}", words[0][0])
    is_left = any(_square(layer) > CANCELLED * sum(map(_square, collected[name])) for name, layer in joined.items())
    if not (is_left or words or any(bool(vector.any()) for vector in vectors)):
        raise LorakitError("combine: at these strengths the adapters add up to no change: give other strengths")
    return AdapterWeights(families[0], "lora", stacked, embeddings=dict(words), biases=biases)


def _square(layer: LoraLayer) -> float:
    """The squared Frobenius norm of delta W, from rank x rank products: ||U D||^2 = tr(U^T U D D^T)."""
    up, down = layer.up.flatten(1).double(), layer.down.flatten(1).double()
    return float(((up.T @ up) * (down @ down.T)).sum()) * layer.scale**2


def _stacked(name: str, layers: list[LoraLayer]) -> LoraLayer:
    if len({(layer.up.shape[0], layer.down.shape[1:]) for layer in layers}) > 1:
        raise LorakitError("combine: {name} has different shapes in the adapters; they are for different bases", name)
    down = torch.cat([layer.down.float() for layer in layers])
    up = torch.cat([layer.up for layer in layers], dim=1)
    return LoraLayer(down, up, float(down.shape[0]))
