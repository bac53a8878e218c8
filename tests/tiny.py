"""Complete Stable Diffusion pipelines of a few hundred thousand weights, saved like published checkpoints.

They contain each kind of layer that an adapter can change: attention in down, mid and up blocks, resnets with a
`conv_shortcut`, downsamplers and upsamplers. Layer names are a subset of the published models' names, so the SDXL model
has two layers per block. Text-encoder keys in files begin with `text_model.`, with any version of transformers. The
tokenizer has a token for each byte. Pictures have 64 px, latents 8x8.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MERGES = ["p h", "o t", "ot o</w>", "ph oto</w>", "o f</w>", "s k", "sk s</w>", "t o", "to y</w>"]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def byte_characters() -> list[str]:
    """Return the 256 printable characters that stand for bytes in byte-level BPE, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(rest))]


def save_tokenizer(folder: Path, pad_token: str = SPECIAL[1], size: int = 0) -> CLIPTokenizer:
    """Write a CLIP tokenizer with all bytes in the published format, and return it loaded from its files.

    With `size`, merges of rare letters fill its vocabulary to this size. A base in a single file needs a vocabulary of
    its text encoder's size.
    """
    folder.mkdir(parents=True)
    letters = byte_characters()
    rare = [letter for letter in letters if ord(letter) > 127]
    missing = max(0, size - 2 * len(letters) - len(MERGES) - len(SPECIAL))
    unused = [f"{first} {second}{end}" for end in ("", "</w>") for first in rare for second in rare][:missing]
    merges = [*MERGES, *unused]
    words = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges), *SPECIAL]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "unk_token": SPECIAL[1], "pad_token": pad_token}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def save_text_encoder(model: torch.nn.Module, folder: Path) -> None:
    """Save a text encoder with `text_model.` in each key, as in published checkpoints."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value
        for key, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def text_config(vocabulary: int, activation: str = "quick_gelu") -> CLIPTextConfig:
    """Return a config with three layers of width 32. The last two tokens of the vocabulary are the special tokens."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def autoencoder(scaling_factor: float, latent_channels: int = 4, **changes: object) -> AutoencoderKL:
    """Return a small VAE that downscales by 8, like the published ones. It has four latent channels by default."""
    small = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        sample_size=64,
        scaling_factor=scaling_factor,
        **(small | changes),
    )


def schedule(prediction_type: str, zero_snr: bool = False) -> dict:
    """Return the noise schedule with which SD1, SD2 and SDXL were trained."""
    values = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return values | {"prediction_type": prediction_type} | ({"rescale_betas_zero_snr": True} if zero_snr else {})


def save_sd2(folder: Path) -> Path:
    """Save a tiny SD2: SD1 with linear `proj_in`. Its width does not distinguish it from SD1."""
    return save_sd1(folder, linear=True)


def save_sd1(
    folder: Path,
    prediction_type: str = "epsilon",
    *,
    zero_snr: bool = False,
    cross_dim: int = 32,
    linear: bool = False,
) -> Path:
    """Save a tiny SD1 with one text encoder of width `cross_dim`. `proj_in` is a convolution unless `linear`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = save_tokenizer(folder / "tokenizer")
        config = text_config(len(tokenizer))
        config.hidden_size = cross_dim
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=cross_dim,
            attention_head_dim=4,
            use_linear_projection=linear,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        text_encoder, vae = CLIPTextModel(config), autoencoder(0.18215)
    if prediction_type == "epsilon":
        scheduler = PNDMScheduler(**schedule(prediction_type), skip_prk_steps=True, steps_offset=1)
    else:
        scheduler = DDIMScheduler(
            **schedule(prediction_type, zero_snr), clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipeline, folder, ["text_encoder"])


def save_sdxl(folder: Path, prediction_type: str = "epsilon", *, shallow: bool = False) -> Path:
    """Save a tiny SDXL: two text encoders, pooled text, six time ids, linear `proj_in`.

    If `shallow`, it has one layer per block and one transformer block per layer: 4 of 12 transformer blocks.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = save_tokenizer(folder / "tokenizer")
        tokenizer_2 = save_tokenizer(folder / "tokenizer_2", pad_token="!")
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1 if shallow else 2,
            transformer_layers_per_block=(1, 1 if shallow else 2),
            norm_num_groups=8,
            cross_attention_dim=64,
            attention_head_dim=(4, 8),
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        )
        text_encoder = CLIPTextModel(text_config(len(tokenizer)))
        text_encoder_2 = CLIPTextModelWithProjection(text_config(len(tokenizer), "gelu"))
        vae = autoencoder(0.13025)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**schedule(prediction_type), timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    return save(pipeline, folder, ["text_encoder", "text_encoder_2"])


def save(pipeline: DiffusionPipeline, folder: Path, encoders: list[str]) -> Path:
    """Save a pipeline. Restore the tokenizer files that were in the folder, and the published keys of text encoders."""
    files = {path: path.read_bytes() for path in folder.glob("tokenizer*/*")}
    pipeline.save_pretrained(folder)
    for name in encoders:
        save_text_encoder(getattr(pipeline, name), folder / name)
    for tokenizer in folder.glob("tokenizer*"):
        for path in tokenizer.iterdir():
            path.unlink()
    for path, content in files.items():
        path.write_bytes(content)
    return folder
