"""Models with all blocks of the published ones in small widths, and a writer of single files in the LDM layout.

The writer counts the blocks of the modules, as the LDM code does when it builds them. It shares no table with lorakit.
A test compares it with diffusers' own converters.
"""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
# Size of CLIP's vocabulary.
WORDS = 49408
# Arguments of the published UNets. SMALL has the changes for small models.
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sd2": {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (PLAIN, CROSS, CROSS),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SMALL: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64},
    "sd2": {"block_out_channels": (64, 64, 128, 128), "cross_attention_dim": 64, "attention_head_dim": (1, 1, 2, 2)},
    "sdxl": {
        "block_out_channels": (64, 64, 128),
        "cross_attention_dim": 128,
        "attention_head_dim": (1, 1, 2),
        "transformer_layers_per_block": (1, 1, 2),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 64,
    },
}


def unet(family: str, in_channels: int = 4, **changes: Any) -> UNet2DConditionModel:
    """Return the published UNet of a family with `changes`."""
    values = UNETS[family] | changes
    ups = tuple("CrossAttnUpBlock2D" if kind == CROSS else "UpBlock2D" for kind in reversed(values["down_block_types"]))
    return UNet2DConditionModel(sample_size=8, in_channels=in_channels, up_block_types=ups, **values)


def vae(family: str, width: int = 128) -> AutoencoderKL:
    """Return the published VAE with this width of its first block."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width) if width >= 128 else (width,) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )


def text(cls: Any, vocabulary: int, width: int, layers: int, *, openclip: bool) -> Any:
    """Return a CLIP text model. OpenCLIP's has GELU instead of quick GELU, and pads with token 0."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act="gelu" if openclip else "quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0 if openclip else vocabulary - 1,
    )
    return cls(config)


def scheduler(family: str, prediction: str, zero_snr: bool) -> Any:
    values = tiny.schedule(prediction, zero_snr)
    if zero_snr or prediction == "v_prediction":
        spacing = {"timestep_spacing": "trailing"} if zero_snr else {}
        return DDIMScheduler(**values, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **spacing)
    if family == "sdxl":
        return EulerDiscreteScheduler(**values, timestep_spacing="leading", steps_offset=1)
    return PNDMScheduler(**values, skip_prk_steps=True, steps_offset=1)


def small(
    family: str, folder: Path, prediction: str = "epsilon", *, zero_snr: bool = False, in_channels: int = 4
) -> Any:
    """Save a small pipeline with random weights in diffusers layout to `folder`, and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tiny.save_tokenizer(folder / "tokenizer", "!" if family == "sd2" else tiny.SPECIAL[1])
        words, width = len(tokenizer), 64
        parts = {
            "unet": unet(family, in_channels, **SMALL[family]),
            "vae": vae(family, 32),
            "text_encoder": text(CLIPTextModel, words, width, 3, openclip=family == "sd2"),
            "tokenizer": tokenizer,
            "scheduler": scheduler(family, prediction, zero_snr),
        }
        if family == "sdxl":
            second = text(CLIPTextModelWithProjection, words, width, 3, openclip=True)
            parts |= {"text_encoder_2": second, "tokenizer_2": tiny.save_tokenizer(folder / "tokenizer_2", "!")}
    if family == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        encoders = ["text_encoder", "text_encoder_2"]
    else:
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline, encoders = StableDiffusionPipeline(**parts, **rest), ["text_encoder"]
    tiny.save(pipeline, folder, encoders)
    return pipeline


# -- the writer -------------------------------------------------------------------------------------------------


def write(
    path: Path,
    family: str,
    parts: Any,
    dtype: torch.dtype = torch.float32,
    *,
    extra: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a single file. `parts` is a pipeline, or an object with the same components as attributes."""
    tensors = {f"model.diffusion_model.{key}": value for key, value in unet_tensors(parts.unet)}
    tensors |= {f"first_stage_model.{key}": value for key, value in vae_tensors(parts.vae)}
    if family == "sd1":
        tensors |= {f"cond_stage_model.transformer.{k}": v for k, v in clip_tensors(parts.text_encoder)}
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif family == "sd2":
        # A file of SD2 has one layer and one projection that are not used.
        unused = type(parts.text_encoder.config)(**parts.text_encoder.config.to_dict() | {"num_hidden_layers": 1})
        every = openclip_tensors(parts.text_encoder, CLIPTextModelWithProjection(unused))
        tensors |= {f"cond_stage_model.model.{k}": v for k, v in every}
    else:
        tensors |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in clip_tensors(parts.text_encoder)}
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in openclip_tensors(parts.text_encoder_2)}
    tensors_of_model = {
        k: v.detach().to(dtype if v.is_floating_point() else v.dtype).contiguous() for k, v in tensors.items()
    }
    save_file(tensors_of_model | (extra or {}), path, metadata={"format": "pt", **(metadata or {})})
    return path


def of_true_size(folder: Path, family: str) -> Path:
    """Write a file of "sd1" or "sdxl" with random weights in bf16 at the published size, and a matching tokenizer.

    Existing files are reused.
    """
    if not (folder / "tokenizer").is_dir():
        tiny.save_tokenizer(folder / "tokenizer", size=WORDS)
    file = folder / f"{family}-random.safetensors"
    if file.is_file():
        return file
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    parts = {"text_encoder": text(CLIPTextModel, WORDS, 768, 12, openclip=False)}
    if family == "sdxl":
        parts["text_encoder_2"] = text(CLIPTextModelWithProjection, WORDS, 1280, 32, openclip=True)
    parts |= {"unet": unet(family), "vae": vae(family)}
    torch.set_default_dtype(torch.float32)
    return write(file, family, SimpleNamespace(**parts), torch.bfloat16)


def _of(name: str, module: torch.nn.Module | None) -> Iterable[tuple[str, torch.Tensor]]:
    return [(f"{name}.{key}", value) for key, value in module.state_dict().items()] if module is not None else []


def _resnet(name: str, resnet: Any) -> Iterable[tuple[str, torch.Tensor]]:
    yield from _of(f"{name}.in_layers.0", resnet.norm1)
    yield from _of(f"{name}.in_layers.2", resnet.conv1)
    yield from _of(f"{name}.emb_layers.1", resnet.time_emb_proj)
    yield from _of(f"{name}.out_layers.0", resnet.norm2)
    yield from _of(f"{name}.out_layers.3", resnet.conv2)
    if resnet.conv_shortcut is not None:
        yield from _of(f"{name}.skip_connection", resnet.conv_shortcut)


def unet_tensors(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield tensors with openaimodel.UNetModel's names: input_blocks, middle_block and output_blocks with a number."""
    for number, linear in ((0, model.time_embedding.linear_1), (2, model.time_embedding.linear_2)):
        yield from _of(f"time_embed.{number}", linear)
    if getattr(model, "add_embedding", None) is not None:
        yield from _of("label_emb.0.0", model.add_embedding.linear_1)
        yield from _of("label_emb.0.2", model.add_embedding.linear_2)
    yield from _of("input_blocks.0.0", model.conv_in)
    number = 0
    for block in model.down_blocks:
        for index, resnet in enumerate(block.resnets):
            number += 1
            yield from _resnet(f"input_blocks.{number}.0", resnet)
            if hasattr(block, "attentions"):
                yield from _of(f"input_blocks.{number}.1", block.attentions[index])
        if block.downsamplers:
            number += 1
            yield from _of(f"input_blocks.{number}.0.op", block.downsamplers[0].conv)
    if model.mid_block is not None:
        for index, resnet in enumerate(model.mid_block.resnets):
            yield from _resnet(f"middle_block.{2 * index}", resnet)
        for attention in (model.mid_block.attentions or [])[:1]:
            yield from _of("middle_block.1", attention)
    number = -1
    for block in model.up_blocks:
        for index, resnet in enumerate(block.resnets):
            number += 1
            layers = 1
            yield from _resnet(f"output_blocks.{number}.0", resnet)
            if hasattr(block, "attentions"):
                yield from _of(f"output_blocks.{number}.1", block.attentions[index])
                layers = 2
        if block.upsamplers:
            yield from _of(f"output_blocks.{number}.{layers}.conv", block.upsamplers[0].conv)
    yield from _of("out.0", model.conv_norm_out)
    yield from _of("out.2", model.conv_out)


def _vae_resnet(name: str, resnet: Any) -> Iterable[tuple[str, torch.Tensor]]:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield from _of(f"{name}.{part}", getattr(resnet, part))
    if resnet.conv_shortcut is not None:
        yield from _of(f"{name}.nin_shortcut", resnet.conv_shortcut)


def vae_tensors(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield tensors with autoencoder.AutoencoderKL's names. Attention has 1x1 convolutions; up levels count down."""
    for side in (model.encoder, model.decoder):
        name = "encoder" if side is model.encoder else "decoder"
        yield from _of(f"{name}.conv_in", side.conv_in)
        blocks = side.down_blocks if name == "encoder" else side.up_blocks
        for index, block in enumerate(blocks):
            level = f"{name}.down.{index}" if name == "encoder" else f"{name}.up.{len(blocks) - 1 - index}"
            for number, resnet in enumerate(block.resnets):
                yield from _vae_resnet(f"{level}.block.{number}", resnet)
            sampler = block.downsamplers if name == "encoder" else block.upsamplers
            if sampler:
                yield from _of(f"{level}.{'downsample' if name == 'encoder' else 'upsample'}.conv", sampler[0].conv)
        for number, resnet in enumerate(side.mid_block.resnets):
            yield from _vae_resnet(f"{name}.mid.block_{number + 1}", resnet)
        attention = side.mid_block.attentions[0]
        yield from _of(f"{name}.mid.attn_1.norm", attention.group_norm)
        linear = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "proj_out": attention.to_out[0]}
        for part, module in linear.items():
            yield f"{name}.mid.attn_1.{part}.weight", module.weight[:, :, None, None]
            yield f"{name}.mid.attn_1.{part}.bias", module.bias
        yield from _of(f"{name}.norm_out", side.conv_norm_out)
        yield from _of(f"{name}.conv_out", side.conv_out)
    yield from _of("quant_conv", model.quant_conv)
    yield from _of("post_quant_conv", model.post_quant_conv)


def clip_tensors(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield tensors with the names of published files, which do not depend on the installed version of transformers."""
    return _of("text_model", getattr(model, "text_model", model))


def openclip_tensors(model: Any, unused: Any = None) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield tensors with OpenCLIP's names. q, k and v are one tensor, and the projection is transposed.

    `unused` is a model whose layers and projection are added.
    """
    inner, tail = (getattr(m, "text_model", m) if m is not None else None for m in (model, unused))
    yield "positional_embedding", inner.embeddings.position_embedding.weight
    yield from _of("token_embedding", inner.embeddings.token_embedding)
    yield from _of("ln_final", inner.final_layer_norm)
    yield "text_projection", (unused or model).text_projection.weight.T
    yield "logit_scale", torch.tensor(4.6)
    for number, layer in enumerate([*inner.encoder.layers, *(tail.encoder.layers if tail is not None else [])]):
        name, attention = f"transformer.resblocks.{number}", layer.self_attn
        three = (attention.q_proj, attention.k_proj, attention.v_proj)
        yield f"{name}.attn.in_proj_weight", torch.cat([linear.weight for linear in three])
        yield f"{name}.attn.in_proj_bias", torch.cat([linear.bias for linear in three])
        yield from _of(f"{name}.attn.out_proj", attention.out_proj)
        yield from _of(f"{name}.ln_1", layer.layer_norm1)
        yield from _of(f"{name}.ln_2", layer.layer_norm2)
        yield from _of(f"{name}.mlp.c_fc", layer.mlp.fc1)
        yield from _of(f"{name}.mlp.c_proj", layer.mlp.fc2)
