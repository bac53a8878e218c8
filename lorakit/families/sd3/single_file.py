"""Stable Diffusion 3 and 3.5 as a single file.

Names: Stability-AI/sd3.5 (mmditx.py, other_impls.py, sd3_infer.py) and ComfyUI's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lorakit.families import ldm, single_file
from lorakit.families.ldm import Swapped, count
from lorakit.families.spec import Configs, FileLayout, FilePart, Shapes

SIDE, SCALING, OFFSET, SHIFT, HEAD = 1024, 1.5305, 0.0609, 3.0, 64
# The file's module -> diffusers'; `*` is a block's number. In modulations with only shift and scale, the file has shift
# first, diffusers scale.
MODULES: dict[str, str | tuple[str, ...]] = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    **{f"t_embedder.mlp.{n}": f"time_text_embed.timestep_embedder.linear_{n // 2 + 1}" for n in (0, 2)},
    **{f"y_embedder.mlp.{n}": f"time_text_embed.text_embedder.linear_{n // 2 + 1}" for n in (0, 2)},
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
}
_BLOCK: dict[str, str | tuple[str, ...]] = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}


# diffusers' names of q, k and v in one layer.
_FUSED = {
    "x_block.attn.qkv": "attn.to_qkv",
    "x_block.attn2.qkv": "attn2.to_qkv",
    "context_block.attn.qkv": "attn.to_added_qkv",
}
# Names in kohya files: sd-scripts' networks/lora_sd3.py uses those of the file's modules.
KOHYA = {str(ours): theirs.replace(".", "_") for theirs, ours in MODULES.items()}
KOHYA |= {
    f"transformer_blocks.*.{_FUSED.get(leaf, ours)}": f"joint_blocks_*_{leaf.replace('.', '_')}"
    for leaf, ours in _BLOCK.items()
    if "ln_" not in leaf
}
FUSED = {
    f"transformer_blocks.*.{name}": tuple(f"transformer_blocks.*.{part}" for part in _BLOCK[leaf])
    for leaf, name in _FUSED.items()
}


def names(shapes: Shapes, theirs: bool) -> ldm.Names:
    """See `FilePart.names`. On the text side, the last block only has an attention and a modulation with shift and
    scale."""
    result: dict[str, str | tuple[str, ...]] = MODULES | {"pos_embed": "pos_embed.pos_embed"}
    blocks = count(shapes, r"joint_blocks\.(\d+)\." if theirs else r"transformer_blocks\.(\d+)\.")
    for n in range(blocks):
        for leaf, ours in _BLOCK.items():
            each = tuple(f"transformer_blocks.{n}.{name}" for name in (ours if isinstance(ours, tuple) else (ours,)))
            result[f"joint_blocks.{n}.{leaf}"] = each if isinstance(ours, tuple) else each[0]
    last = f"transformer_blocks.{blocks - 1}.norm1_context.linear"
    return result | {f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1": Swapped(last)}


def _transformer(shapes: Shapes) -> dict[str, object]:
    width, text = shapes["context_embedder.weight"]
    _, channels, patch, _ = shapes["pos_embed.proj.weight"]
    blocks, normed = count(shapes, r"transformer_blocks\.(\d+)\."), "transformer_blocks.0.attn.norm_q.weight" in shapes
    # Every published model has as many heads as blocks, each 64 wide.
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0] if normed else width // blocks
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": SIDE // 8,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": blocks,
        "attention_head_dim": head if width % head == 0 else HEAD,
        "num_attention_heads": width // head if width % head == 0 else width // HEAD,
        "joint_attention_dim": text,
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": [n for n in range(blocks) if f"transformer_blocks.{n}.attn2.to_q.weight" in shapes],
        "qk_norm": "rms_norm" if normed else None,
    }


def _t5(shapes: Shapes) -> dict[str, object]:
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    words, width = shapes["shared.weight"]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": words,
        "d_model": width,
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "tie_word_embeddings": False,
    }


def _configs(shapes: Mapping[str, Shapes], prediction: str, zero_snr: bool) -> Configs:
    vae = shapes.get("vae", {})
    convolutions = {f"use_{name}": f"{name}.weight" in vae for name in ("quant_conv", "post_quant_conv")}
    parts = {
        "unet": _transformer(shapes["unet"]),
        "vae": single_file.vae_config(
            vae, SIDE, scaling_factor=SCALING, shift_factor=OFFSET, force_upcast=True, **convolutions
        ),
        **{
            name: single_file.text_config(shapes[name], openclip=name != "text_encoder", projection=True)
            for name in ("text_encoder", "text_encoder_2")
            if name in shapes
        },
        **({"text_encoder_3": _t5(shapes["text_encoder_3"])} if "text_encoder_3" in shapes else {}),
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": SHIFT},
    }
    index = single_file.model_index("StableDiffusion3Pipeline", parts)
    index["transformer"] = index.pop("unet")
    t5 = ["transformers", "T5TokenizerFast"] if "text_encoder_3" in parts else [None, None]
    return parts | {"model_index": {"text_encoder_3": [None, None], **index, "tokenizer_3": t5}}


_T5_BLOCK = (
    r"layer\.(0\.(layer_norm|SelfAttention\.([qkvo]|relative_attention_bias))|1\.(layer_norm|DenseReluDense\.w\w+))"
)
SD3_FILE = FileLayout(
    parts={
        "unet": FilePart(
            prefixes=(ldm.UNET,),
            tensors=r"pos_embed\.pos_embed|((context_embedder|proj_out|norm_out\.linear|pos_embed\.proj"
            r"|time_text_embed\.\w+\.linear_[12]|transformer_blocks\.\d+\.(norm1(_context)?\.linear"
            r"|ff(_context)?\.net\.(0\.proj|2)|attn2?\.(to_([qkv]|out\.0|add_out)|add_[qkv]_proj|norm(_added)?_[qk])))"
            r"\.(weight|bias))",
            names=names,
            partial=r"(attn2\.)|(to_add_out|ff_context)",
        ),
        "vae": single_file.VAE,
        # What is pooled of the first CLIP is not projected; diffusers has the identity there.
        "text_encoder": single_file.clip(
            "text_encoders.clip_l.transformer.",
            optional=True,
            identity=("text_projection.weight", "text_model.final_layer_norm.weight"),
        ),
        "text_encoder_2": single_file.clip("text_encoders.clip_g.transformer.", projection=True, optional=True),
        "text_encoder_3": FilePart(
            prefixes=("text_encoders.t5xxl.transformer.",),
            tensors=rf"(shared|encoder\.(final_layer_norm|block\.\d+\.{_T5_BLOCK}))\.weight",
            partial="relative_attention_bias",
            optional=True,
        ),
    },
    marks=(f"{ldm.UNET}joint_blocks.",),
    configs=_configs,
    scaling_factor=SCALING,
    vae_names=r"sd_?3",
)
