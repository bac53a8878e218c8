"""Recognize adapters of models other than Stable Diffusion, such as FLUX. No torch.

Layer names decide, because they are always true. If several models share them, metadata and widths decide. Sources of
the names: each model's own code, diffusers, ComfyUI, sd-scripts, musubi-tuner, OneTrainer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorakit.core.messages import Message

# Prefix of a layer's path: those of kohya, OneTrainer, LyCORIS, ComfyUI, diffusers and PEFT.
_PREFIX = re.compile(
    r"^(?:base_model\.model\.)?(?:lora_unet_|lora_transformer_|lycoris_|(?:model\.)?diffusion_model\.|transformer\."
    r"|unet\.|net\.)?"
)
_TAGS = ("ss_base_model_version", "modelspec.architecture", "ss_network_module", "ss_sd_model_name", "lorakit.family")


@dataclass(frozen=True)
class Model:
    """One model. All patterns match layer paths without prefix and with underscores instead of dots.

    Attributes:
        title: its usual name.
        marks: pattern of layers that only this model has.
        layers: pattern of layers that it shares with others.
        tags: pattern of its names in metadata.
        widths: widths of its layers, to choose among models with the same names.
        lacks: pattern of layers that exclude it.
        family: its name in lorakit, if lorakit trains it.
    """

    title: str
    marks: str
    layers: str
    tags: str
    widths: tuple[int, ...] = ()
    lacks: str = r"(?!)"
    family: str | None = None


_NEVER = r"(?!)"
_FLUX_LAYERS = r"^(?:double|single)_blocks_\d|^single_transformer_blocks_\d|^transformer_blocks_\d+_(?:attn|ff)_"
_JOINT = r"^transformer_blocks_\d+_(?:attn2?|ff|ff_context|norm1|norm1_context)_"
_PIXART = r"^transformer_blocks_\d+_(?:attn[12]|ff)_"
_NEXT_DIT = r"^layers_\d+_|^(?:noise|context)_refiner_\d"
_LATE = r"(?:19|[2-9]\d)"  # blocks that FLUX.1 does not have
MODELS = (
    Model(
        "Stable Cascade",
        r"^lora_prior_|^prior_(?:unet|te)|^(?:down|up)_blocks_\d+_\d+_",
        _NEVER,
        r"cascade|wuerstchen",
    ),
    Model(
        "Stable Diffusion 3",
        r"^joint_blocks_\d|_x_block_|_context_block_|^transformer_blocks_\d+_(?:ff_context|norm1_context)"
        r"|^transformer_blocks_\d+_attn2_to_out",
        _JOINT,
        r"sd3|stable-diffusion-(?:v?)3",
        (1536, 2432),
        r"^single_|^transformer_blocks_\d+_attn1_|_(?:img|txt)_(?:mlp|mod)_",
        "sd3",
    ),
    Model("FLUX.1", r"^transformer_single_|_(?:img|txt)_mod_lin(?:_|$)", _FLUX_LAYERS, r"flux", (3072,)),
    Model(
        "FLUX.2",
        r"_attn_to_qkv_mlp_proj|_stream_modulation",
        _FLUX_LAYERS,
        r"flux-?_?\.?2",
        (6144, 27648, 36864),  # dev's, and those of klein's `linear1`
    ),
    Model("Chroma", r"^distilled_guidance_layer", _FLUX_LAYERS, r"chroma"),
    Model(
        "HunyuanVideo",
        rf"token_refiner|_(?:img|txt)_mlp_fc[12]|_(?:img|txt)_mod_linear|_modulation_linear|^double_blocks_{_LATE}_"
        r"|^single(?:_transformer)?_blocks_(?:38|39)_",
        r"^(?:double|single)_blocks_\d|^single_transformer_blocks_\d",
        r"hunyuan-?_?video",
    ),
    Model(
        "Qwen-Image",
        r"^transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)_|^transformer_blocks_[45]\d_attn_(?:add|to)_",
        r"^transformer_blocks_\d+_attn_(?:to|add)_",
        r"qwen",
        (3072,),
        r"^single_|_ff_|^text_fusion|^txtfusion",
    ),
    Model("AuraFlow", r"^joint_transformer_blocks_\d|^(?:double|single)_layers_\d", _NEVER, r"aura-?_?flow|pony-?_?v7"),
    Model("HiDream", r"^(?:double|single)_stream_blocks_\d", _NEVER, r"hidream"),
    Model(
        "Z-Image",
        r"^layers_(?:2[6-9])_|^layers_\d+_attention_to_|_adaLN_modulation_0_z$",
        _NEXT_DIT,
        r"z-?_?image",
        (3840,),
    ),
    Model("Lumina Image 2", r"^layers_\d+_attn_to_", _NEXT_DIT, r"lumina", (2304,)),
    Model(
        "Wan",
        r"^blocks_\d+_(?:self|cross)_attn_(?:[qkvo](?:_img)?$|norm)|^blocks_\d+_ffn_|^blocks_\d+_attn2_add_[kv]_proj"
        r"|^vace_blocks_\d|^head_head$",
        r"^blocks_\d+_attn[12]_to_",
        r"wan(?:\b|_|\d|-)",
        (1536, 3072, 5120),
    ),
    Model(
        "HunyuanDiT",
        r"^blocks_\d+_attn[12]_(?:Wqkv|q_proj|kv_proj)|^blocks_\d+_skip_linear|^blocks_\d+_default_modulation",
        r"^blocks_\d+_(?:attn[12]_to_|mlp_fc|ff_net)",
        r"hunyuan-?_?dit|hydit",
        (1408,),
    ),
    Model("PixArt", r"^blocks_\d+_cross_attn_(?:q|kv)_linear|^caption_projection_linear", _PIXART, r"pixart", (1152,)),
    Model("Sana", r"_ff_conv_(?:inverted|point)", _PIXART, r"sana", (2240,)),
    Model("LTX-Video", r"^patchify_proj", _PIXART, r"ltx", (2048, 4096)),
    Model("CogVideoX", r"^patch_embed_text_proj", r"^transformer_blocks_\d+_(?:attn1|ff)_", r"cogvideo", (1920,)),
    Model("Mochi", r"^blocks_\d+_attn_(?:qkv|proj)_[xy]", _NEVER, r"mochi"),
    Model(
        "Krea 2",
        r"^(?:text_fusion|txtfusion)_|^(?:time_mod_proj|tproj_1)$|^blocks_\d+_attn_(?:w[qkvo]|gate)$"
        r"|^transformer_blocks_\d+_attn_to_gate$",
        _NEVER,
        r"krea-?_?2",
    ),
    Model(
        "HunyuanImage",
        r"_(?:img|txt)_mlp_fc[12]|^double_blocks_\d+_(?:img|txt)_attn_[qkv]$",
        r"^(?:double|single)_blocks_\d",
        r"hunyuan-?_?image",
        (3584,),
    ),
    Model("Kandinsky 5", r"^(?:visual|text)_transformer_blocks_\d", _NEVER, r"kandinsky-?_?5"),
    Model("AnimateDiff's motion module", r"_motion_modules_\d", _NEVER, r"animatediff"),
    Model("Cosmos or Anima", r"^blocks_\d+_(?:self|cross)_attn_(?:q_proj|output_proj)", _NEVER, r"cosmos|anima"),
)


def find(stems: Iterable[str], widths: Iterable[int], metadata: Mapping[str, str]) -> tuple[Model, str] | None:
    """The model of an adapter, and the evidence; None if it has layers of a UNet, or unknown ones.

    Args:
        stems: module names in the adapter's tensor names.
        widths: widths of the layers' inputs and outputs.
    """
    paths = [_PREFIX.sub("", stem).replace(".", "_") for stem in stems]
    text = " ".join(metadata.get(key, "") for key in _TAGS).lower()
    pool = _having(paths, "marks") or _having(paths, "layers")
    tagged = [model for model in MODELS if re.search(model.tags, text)]
    if not pool:
        is_unet = any(
            re.match(r"(?:down|up|input|output)_blocks_|mid_block|middle_block|lora_te|text_", p) for p in paths
        )
        return None if is_unet or not tagged else (tagged[0], "metadata")
    if agreed := [model for model in pool if model in tagged]:
        return agreed[0], "names of its layers and metadata"
    contradiction = Message("; its metadata says {tagged}, which is wrong", tagged[0].title) if tagged else ""
    sizes = set(widths)
    fitting = sorted(
        (m for m in pool if sizes.intersection(m.widths)), key=lambda m: -max(sizes.intersection(m.widths))
    )
    source = "names and widths of its layers" if fitting and len(pool) > 1 else "names of its layers"
    return (fitting or pool)[0], source + contradiction


def _having(paths: list[str], what: str) -> list[Model]:
    """The models that match such layers and are not excluded by others."""
    result = []
    for model in MODELS:
        pattern = re.compile(getattr(model, what))
        if any(pattern.search(path) for path in paths) and not any(re.search(model.lacks, path) for path in paths):
            result.append(model)
    return result
