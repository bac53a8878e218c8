"""DoRA (Liu et al. 2024, arXiv 2402.09353) with its magnitude on the input axis.

W' = m * V / ||V||, V = W + alpha / rank * B A. m has one entry for each input channel, and the norm is taken over all
other axes. The paper, LyCORIS before version 3 and all web UIs use this axis; PEFT uses the output axis, which only
PEFT reads. Because V's columns are the inputs, W' x = V (s * x) with s = m / ||V||: DoRA is LoRA on a scaled input, and
W' is never computed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import Conv2d, Linear
from torch import nn

from lorakit.adapters import lora
from lorakit.config import LoraConfig
from lorakit.core.errors import LorakitError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def dora(config: LoraConfig, modules: list[str]) -> PeftConfig:
    """PEFT's config for `modules`, with the layers of this module instead of PEFT's DoRA."""
    peft_config = lora.lora(config, modules)
    peft_config._register_custom_module({nn.Linear: DoraLinear, nn.Conv2d: DoraConv2d})
    return peft_config


class Magnitude(nn.Module):
    """m: `weight` is `[1, in]`, or `[1, in, 1, 1]` for a convolution."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def column_norms(weight: torch.Tensor) -> torch.Tensor:
    """Norms over every axis but the input's: `[1, in]` or `[1, in, 1, 1]`."""
    return torch.linalg.vector_norm(weight, dim=[axis for axis in range(weight.ndim) if axis != 1], keepdim=True)  # type: ignore[no-any-return]


def input_scale(layer: LoraLayer, name: str) -> torch.Tensor:
    """s = m / ||V||, float32, in the shape of the magnitude. No gradient flows through the norm, as in the paper's
    section 4.3."""
    weight, down, up = layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.no_grad():
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * layer.full_scaling[name]
        norms = column_norms(weight.float() + delta)
    # A column of zeros has m = 0, and stays zero.
    return layer.lora_magnitude_vector[name].weight / norms.clamp(min=torch.finfo(norms.dtype).tiny)  # type: ignore[no-any-return]


def forward(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """y = W ((1 + t (s - 1)) * x) + t * scale * B A (s * x): at strength t the weight is W + t (W' - W)."""
    (name,) = layer.active_adapters
    strength = layer.scaling[name] / layer.full_scaling[name]
    scale = input_scale(layer, name)
    # A linear layer's input has its channels last, a convolution's second: `[1, in]` and `[1, in, 1, 1]` broadcast to
    # both. The product is computed in float32 and rounded once: s is near 1, where bfloat16 has steps of nearly 1 %.
    scaled = x * scale
    output = layer.base_layer((scaled if strength == 1 else x * (1 + strength * (scale - 1))).to(x.dtype))
    update = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](scaled))) * layer.scaling[name]
    return (output + update).to(output.dtype)  # type: ignore[no-any-return]


class DoraLinear(Linear):  # type: ignore[misc]
    """PEFT's linear LoRA layer with a magnitude."""

    def update_layer(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        """Create the factors, and a magnitude with which the layer's output does not change."""
        super().update_layer(adapter_name, *args, **kwargs)
        _add_magnitude(self, adapter_name)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        return forward(self, x) if _has_magnitude(self) else super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            LorakitError: always; PEFT's method would merge the factors without the magnitude.
        """
        raise LorakitError(NO_MERGE)


class DoraConv2d(Conv2d):  # type: ignore[misc]
    """PEFT's convolutional LoRA layer with a magnitude."""

    def update_layer(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        """Create the factors, and a magnitude with which the layer's output does not change."""
        super().update_layer(adapter_name, *args, **kwargs)
        _add_magnitude(self, adapter_name)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """`[B, in, h, w]` -> `[B, out, h', w']`."""
        return forward(self, x) if _has_magnitude(self) else super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            LorakitError: always; PEFT's method would merge the factors without the magnitude.
        """
        raise LorakitError(NO_MERGE)


NO_MERGE = "a DoRA adapter cannot be fused into the base here: draw with it as it is"


def _has_magnitude(layer: LoraLayer) -> bool:
    """Whether this layer is enabled and has a magnitude: in files some layers of a DoRA adapter may be plain LoRA."""
    return not layer.disable_adapters and any(name in layer.lora_magnitude_vector for name in layer.active_adapters)


def _add_magnitude(layer: LoraLayer, name: str) -> None:
    layer.full_scaling = {name: layer.scaling[name]}
    layer.lora_magnitude_vector[name] = Magnitude(column_norms(layer.base_layer.weight.detach().float()))


DORA = replace(lora.LORA, peft=dora, fuse=lambda config: config)
