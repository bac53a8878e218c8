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
    """Attach a new adapter to a base for training. Until the first step the base's output does not change, to the bit.

    Args:
        target: a `families.Family`, or a Stable Diffusion pipeline of diffusers; its modules are changed in place.
        config: method, rank and so on.
        seed: the initial weights depend only on it and on each layer's name, not on the other layers.
        trigger: the word for which `config.new_tokens` vectors are learned.
        init_word: the word whose vectors they start from; by default the trigger.

    Raises:
        LorakitError: `target` is neither, already has an adapter, or has none of the selected layers.
    """
    from lorakit.adapters import adapter

    return adapter.attach(target, config, seed=seed, trigger=trigger, init_word=init_word)


def apply(target: Family | DiffusionPipeline, weights: AdapterWeights, strength: float = 1.0) -> Adapter:
    """Attach a trained adapter of any method, rank and set of layers to a base. `set_strength` scales its effect.

    Raises:
        LorakitError: as `attach`, or the adapter is for another family or for a base with other shapes.
    """
    from lorakit.adapters import adapter

    return adapter.apply(target, weights, strength)


def optimize_blocks(
    target: Family | DiffusionPipeline, *, save_less: bool = False, channels_last: bool = False
) -> None:
    """Make the UNet of a base with an attached adapter run in fewer operations, for training.

    Args:
        target: the `families.Family`.
        save_less: also save less for the backward pass, which takes the host slightly longer.
        channels_last: keep feature maps channels_last between convolutions and norms.
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
    """Make an adapter's parameters views of one tensor for each group. For training, after `optimize_blocks`.

    Args:
        target: the `families.Family` that the adapter is attached to.
        adapter: the adapter; its parameters, their names and its file format do not change.
        groups: (component, some of its parameters) with one learning rate; by default all parameters of each component.
        copies: for a half-precision base, let LoRA layers read copies of the factors that are cast in one operation.
            Copies and their gradients take 4 bytes per trained weight.
        block_size: block size of the optimizer, see `registry.OptimizerSpec`.
    """
    from lorakit.engine import flat_parameters

    return flat_parameters.flatten(target, adapter, groups=groups, copies=copies, block_size=block_size)
