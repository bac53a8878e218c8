"""Stable Diffusion 3 and 3.5 as data."""

from __future__ import annotations

import math
import re

from lorakit.families.sd3.single_file import FUSED, KOHYA, SD3_FILE
from lorakit.families.spec import (
    FLOW,
    FamilySpec,
    KohyaNames,
    LayerUse,
    ModelVersion,
    Reads,
    Shapes,
    Tags,
    TextEncoder,
)
from lorakit.families.unet import CLIP, COMFY_TEXT, DOTTED_TEXT

PATCHES = "unet.pos_embed.proj"
# `attn` is the joint attention of picture and text, with separate projections for the text; `attn2` is the second
# attention of 3.5 medium, of the picture alone.
_ATTENTION = r"\.attn2?\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)$"
_LINEAR = _ATTENTION + r"|\.ff(_context)?\.net\.(0\.proj|2)$"


def layer_uses(shapes: Shapes, height: int, width: int, text_tokens: int) -> list[LayerUse]:
    """See `FamilySpec.layer_uses`: a layer is applied to each patch, to each token, or once."""
    side = shapes[PATCHES][-1]
    cells = math.ceil(height / side) * math.ceil(width / side)
    uses = []
    for name in shapes:
        if not name.startswith("unet."):
            continue
        if re.search(r"norm(1|1_context|_out)\.linear|time_text_embed", name):
            places = 1
        elif re.search(r"ff_context|add_[qkv]_proj|to_add_out|context_embedder", name):
            places = text_tokens
        else:
            places = cells
        attended = 0
        if name.endswith(".attn.to_q"):
            attended = (cells + text_tokens) ** 2
        elif name.endswith(".attn2.to_q"):
            attended = cells * cells
        uses.append(LayerUse(name, shapes[name], places, attended))
    return uses


def bucket_multiple(shapes: Shapes, downscale: int) -> int:
    """See `FamilySpec.bucket_multiple`: the pixels of a patch."""
    return int(downscale * shapes[PATCHES][-1])


_KOHYA = (
    r"lora_unet_(?:joint_blocks_\d+_(?:x|context)_block_.+|(?:x|t|y|context)_embedder.*|final_layer_.+)",
    *(rf"lora_te[12]_{CLIP}",),
)
_COMFY = (r"lora_transformer_transformer_blocks_\d+_.+", r"lycoris_transformer_blocks_\d+_.+", r"diffusion_model\..+")
SD3 = ModelVersion(
    name="sd3",
    title="Stable Diffusion 3",
    preset="sd3",
    kohya=KohyaNames(
        sgm=False,
        text={"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
        denoiser=KOHYA,
        fused=FUSED,
        swapped=("norm1_context.linear", "norm_out.linear"),
    ),
    tags=Tags("sd3", "stable-diffusion-3/lora", "SD3"),
    tag_prefixes=("sd3", "stable-diffusion-3"),
    # The rules of ComfyUI, sd-scripts, Forge and A1111 1.10 were read in their loaders, diffusers' and PEFT's were run.
    # A1111 maps diffusers' attention of the picture; its names for the text's are of no module, and an alpha stops it.
    readers={
        "a1111": Reads((r"transformer\.transformer_blocks\.\d+\.attn\.to_(?:q|k|v|out\.0)",)),
        "forge": Reads((*_KOHYA, r"diffusion_model\..+", *(rf"lora_te_{CLIP}",), *COMFY_TEXT)),
        "comfyui": Reads((r"transformer\.transformer_blocks\..+", *_KOHYA, *_COMFY, *COMFY_TEXT)),
        "sd-scripts": Reads(_KOHYA),
        # Its conversion of names, as of 2026-08. It puts diffusers' q, k and v one after the other into its own layer,
        # up to the first that is missing; of kohya's names it keeps no underscore of SD3's, and has none for the text.
        "sd.cpp": Reads(
            (
                r"transformer\.(?!norm_out).+",
                r"lycoris_transformer_blocks_\d+_.+",
                r"diffusion_model\..+",
                r"text_encoders\.clip_[lg]\.transformer\..+",
            ),
            ordered_attention=("transformer.", "lycoris_transformer_"),
        ),
        "diffusers": Reads((r"transformer\..+", *DOTTED_TEXT)),
        "peft": Reads((r"transformer\..+", *DOTTED_TEXT)),
    },
    layout=SD3_FILE,
)
SPEC = FamilySpec(
    name="sd3",
    pipeline="StableDiffusion3",
    loader="lorakit.families.sd3.model:StableDiffusion3",
    text_encoders=(
        TextEncoder("text_encoder"),
        TextEncoder("text_encoder_2"),
        TextEncoder("text_encoder_3", kind="T5", trainable=False, optional=True, extra_tokens=256),
    ),
    versions=(SD3,),
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    prediction=FLOW,
    chunked_texts=False,
    target_patterns={"attention": _ATTENTION, "linear": _LINEAR, "linear+conv": _LINEAR},
    layer_uses=layer_uses,
    bucket_multiple=bucket_multiple,
    guidance=5.0,
    block_layers=re.compile(
        r"transformer_blocks\.\d+\.(?:attn\.(?:to_[qkv]|to_qkv|to_out\.0|add_[qkv]_proj|to_added_qkv|to_add_out)"
        r"|attn2\.(?:to_[qkv]|to_qkv|to_out\.0)|ff(?:_context)?\.net\.(?:0\.proj|2)|norm1(?:_context)?\.linear)"
        r"|context_embedder|pos_embed\.proj|proj_out|norm_out\.linear"
        r"|time_text_embed\.(?:timestep|text)_embedder\.linear_[12]"
    ),
    dead_end_layers=("attn.add_q_proj",),
    format_refusals=dict.fromkeys(
        (("kohya", method) for method in ("dora", "loha", "lokr")),
        "the kohya format cannot carry this adapter: it has q, k and v of Stable Diffusion 3's attention in one layer, "
        "which only LoRA can be put into; set output.formats = ['diffusers'] or ['peft']",
    ),
)
