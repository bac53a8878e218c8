"""Tests that a loaded base computes what the diffusers pipeline computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from lorakit import families
from lorakit.families.conditioning import Conditioning
from lorakit.training import objective

TEXTS = ["a photo of sks toy", "", "a very long text " * 30]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return families.load(families.describe(folder), "cpu", dtype)


@pytest.fixture(scope="module")
def sd1(tiny_sd1: Path) -> Any:
    return load(tiny_sd1)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> Any:
    return load(tiny_sdxl)


@pytest.fixture(scope="module")
def sd1_pipeline(tiny_sd1: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_sd1, dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def sdxl_pipeline(tiny_sdxl: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32, local_files_only=True)


def test_texts_are_encoded_as_by_the_pipeline(sd1: Any, sd1_pipeline: Any) -> None:
    expected = sd1_pipeline.encode_prompt(TEXTS, "cpu", 1, False)[0]
    condition = sd1.encode_text(TEXTS)
    assert torch.equal(condition["encoder_hidden_states"], expected)
    assert condition["encoder_hidden_states"].shape == (3, 77, 32)
    assert condition.get("pooled") is None
    assert condition.get("time_ids") is None


def test_texts_of_sdxl_are_encoded_as_by_the_pipeline(sdxl: Any, sdxl_pipeline: Any) -> None:
    expected, _, pooled, _ = sdxl_pipeline.encode_prompt(TEXTS, device="cpu", do_classifier_free_guidance=False)
    condition = sdxl.encode_text(TEXTS)
    assert torch.equal(condition["encoder_hidden_states"], expected)
    assert torch.equal(condition["pooled"], pooled)
    assert condition["encoder_hidden_states"].shape == (3, 77, 64)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_texts_carry_gradients_only_on_request(request: pytest.FixtureRequest, name: str) -> None:
    family = request.getfixturevalue(name)
    bias = family.text_encoders["text_encoder"].get_submodule("encoder.layers.0.mlp.fc1").bias
    bias.requires_grad_(True)
    try:
        assert not family.encode_text(["a"])["encoder_hidden_states"].requires_grad
        assert family.encode_tokens(family.tokens(["a"]), grad=True)["encoder_hidden_states"].requires_grad
    finally:
        bias.requires_grad_(False)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_images_are_encoded_in_the_unets_scale_and_decoded(request: pytest.FixtureRequest, name: str) -> None:
    family = request.getfixturevalue(name)
    pixels = torch.rand((2, 3, 64, 48), generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_image(pixels)
    assert mean.shape == std.shape == (2, 4, 8, 6)
    posterior = family.vae.encode(pixels).latent_dist
    scale = {"sd1": 0.18215, "sdxl": 0.13025}[name]
    torch.testing.assert_close(mean, posterior.mean * scale)
    torch.testing.assert_close(std, posterior.std * scale)
    torch.testing.assert_close(family.decode(mean), family.vae.decode(posterior.mean).sample, rtol=1e-4, atol=1e-5)


def test_latent_means_and_shifts_of_other_vaes_are_applied(tiny_sd1: Path) -> None:
    family = load(tiny_sd1)
    pixels = torch.zeros((1, 3, 64, 64))
    raw = family.vae.encode(pixels).latent_dist
    family.vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4)
    mean, std = family.encode_image(pixels)
    offset = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    torch.testing.assert_close(mean, (raw.mean - offset) * 0.18215 / 2)
    torch.testing.assert_close(std, raw.std * 0.18215 / 2)
    torch.testing.assert_close(family.decode(mean), family.vae.decode(raw.mean).sample, rtol=1e-4, atol=1e-5)
    family.vae.register_to_config(latents_mean=None, latents_std=None, shift_factor=0.5)
    torch.testing.assert_close(family.encode_image(pixels)[0], (raw.mean - 0.5) * 0.18215)


def test_predict_returns_the_unets_output(sd1: Any) -> None:
    noisy, timesteps = torch.randn((2, 4, 8, 8)), torch.tensor([3, 900])
    condition = sd1.encode_text(["a", "b"])
    with torch.no_grad():
        expected = sd1.denoiser(noisy, timesteps, encoder_hidden_states=condition["encoder_hidden_states"]).sample
        assert torch.equal(sd1.predict(noisy, timesteps, condition), expected)


def test_sdxls_prediction_uses_pooled_text_and_sizes(sdxl: Any) -> None:
    noisy, timesteps = torch.randn((2, 4, 8, 8)), torch.tensor([3, 900])
    sizes = sdxl.size_conditions((1000, 800), (16, 8), (64, 48))
    assert sizes == {"time_ids": [1000, 800, 16, 8, 64, 48]}
    condition = sdxl.encode_text(["a", "b"]).with_sizes(sizes)
    assert condition["time_ids"].tolist() == [sizes["time_ids"]] * 2
    added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"].float()}
    with torch.no_grad():
        expected = sdxl.denoiser(
            noisy, timesteps, encoder_hidden_states=condition["encoder_hidden_states"], added_cond_kwargs=added
        ).sample
        actual = sdxl.predict(noisy, timesteps, condition)
        shifted = sdxl.predict(noisy, timesteps, condition.with_rows(time_ids=condition["time_ids"] + 8))
    assert torch.equal(actual, expected)
    assert not torch.equal(shifted, expected)


def test_the_noise_schedule_is_the_published_one(sd1: Any) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(sd1.prediction.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=2e-5)
    assert sd1.prediction.alphas_cumprod.dtype is torch.float32


def test_zero_terminal_snr_is_applied_and_trains_without_nan(tmp_path: Path) -> None:
    family = load(tiny.save_sd1(tmp_path / "zero", "v_prediction", zero_snr=True))
    schedule = family.prediction.alphas_cumprod
    assert schedule[-1] == 0
    # Lin et al. 2023, algorithm 1: shift and scale the square roots so that the first stays and the last is 0.
    roots = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    stretched = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    np.testing.assert_allclose(schedule.numpy(), stretched**2, rtol=1e-3, atol=1e-7)
    latents, noise = torch.randn((2, 4, 8, 8)), torch.randn((2, 4, 8, 8))
    timesteps = torch.tensor([999, 999])
    noisy = family.prediction.add_noise(latents, noise, timesteps)
    assert torch.equal(noisy, noise)
    target = family.prediction.target(latents, noise, timesteps)
    torch.testing.assert_close(target, -latents)
    prediction = family.predict(noisy, timesteps, family.encode_text(["a", "b"]))
    for gamma in (None, 5.0):
        weight = family.prediction.min_snr_weights(timesteps, gamma)
        assert torch.isfinite(objective.loss(prediction, target, weight=weight))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_everything_is_frozen_and_in_eval_mode(request: pytest.FixtureRequest, name: str) -> None:
    family = request.getfixturevalue(name)
    for module in [*family.modules().values(), family.vae]:
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(part.training for part in module.modules())
    assert list(family.modules()) == ["unet", *family.text_encoders]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sdxl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_vae_stays_float32_and_samples_work(
    request: pytest.FixtureRequest, name: str, dtype: torch.dtype
) -> None:
    family = load(request.getfixturevalue(name), dtype)
    assert {p.dtype for module in family.modules().values() for p in module.parameters()} == {dtype}
    assert {p.dtype for p in family.vae.parameters()} == {torch.float32}
    condition = family.encode_text(["a"])
    assert condition["encoder_hidden_states"].dtype is dtype
    condition = condition.with_sizes(family.size_conditions((64, 64), (0, 0), (64, 64)))
    with torch.no_grad():
        assert family.predict(torch.randn((1, 4, 8, 8)), torch.tensor([5]), condition).dtype is torch.float32
    mean, _ = family.encode_image(torch.zeros((1, 3, 64, 64)))
    assert mean.dtype is torch.float32
    image = family.pipeline()("a toy", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    assert np.isfinite(image).all()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_pipeline_shares_modules_and_draws_as_diffusers(request: pytest.FixtureRequest, name: str) -> None:
    family, reference = request.getfixturevalue(name), request.getfixturevalue(f"{name}_pipeline")
    reference.set_progress_bar_config(disable=True)
    pipeline = family.pipeline()
    assert pipeline.unet is family.denoiser
    assert pipeline.vae is family.vae
    assert pipeline.scheduler is not family.pipeline().scheduler
    images = [
        p("a toy", num_inference_steps=3, height=64, width=64, generator=torch.Generator().manual_seed(1)).images[0]
        for p in (pipeline, reference)
    ]
    ours, theirs = (np.asarray(image).astype(int) for image in images)
    # Products with frozen weights use another kernel, whose rounding can change a pixel by 1.
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 1e-3


def test_release_and_acquire_name_their_parts(sdxl: Any) -> None:
    sdxl.release("unet", "vae", "text_encoders")
    sdxl.acquire("unet", "vae", "text_encoders")
    assert sdxl.vae.device.type == "cpu"
    with pytest.raises(ValueError, match="unknown component 'tokenizer'"):
        sdxl.release("tokenizer")


def test_loading_prints_nothing(tiny_sd1: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny_sd1).pipeline()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_loading_never_uses_the_network(tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    calls: list[Any] = []

    def refuse(*_args: Any, **_: Any) -> None:
        calls.append(_args)
        raise OSError("the network was asked")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    load(tiny_sdxl).pipeline()
    assert calls == []


# -- conditions -------------------------------------------------------------------------------------------------


def condition(rows: int, sizes: bool = True) -> Conditioning:
    states = torch.arange(rows * 6.0).reshape(rows, 2, 3)
    ids = {"time_ids": torch.arange(rows * 6).reshape(rows, 6)} if sizes else {}
    pooled = torch.arange(rows * 2.0).reshape(rows, 2)
    return Conditioning(encoder_hidden_states=states, pooled=pooled).with_rows(**ids)


def test_conditions_are_indexed_joined_and_repeated() -> None:
    three = condition(3)
    picked = three.index(torch.tensor([2, 0, 2]))
    assert torch.equal(picked["encoder_hidden_states"], three["encoder_hidden_states"][[2, 0, 2]])
    assert torch.equal(picked["time_ids"], three["time_ids"][[2, 0, 2]])
    joined = Conditioning.cat([three, picked])
    assert len(joined) == 6
    assert torch.equal(joined["pooled"], torch.cat([three["pooled"], picked["pooled"]]))
    repeated = condition(1).expand(4)
    assert repeated["encoder_hidden_states"].shape == (4, 2, 3)
    assert repeated["time_ids"].shape == (4, 6)
    bare = condition(2, sizes=False)
    assert Conditioning.cat([bare, bare]).get("time_ids") is None
    assert torch.equal(bare.with_rows(time_ids=three["time_ids"][:2])["time_ids"], three["time_ids"][:2])


def test_moving_a_condition_keeps_the_dtype_of_its_sizes() -> None:
    converted = condition(2).to("cpu", torch.bfloat16)
    assert converted["encoder_hidden_states"].dtype is torch.bfloat16
    assert converted["pooled"].dtype is torch.bfloat16
    assert converted["time_ids"].dtype is torch.int64


def test_a_family_can_add_its_own_condition() -> None:
    angles = torch.arange(6.0).reshape(3, 2)
    three = condition(3).with_rows(angles=angles)
    picked = three.index(torch.tensor([2, 0]))
    assert torch.equal(picked["angles"], angles[[2, 0]])
    joined = Conditioning.cat([three, picked])
    assert len(joined) == 5
    assert torch.equal(joined["angles"], torch.cat([angles, angles[[2, 0]]]))
    assert torch.equal(three.index(torch.tensor([1])).expand(4)["angles"], angles[[1, 1, 1, 1]])
    converted = three.to("cpu", torch.bfloat16)
    assert converted["angles"].dtype is torch.bfloat16
    assert torch.equal(converted["angles"].float(), angles)
    assert torch.equal(three["angles"], angles)


def test_conditions_with_other_names_or_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="need the same names"):
        Conditioning.cat([condition(2), condition(2, sizes=False)])
    with pytest.raises(ValueError, match=r"equally many rows, not \{.*'time_ids': 3"):
        condition(2).with_rows(time_ids=torch.zeros((3, 6)))
    with pytest.raises(KeyError, match="time_ids"):
        condition(2, sizes=False)["time_ids"]
