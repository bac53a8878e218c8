"""A base in one file: the configuration that diffusers needs of each part, from the shapes of its tensors. No torch.

What shapes do not tell is the same in all models of a family and written down here; each value is that of the
published model in diffusers layout (CompVis, StabilityAI).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorakit.families import ldm

Shapes = Mapping[str, tuple[int, ...]]
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
CLASSES |= {"text_encoder_2": "CLIPTextModelWithProjection"}
SCALING = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
SIDES = {"sd1": 512, "sd2": 512, "sdxl": 1024}
# Width of an attention head; SD1 has eight heads whatever their width.
HEAD, SD1_HEADS = 64, 8
_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def configs(checkpoint: ldm.Checkpoint) -> dict[str, dict[str, Any]]:
    """What the config.json of each part in diffusers layout would say; with "scheduler" and "model_index"."""
    family = checkpoint.family
    shapes = {part: {name: slot.shape for name, slot in slots.items()} for part, slots in checkpoint.parts.items()}
    side = 768 if family == "sd2" and checkpoint.prediction.type == "v_prediction" else SIDES[family]
    parts = {"unet": unet(shapes["unet"], family, side), "vae": vae(shapes["vae"], family, side)}
    for name in [part for part in shapes if part.startswith("text_encoder")]:
        parts[name] = text(shapes[name], openclip=(family, name) in ldm.OPENCLIP)
    if family == "sdxl":
        pooled = parts["text_encoder_2"]["projection_dim"]
        wide = parts["unet"]["projection_class_embeddings_input_dim"]
        parts["unet"]["addition_time_embed_dim"] = (wide - pooled) // 6
    parts["scheduler"] = scheduler(family, checkpoint.prediction.type, checkpoint.prediction.zero_snr)
    parts["model_index"] = model_index(family, parts)
    return parts


def unet(shapes: Shapes, family: str, side: int) -> dict[str, Any]:
    """UNet2DConditionModel's."""
    levels = _count(shapes, r"down_blocks\.(\d+)\.")
    channels = [shapes[f"down_blocks.{n}.resnets.0.conv1.weight"][0] for n in range(levels)]
    down, up = (_depths(shapes, side, levels) for side in ("down", "up"))
    middle = _depth(shapes, "mid_block.attentions.0")
    # The last number is the middle block's too: SD1 and SD2 have attention there and not in the last block.
    depths = [_uniform(depth) or 1 for depth in down[:-1]] + [_uniform(down[-1]) or middle or 1]
    text = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    linear = len(next(shape for name, shape in shapes.items() if name.endswith("proj_in.weight"))) == 2
    config: dict[str, Any] = {
        "_class_name": CLASSES["unet"],
        "sample_size": side // 8,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in down],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in up],
        "transformer_layers_per_block": depths,
        "cross_attention_dim": text,
        # diffusers' name for the number of heads.
        "attention_head_dim": [width // HEAD for width in channels] if family != "sd1" else SD1_HEADS,
        "use_linear_projection": linear,
    }
    # Of distilled models: SSD-1B, Vega and KOALA (of SDXL), BK-SDM (of SD1).
    mirrored = [_uniform(depth) or 1 for depth in up]
    if mirrored != [depth if up[n] else 1 for n, depth in enumerate(reversed(depths))]:
        config["reverse_transformer_layers_per_block"] = mirrored
    if not middle:
        config["mid_block_type"] = "UNetMidBlock2D" if "mid_block.resnets.0.conv1.weight" in shapes else None
    if family == "sd2":
        config["upcast_attention"] = True
    if family == "sdxl":
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
        }
    return config


def _depth(shapes: Shapes, place: str) -> int:
    """Transformer blocks of one attention."""
    return _count(shapes, rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.")


def _depths(shapes: Shapes, side: str, levels: int) -> list[list[int]]:
    """Transformer blocks of each attention of each block on the way down or up."""
    return [
        [
            _depth(shapes, f"{side}_blocks.{n}.attentions.{k}")
            for k in range(_count(shapes, rf"{side}_blocks\.{n}\.attentions\.(\d+)\."))
        ]
        for n in range(levels)
    ]


def _uniform(depths: list[int]) -> int | list[int]:
    """One number where all are equal; 0 where there are none."""
    return depths if len(set(depths)) > 1 else next(iter(depths), 0)


def vae(shapes: Shapes, family: str, side: int) -> dict[str, Any]:
    """AutoencoderKL's."""
    levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "_class_name": CLASSES["vae"],
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down_blocks.{n}.resnets.0.conv1.weight"][0] for n in range(levels)],
        "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": side,
        "scaling_factor": SCALING[family],
        "force_upcast": family == "sdxl",
    }


def text(shapes: Shapes, *, openclip: bool) -> dict[str, Any]:
    """CLIPTextConfig's. OpenAI's text model has the quick GELU; OpenCLIP's the true one, and it pads with word 0."""
    words, width = shapes["text_model.embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight", (width,))[0]
    return {
        "architectures": [CLASSES["text_encoder_2" if "text_projection.weight" in shapes else "text_encoder"]],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "projection_dim": projection,
        # The two special words are the last of the vocabulary.
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": 0 if openclip else words - 1,
    }


def scheduler(family: str, prediction: str, zero_snr: bool) -> dict[str, Any]:
    """The sampler that the published model names, on the schedule all of them were trained with."""
    config = {**_SCHEDULE, "prediction_type": prediction, "steps_offset": 1}
    ddim = {"_class_name": "DDIMScheduler", **config, "clip_sample": False, "set_alpha_to_one": False}
    if zero_snr:
        # Lin et al. 2023, arXiv 2305.08891: sampling must begin at the last timestep, where there is noise alone.
        return ddim | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if family == "sdxl":
        return {"_class_name": "EulerDiscreteScheduler", **config, "timestep_spacing": "leading"}
    if prediction == "v_prediction":
        return ddim
    return {"_class_name": "PNDMScheduler", **config, "skip_prk_steps": True, "set_alpha_to_one": False}


def model_index(family: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """model_index.json's."""
    index: dict[str, Any] = {"_class_name": PIPELINES[family]}
    for name in parts:
        library = "transformers" if name.startswith("text_encoder") else "diffusers"
        index[name] = [library, CLASSES.get(name) or parts[name]["_class_name"]]
        if name.startswith("text_encoder"):
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if family == "sdxl":
        return index | {"force_zeros_for_empty_prompt": True}
    return index | {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}


def _count(names: Mapping[str, Any], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
