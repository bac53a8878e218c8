"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA initialized with the principal part of the weight that it adapts.

The paper trains W - s B0 A0 + s B A, where s B0 A0 is made of the first singular directions of W, and B A = B0 A0
initially. Here W does not change, in whatever precision it is stored, and the layer computes the same as

    y = W x + s ((B - B0) A x + B0 (A - A0) x),

which initially is exactly the base's output; no large numbers are subtracted from each other. The export has the same
sum: plain LoRA of twice the rank, for the unchanged base.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import Conv2d, Linear
from torch import nn
from torch.nn import functional

from lorakit.adapters import lora
from lorakit.adapters.method import NAME, parameter
from lorakit.config import LoraConfig
from lorakit.core.errors import LorakitError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

# Randomized SVD (Halko et al. 2009, arXiv 0909.4061): directions beyond the rank, and power iterations.
OVERSAMPLING, ITERATIONS = 8, 6
NO_MERGE = "a PiSSA adapter that is being trained cannot be fused into the base: export it, it is plain LoRA then"


def peft(config: LoraConfig, modules: list[str]) -> PeftConfig:
    """PEFT's config for `modules`, with the layers of this module."""
    peft_config = lora.lora(config, modules)
    peft_config._register_custom_module({nn.Linear: PissaLinear, nn.Conv2d: PissaConv2d})
    return peft_config


def begin(layer: LoraLayer, draw: torch.Generator) -> None:
    """Set A and B, and the constants A0 and B0: the principal part of the weight, with the roots of its singular values
    in both factors."""
    down, up = layer.lora_A[NAME], layer.lora_B[NAME]
    weight, rank = layer.base_layer.weight.detach().float().flatten(1), len(down.weight)
    left, values, right = _principal(weight, rank, draw)
    roots = (values / layer.scaling[NAME]).sqrt()
    first = {"down": (roots[:, None] * right.T).reshape(down.weight.shape), "up": (left * roots)}
    down.weight = parameter(first["down"], layer)
    up.weight = parameter(first["up"].reshape(up.weight.shape), layer)
    layer.register_buffer("down_0", down.weight.detach().clone(), persistent=False)
    layer.register_buffer("up_0", up.weight.detach().clone(), persistent=False)


def _principal(
    weight: torch.Tensor, rank: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first `rank` singular triples (U, S, V) of a matrix, padded with zeros."""
    count = min(rank, *weight.shape)
    sketch_rank = min(count + OVERSAMPLING, *weight.shape)
    with torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (), generator=draw)))
        left, values, right = torch.svd_lowrank(weight, sketch_rank, ITERATIONS)
    short = rank - count
    left, right = (functional.pad(side[:, :count], (0, short)) for side in (left, right))
    return left, functional.pad(values[:count], (0, short)), right


def constants(layer: LoraLayer) -> dict[str, torch.Tensor]:
    """A0 and B0."""
    return {"down_0": layer.down_0, "up_0": layer.up_0}


class PissaLinear(Linear):  # type: ignore[misc]
    """PEFT's linear LoRA layer that adds the change since initialization."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.disable_adapters:
            return self.base_layer(x)  # type: ignore[no-any-return]
        dropout_output = self.lora_dropout[NAME](x)
        updates = [functional.linear(functional.linear(dropout_output, down), up) for down, up in _pairs(self, x.dtype)]
        return self.base_layer(x) + (updates[0] + updates[1]) * self.scaling[NAME]  # type: ignore[no-any-return]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            LorakitError: always; PEFT's method would add the principal part a second time.
        """
        raise LorakitError(NO_MERGE)


class PissaConv2d(Conv2d):  # type: ignore[misc]
    """PEFT's convolutional LoRA layer that adds the change since initialization."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """`[B, in, h, w]` -> `[B, out, h', w']`."""
        base = self.base_layer
        if self.disable_adapters:
            return base(x)  # type: ignore[no-any-return]
        dropout_output = self.lora_dropout[NAME](x)
        updates = [
            functional.conv2d(
                functional.conv2d(dropout_output, down, None, base.stride, base.padding, base.dilation), up
            )
            for down, up in _pairs(self, x.dtype)
        ]
        return base(x) + (updates[0] + updates[1]) * self.scaling[NAME]  # type: ignore[no-any-return]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            LorakitError: always; PEFT's method would add the principal part a second time.
        """
        raise LorakitError(NO_MERGE)


def _pairs(layer: LoraLayer, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A, B - B0) and (A - A0, B0); the differences are computed in float32."""
    down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    pairs = [(down, up - layer.up_0), (down - layer.down_0, layer.up_0)]
    return [(left.to(dtype), right.to(dtype)) for left, right in pairs]


PISSA = replace(lora.LORA, peft=peft, begin=begin, fill=None, constants=constants, fuse=lambda config: config)
