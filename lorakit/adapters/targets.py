"""Which layers of a base an adapter enters: names only, so that a plan can be made without loading anything.

The sets are those of sd-scripts, which every program reads: attention blocks, resnets and samplers of the UNet, and
attention and MLP of the text encoders. Not `conv_in`, `conv_out`, time and size embeddings or norms: they are lost in
half of the programs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from lorakit.adapters.weights import factorization
from lorakit.config import AdapterConfig
from lorakit.core import registry
from lorakit.core.registry import METHODS, resolve

# Always all four of an attention: A1111 reads none of them where one is missing.
_TEXT_ATTENTION = r"\.self_attn\.(q|k|v|out)_proj$"
_TEXT_LINEAR = _TEXT_ATTENTION + r"|\.mlp\.fc[12]$"
TEXT = {"attention": _TEXT_ATTENTION, "linear": _TEXT_LINEAR, "linear+conv": _TEXT_LINEAR}


def select(family: str, layers: Iterable[str], target_modules: str, train_text_encoder: bool) -> list[str]:
    """Canonical names of the adapted layers, in the order of `layers`.

    Args:
        family: what adapters of the base are called, such as "sd1".
        layers: canonical names of a base's linear and convolutional layers.
        target_modules: "attention" (q, k, v, out), "linear" (every layer of the attention blocks, `proj_in`, `proj_out`
            and feed-forward too) or "linear+conv" (resnets, down- and upsamplers too).
        train_text_encoder: the text encoders' layers too.
    """
    spec = registry.family_of(family)
    rules = {"unet": spec.target_patterns[target_modules]}
    if train_text_encoder:
        rules |= dict.fromkeys(spec.trainable_encoders(), TEXT[target_modules])
    parts = [(name, *name.split(".", 1)) for name in layers]
    return [name for name, component, module in parts if component in rules and re.search(rules[component], module)]


def trained(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """How many numbers a method trains in one layer, whose weight is `[out, in]` or `[out, in, kh, kw]`."""
    return int(resolve(METHODS[adapter.method].trained_weights)(adapter, shape))


def lora_weights(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """The numbers of A and B."""
    return adapter.rank * (shape[0] + math.prod(shape[1:]))


def dora_weights(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """LoRA's, and a magnitude for each input."""
    return lora_weights(adapter, shape) + shape[1]


def loha_weights(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """Two products of LoRA's size."""
    return 2 * lora_weights(adapter, shape)


def lokr_weights(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """The numbers of w1, and of w2 or its two factors."""
    (a, b), (c, d) = factorization(shape[0]), factorization(shape[1])
    is_full = adapter.rank >= max(b, d) / 2
    d *= math.prod(shape[2:])
    return a * c + (b * d if is_full else adapter.rank * (b + d))
