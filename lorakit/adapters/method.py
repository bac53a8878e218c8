"""`Method`: the functions of a method that `Adapter` calls, most of them on one of PEFT's layers. Each method is one
file, named by one entry of `registry.METHODS`."""

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

# The name of the adapter in PEFT. There is only one at a time, so training and sampling use the attached one.
NAME = "default"
Factors = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Method:
    """One method. `layer` is a layer that PEFT has inserted for it. `layer.scaling[NAME]` is the scale times the
    strength. `layer._disable_adapters` is True while the adapter is off.

    Attributes:
        peft: (section of the config, full paths inside one component) -> PEFT's config.
        begin: (layer, generator): set the initial weights, with which the base's output does not change.
        factors: layer -> trained parameters, float32, with the names of `weights.from_factors`.
        fill: (layer, weights): set factors of any rank and scale; None if such weights only exist in training.
        constants: layer -> tensors that are not trained but are part of the adapter, with the same names.
        fuse: changes PEFT's config so that it inserts fused layers, if there are any. The plain engine does not call
            it.
        scale: layer -> initial factor of the product of the factors.
    """

    peft: Callable[[Any, list[str]], PeftConfig]
    begin: Callable[[Any, torch.Generator], None]
    factors: Callable[[Any], Factors]
    fill: Callable[[Any, AnyLayer], None] | None
    constants: Callable[[Any], dict[str, torch.Tensor]] = lambda layer: {}
    fuse: Callable[[PeftConfig], PeftConfig] = lambda config: config
    scale: Callable[[Any], float] = lambda layer: float(layer.scaling[NAME])


def parameter(weight: torch.Tensor, layer: BaseTunerLayer) -> nn.Parameter:
    """A float32 parameter on the base layer's device. PEFT would use the dtype of the base."""
    device = layer.base_layer.weight.device
    return nn.Parameter(weight.detach().to(device, torch.float32, copy=True))


def uniform(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    """Uniform values with the bound of `nn.Linear` (Kaiming with a = sqrt 5): 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(shape[1:].numel())
    return torch.empty(shape).uniform_(-bound, bound, generator=draw)


def recompute_delta(layer: BaseTunerLayer) -> None:
    """Make a layer that materializes delta W compute it again in the backward pass instead of saving it.

    Saved for all layers, delta W would take as much memory as the base in float32. The output passes through the
    layer's dropout.
    """
    compute = functools.partial(type(layer)._get_delta_activations, layer)
    change = functools.partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    dropout = layer.lora_dropout[NAME] if hasattr(layer, "lora_dropout") else None
    layer._get_delta_activations = change if dropout is None else lambda *inputs: dropout(change(*inputs))
