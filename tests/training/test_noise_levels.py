"""Tests of loss weights by noise level, timestep ranges and distributions, and coarse noise, against formulas."""

from __future__ import annotations

import pytest
import torch

from lorakit import config
from lorakit.config import ConfigError
from lorakit.families import prediction
from lorakit.training import objective

SCHEDULE = torch.linspace(0.999, 0.01, 1000)
EVERYWHERE = torch.arange(1000)
SNR = SCHEDULE / (1 - SCHEDULE)


@pytest.mark.parametrize(("cls", "by"), [(prediction.Epsilon, SNR), (prediction.VPrediction, SNR + 1)])
def test_loss_weights_follow_the_papers_formulas(cls: type, by: torch.Tensor) -> None:
    of = cls(SCHEDULE)
    soft = of.loss_weights(EVERYWHERE, "soft_min", 5.0)
    assert torch.allclose(soft, (1 / (1 / SNR + 1 / 5)) / by)
    assert torch.allclose(of.loss_weights(EVERYWHERE, "debiased", None), SNR.sqrt() / by)
    assert torch.equal(of.loss_weights(EVERYWHERE, "min", 5.0), of.min_snr_weights(EVERYWHERE, 5.0))
    assert of.loss_weights(EVERYWHERE, "min", None) is None
    zero_terminal = cls(torch.cat([SCHEDULE[:-1], torch.zeros(1)]))
    assert zero_terminal.loss_weights(EVERYWHERE, "debiased", None).isfinite().all()


def test_timesteps_stay_in_range_and_concentrate_in_the_middle() -> None:
    of = prediction.Epsilon(SCHEDULE)

    def draw(**how: object) -> torch.Tensor:
        return of.sample_timesteps(4000, torch.Generator().manual_seed(0), "cpu", **how).float()

    part = draw(between=(0.2, 0.6))
    assert part.min() == 200 and part.max() == 599 and part.mean() == pytest.approx(400, abs=1)
    middle = draw(sampling="logit_normal") / 1000
    assert middle.median() == pytest.approx(0.5, abs=0.002)
    logit = (middle.clamp(1e-3, 1 - 1e-3)).logit()
    assert logit.std() == pytest.approx(1, abs=0.01)


def test_uniform_timesteps_of_a_flow_are_uniform_or_shifted() -> None:
    """The default of Stable Diffusion 3 is logit-normal with shift 3. With uniform sampling only the given shift
    applies."""
    of = prediction.Flow(3.0)

    def draw(**how: object) -> torch.Tensor:
        return of.sample_timesteps(4000, torch.Generator().manual_seed(0), "cpu", **how).sort().values / 1000

    shares = (torch.arange(4000) + 0.5) / 4000
    torch.testing.assert_close(draw(sampling="uniform"), shares, rtol=0, atol=2e-3)
    torch.testing.assert_close(draw(sampling="uniform", shift=3.0), 3 * shares / (1 + 2 * shares), rtol=0, atol=2e-3)
    assert (draw(sampling="uniform", between=(0.5, 1.0)) >= 0.5).all() and (draw() - shares).abs().max() > 0.1
    diffusion = prediction.Epsilon(SCHEDULE)
    same = [diffusion.sample_timesteps(9, torch.Generator(), "cpu", sampling=name) for name in ("base", "uniform")]
    assert torch.equal(*same)


def test_coarse_noise_has_unit_deviation_and_is_correlated() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn((8, 4, 32, 32), generator=generator)
    noise = objective.add_coarse_noise(plain, generator, 0.6)
    assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx([1.0] * 8, abs=1e-5)

    def neighbours(field: torch.Tensor) -> float:
        return float((field[..., 1:] * field[..., :-1]).mean())

    assert abs(neighbours(plain)) < 0.02 and neighbours(noise) > 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_low": 0.7, "timestep_high": 0.5}, r"timestep_low must be below train.timestep_high"),
        ({"snr_weighting": "soft_min"}, r"needs train.min_snr_gamma; 5 is usual"),
        ({"snr_weighting": "debiased", "min_snr_gamma": 5.0}, r"has no effect with train.snr_weighting = 'debiased'"),
    ],
)
def test_contradicting_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(None, {"train.steps": 1} | {f"train.{name}": value for name, value in options.items()})
