"""LoKr (Yeh et al. 2023, arXiv 2309.14859): PEFT's layers, with LyCORIS' formula and names.

delta W = scale * kron(w1, w2). Rows and columns of the layer are each split into two factors as equal as possible. w1,
the smaller matrix, is not factorized. w2 is a product of two matrices if the rank is below half its larger side. The
scale is alpha / rank, or 1 if w2 is not factorized. delta W is computed for each forward and freed, and computed again
in the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoKrConfig as PeftConfig

from lorakit.adapters.method import NAME, Factors, Method, parameter, recompute_delta, uniform
from lorakit.adapters.weights import AnyLayer
from lorakit.config import AdapterConfig

if TYPE_CHECKING:
    from peft.tuners.lokr import LoKrLayer

PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def peft(config: AdapterConfig, modules: list[str]) -> PeftConfig:
    """PEFT's config for `modules`."""
    return PeftConfig(r=config.rank, alpha=config.effective_alpha, target_modules=modules, init_weights=False)


def begin(layer: LoKrLayer, draw: torch.Generator) -> None:
    """As LyCORIS: zeros in w2 or its second factor, uniform values in the rest."""
    recompute_delta(layer)
    for part, weight in factors(layer).items():
        still = part in ("lokr_w2", "lokr_w2_b")
        first = torch.zeros(weight.shape) if still else uniform(weight.shape, draw)
        getattr(layer, part)[NAME] = parameter(first, layer)


def factors(layer: LoKrLayer) -> Factors:
    """w1, and w2 or its factors."""
    return {part: parameters[NAME] for part in PARTS if NAME in (parameters := getattr(layer, part))}


def fill(layer: LoKrLayer, weights: AnyLayer) -> None:
    """Set these matrices, factorized or not."""
    for part in PARTS:
        if NAME in getattr(layer, part):
            del getattr(layer, part)[NAME]
    for part, weight in weights.factors().items():
        getattr(layer, part)[NAME] = parameter(weight, layer)
    layer.r[NAME], layer.alpha[NAME], layer.scaling[NAME] = weights.rank, weights.alpha, weights.scale


def scale(layer: LoKrLayer) -> float:
    """alpha / rank, or 1 where no matrix is factorized."""
    return 1.0 if NAME in layer.lokr_w1 and NAME in layer.lokr_w2 else float(layer.scaling[NAME])


LOKR = Method(peft, begin, factors, fill, scale=scale)
