"""Tests of the smoothed loss."""

import pytest

from lorakit.training.loss_step import RunningMean


def test_smoothing_is_a_weighted_mean() -> None:
    mean = RunningMean(0.5)
    expected = [4.0, (0.5 * 4 + 0) / 1.5, (0.25 * 4 + 0.5 * 0 + 1) / 1.75]
    assert [mean.add(value) for value in (4.0, 0.0, 1.0)] == pytest.approx(expected)


def test_a_constant_is_not_changed() -> None:
    mean = RunningMean()
    assert [mean.add(2.0) for _ in range(50)] == pytest.approx([2.0] * 50)


def test_a_mean_continues_from_its_state() -> None:
    mean, repeat = RunningMean(), RunningMean()
    mean.add(3.0)
    repeat.load_state(mean.state())
    assert repeat.add(1.0) == mean.add(1.0)
