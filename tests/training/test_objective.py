"""The objective against references written from the papers' formulas in numpy, in float64."""

import numpy as np
import pytest
import torch

from lorakit import adapters, families
from lorakit.config import LoraConfig
from lorakit.training import objective

DRAW = np.random.default_rng(0)
LATENTS, NOISE, GUESS = (DRAW.standard_normal((4, 3, 5, 6)).astype(np.float32) for _ in range(3))
TIMESTEPS = np.array([0, 200, 700, 999])
SCHEDULE = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(a, dtype=np.int64 if a.dtype == int else np.float32)) for a in arrays]


def reference_target(prediction_type: str, latents: np.ndarray, noise: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Target by the definition of each type; a is alpha_bar `[B, 1, 1, 1]`."""
    return {
        "epsilon": noise,
        "v_prediction": np.sqrt(a) * noise - np.sqrt(1 - a) * latents,
        "flow_prediction": noise - latents,
    }[prediction_type]


def reference_weight(prediction_type: str, a: np.ndarray, gamma: float) -> np.ndarray:
    """min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v."""
    snr = a / (1 - a)
    return np.minimum(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def test_noise_is_added_by_the_formula() -> None:
    a = SCHEDULE[TIMESTEPS].reshape(-1, 1, 1, 1)
    found = objective.add_noise(*tensors(LATENTS, NOISE, TIMESTEPS, SCHEDULE)).numpy()
    np.testing.assert_allclose(found, np.sqrt(a) * LATENTS + np.sqrt(1 - a) * NOISE, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_targets(prediction_type: str) -> None:
    a = SCHEDULE[TIMESTEPS].reshape(-1, 1, 1, 1)
    found = objective.target(prediction_type, *tensors(LATENTS, NOISE, TIMESTEPS, SCHEDULE)).numpy()
    np.testing.assert_allclose(found, reference_target(prediction_type, LATENTS, NOISE, a), rtol=1e-4, atol=1e-5)


def test_a_right_v_gives_the_latents_back() -> None:
    latents, noise, timesteps, schedule = tensors(LATENTS, NOISE, TIMESTEPS, SCHEDULE)
    noisy = objective.add_noise(latents, noise, timesteps, schedule)
    v = objective.target("v_prediction", latents, noise, timesteps, schedule)
    a = schedule[timesteps].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(prediction_type: str, gamma: float) -> None:
    everywhere = np.arange(1000)
    found = objective.weights(prediction_type, *tensors(everywhere, SCHEDULE), gamma)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), reference_weight(prediction_type, SCHEDULE, gamma), rtol=2e-4)


def test_min_snr_is_finite_where_the_schedule_ends_in_zero() -> None:
    schedule = torch.tensor([0.9, 0.5, 0.0])
    timesteps = torch.arange(3)
    # The limits: SNR / SNR = 1 for epsilon, 0 / 1 = 0 for v.
    assert objective.weights("epsilon", timesteps, schedule, 5.0).tolist() == pytest.approx([5 / 9, 1, 1])
    assert objective.weights("v_prediction", timesteps, schedule, 5.0).tolist() == pytest.approx([0.5, 0.5, 0])


def test_without_gamma_there_are_no_weights() -> None:
    assert objective.weights("epsilon", *tensors(TIMESTEPS, SCHEDULE), None) is None


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown prediction type 'sample'"):
        objective.target("sample", *tensors(LATENTS, NOISE, TIMESTEPS, SCHEDULE))
    with pytest.raises(ValueError, match="not defined for 'flow_prediction'"):
        objective.weights("flow_prediction", *tensors(TIMESTEPS, SCHEDULE), 5.0)


@pytest.mark.parametrize("kind", ["mse", "huber"])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses(kind: str, weighted: bool) -> None:
    weight = np.array([0.5, 1, 2, 0.0])
    difference = GUESS.astype(np.float64) - NOISE
    c = 0.1
    distance = difference**2 if kind == "mse" else 2 * c * (np.sqrt(difference**2 + c**2) - c)
    expected = (distance.mean(axis=(1, 2, 3)) * (weight if weighted else 1)).mean()
    given = tensors(weight)[0] if weighted else None
    assert objective.loss(*tensors(GUESS, NOISE), kind, given).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_a_mask_hides_its_zeros_exactly_and_the_rest_counts_as_a_whole_picture(kind: str) -> None:
    mask = torch.zeros(4, 1, 5, 6)
    mask[:, :, :, :2] = 1
    guess = torch.from_numpy(GUESS).requires_grad_()
    loss = objective.loss(guess, torch.from_numpy(NOISE), kind, mask=mask)
    (gradient,) = torch.autograd.grad(loss, guess)
    assert torch.count_nonzero(gradient[..., 2:]) == 0
    assert torch.count_nonzero(gradient[..., :2]) == gradient[..., :2].numel()
    shown = objective.loss(guess[..., :2], torch.from_numpy(NOISE)[..., :2], kind)
    torch.testing.assert_close(loss, shown)


def test_masks_may_be_soft_or_empty() -> None:
    prediction, target = tensors(GUESS, NOISE)
    half = objective.loss(prediction, target, mask=torch.full((4, 1, 5, 6), 0.5))
    torch.testing.assert_close(half, objective.loss(prediction, target))
    prediction.requires_grad_()
    nothing = objective.loss(prediction, target, mask=torch.zeros((4, 1, 5, 6)))
    (gradient,) = torch.autograd.grad(nothing, prediction)
    assert nothing == 0
    assert torch.count_nonzero(gradient) == 0


def test_noise_offset_moves_whole_channels() -> None:
    shape = (64, 4, 16, 16)
    plain = objective.sample_noise(torch.Generator().manual_seed(0), shape, "cpu")
    moved = objective.sample_noise(torch.Generator().manual_seed(0), shape, "cpu", 0.3)
    assert torch.equal(plain, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    shift = (moved - plain).flatten(2)
    assert shift.std(dim=2).max() < 1e-5
    assert shift.mean(dim=2).std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd1_v", "tiny_sdxl"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_first_loss_is_the_bases_by_an_independent_reckoning(
    request: pytest.FixtureRequest, name: str, gamma: float | None
) -> None:
    family = families.load(families.describe(request.getfixturevalue(name)), "cpu", torch.float32)
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((3, 4, 8, 8), generator=draw) for _ in range(2))
    timesteps = torch.tensor([10, 500, 990])
    condition = family.encode_text(["a", "b", "c"])
    ids = family.time_ids((100, 80), (8, 0), (64, 64))
    if ids is not None:
        condition = condition.with_sizes(torch.tensor([ids] * 3))

    a = SCHEDULE[timesteps.numpy()].reshape(-1, 1, 1, 1)
    noisy = torch.from_numpy(np.sqrt(a) * latents.numpy() + np.sqrt(1 - a) * noise.numpy()).float()
    added = {}
    if ids is not None:
        added = {"text_embeds": condition.pooled, "time_ids": torch.tensor([[100.0, 80, 8, 0, 64, 64]] * 3)}
    with torch.no_grad():
        said = family.unet(noisy, timesteps, condition.encoder_hidden_states, added_cond_kwargs=added).sample.numpy()
    target = reference_target(family.prediction_type, latents.numpy(), noise.numpy(), a)
    each = ((said - target) ** 2).mean(axis=(1, 2, 3))
    if gamma is not None:
        each = each * reference_weight(family.prediction_type, a.reshape(-1), gamma)

    adapters.attach(family, LoraConfig(rank=2, target_modules="linear+conv", train_text_encoder=True))
    schedule = family.alphas_cumprod
    prediction = family.predict(objective.add_noise(latents, noise, timesteps, schedule), timesteps, condition)
    goal = objective.target(family.prediction_type, latents, noise, timesteps, schedule)
    weight = objective.weights(family.prediction_type, timesteps, schedule, gamma)
    assert objective.loss(prediction, goal, weight=weight).item() == pytest.approx(each.mean(), rel=1e-4)
