"""Dropout of ranks and of whole layers, as sd-scripts and LyCORIS have them (rank_dropout, module_dropout).

All numbers are drawn on the layer's device, so that a CUDA graph draws others on each replay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from lorakit.adapters.method import NAME
from lorakit.config import AdapterConfig, LoraConfig

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class InputDropout(nn.Module):
    """PEFT's dropout on an adapter's input, which is all zeros with a chance: the layer is then the base's.

    Args:
        share: of numbers that are dropped, the rest scaled up.
        module_share: of passes without the adapter, the others not scaled.
    """

    def __init__(self, share: float, module_share: float):
        super().__init__()
        self.share, self.module_share = share, module_share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        if not self.training:
            return x
        stays = torch.rand((), device=x.device) >= self.module_share
        return functional.dropout(x, self.share) * stays.to(x.dtype)


def install(layers: Iterable[LoraLayer], config: AdapterConfig) -> None:
    """Put both into PEFT's LoRA layers, if they are asked for."""
    if not isinstance(config, LoraConfig) or not (config.rank_dropout or config.module_dropout):
        return
    for layer in layers:
        dropout = layer.lora_dropout[NAME] = InputDropout(config.dropout, config.module_dropout)
        if config.rank_dropout:
            _drop_ranks(layer.lora_A[NAME], dropout, config.rank_dropout)


def _drop_ranks(down: nn.Module, dropout: nn.Module, share: float) -> None:
    def hook(module: nn.Module, inputs: object, inner: torch.Tensor) -> torch.Tensor:
        """Of each picture other ranks, which are last in a linear layer and second in a convolution."""
        if not dropout.training:
            return inner
        ones = (1,) * (inner.ndim - 2)
        shape = (
            (len(inner), inner.shape[1], *ones)
            if isinstance(module, nn.Conv2d)
            else (len(inner), *ones, inner.shape[-1])
        )
        stays = torch.rand(shape, device=inner.device) >= share
        return inner * stays.to(inner.dtype) / (1 - share)

    down.register_forward_hook(hook)
