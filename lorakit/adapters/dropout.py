"""Dropout of ranks and of modules, as in sd-scripts and LyCORIS (rank_dropout, module_dropout).

All random numbers are drawn on the layer's device, so that each replay of a CUDA graph draws new ones.
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
    """PEFT's dropout on an adapter's input. With probability `module_share` the input is all zeros, so that only the
    base computes.

    Args:
        share: probability that a value is dropped; the others are scaled up.
        module_share: probability that a pass leaves out the adapter; other passes are not scaled.
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
    """Dropout for a layer that materializes delta W: drops rows of its output for each picture, or the output of a
    pass.

    Args:
        share: probability that a row of delta W is dropped; the others are scaled up.
        module_share: probability that a pass leaves out the adapter; other passes are not scaled.
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
    """Add the configured dropout to PEFT's layers."""
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
        """Drop other ranks for each picture."""
        return _without_channels(inner, share, isinstance(module, nn.Conv2d)) if dropout.training else inner

    down.register_forward_hook(hook)


def _without_channels(x: torch.Tensor, share: float, is_picture: bool) -> torch.Tensor:
    """Set channels to 0, others for each row of a batch. The channel axis of a picture is the second, else the last."""
    ones = (1,) * (x.ndim - 2)
    stays = torch.rand((len(x), x.shape[1], *ones) if is_picture else (len(x), *ones, x.shape[-1]), device=x.device)
    return x * (stays >= share).to(x.dtype) / (1 - share)
