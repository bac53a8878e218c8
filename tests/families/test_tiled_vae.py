"""Tests that the VAE in strips gives the result for the whole picture."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from lorakit.families import loading, tiled_vae


@pytest.fixture(scope="module", params=[True, False], ids=["quant_conv", "without"])
def vae(request: pytest.FixtureRequest) -> Any:
    """Stable Diffusion's VAE with an eighth of the channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=2,
            norm_num_groups=8,
            latent_channels=4,
            use_quant_conv=request.param,
            use_post_quant_conv=request.param,
        )
        for parameter in model.parameters():  # norms with initial weights would hide a missing norm
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Strips of one row, strips of several rows with a shorter last one, and one strip.
@pytest.mark.parametrize("strip", [1, 20_000, tiled_vae.STRIP])
@pytest.mark.parametrize("size", [(64, 64), (72, 104)])
def test_encoding_in_strips_equals_encoding(vae: Any, strip: int, size: tuple[int, int]) -> None:
    pixels = draw(2, 3, *size).clamp(-1, 1)
    untiled = vae.encode(pixels).latent_dist.parameters
    actual = tiled_vae.encode(vae, pixels, strip)
    assert actual.shape == untiled.shape
    assert (actual - untiled).norm() / untiled.norm() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strip", [1, 20_000, tiled_vae.STRIP])
@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_decoding_in_strips_equals_decoding(vae: Any, strip: int, size: tuple[int, int]) -> None:
    latents = draw(2, 4, *size)
    untiled = vae.decode(latents).sample
    actual = tiled_vae.decode(vae, latents, strip)
    assert actual.shape == untiled.shape
    assert (actual - untiled).norm() / untiled.norm() < 1e-5


def test_a_picture_is_tiled_only_if_it_does_not_fit(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = draw(1, 3, 64, 64).clamp(-1, 1)
    expected = loading.encode_image(vae, pixels)
    assert tiled_vae.fits(vae, 10**12, tiled_vae.ENCODING)  # a CPU has no separate memory, so this is always true
    monkeypatch.setattr(tiled_vae, "fits", lambda *_: False)
    monkeypatch.setattr(vae, "encode", None)
    for actual, right in zip(loading.encode_image(vae, pixels), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)


def test_free_memory_includes_torchs_unused_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(block_out_channels=(128,)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * 10**9)
    pools = [(0, 0), (0, 7)]  # 4 MB of torch's cache belong to a CUDA graph
    segments = [{"segment_pool_id": pool, "total_size": 5 * 10**6, "allocated_size": 10**6} for pool in pools]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert tiled_vae.fits(card, 1024 * 1024, tiled_vae.ENCODING)  # 2.68e9 of 3e9 bytes
    assert not tiled_vae.fits(card, 1024 * 1024, tiled_vae.DECODING)  # 3.22e9 bytes
    segments[1]["total_size"] = 5 * 10**8
    assert not tiled_vae.fits(card, 1024 * 1024, tiled_vae.ENCODING)
    card.config.block_out_channels = (64,)
    assert tiled_vae.fits(card, 1024 * 1024, tiled_vae.DECODING)
