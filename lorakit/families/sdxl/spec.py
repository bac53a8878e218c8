"""Stable Diffusion XL as data."""

from lorakit.families import unet
from lorakit.families.sdxl.single_file import SDXL_FILE
from lorakit.families.spec import FamilySpec, KohyaNames, ModelVersion, Reads, Tags, TextEncoder
from lorakit.families.unet import (
    A1111_SGM,
    ADD,
    ADD_SGM,
    ALL_BLOCKS,
    BLOCKS,
    CHECKPOINT_BLOCKS,
    COMFY_DOTTED,
    DOTTED_ALL,
    DOTTED_UNET,
    FORGE_DOTTED,
    PROJECTION,
    SGM,
    TE1,
    TE2,
    TOP,
    TOP_SGM,
    UPSAMPLERS_BUT_FIRST,
)

_TEXT = (*TE1, *TE2)
_FULL = (*ALL_BLOCKS, *TOP, *ADD, *SGM, *TOP_SGM, *ADD_SGM, *_TEXT, *PROJECTION)

SDXL = ModelVersion(
    name="sdxl",
    title="Stable Diffusion XL",
    preset="sdxl",
    cross_dim=2048,
    kohya=KohyaNames(sgm=True, text={"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}),
    tags=Tags(
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base/lora",
        "SDXL",
        implementation="https://github.com/Stability-AI/generative-models",
    ),
    tag_prefixes=("sdxl_", "stable-diffusion-xl"),
    key_prefixes=(
        *("lora_te2_", "text_encoder_2.", "text_encoders.clip_g."),
        *("lora_unet_label_emb", "diffusion_model.label_emb", "lora_unet_add_embedding", "unet.add_embedding"),
    ),
    readers={
        "a1111": Reads(
            (*BLOCKS, *UPSAMPLERS_BUT_FIRST, *TOP, *A1111_SGM, *ADD_SGM, *_TEXT), complete_attention=("lora_te2_",)
        ),
        "forge": Reads((*_FULL, *FORGE_DOTTED)),
        "comfyui": Reads((*_FULL, *COMFY_DOTTED)),
        "invokeai": Reads(_FULL),
        "sd-scripts": Reads((*ALL_BLOCKS, *SGM, *_TEXT)),
        "sd.cpp": Reads(
            (*ALL_BLOCKS, *SGM, *ADD_SGM, *_TEXT, *DOTTED_UNET, *CHECKPOINT_BLOCKS), ordered_attention=("lora_te2_",)
        ),
        "diffusers": Reads((*ALL_BLOCKS, *TOP, *SGM, *TOP_SGM, *ADD_SGM, *_TEXT, *PROJECTION, *DOTTED_ALL)),
        "peft": Reads(DOTTED_ALL),
    },
    layout=SDXL_FILE,
)
SPEC = FamilySpec(
    name="sdxl",
    pipeline="StableDiffusionXL",
    loader="lorakit.families.sdxl.model:StableDiffusionXL",
    text_encoders=(TextEncoder("text_encoder"), TextEncoder("text_encoder_2")),
    versions=(SDXL,),
    target_patterns=unet.TARGET_PATTERNS,
    layer_uses=unet.layer_uses,
    bucket_multiple=unet.bucket_multiple,
    guidance=6.0,
    clip_skip=2,
)
