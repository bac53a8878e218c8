"""Every size and number of the making of pocket, in one place. A larger machine changes this page, not the code."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Counts are pictures seen, summed over the workers. Rates are peaks of a warm-up and cosine schedule."""

    size: int = 64  # px
    latent_channels: int = 4
    pictures: int = 120_000  # rendered
    max_tokens: int = 32  # prompt length; positions up to CLIP's 77 exist, the later ones equal the last trained one
    captions: int = 20_000  # for the tokenizer

    vae_channels: tuple[int, ...] = (32, 48, 64)
    vae_batch: int = 8
    vae_crop: int = 32  # px
    vae_pictures: int = 160_000
    vae_rate: float = 1.5e-3
    kl_weight: float = 1e-4
    decoder_pictures: int = 0  # none: the decoder stays as the autoencoder stage left it; try 40_000 on a GPU
    decoder_batch: int = 8
    decoder_rate: float = 4e-4
    adversarial_weight: float = 0.02

    judge_channels: tuple[int, ...] = (32, 64, 96, 128)
    judge_batch: int = 64
    judge_pictures: int = 200_000
    judge_rate: float = 2e-3
    judge_references: int = 48  # renders of each kind, subject and style whose mean features are its centroid

    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_batch: int = 256
    text_captions: int = 110_000
    text_rate: float = 2e-3

    unet_channels: tuple[int, ...] = (64, 96, 128)
    unet_heads: tuple[int, ...] = (1, 3, 4)
    unet_batch: int = 24  # per worker
    unet_every: int = 8  # steps on its own before a worker averages its weights with the others'
    unet_pictures: int = 330_000
    unet_rate: float = 1.2e-3
    ema: float = 0.999
    empty_captions: float = 0.1

    seed: int = 0
    bf16: bool = True  # autocast of the forward passes
    save_seconds: float = 120.0


SHIPPED = Recipe()
SMOKE = replace(
    SHIPPED,
    pictures=128, captions=400, vae_channels=(16, 16, 32), vae_pictures=256, decoder_pictures=32,
    judge_channels=(16, 16, 32, 32), judge_pictures=256, judge_references=1,
    text_width=32, text_layers=1, text_heads=2, text_captions=1024, unet_channels=(32, 32, 32),
    unet_heads=(1, 1, 1), unet_batch=16, unet_every=2, unet_pictures=128, save_seconds=1.0,
)  # fmt: skip
