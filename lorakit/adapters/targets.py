"""Which layers of a base an adapter enters: names only, so that a plan can be made without loading anything.

The sets are those of sd-scripts, which every program reads: attention blocks, resnets and samplers of the UNet, and
attention and MLP of the text encoders. Not `conv_in`, `conv_out`, time and size embeddings or norms: they are lost in
half of the programs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

UNET = {
    "attention": r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$",
    "linear": r"\.attentions\.\d+\.",
    "linear+conv": r"\.attentions\.\d+\."
    r"|\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)$"
    r"|\.(down|up)samplers\.\d+\.conv$",
}
# Always all four of an attention: A1111 reads none of them where one is missing.
TEXT = {
    "attention": r"\.self_attn\.(q|k|v|out)_proj$",
    "linear": r"\.self_attn\.(q|k|v|out)_proj$|\.mlp\.fc[12]$",
    "linear+conv": r"\.self_attn\.(q|k|v|out)_proj$|\.mlp\.fc[12]$",
}


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
