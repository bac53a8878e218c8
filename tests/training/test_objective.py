"""Tests of the objective against the papers' formulas in numpy and float64."""

import numpy as np
import pytest
import torch

from lorakit import adapters, families
from lorakit.config import LoraConfig
from lorakit.families import prediction
from lorakit.training import objective

DRAW = np.random.default_rng(0)
LATENTS, NOISE, GUESS = (DRAW.standard_normal((4, 3, 5, 6)).astype(np.float32) for _ in range(3))
TIMESTEPS = np.array([0, 200, 700, 999])
SCHEDULE = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(a, dtype=np.int64 if a.dtype == int else np.float32)) for a in arrays]


def reference_target(prediction_type: str, latents: np.ndarray, noise: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Return the target by each type's definition; a is alpha_bar `[B, 1, 1, 1]`."""
    return {
        "epsilon": noise,
        "v_prediction": np.sqrt(a) * noise - np.sqrt(1 - a) * latents,
        "flow_prediction": noise - latents,
    }[prediction_type]


def reference_weight(prediction_type: str, a: np.ndarray, gamma: float) -> np.ndarray:
    """Return min(SNR, gamma) / SNR for epsilon, and min(SNR, gamma) / (SNR + 1) for v."""
    snr = a / (1 - a)
    return np.minimum(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def prediction_of(prediction_type: str) -> prediction.Prediction:
    return prediction.of_schedule(prediction_type, *tensors(SCHEDULE))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_target_and_snr_follow_the_formulas(prediction_type: str) -> None:
    a = SCHEDULE[TIMESTEPS].reshape(-1, 1, 1, 1)
    latents, noise, timesteps = tensors(LATENTS, NOISE, TIMESTEPS)
    of = prediction_of(prediction_type)
    noisy, target = of.add_noise(latents, noise, timesteps), of.target(latents, noise, timesteps)
    np.testing.assert_allclose(noisy.numpy(), np.sqrt(a) * LATENTS + np.sqrt(1 - a) * NOISE, rtol=1e-4, atol=1e-5)
    expected = reference_target(prediction_type, LATENTS, NOISE, a)
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of.snr(timesteps).numpy(), (a / (1 - a)).reshape(-1), rtol=2e-4)
    # From the exact prediction, picture and noise follow; at the highest noise, epsilon loses the picture to rounding.
    for actual, original in zip(of.to_x0_noise(noisy, target, timesteps), (latents, noise), strict=True):
        torch.testing.assert_close(actual[:3], original[:3], rtol=1e-3, atol=1e-3)


def test_flow_equals_diffusers_scheduler_and_the_closed_forms() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, flow = FlowMatchEulerDiscreteScheduler(shift=3.0), prediction.Flow(3.0)
    timesteps = scheduler.timesteps[[0, 100, 500, 999]]
    latents, noise = tensors(LATENTS, NOISE)
    noisy, target = flow.add_noise(latents, noise, timesteps), flow.target(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    assert torch.equal(target, noise - latents)
    torch.testing.assert_close(flow.to_x0_noise(noisy, target, timesteps), (latents, noise), rtol=1e-4, atol=1e-5)
    sigma = timesteps / 1000
    torch.testing.assert_close(flow.snr(timesteps), (1 - sigma) ** 2 / sigma**2)
    with pytest.raises(ValueError, match="min-SNR weights are not defined for 'flow_prediction'"):
        flow.min_snr_weights(timesteps, 5.0)
    assert flow.default_sampler(scheduler) == (scheduler, "Euler")


def test_a_shift_of_flow_may_depend_on_the_size() -> None:
    flow = prediction.Flow(3.0, shift_for=lambda cells: cells / 1024)
    shares = torch.tensor([0.1, 0.5, 0.9])
    plain = prediction.Flow().timesteps_at(shares)
    assert torch.equal(flow.timesteps_at(shares, 1024), plain)
    assert torch.equal(flow.timesteps_at(shares), prediction.Flow(3.0).timesteps_at(shares))
    shifted = 4 * plain / (1 + 3 * plain / 1000)
    torch.testing.assert_close(flow.timesteps_at(shares, 4096), shifted)


@pytest.mark.parametrize("of", [prediction.Flow(3.0), prediction.of_schedule("epsilon", torch.linspace(1, 0, 1000))])
def test_timesteps_are_a_function_of_the_generator_and_finite(of: prediction.Prediction) -> None:
    one, other = (of.sample_timesteps(16, torch.Generator().manual_seed(3), "cpu") for _ in range(2))
    assert torch.equal(one, other) and (one.diff() >= 0).all() and len(one.unique()) == 16
    ends = of.timesteps_at(torch.tensor([0.0, 1.0]))
    assert ends[0] == 0 and 999 <= ends[1] <= 1000


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(ValueError, match="unknown prediction type 'sample'; known: epsilon, v_prediction"):
        prediction_of("sample")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_follow_the_formula(prediction_type: str, gamma: float) -> None:
    everywhere = np.arange(1000)
    weights = prediction_of(prediction_type).min_snr_weights(*tensors(everywhere), gamma)
    assert weights is not None
    np.testing.assert_allclose(weights.numpy(), reference_weight(prediction_type, SCHEDULE, gamma), rtol=2e-4)


def test_min_snr_is_finite_if_the_schedule_ends_at_zero() -> None:
    schedule = torch.tensor([0.9, 0.5, 0.0])
    timesteps = torch.arange(3)
    # The limits at SNR 0: SNR / SNR = 1 for epsilon, 0 / 1 = 0 for v.
    assert prediction.Epsilon(schedule).min_snr_weights(timesteps, 5.0).tolist() == pytest.approx([5 / 9, 1, 1])
    assert prediction.VPrediction(schedule).min_snr_weights(timesteps, 5.0).tolist() == pytest.approx([0.5, 0.5, 0])


def test_without_gamma_min_snr_weights_are_none() -> None:
    assert prediction_of("epsilon").min_snr_weights(*tensors(TIMESTEPS), None) is None


@pytest.mark.parametrize("kind", ["mse", "huber"])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_follow_the_formulas(kind: str, weighted: bool) -> None:
    weight = np.array([0.5, 1, 2, 0.0])
    difference = GUESS.astype(np.float64) - NOISE
    c = 0.1
    distance = difference**2 if kind == "mse" else 2 * c * (np.sqrt(difference**2 + c**2) - c)
    expected = (distance.mean(axis=(1, 2, 3)) * (weight if weighted else 1)).mean()
    row_weights = tensors(weight)[0] if weighted else None
    assert objective.loss(*tensors(GUESS, NOISE), kind, row_weights).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_a_mask_excludes_its_zeros_and_rescales_the_rest(kind: str) -> None:
    mask = torch.zeros(4, 1, 5, 6)
    mask[:, :, :, :2] = 1
    guess = torch.from_numpy(GUESS).requires_grad_()
    loss = objective.loss(guess, torch.from_numpy(NOISE), kind, mask=mask)
    (gradient,) = torch.autograd.grad(loss, guess)
    assert torch.count_nonzero(gradient[..., 2:]) == 0
    assert torch.count_nonzero(gradient[..., :2]) == gradient[..., :2].numel()
    unmasked = objective.loss(guess[..., :2], torch.from_numpy(NOISE)[..., :2], kind)
    torch.testing.assert_close(loss, unmasked)


def test_masks_may_be_soft_or_empty() -> None:
    prediction, target = tensors(GUESS, NOISE)
    half = objective.loss(prediction, target, mask=torch.full((4, 1, 5, 6), 0.5))
    torch.testing.assert_close(half, objective.loss(prediction, target))
    prediction.requires_grad_()
    nothing = objective.loss(prediction, target, mask=torch.zeros((4, 1, 5, 6)))
    (gradient,) = torch.autograd.grad(nothing, prediction)
    assert nothing == 0
    assert torch.count_nonzero(gradient) == 0


def test_noise_offset_shifts_each_channel_by_one_value() -> None:
    shape = (64, 4, 16, 16)
    plain = objective.sample_noise(torch.Generator().manual_seed(0), shape, "cpu")
    noise = objective.sample_noise(torch.Generator().manual_seed(0), shape, "cpu", 0.3)
    assert torch.equal(plain, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    shift = (noise - plain).flatten(2)
    assert shift.std(dim=2).max() < 1e-5
    assert shift.mean(dim=2).std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd1_v", "tiny_sdxl"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_first_loss_equals_an_independent_computation(
    request: pytest.FixtureRequest, name: str, gamma: float | None
) -> None:
    family = families.load(families.describe(request.getfixturevalue(name)), "cpu", torch.float32)
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((3, 4, 8, 8), generator=draw) for _ in range(2))
    timesteps = torch.tensor([10, 500, 990])
    condition = family.encode_text(["a", "b", "c"])
    sizes = family.size_conditions((100, 80), (8, 0), (64, 64))
    condition = condition.with_sizes(sizes)

    a = SCHEDULE[timesteps.numpy()].reshape(-1, 1, 1, 1)
    noisy = torch.from_numpy(np.sqrt(a) * latents.numpy() + np.sqrt(1 - a) * noise.numpy()).float()
    added = {}
    if sizes:
        added = {"text_embeds": condition["pooled"], "time_ids": torch.tensor([[100.0, 80, 8, 0, 64, 64]] * 3)}
    with torch.no_grad():
        prediction = family.denoiser(
            noisy, timesteps, condition["encoder_hidden_states"], added_cond_kwargs=added
        ).sample.numpy()
    target = reference_target(family.prediction.name, latents.numpy(), noise.numpy(), a)
    each = ((prediction - target) ** 2).mean(axis=(1, 2, 3))
    if gamma is not None:
        each = each * reference_weight(family.prediction.name, a.reshape(-1), gamma)

    adapters.attach(family, LoraConfig(rank=2, target_modules="linear+conv", train_text_encoder=True))
    of = family.prediction
    predicted = family.predict(of.add_noise(latents, noise, timesteps), timesteps, condition)
    goal = of.target(latents, noise, timesteps)
    weight = of.min_snr_weights(timesteps, gamma)
    assert objective.loss(predicted, goal, weight=weight).item() == pytest.approx(each.mean(), rel=1e-4)
