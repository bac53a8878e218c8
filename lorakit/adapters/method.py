"""`Method`: the functions by which `Adapter` uses a method, most of them on one of PEFT's layers. Each method has one,
in one file, which a line of `registry.METHODS` names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorakit.adapters.weights import AnyLayer

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

# PEFT's name for the adapter. There is one at a time, so training and drawing use exactly the attached one.
NAME = "default"
Factors = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Method:
    """One method. `layer` is a layer that PEFT has inserted for it. `layer.scaling[NAME]` is the scale times the
    strength. `layer._disable_adapters` is True while the adapter is off.

    Attributes:
        peft: (section of the config, full paths inside one component) -> PEFT's config.
        begin: (layer, generator): the first weights, by which the base's output is unchanged.
        factors: layer -> what is trained, named as `weights.from_factors` knows it, float32.
        fill: (layer, weights): take factors of any rank and scale as they are; None where only training makes such.
        constants: layer -> what is not trained and yet belongs to the adapter, named in the same way.
        fuse: changes PEFT's config so that it makes fused layers, where there are such; unused by the plain engine.
        scale: layer -> what the product of the factors is multiplied by, as the layer was made.
    """

    peft: Callable[[Any, list[str]], PeftConfig]
    begin: Callable[[Any, torch.Generator], None]
    factors: Callable[[Any], Factors]
    fill: Callable[[Any, AnyLayer], None] | None
    constants: Callable[[Any], dict[str, torch.Tensor]] = lambda layer: {}
    fuse: Callable[[PeftConfig], PeftConfig] = lambda config: config
    scale: Callable[[Any], float] = lambda layer: float(layer.scaling[NAME])


def parameter(weight: torch.Tensor, layer: BaseTunerLayer) -> nn.Parameter:
    """A float32 parameter on the base layer's device. PEFT's parameters have the precision of the base."""
    device = layer.base_layer.weight.device
    return nn.Parameter(weight.detach().to(device, torch.float32, copy=True))


def uniform(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    """Uniform as `nn.Linear` begins (Kaiming, a = sqrt 5): within one by the square root of a row's length."""
    bound = 1 / math.sqrt(shape[1:].numel())
    return torch.empty(shape).uniform_(-bound, bound, generator=draw)


def recompute_delta(layer: BaseTunerLayer) -> None:
    """Make a layer that materializes delta W compute it again in the backward pass instead of keeping it.

    Kept for all layers, delta W would take as much memory as the base in float32. The output goes through the layer's
    dropout.
    """
    compute = functools.partial(type(layer)._get_delta_activations, layer)
    change = functools.partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    dropout = layer.lora_dropout[NAME] if hasattr(layer, "lora_dropout") else None
    layer._get_delta_activations = change if dropout is None else lambda *inputs: dropout(change(*inputs))
