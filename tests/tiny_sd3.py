"""A tiny Stable Diffusion 3.5, saved like published checkpoints: two CLIP encoders, optional T5, 16 latent channels."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from tiny import autoencoder, save, save_tokenizer, text_config
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

BLOCKS = 3
# T5's special tokens, a few words, and printable ASCII characters.
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -2.0), ("▁photo", -3.0), ("▁sks", -3.0), ("▁toy", -3.0)]
PIECES += [(chr(code), -5.0) for code in range(33, 127)]


def save_sd3(folder: Path, *, t5: bool = True, dual: bool = True, shift: float = 3.0) -> Path:
    """Save a pipeline with three blocks. As in the published models, the last one has no output for the text.

    With `dual`, the first block has the second attention of 3.5 medium.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizers = {name: save_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")}
        count = len(tokenizers["tokenizer"])
        encoders = {
            name: CLIPTextModelWithProjection(text_config(count, activation))
            for name, activation in (("text_encoder", "quick_gelu"), ("text_encoder_2", "gelu"))
        }
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            num_layers=BLOCKS,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=80,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=16,
            pos_embed_max_size=16,
            dual_attention_layers=(0,) if dual else (),
            qk_norm="rms_norm",
        )
        vae = autoencoder(1.5305, 16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
        third = {"text_encoder_3": None, "tokenizer_3": None}
        if t5:
            config = T5Config(
                vocab_size=len(PIECES),
                d_model=80,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
            third = {
                "text_encoder_3": T5EncoderModel(config),
                "tokenizer_3": T5TokenizerFast(vocab=PIECES, extra_ids=0, model_max_length=512),
            }
            third["tokenizer_3"].save_pretrained(folder / "tokenizer_3")
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        **encoders,
        **tokenizers,
        **third,
    )
    save(pipeline, folder, list(encoders))
    assert "pos_embed.pos_embed" in load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder
