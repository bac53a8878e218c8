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
from lorakit.config import AdapterConfig, DropoutConfig, LoraConfig

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


class OutputDropout(nn.Module):
    """The same for a layer that materializes delta W: drops rows of its output for each picture, or all of a pass.

    Args:
        share: of the rows of delta W that are dropped, the rest scaled up.
        module_share: of passes without the adapter, the others not scaled.
    """

    def __init__(self, share: float, module_share: float):
        super().__init__()
        self.share, self.module_share = share, module_share

    def forward(self, added: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        if not self.training:
            return added
        stays = torch.rand((), device=added.device) >= self.module_share
        return _without_channels(added * stays.to(added.dtype), self.share, is_picture=added.ndim == 4)


def install(layers: Iterable[LoraLayer], config: AdapterConfig) -> None:
    """Put both into PEFT's layers, if they are asked for."""
    if not isinstance(config, DropoutConfig) or not (config.rank_dropout or config.module_dropout):
        return
    for layer in layers:
        if not isinstance(config, LoraConfig):
            layer.lora_dropout = nn.ModuleDict({NAME: OutputDropout(config.rank_dropout, config.module_dropout)})
            continue
        dropout = layer.lora_dropout[NAME] = InputDropout(config.dropout, config.module_dropout)
        if config.rank_dropout:
            _drop_ranks(layer.lora_A[NAME], dropout, config.rank_dropout)


def _drop_ranks(down: nn.Module, dropout: nn.Module, share: float) -> None:
    def hook(module: nn.Module, inputs: object, inner: torch.Tensor) -> torch.Tensor:
        """Of each picture other ranks."""
        return _without_channels(inner, share, isinstance(module, nn.Conv2d)) if dropout.training else inner

    down.register_forward_hook(hook)


def _without_channels(x: torch.Tensor, share: float, is_picture: bool) -> torch.Tensor:
    """Of each row of a batch other channels are 0: they are second in a convolution, else last."""
    ones = (1,) * (x.ndim - 2)
    stays = torch.rand((len(x), x.shape[1], *ones) if is_picture else (len(x), *ones, x.shape[-1]), device=x.device)
    return x * (stays >= share).to(x.dtype) / (1 - share)
