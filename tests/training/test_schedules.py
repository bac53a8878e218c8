"""Tests of learning rate schedules against transformers and the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from lorakit import config
from lorakit.config import ConfigError, OptimizerConfig, lr_schedule

TOTAL = 40


def rates(**options: object) -> list[float]:
    return [lr_schedule.factor(OptimizerConfig(**options), step, TOTAL) for step in range(TOTAL + 1)]  # type: ignore


@pytest.mark.parametrize(
    ("options", "name", "specific"),
    [
        ({"lr_scheduler": "cosine"}, "cosine", {}),
        ({"lr_scheduler": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ({"lr_scheduler": "cosine_with_restarts", "lr_cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
        ({"lr_scheduler": "polynomial", "lr_power": 3.0}, "polynomial", {"power": 3.0, "lr_end": 0.0}),
        (
            {"lr_scheduler": "wsd", "lr_decay_ratio": 0.25},
            "warmup_stable_decay",
            {"num_decay_steps": 10, "decay_type": "linear"},
        ),
    ],
)
def test_a_schedule_equals_transformers(options, name, specific) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(
        name, optimizer, num_warmup_steps=0, num_training_steps=TOTAL, scheduler_specific_kwargs=specific
    )
    expected = [theirs.lr_lambdas[0](step) for step in range(TOTAL)]
    assert rates(**options)[:TOTAL] == pytest.approx(expected, abs=1e-12)


def test_rex_follows_the_papers_formula() -> None:
    expected = [(1 - step / TOTAL) / (0.5 + 0.5 * (1 - step / TOTAL)) for step in range(TOTAL + 1)]
    assert rates(lr_scheduler="rex") == pytest.approx(expected)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "cosine_with_restarts", "polynomial", "rex", "wsd"])
def test_every_schedule_warms_up_peaks_and_ends_at_its_floor(name: str) -> None:
    floor = {} if name == "constant" else {"min_lr_ratio": 0.2}
    actual = rates(lr_scheduler=name, warmup_ratio=0.25, **floor)
    assert actual[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]) and actual[10] == 1
    assert actual == pytest.approx(rates(lr_scheduler=name, warmup_steps=10, **floor))
    assert (
        actual[TOTAL] == pytest.approx(1 if name == "constant" else 0.2) and min(actual[10:]) >= actual[TOTAL] - 1e-12
    )


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "are both set: leave one out"),
        ({"args": {"lr": 1.0}}, "optimizer.args.lr has no effect: set optimizer.learning_rate"),
        ({"lr_cycles": 3}, "lr_cycles has no effect without optimizer.lr_scheduler = 'cosine_with_restarts'"),
        ({"lr_power": 3.0, "lr_scheduler": "cosine"}, "lr_power has no effect without .* = 'polynomial'"),
        ({"lr_decay_ratio": 0.5}, "lr_decay_ratio has no effect without .* = 'wsd'"),
        ({"min_lr_ratio": 0.5}, "min_lr_ratio has no effect with a constant rate"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], messages: str) -> None:
    changes = {f"optimizer.{name}": value for name, value in options.items()}
    with pytest.raises(ConfigError, match=messages):
        config.load(None, {"train.steps": 1, **changes})


def test_a_configured_warm_up_replaces_the_presets() -> None:
    assert config.load("subject-sd15").optimizer.warmup_ratio > 0
    settings = config.load("subject-sd15", {"optimizer.warmup_steps": 7}).optimizer
    assert (settings.warmup_steps, settings.warmup_ratio, lr_schedule.warmup_of(settings, 100)) == (7, 0.0, 7)


@pytest.mark.parametrize(("warmup", "decay"), [(10, 20), (4, 8), (20, 20)])
def test_wsd_decays_over_its_share_of_the_run(warmup: int, decay: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=TOTAL,
        scheduler_specific_kwargs={"num_decay_steps": decay, "decay_type": "linear"},
    )
    expected = [theirs.lr_lambdas[0](step) for step in range(warmup, TOTAL)]
    actual = rates(lr_scheduler="wsd", warmup_steps=warmup, lr_decay_ratio=decay / TOTAL)
    assert actual[warmup:TOTAL] == pytest.approx(expected, abs=1e-12)


def test_a_warm_up_that_leaves_too_few_steps_is_reported() -> None:
    def problem(**options: object) -> str | None:
        return lr_schedule.problem(OptimizerConfig(**options), TOTAL)  # type: ignore[arg-type]

    assert problem(lr_scheduler="wsd", warmup_steps=20, lr_decay_ratio=0.75) == (
        "optimizer.lr_decay_ratio = 0.75: the warm-up takes 20 of 40 steps, so wsd falls over the rest and is never "
        "constant"
    )
    actual = rates(lr_scheduler="wsd", warmup_steps=20, lr_decay_ratio=0.75)
    assert actual[19:22] == pytest.approx([1, 1, 0.95])  # the rate falls from the peak without a jump
    assert problem(lr_scheduler="wsd", warmup_steps=20, lr_decay_ratio=0.5) is None
    assert problem(lr_scheduler="wsd", lr_decay_ratio=1.0) is None
    assert problem(warmup_steps=80) == (
        "optimizer.warmup_steps = 80: the run has 40 steps, so the learning rate rises to the end and comes to 50% of "
        "optimizer.learning_rate"
    )
    assert "the run has 1 step, so" in str(lr_schedule.problem(OptimizerConfig(warmup_steps=5), 1))
