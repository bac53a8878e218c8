"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098): PEFT's layers, with LyCORIS' formula and names.

delta W = alpha / rank * (w1_a w1_b) * (w2_a w2_b), an elementwise product with a rank up to rank * rank. delta W is
computed for each forward and freed, and computed again in the backward pass: slower than LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoHaConfig as PeftConfig

from lorakit.adapters.method import NAME, Factors, Method, parameter, recompute_delta
from lorakit.adapters.weights import AnyLayer
from lorakit.config import AdapterConfig

if TYPE_CHECKING:
    from peft.tuners.loha import LoHaLayer

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# Standard deviations of LyCORIS (modules/loha.py); one factor of zeros makes delta W zero.
SPREAD = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}


def peft(config: AdapterConfig, modules: list[str]) -> PeftConfig:
    """PEFT's config for `modules`."""
    return PeftConfig(r=config.rank, alpha=config.effective_alpha, target_modules=modules, init_weights=False)


def begin(layer: LoHaLayer, draw: torch.Generator) -> None:
    """Draw from normal distributions, as LyCORIS does."""
    recompute_delta(layer)
    for part, spread in SPREAD.items():
        shape = getattr(layer, part)[NAME].shape
        getattr(layer, part)[NAME] = parameter(torch.empty(shape).normal_(generator=draw) * spread, layer)


def factors(layer: LoHaLayer) -> Factors:
    """The four matrices."""
    return {part: getattr(layer, part)[NAME] for part in PARTS}


def fill(layer: LoHaLayer, weights: AnyLayer) -> None:
    """Set the four matrices."""
    for part, weight in weights.factors().items():
        getattr(layer, part)[NAME] = parameter(weight, layer)
    layer.r[NAME], layer.alpha[NAME], layer.scaling[NAME] = weights.rank, weights.alpha, weights.scale


LOHA = Method(peft, begin, factors, fill)
