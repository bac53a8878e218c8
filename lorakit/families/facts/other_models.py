"""Recognize files and folders that are not bases: other models, parts of models, adapters. No torch.

Tensor names decide. Sources: each model's own code, diffusers, and the loaders of ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lorakit.core import registry, safetensors_header
from lorakit.core.messages import Message
from lorakit.families import weight_files
from lorakit.families.facts import gguf
from lorakit.families.facts.fit import Config

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_ADAPTER = "is an adapter (LoRA), not a base model: give the model that it was made for"
# Kind of a file (`safetensors_header.kind`) -> message.
KINDS = {
    "adapter": _ADAPTER,
    "lycoris": _ADAPTER,
    "unet": "is a UNet alone: give the whole model",
    "vae": "is a VAE alone, not a base model",
    "text encoder": "is a text encoder alone: give the whole model",
    "embedding": "is a textual-inversion embedding, not a base model",
    "controlnet": "is a ControlNet, not a base model",
    "numbered": _ADAPTER,
    "ip-adapter": "is an IP-Adapter, not a base model",
    "unknown": "is a safetensors file of no kind known here: give a Stable Diffusion model",
}
_NEVER = r"(?!)"
# Models that lorakit does not train -> pattern of a tensor that only they have, and of their pipelines' names.
_MODELS: dict[str, tuple[str, str]] = {
    "FLUX.2": (r"double_stream_modulation_img|single_stream_modulation", r"Flux2"),
    "Chroma": (r"distilled_guidance_layer", r"Chroma"),
    "HunyuanVideo": (r"individual_token_refiner|token_refiner\.refiner_blocks", r"HunyuanVideo"),
    "FLUX.1": (r"double_blocks\.\d+\.img_attn|^(transformer\.)?single_transformer_blocks\.\d", r"Flux|ReduxPipeline"),
    "Qwen-Image": (r"transformer_blocks\.\d+\.img_mod\.", r"QwenImage"),
    "AuraFlow": (r"(^|\.)double_layers\.\d|joint_transformer_blocks\.\d", r"AuraFlow"),
    "HiDream": (r"double_stream_blocks\.\d", r"HiDream"),
    "Sana": (r"\.mlp\.inverted_conv|\.ff\.conv_inverted", r"Sana"),
    "HunyuanDiT": (r"blocks\.\d+\.(default_modulation|attn1\.Wqkv)|(^|\.)style_embedder\.", r"HunyuanDiT"),
    "LTX-Video": (r"(^|\.)patchify_proj\.", r"LTX"),
    "PixArt": (r"blocks\.\d+\.cross_attn\.kv_linear|^adaln_single\.", r"PixArt"),
    "Stable Cascade": (r"(^|\.)(clip_txt_pooled_mapper|clip_txt_mapper|effnet_mapper)\.", r"StableCascade|Wuerstchen"),
    "Stable Video Diffusion": (r"\.time_stack\.|\.time_mixer\.|\.temporal_transformer_blocks\.", r"StableVideo"),
    "Kolors": (r"^(model\.diffusion_model\.)?encoder_hid_proj\.weight$", r"Kolors"),
    "Wan": (r"(^|\.)blocks\.\d+\.self_attn\.q\.|^condition_embedder\.text_embedder\.", r"Wan"),
    "Cosmos or Anima": (r"(^|\.)blocks\.\d+\.(self|cross)_attn\.(q_proj|output_proj)\.", r"Cosmos|Anima(?!teDiff)"),
    "CogVideoX": (r"(^|\.)patch_embed\.text_proj\.", r"CogVideoX"),
    "OmniGen": (r"(^|\.)ref_image_refiner\.\d", r"OmniGen"),
    "Z-Image": (r"(^|\.)(x|cap)_pad_token$", r"ZImage"),
    "Lumina Image": (r"(^|\.)(noise|context)_refiner\.\d", r"Lumina"),
    "Kandinsky": (r"^text_transformer_blocks\.", r"Kandinsky"),
    "Mochi": (r"blocks\.\d+\.attn\.qkv_[xy]", r"Mochi"),
    "DeepFloyd IF": (_NEVER, r"IF[A-Z]"),
    "Stable Diffusion upscaler": (r"^low_scale_model\.", r"StableDiffusion(Latent)?Upscale"),
    "Stable Diffusion image variation": (_NEVER, r"StableDiffusionImageVariation|StableUnCLIP|UnCLIP"),
    "AnimateDiff": (_NEVER, r"AnimateDiff"),
    "Stable Audio": (_NEVER, r"StableAudio|AudioLDM"),
}
# Message for a part or a helper model -> pattern of a tensor, and of the class in config.json.
_PARTS: dict[str, tuple[str, str]] = {
    "is an IP-Adapter, not a base model": (r"^(ip_adapter|image_proj)\.", r"IPAdapter"),
    "is an AnimateDiff motion module, not a base model": (r"motion_modules\.\d", r"MotionAdapter"),
    "is a ControlNet, not a base model": (
        r"^(control_model|controlnet_cond_embedding|input_hint_block|controlnet_(down|mid|blocks|x_)\w*|lora_controlnet)(\.|$)",
        r"\w*ControlNet\w*",
    ),
    "is a T2I-Adapter, not a base model": (r"^(adapter\.)?body\.\d+\.(resnets|in_conv|block[12])\.", r"T2IAdapter"),
    "is an upscaler (ESRGAN and the like), not a base model": (
        r"^(params(_ema)?\.)?(model\.1\.sub\.\d|body\.\d+\.rdb\d|(RRDB_trunk|trunk)\.?\d*|layers\.\d+\.residual_group)",
        _NEVER,
    ),
    "is a VAE for previews (TAESD), not a base model": (
        r"^(taesd_)?decoder\.(layers\.)?\d+\.",
        r"AutoencoderTiny",
    ),
    "is a text encoder (T5) alone: give the whole model": (r"^encoder\.block\.\d|^shared\.weight$", r"\w*T5\w*"),
    "is an image encoder alone: give the whole model": (r"^(vision_model|visual)\.", r"CLIPVision\w+|Siglip\w+"),
    "is a language model, not a base model": (r"^model\.layers\.\d+\.self_attn\.", r"\w+ForCausalLM|ChatGLM\w*"),
    KINDS["vae"]: (_NEVER, r"AutoencoderKL|\w*Autoencoder\w*|AsymmetricAutoencoderKL|VQModel"),
    KINDS["unet"]: (_NEVER, r"UNet\w+"),
    "is Stable Diffusion 3's transformer alone: give the whole model": (
        r"^joint_blocks\.\d|^pos_embed\.pos_embed$",
        r"SD3Tr\w+",
    ),
    "is a transformer alone: give the whole model": (_NEVER, r"\w+Transformer\w*Model"),
    KINDS["text encoder"]: (_NEVER, r"CLIPText\w+|CLIPModel"),
}
# Prefix of the class of a text encoder.
_ENCODERS = {"CLIP": "CLIPTextModel", "T5": "T5EncoderModel"}


def what_file(header: safetensors_header.Header) -> str:
    """The end of a message "base NAME ..." for a single file that is not a trainable model; empty for a model."""
    suffix = header.path.suffix.lower()
    if suffix in _PICKLES:
        return "is a pickle, which can run code when it is read; convert it once: lorakit convert FILE"
    if suffix == ".gguf":
        return _what_gguf(gguf.names(header.path))
    if suffix != ".safetensors":
        return "is a file, not a base model: give a .safetensors file or a folder in diffusers layout"
    kind = safetensors_header.kind(header.shapes())
    if kind in ("adapter", "lycoris"):
        return KINDS[kind]
    for what, (pattern, _) in _PARTS.items():
        if safetensors_header.has_name(header.tensors, pattern):
            return what
    title = model_title(header.tensors)
    return _other(title) if title else KINDS.get(kind, "")


def _what_gguf(tensors: list[str]) -> str:
    """The same for a GGUF file, from its tensor names."""
    if title := model_title(tensors):
        return _other(title)
    if ours := gguf.title(tensors):
        encoders = safetensors_header.has_name(tensors, r"(^|\.)(cond_stage_model|conditioner|text_encoders)\.")
        part = "" if encoders else "'s denoiser alone"
        return Message(
            "is a GGUF file of {ours}{part}, whose weights lorakit does not read: give the model's "
            ".safetensors file; memory.base_storage = 'nf4' keeps it as small in memory",
            *(ours, part),
        )
    if safetensors_header.has_name(tensors, r"(^|\.)(enc\.blk|encoder\.block)\.\d"):
        return next(what for what in _PARTS if "(T5)" in what)
    return "is a GGUF file, whose weights lorakit does not read: give the model's .safetensors file"


def model_title(tensors: Iterable[str]) -> str:
    """The title of a model that lorakit does not train, from its tensor names, or ""."""
    names = list(tensors)
    return next((title for title, (pattern, _) in _MODELS.items() if safetensors_header.has_name(names, pattern)), "")


def pipeline_title(name: str) -> str:
    """The title of a model that lorakit does not train, from its pipeline class, or ""."""
    return next((title for title, (_, pattern) in _MODELS.items() if re.match(pattern, name)), "")


def what_pipeline(name: str) -> str:
    """The end of a message "base NAME ..." for a model_index.json of no family."""
    title = pipeline_title(name)
    if title:
        return _other(title)
    return Message("is {kind}; lorakit trains {families}", with_article(name), registry.version_titles())


def what_encoder(index: Config, encoder: str, kind: str) -> str:
    """The end of a message "base NAME ..." if the text encoder has another class than the family's, or ""."""
    name = (index.get(encoder) or [None, None])[1]
    if not isinstance(name, str) or name.startswith(_ENCODERS[kind]):
        return ""
    if name.startswith("ChatGLM"):
        return _other("Kolors")
    line = "reads texts by a {kind}, as no Stable Diffusion does; lorakit trains {families}"
    return Message(line, name, registry.version_titles())


def what_folder(folder: Path) -> str:
    """The end of a message "base NAME ..." for a folder without model_index.json, from its small files, or ""."""
    if (folder / "adapter_config.json").is_file():
        return "is a PEFT adapter, not a base model"
    if not (folder / "config.json").is_file():
        return ""
    config = weight_files.read_json(folder / "config.json")
    architectures = config.get("architectures") or [""]
    name = str(config.get("_class_name") or architectures[0])
    return next((what for what, (_, pattern) in _PARTS.items() if re.fullmatch(pattern, name)), "")


def _other(title: str) -> str:
    return Message("is {kind} model; lorakit trains {families}", with_article(title), registry.version_titles())


def with_article(title: str) -> str:
    """A model's title with "a" or "an", according to its pronunciation."""
    return Message("an {title}" if title[0] in "AIO" or title.startswith("LTX") else "a {title}", title)
