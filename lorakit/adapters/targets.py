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

# Stable Diffusion 3 has one attention for picture and text, `attn`, with projections of its own for the text.
_ATTENTION = r"\.attn[12]?\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)$"
_LINEAR = _ATTENTION + r"|\.attentions\.\d+\.proj_(in|out)$|\.ff(_context)?\.net\.(0\.proj|2)$"
_CONV = r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)$|\.(down|up)samplers\.\d+\.conv$"
UNET = {"attention": _ATTENTION, "linear": _LINEAR, "linear+conv": f"{_LINEAR}|{_CONV}"}
# Always all four of an attention: A1111 reads none of them where one is missing.
_TEXT_ATTENTION = r"\.self_attn\.(q|k|v|out)_proj$"
_TEXT_LINEAR = _TEXT_ATTENTION + r"|\.mlp\.fc[12]$"
TEXT = {"attention": _TEXT_ATTENTION, "linear": _TEXT_LINEAR, "linear+conv": _TEXT_LINEAR}


def select(layers: Iterable[str], target_modules: str, train_text_encoder: bool) -> list[str]:
    """Canonical names of the adapted layers, in the order of `layers`.

    Args:
        layers: canonical names of a base's linear and convolutional layers.
        target_modules: "attention" (q, k, v, out), "linear" (every layer of the attention blocks, `proj_in`, `proj_out`
            and feed-forward too) or "linear+conv" (resnets, down- and upsamplers too).
        train_text_encoder: the text encoders' layers too.
    """
    rules = {"unet": UNET[target_modules]}
    if train_text_encoder:
        rules |= dict.fromkeys(("text_encoder", "text_encoder_2"), TEXT[target_modules])
    parts = [(name, *name.split(".", 1)) for name in layers]
    return [name for name, component, module in parts if component in rules and re.search(rules[component], module)]


def trained(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """How many numbers a method trains in one layer, whose weight is `[out, in]` or `[out, in, kh, kw]`."""
    out, into, *kernel = shape
    columns, rank = into * math.prod(kernel), adapter.rank
    if adapter.method == "loha":
        return 2 * rank * (out + columns)
    if adapter.method == "lokr":
        (a, b), (c, d) = factorization(out), factorization(into)
        whole = rank >= max(b, d) / 2
        d *= math.prod(kernel)
        return a * c + (b * d if whole else rank * (b + d))
    return rank * (out + columns) + (into if adapter.method == "dora" else 0)
