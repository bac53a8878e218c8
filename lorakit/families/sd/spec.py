"""Stable Diffusion 1.x and 2.x as data. They differ in the text width and in names."""

from lorakit.families import unet
from lorakit.families.sd.single_file import SD1_FILE, SD2_FILE
from lorakit.families.spec import FamilySpec, KohyaNames, ModelVersion, Reads, Tags, TextEncoder
from lorakit.families.unet import (
    A1111_SGM,
    ALL_BLOCKS,
    CHECKPOINT_BLOCKS,
    COMFY_DOTTED,
    DOTTED_ALL,
    DOTTED_UNET,
    FORGE_DOTTED,
    SGM,
    TE,
    TE1,
    TOP,
    TOP_SGM,
)

_BOTH = {
    "forge": Reads((*ALL_BLOCKS, *TOP, *SGM, *TOP_SGM, *TE, *TE1, *FORGE_DOTTED)),
    "comfyui": Reads((*ALL_BLOCKS, *TOP, *SGM, *TOP_SGM, *TE, *TE1, *COMFY_DOTTED)),
    "invokeai": Reads((*ALL_BLOCKS, *TOP, *TE)),
    "sd-scripts": Reads((*ALL_BLOCKS, *TE)),
    "sd.cpp": Reads((*ALL_BLOCKS, *SGM, *TE, *TE1, *DOTTED_UNET, *CHECKPOINT_BLOCKS)),
    "diffusers": Reads((*ALL_BLOCKS, *TOP, *TE, *TE1, *DOTTED_ALL)),
    "peft": Reads(DOTTED_ALL),
}
_TEXT = {"text_encoder": "lora_te_"}

SD1 = ModelVersion(
    name="sd1",
    title="Stable Diffusion 1",
    preset="sd15",
    cross_dim=768,
    kohya=KohyaNames(sgm=False, text=_TEXT, conv_projections=True),
    tags=Tags("sd_v1", "stable-diffusion-v1/lora", "SD1", version_v="sd_v1_v"),
    tag_prefixes=("sd_v1", "stable-diffusion-v1"),
    readers=_BOTH | {"a1111": Reads((*ALL_BLOCKS, *TOP, *A1111_SGM, *TE, *TE1))},
    layout=SD1_FILE,
)
# Only SD2's OpenCLIP has a width of 1024; other bases with one text encoder are SD1, including small models.
SD2 = ModelVersion(
    name="sd2",
    title="Stable Diffusion 2",
    preset="sd15",
    cross_dim=1024,
    kohya=KohyaNames(sgm=False, text=_TEXT),
    tags=Tags(
        "sd_v2",
        "stable-diffusion-v2-512/lora",
        "SD2",
        version_v="sd_v2_v",
        architecture_v="stable-diffusion-v2-768-v/lora",
        v2="True",
    ),
    tag_prefixes=("sd_v2", "stable-diffusion-v2"),
    readers=_BOTH | {"a1111": Reads((*ALL_BLOCKS, *TOP, *A1111_SGM, *TE), complete_attention=("lora_te_",))},
    layout=SD2_FILE,
)
SPEC = FamilySpec(
    name="sd",
    pipeline="StableDiffusion",
    loader="lorakit.families.sd.model:StableDiffusion",
    text_encoders=(TextEncoder("text_encoder"),),
    versions=(SD1, SD2),
    target_patterns=unet.TARGET_PATTERNS,
    layer_uses=unet.layer_uses,
    bucket_multiple=unet.bucket_multiple,
    clip_skip=1,
)
