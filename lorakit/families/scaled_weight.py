"""Weights in 8 bits with a scale beside them, as ComfyUI and others store them: weight = stored * scale.

Names: ComfyUI's comfy/ops.py and comfy/utils.py (`scaled_fp8`, `scale_weight`; since 2025 `comfy_quant`,
`weight_scale`).
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCALE_NAMES = ("scale_weight", "weight_scale")
# What stands beside such weights and is not needed to read them: marks, and scales of activations.
MARKS = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$")
SCALE = re.compile(rf"(^|\.)({'|'.join(SCALE_NAMES)})$")
# safetensors' names of the dtypes that a weight may have, and of those that have 8 bits.
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
READABLE = ("F64", "F32", "F16", "BF16", *EIGHT_BITS)


def scale_of(weight: str, names: Container[str]) -> str | None:
    """The name of the scale of a weight, if it has one."""
    stem = weight.removesuffix(".weight")
    return next((name for kind in SCALE_NAMES if (name := f"{stem}.{kind}") in names), None)


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight in float32. A scale is for the whole weight, for a row, or for a block of a row."""
    weight, scale = weight.float(), scale.float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    rows = len(weight)
    return (weight.reshape(rows, scale.numel() // rows, -1) * scale.reshape(rows, -1, 1)).reshape(weight.shape)
