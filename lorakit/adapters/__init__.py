"""Adapters: the layers they change (`targets`, no torch) and their weights in a loaded base (`attach`, `apply`).

May import: core, config, data, engine.
Used by: formats, inference, runs, training, cli.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline
    from torch import nn

    from lorakit.adapters.adapter import Adapter
    from lorakit.adapters.weights import AdapterWeights
    from lorakit.config import AdapterConfig
    from lorakit.engine.flat_parameters import FlatParameters
    from lorakit.families import Family

__all__ = ["apply", "attach", "flatten", "optimize_blocks"]


def attach(
    target: Family | DiffusionPipeline,
    config: AdapterConfig,
    *,
    seed: int = 0,
    trigger: str = "",
    init_word: str = "",
) -> Adapter:
    """Attach a new adapter to a base for training. Before training the base's output is the same to the bit.

    Args:
        target: a `families.Family`, or any Stable Diffusion pipeline of diffusers, whose modules are changed in place.
        config: method, rank and so on.
        seed: the first weights follow from it and from each layer's name, whatever else is adapted.
        trigger: the word that `config.new_tokens` vectors are learned for.
        init_word: what they begin as; by default the trigger.

    Raises:
        LorakitError: `target` is no such thing, already carries an adapter, or has none of the layers asked for.
    """
    from lorakit.adapters import adapter

    return adapter.attach(target, config, seed=seed, trigger=trigger, init_word=init_word)


def apply(target: Family | DiffusionPipeline, weights: AdapterWeights, strength: float = 1.0) -> Adapter:
    """Attach a trained adapter of any method, rank and set of layers to a base. `set_strength` scales its effect.

    Raises:
        LorakitError: as `attach`, or the adapter was made for another family or shape of base.
    """
    from lorakit.adapters import adapter

    return adapter.apply(target, weights, strength)


def optimize_blocks(
    target: Family | DiffusionPipeline, *, save_less: bool = False, channels_last: bool = False
) -> None:
    """Make the UNet of a base with an attached adapter compute in fewer operations, for training.

    Args:
        target: the `families.Family`.
        save_less: also save less for the backward pass, which takes the host a little longer.
        channels_last: keep pictures channels last between convolutions and norms.
    """
    from lorakit.engine import fused_blocks

    fused_blocks.optimize_blocks(target.denoiser, save_less=save_less, channels_last=channels_last)


def flatten(
    target: Family | DiffusionPipeline,
    adapter: Adapter,
    *,
    groups: Sequence[tuple[str, Sequence[nn.Parameter]]] | None = None,
    copies: bool = True,
    block_size: int = 1,
) -> list[FlatParameters]:
    """Make an adapter's parameters views of one tensor for each of its groups; for training, after
    `optimize_blocks`.

    Args:
        target: the `families.Family` that the adapter is attached to.
        adapter: its parameters, names and file stay what they are.
        groups: (component, some of its parameters), which share a learning rate; by default all of each component.
        copies: where the base is in half precision, let LoRA's layers read copies of the factors that are cast all at
            once; these, and their gradients, take 4 bytes for each trained number.
        block_size: the optimizer's, see `registry.OptimizerSpec`.
    """
    from lorakit.engine import flat_parameters

    return flat_parameters.flatten(target, adapter, groups=groups, copies=copies, block_size=block_size)
