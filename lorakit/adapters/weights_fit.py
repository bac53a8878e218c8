"""Check by names, ranks and shapes that the weights of an adapter fit a base and a config. No model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorakit.adapters import targets
from lorakit.adapters.weights import AdapterWeights, AnyLayer, ForeignLayer, LoraLayer
from lorakit.config import AdapterConfig
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import join

if TYPE_CHECKING:
    import torch


def require(
    weights: AdapterWeights, config: AdapterConfig, family: str, shapes: Mapping[str, Sequence[int]], trigger: str
) -> None:
    """Compare an initial adapter with the one to train.

    Args:
        shapes: canonical name of each trained layer -> shape of its weight.
        trigger: the word for which vectors are learned.

    Raises:
        LorakitError: family, method, layers, ranks or shapes differ, or the method starts from the base's weights.
    """
    spec = registry.METHODS[config.method]
    if spec.begins_from_base:
        raise LorakitError(
            "{method} begins from the base's own weights and not from an adapter: set adapter.method = 'lora'",
            config.method,
        )
    if weights.family != family:
        raise LorakitError("the adapter to start from is for {theirs}, this base is {family}", weights.family, family)
    theirs = method(weights)
    if theirs != spec.layers:
        raise LorakitError("the adapter to start from is {theirs}: set adapter.method = {method!r}", theirs, theirs)
    missing = [name for name in shapes if name not in weights.layers]
    extra = [name for name in weights.layers if name not in shapes]
    if missing or extra:
        raise LorakitError(
            "the adapter to start from has other layers: {count} are missing, {more} are too many, "
            "e.g. {missing}; set adapter.target_modules and adapter.train_text_encoder as it was made",
            *(len(missing), len(extra), (missing or extra)[0]),
        )
    for name, shape in shapes.items():
        layer, own = weights.layers[name], targets.layer_config(config, name)
        count = sum(factor.numel() for factor in layer.factors().values())
        if fits(layer, shape) and count == targets.trained(own, shape):
            continue
        if layer.rank != own.rank:
            rank = layer.rank
            alike = [other for other in shapes if targets.layer_config(config, other).rank == own.rank]
            if len(ranks := sorted({weights.layers[other].rank for other in alike})) > 1:
                raise LorakitError(
                    "the adapter to start from has ranks {ranks}: make them one with lorakit resize FILE --rank {rank}",
                    ", ".join(map(str, ranks)),
                    ranks[0],
                )
            raise LorakitError(
                "the adapter to start from has rank {rank} in {name}: set adapter.rank = {rank}", rank, name
            )
        raise LorakitError("the adapter to start from has another shape in {name}: it is of another base", name)
    for word, vectors in weights.embeddings.items():
        count = len(next(iter(vectors.values())))
        if (word, count) != (trigger, config.new_tokens):
            raise LorakitError(
                "the adapter to start from learned the word {word!r} with adapter.new_tokens = {count}: set that, and "
                "begin data.name with {word!r}",
                word,
                count,
            )


def require_checkpoint(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], what: str) -> None:
    """Compare the tensors of a checkpoint with those that they will be copied into.

    Args:
        what: a word for the trained object, for the message.

    Raises:
        LorakitError: a tensor is missing, unknown or of another shape.
    """
    wrong = sorted(own.keys() ^ state.keys()) or [n for n, p in own.items() if p.shape != state[n].shape]
    if wrong:
        raise LorakitError(
            "the checkpoint does not fit this {what}: {wrong} ({count} such)", what, wrong[0], len(wrong)
        )


def fits(layer: AnyLayer, shape: Sequence[int]) -> bool:
    """Whether an adapter's layer fits a weight of this shape."""
    if isinstance(layer, ForeignLayer):
        import torch

        try:
            return tuple(layer.change(torch.zeros(tuple(shape)), layer, 1.0).shape) == tuple(shape)
        except RuntimeError:
            return False
    if isinstance(layer, LoraLayer):
        return (len(layer.up), *layer.down.shape[1:]) == tuple(shape)
    return layer.size == (shape[0], math.prod(shape[1:]))


def size_text(layer: AnyLayer) -> str:
    """The shape of the weight that an adapter's layer fits, as far as it is known."""
    if isinstance(layer, ForeignLayer):
        return "another shape"
    return str((len(layer.up), *layer.down.shape[1:]) if isinstance(layer, LoraLayer) else layer.size)


def method(weights: AdapterWeights) -> str:
    """The method that applies these weights. It depends on the kinds of layers, not on how they were trained.

    Raises:
        LorakitError: the adapter mixes methods, or has layers that can only be merged.
    """
    if weights.embeddings and not weights.layers:
        return "embedding"
    rows = any(layer.magnitude is not None and len(layer.magnitude) > 1 for layer in weights.layers.values())
    methods = {layer.method for layer in weights.layers.values()}
    foreign = sorted(methods - {spec.layers for spec in registry.METHODS.values()} - {LoraLayer.METHOD})
    mixed = any(layer.magnitude is not None and not isinstance(layer, LoraLayer) for layer in weights.layers.values())
    if rows or mixed or foreign or weights.biases:
        other = "DoRA per output row" if rows else "DoRA over LyCORIS" if mixed else "biases"
        what = join(" and ", foreign) if foreign else other
        raise LorakitError(
            "the adapter has {what}, which lorakit does not put into a model in use: merge it into a base", what
        )
    # Some layers of a DoRA adapter may be plain LoRA.
    if any(layer.magnitude is not None for layer in weights.layers.values()):
        methods -= {LoraLayer.METHOD}
    if len(methods) > 1:
        raise LorakitError(
            "the adapter mixes {methods}: only one method at a time can be applied", join(" and ", sorted(methods))
        )
    return next(iter(methods))
