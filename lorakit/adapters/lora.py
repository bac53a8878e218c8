"""LoRA and rank-stabilized LoRA: PEFT's config and layers. The engine may replace their forward by a fused one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig as PeftConfig
from torch import nn

from lorakit.adapters.method import NAME, Factors, Method, parameter, uniform
from lorakit.adapters.weights import AnyLayer
from lorakit.config import LoraConfig
from lorakit.core.registry import METHODS
from lorakit.engine import fused_lora

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def lora(config: LoraConfig, modules: list[str]) -> PeftConfig:
    """PEFT's config for `modules` (full paths inside one component)."""
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.effective_alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        use_rslora=METHODS[config.method].rank_stabilized,
        # `Adapter` draws the weights, with its own generator.
        init_lora_weights=False,
    )
    return peft_config


def fuse(config: PeftConfig) -> PeftConfig:
    """Make PEFT insert the engine's fused layers instead of its own."""
    config._register_custom_module({nn.Linear: fused_lora.FusedLinear, nn.Conv2d: fused_lora.FusedConv2d})
    return config


def begin(layer: LoraLayer, draw: torch.Generator) -> None:
    """Initialize A with uniform values and B with zeros."""
    down, up = layer.lora_A[NAME], layer.lora_B[NAME]
    down.weight = parameter(uniform(down.weight.shape, draw), layer)
    up.weight = parameter(torch.zeros(up.weight.shape), layer)


def factors(layer: LoraLayer) -> Factors:
    """A, B and, for DoRA, the magnitude."""
    tensors = {"down": layer.lora_A[NAME].weight, "up": layer.lora_B[NAME].weight}
    if NAME in layer.lora_magnitude_vector:
        tensors["magnitude"] = layer.lora_magnitude_vector[NAME].weight
    return tensors


def fill(layer: LoraLayer, weights: AnyLayer) -> None:
    """Set these factors. Some layers of a DoRA adapter may have no magnitude."""
    tensors, magnitudes = weights.factors(), layer.lora_magnitude_vector
    layer.lora_A[NAME].weight = parameter(tensors["down"], layer)
    layer.lora_B[NAME].weight = parameter(tensors["up"], layer)
    layer.r[NAME], layer.lora_alpha[NAME], layer.scaling[NAME] = weights.rank, weights.alpha, weights.scale
    if "magnitude" in tensors:
        magnitudes[NAME].weight = parameter(tensors["magnitude"], layer)
        layer.full_scaling[NAME] = weights.scale
    elif NAME in magnitudes:
        del magnitudes[NAME]


LORA = Method(lora, begin, factors, fill, fuse=fuse)
