"""Facts of Stable Diffusion's UNet that its families share: target layers, use of layers, names in files. No torch.

Names in single files: CompVis/latent-diffusion and Stability-AI/generative-models (the modules themselves).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

from lorakit.families.ldm import UNET, count
from lorakit.families.single_file import CLASSES, RESNETS
from lorakit.families.spec import FilePart, LayerUse, Shapes

_ATTENTION = r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$"
_LINEAR = _ATTENTION + r"|\.attentions\.\d+\.proj_(in|out)$|\.ff\.net\.(0\.proj|2)$"
_CONV = r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)$|\.(down|up)samplers\.\d+\.conv$"
TARGET_PATTERNS = {"attention": _ATTENTION, "linear": _LINEAR, "linear+conv": f"{_LINEAR}|{_CONV}"}


def layer_uses(shapes: Shapes, height: int, width: int, text_tokens: int) -> list[LayerUse]:
    """See `FamilySpec.layer_uses`.

    Down blocks halve the resolution one after the other, up blocks double it; a sampler's convolution runs at its
    output resolution. Keys and values of cross-attention are computed from the text, and the timestep embedding once.
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
            places = text_tokens
        else:
            places = cells
        attended = 0
        if name.endswith("attn1.to_q"):
            attended = cells * cells
        elif name.endswith("attn2.to_q"):
            attended = cells * text_tokens
        uses.append(LayerUse(name, shapes[name], places, attended))
    return uses


def _level(name: str, levels: int) -> int:
    """How often the resolution is halved before a layer."""
    block = re.match(r"unet\.(down|up)_blocks\.(\d+)\.", name)
    if "mid_block" in name:
        return levels - 1
    if block is None:
        return 0
    if block[1] == "down":
        return int(block[2]) + ("downsamplers" in name)
    return levels - 1 - int(block[2]) - ("upsamplers" in name)


def bucket_multiple(shapes: Shapes, downscale: int) -> int:
    """See `FamilySpec.bucket_multiple`: the pixels per latent, doubled for each downsampler."""
    return int(downscale * 2 ** sum(name.startswith("unet.") and ".downsamplers." in name for name in shapes))


# Module names in programs' loaders, copied from there and not derived from `formats.keys`.
_SIDES = r"lora_unet_(?:(?:down|up)_blocks_\d+|mid_block)_"
_TRANSFORMER = r"(?:proj_in|proj_out|transformer_blocks_\d+_(?:attn[12]_to_(?:q|k|v|out_0)|ff_net_0_proj|ff_net_2))"
CLIP = r"text_model_encoder_layers_\d+_(?:self_attn_(?:q|k|v|out)_proj|mlp_fc[12])"

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
A1111_SGM = (*SGM, *TOP_SGM, *(pattern.replace("lora_unet_", "oft_unet_", 1) for pattern in SGM))
ADD_SGM = (r"lora_unet_label_emb_0_[02]",)
TE, TE1, TE2 = ((rf"lora_{te}_{CLIP}",) for te in ("te", "te1", "te2"))
PROJECTION = (r"lora_te2_text_projection",)
# Dotted names. ComfyUI looks for `.processor.to_q`, so PEFT's plain `.to_q` never matches there.
DOTTED_UNET = (r"unet\..+",)
DOTTED_TEXT = (r"text_encoder(?:_2)?\..+",)
DOTTED_ALL = (*DOTTED_UNET, *DOTTED_TEXT)
COMFY_TEXT = (r"text_encoder(?:_2)?\.text_model\.(?!.*_lora$).+",)
# LyCORIS' names as written by SimpleTuner, and names of checkpoints, which ComfyUI's nodes and OneTrainer write.
LYCORIS = tuple(pattern.replace("lora_unet_", "lycoris_", 1) for pattern in (*ALL_BLOCKS, *TOP, *ADD))
CHECKPOINT_BLOCKS = (r"diffusion_model\.(?:input_blocks|output_blocks|middle_block)\..+",)
CHECKPOINT = (*CHECKPOINT_BLOCKS, r"diffusion_model\.(?:time_embed|label_emb|out)\..+")
FORGE_DOTTED = (
    r"(?:unet\.|(?=(?:down|up)_blocks\.|mid_block\.))(?!.*\.attn[12]\.to_).+",
    *(*COMFY_TEXT, *LYCORIS, *CHECKPOINT),
)
COMFY_DOTTED = (*FORGE_DOTTED, r"text_encoders\.clip_[lhg]\.transformer\..+")


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

# Width of an attention head.
HEAD = 64


def names(shapes: Shapes, theirs: bool) -> dict[str, str]:
    """See `FilePart.names`."""
    if not theirs:
        levels, layers = count(shapes, r"down_blocks\.(\d+)\."), count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")
        ups = {int(match[1]) for name in shapes if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
        return table(levels, layers, ups)
    samplers = count(shapes, r"input_blocks\.(\d+)\.0\.op\.") - 1
    levels = 1 + sum(1 for name in shapes if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name))
    layers = samplers // (levels - 1) - 1 if levels > 1 else count(shapes, r"input_blocks\.(\d+)\.") - 1
    ups = {
        int(match[1]) // (layers + 1)
        for name in shapes
        if (match := re.match(r"output_blocks\.(\d+)\.1\.proj_in\.", name))
    }
    return table(levels, layers, ups)


def table(levels: int, layers: int, attention_ups: Collection[int]) -> dict[str, str]:
    """LDM's module name -> diffusers', for `levels` resolutions with `layers` resnets each on the way down.

    `attention_ups` are the up blocks with attention, in which the upsampler is the third module, elsewhere the second.
    """
    result, row = dict(_TOP), layers + 1
    pairs = [("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")]
    result["middle_block.1"] = "mid_block.attentions.0"
    for block in range(levels):
        for n in range(layers):
            place = f"input_blocks.{1 + row * block + n}"
            pairs.append((f"{place}.0", f"down_blocks.{block}.resnets.{n}"))
            result[f"{place}.1"] = f"down_blocks.{block}.attentions.{n}"
        result[f"input_blocks.{row * (block + 1)}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
        for n in range(row):
            place = f"output_blocks.{row * block + n}"
            pairs.append((f"{place}.0", f"up_blocks.{block}.resnets.{n}"))
            result[f"{place}.1"] = f"up_blocks.{block}.attentions.{n}"
        slot = 2 if block in attention_ups else 1
        result[f"output_blocks.{row * block + layers}.{slot}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    return result | {f"{a}.{leaf}": f"{b}.{name}" for a, b in pairs for leaf, name in _RESNET.items()}


def config(shapes: Shapes, side: int, heads: int | None = None) -> dict[str, Any]:
    """The config.json of a UNet2DConditionModel. `heads`: number of attention heads, if it does not follow from the
    width."""
    levels = count(shapes, r"down_blocks\.(\d+)\.")
    channels = [shapes[f"down_blocks.{n}.resnets.0.conv1.weight"][0] for n in range(levels)]
    down, up = (_depths(shapes, side, levels) for side in ("down", "up"))
    middle = _depth(shapes, "mid_block.attentions.0")
    # The last number is also that of the middle block: SD1 and SD2 have attention there and not in the last block.
    depths = [_uniform(depth) or 1 for depth in down[:-1]] + [_uniform(down[-1]) or middle or 1]
    text = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    linear = len(next(shape for name, shape in shapes.items() if name.endswith("proj_in.weight"))) == 2
    result: dict[str, Any] = {
        "_class_name": CLASSES["unet"],
        "sample_size": side // 8,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in down],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in up],
        "transformer_layers_per_block": depths,
        "cross_attention_dim": text,
        # diffusers' name for the number of heads.
        "attention_head_dim": [width // HEAD for width in channels] if heads is None else heads,
        "use_linear_projection": linear,
    }
    # For distilled models: SSD-1B, Vega and KOALA (of SDXL), BK-SDM (of SD1).
    mirrored = [_uniform(depth) or 1 for depth in up]
    if mirrored != [depth if up[n] else 1 for n, depth in enumerate(reversed(depths))]:
        result["reverse_transformer_layers_per_block"] = mirrored
    if not middle:
        result["mid_block_type"] = "UNetMidBlock2D" if "mid_block.resnets.0.conv1.weight" in shapes else None
    return result


def _depth(shapes: Shapes, place: str) -> int:
    """Number of transformer blocks of one attention module."""
    return count(shapes, rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.")


def _depths(shapes: Shapes, side: str, levels: int) -> list[list[int]]:
    """Number of transformer blocks of each attention module in each down or up block."""
    return [
        [
            _depth(shapes, f"{side}_blocks.{n}.attentions.{k}")
            for k in range(count(shapes, rf"{side}_blocks\.{n}\.attentions\.(\d+)\."))
        ]
        for n in range(levels)
    ]


def _uniform(depths: list[int]) -> int | list[int]:
    """One number if all are equal; 0 if there are none."""
    return depths if len(set(depths)) > 1 else next(iter(depths), 0)


FILE = FilePart(
    prefixes=(UNET,),
    tensors=rf"((time|add)_embedding\.linear_[12]|conv_in|conv_norm_out|conv_out|{RESNETS}"
    r"|\w+(\.\d+)?\.attentions\.\d+\.(norm|proj_in|proj_out|transformer_blocks\.\d+\."
    r"(norm[123]|attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))))\.(weight|bias)",
    names=names,
)
