"""Write Stable Diffusion 3 as single files: with text encoders, without them, or with encoders in separate files.

Tensor names are those of the modules in Stability-AI/sd3.5. They do not come from lorakit. Widths are small, but each
attention head has its published width, because a file does not contain the head width.
"""

from pathlib import Path
from typing import Any

import small_models
import tiny
import tiny_sd3
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

U, V = "model.diffusion_model.", "first_stage_model."
L, G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
WIDTH, BLOCKS, WORDS = 128, 2, 600
# The norms have 32 groups, as in the published VAE, because a file does not contain this number.
VAE = {"block_out_channels": (32,) * 4, "norm_num_groups": 32, "shift_factor": 0.0609}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
# Model -> its qk norm, and the blocks with a second attention.
KINDS = {"medium": (None, ()), "3.5 medium": ("rms_norm", (0,)), "3.5 large": ("rms_norm", ())}


def clip(width: int, activation: str, pad: int) -> CLIPTextModelWithProjection:
    config = tiny.text_config(WORDS, activation)
    config.hidden_size = config.projection_dim = width
    config.num_attention_heads, config.pad_token_id = width // 64, pad
    return CLIPTextModelWithProjection(config)


def small(folder: Path, kind: str = "3.5 medium") -> StableDiffusion3Pipeline:
    """Save a small pipeline with T5 in `folder` and return it."""
    norm, dual = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # As in the published models, the second tokenizer pads with token 0.
        tokenizers = {
            "tokenizer": tiny.save_tokenizer(folder / "tokenizer", size=WORDS),
            "tokenizer_2": tiny.save_tokenizer(folder / "tokenizer_2", pad_token="!", size=WORDS),
        }
        encoders = {"text_encoder": clip(64, "quick_gelu", WORDS - 1), "text_encoder_2": clip(128, "gelu", 0)}
        torch.nn.init.eye_(encoders["text_encoder"].text_projection.weight)
        t5 = T5Config(
            vocab_size=len(tiny_sd3.PIECES) + 3,
            d_model=256,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=16,
            num_layers=BLOCKS,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            joint_attention_dim=256,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=64 + 128,
            out_channels=16,
            pos_embed_max_size=16,
            dual_attention_layers=dual,
            qk_norm=norm,
        )
        for name, weight in transformer.named_parameters():
            if name.endswith("bias"):  # diffusers initializes some of them with zeros
                torch.nn.init.normal_(weight, std=0.1)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny.autoencoder(1.5305, 16, **VAE),
            **encoders,
            **tokenizers,
            text_encoder_3=T5EncoderModel(t5),
            tokenizer_3=T5TokenizerFast(vocab=tiny_sd3.PIECES, extra_ids=0, model_max_length=512),
        )
    pipeline.tokenizer_3.save_pretrained(folder / "tokenizer_3")
    tiny.save(pipeline, folder, list(encoders))
    return pipeline


def tensors(pipeline: Any, *encoders: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a single file: the transformer, the VAE and these text encoders."""
    result = {U + name: tensor for name, tensor in mmdit(pipeline.transformer.state_dict()).items()}
    result |= {V + name: tensor for name, tensor in small_models.vae_tensors(pipeline.vae)}
    for name in encoders:
        result |= {f"text_encoders.{name}.transformer.{key}": tensor for key, tensor in encoder(pipeline, name).items()}
    return {name: tensor.contiguous().clone() for name, tensor in result.items()}


def encoder(pipeline: Any, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of `clip_l`, `clip_g` or `t5xxl` with the names of a separate file."""
    module = {"clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2, "t5xxl": pipeline.text_encoder_3}[
        name
    ]
    weights = module.state_dict()
    if name == "t5xxl":
        return {key: tensor for key, tensor in weights.items() if "embed_tokens" not in key}
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith("position_ids")}
    return {key: t for key, t in weights.items() if name == "clip_g" or not key.startswith("text_projection")}


def mmdit(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of diffusers' transformer with the names of mmditx.py."""
    result = {"pos_embed": weights["pos_embed.pos_embed"]}
    blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))

    def put(theirs: str, *ours: str, swap: bool = False) -> None:
        for end in ("weight", "bias"):
            if f"{ours[0]}.{end}" in weights:
                tensor = torch.cat([weights[f"{name}.{end}"] for name in ours])
                result[f"{theirs}.{end}"] = torch.cat(tensor.chunk(2)[::-1]) if swap else tensor

    put("x_embedder.proj", "pos_embed.proj")
    put("context_embedder", "context_embedder")
    for theirs, ours in {"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}.items():
        put(f"{theirs}.mlp.0", f"time_text_embed.{ours}.linear_1")
        put(f"{theirs}.mlp.2", f"time_text_embed.{ours}.linear_2")
    put("final_layer.linear", "proj_out")
    put("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    for n in range(blocks):
        ours, x, text = f"transformer_blocks.{n}", f"joint_blocks.{n}.x_block", f"joint_blocks.{n}.context_block"
        put(f"{x}.adaLN_modulation.1", f"{ours}.norm1.linear")
        put(f"{text}.adaLN_modulation.1", f"{ours}.norm1_context.linear", swap=n == blocks - 1)
        for attention in ("attn", "attn2"):
            put(f"{x}.{attention}.qkv", *(f"{ours}.{attention}.to_{part}" for part in "qkv"))
            put(f"{x}.{attention}.proj", f"{ours}.{attention}.to_out.0")
            for part in "qk":
                put(f"{x}.{attention}.ln_{part}", f"{ours}.{attention}.norm_{part}")
        put(f"{text}.attn.qkv", *(f"{ours}.attn.add_{part}_proj" for part in "qkv"))
        put(f"{text}.attn.proj", f"{ours}.attn.to_add_out")
        for part in "qk":
            put(f"{text}.attn.ln_{part}", f"{ours}.attn.norm_added_{part}")
        for theirs, feed in {x: "ff", text: "ff_context"}.items():
            put(f"{theirs}.mlp.fc1", f"{ours}.{feed}.net.0.proj")
            put(f"{theirs}.mlp.fc2", f"{ours}.{feed}.net.2")
    return result


def write(path: Path, pipeline: Any, *encoders: str, **extra: torch.Tensor) -> Path:
    """Write a single file with the transformer, the VAE and these text encoders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors(pipeline, *encoders) | extra, path)
    return path


def write_encoders(folder: Path, pipeline: Any, *names: str) -> Path:
    """Write text encoders as separate files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in encoder(pipeline, name).items()},
            folder / f"{name}{'_fp16' * (name == 't5xxl')}.safetensors",
        )
    return folder
