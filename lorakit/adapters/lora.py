"""LoRA and rank-stabilised LoRA: PEFT's layers, told to PEFT as PEFT wants it, with a leaner forward."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig as PeftConfig
from torch import nn

from lorakit.adapters import fused
from lorakit.config import LoraConfig


def lora(config: LoraConfig, modules: list[str]) -> PeftConfig:
    """PEFT's config for `modules` (full paths inside one component): scale alpha / rank."""
    return _peft_config(config, modules)


def rslora(config: LoraConfig, modules: list[str]) -> PeftConfig:
    """The same with scale alpha / sqrt(rank) (arXiv 2312.03732)."""
    return _peft_config(config, modules, use_rslora=True)


def _peft_config(config: LoraConfig, modules: list[str], **options: Any) -> PeftConfig:
    made = PeftConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        # The weights are drawn by `Adapter`, from a generator of its own.
        init_lora_weights=False,
        **options,
    )
    made._register_custom_module({nn.Linear: fused.FusedLinear, nn.Conv2d: fused.FusedConv2d})
    return made
