"""Facts of Stable Diffusion's UNet that its families share: targets, use of layers, names in files. No torch."""

from __future__ import annotations

import math
import re

from lorakit.families.spec import LayerUse, Shapes

_ATTENTION = r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$"
_LINEAR = _ATTENTION + r"|\.attentions\.\d+\.proj_(in|out)$|\.ff\.net\.(0\.proj|2)$"
_CONV = r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)$|\.(down|up)samplers\.\d+\.conv$"
TARGET_PATTERNS = {"attention": _ATTENTION, "linear": _LINEAR, "linear+conv": f"{_LINEAR}|{_CONV}"}


def layer_uses(shapes: Shapes, height: int, width: int, tokens: int) -> list[LayerUse]:
    """See `FamilySpec.layer_uses`.

    Down blocks halve the picture one after the other, up blocks double it; a sampler's convolution works at the size
    it makes. Keys and values of cross-attention are of the text, and what embeds the timestep is applied once.
    """
    names = [name for name in shapes if name.startswith("unet.")]
    levels = 1 + max((int(m[1]) for name in names if (m := re.match(r"unet\.down_blocks\.(\d+)\.", name))), default=0)
    uses = []
    for name in names:
        level = _level(name, levels)
        cells = math.ceil(height / 2**level) * math.ceil(width / 2**level)
        if re.search(r"time_emb|add_embedding", name):
            places = 1
        elif name.endswith(("attn2.to_k", "attn2.to_v")):
            places = tokens
        else:
            places = cells
        attended = 0
        if name.endswith("attn1.to_q"):
            attended = cells * cells
        elif name.endswith("attn2.to_q"):
            attended = cells * tokens
        uses.append(LayerUse(name, shapes[name], places, attended))
    return uses


def _level(name: str, levels: int) -> int:
    """How often the picture has been halved where a layer is applied."""
    block = re.match(r"unet\.(down|up)_blocks\.(\d+)\.", name)
    if "mid_block" in name:
        return levels - 1
    if block is None:
        return 0
    if block[1] == "down":
        return int(block[2]) + ("downsamplers" in name)
    return levels - 1 - int(block[2]) - ("upsamplers" in name)


def bucket_step(shapes: Shapes, downscale: int) -> int:
    """See `FamilySpec.bucket_step`: the pixels of a latent, doubled for each downsampler."""
    return int(downscale * 2 ** sum(name.startswith("unet.") and ".downsamplers." in name for name in shapes))


# Names of modules as programs' loaders spell them, read there and not made from `formats.keys`.
_SIDES = r"lora_unet_(?:(?:down|up)_blocks_\d+|mid_block)_"
_TRANSFORMER = r"(?:proj_in|proj_out|transformer_blocks_\d+_(?:attn[12]_to_(?:q|k|v|out_0)|ff_net_0_proj|ff_net_2))"
_CLIP = r"text_model_encoder_layers_\d+_(?:self_attn_(?:q|k|v|out)_proj|mlp_fc[12])"

BLOCKS = (
    rf"{_SIDES}attentions_\d+_{_TRANSFORMER}",
    rf"{_SIDES}resnets_\d+_(?:conv1|conv2|time_emb_proj|conv_shortcut)",
    r"lora_unet_down_blocks_\d+_downsamplers_0_conv",
)
ALL_BLOCKS = (*BLOCKS, r"lora_unet_up_blocks_\d+_upsamplers_0_conv")
UPSAMPLERS_BUT_FIRST = (r"lora_unet_up_blocks_[1-9]\d*_upsamplers_0_conv",)
SGM = (
    rf"lora_unet_(?:input_blocks_\d+|output_blocks_\d+|middle_block)_1_{_TRANSFORMER}",
    r"lora_unet_(?:input_blocks_\d+_0|output_blocks_\d+_0|middle_block_[02])_"
    r"(?:in_layers_2|out_layers_3|emb_layers_1|skip_connection)",
    r"lora_unet_(?:input_blocks_\d+_0_op|output_blocks_\d+_[12]_conv)",
)
TOP = (r"lora_unet_(?:conv_in|conv_out|time_embedding_linear_[12])",)
ADD = (r"lora_unet_add_embedding_linear_[12]",)
TOP_SGM = (r"lora_unet_(?:input_blocks_0_0|out_2|time_embed_[02])",)
ADD_SGM = (r"lora_unet_label_emb_0_[02]",)
TE, TE1, TE2 = ((rf"lora_{te}_{_CLIP}",) for te in ("te", "te1", "te2"))
PROJECTION = (r"lora_te2_text_projection",)
# Dotted names. ComfyUI looks for `.processor.to_q`, so PEFT's plain `.to_q` never matches there.
DOTTED_UNET = (r"unet\..+",)
DOTTED_TEXT = (r"text_encoder(?:_2)?\..+",)
DOTTED_ALL = (*DOTTED_UNET, *DOTTED_TEXT)
COMFY_TEXT = (r"text_encoder(?:_2)?\.text_model\.(?!.*_lora$).+",)
COMFY_DOTTED = (r"unet\.(?!.*\.attn[12]\.to_).+", *COMFY_TEXT)
