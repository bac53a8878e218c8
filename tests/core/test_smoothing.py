"""The smoothed loss."""

import math

import pytest

from lorakit.core.smoothing import RunningMean, smooth


def test_smoothing_is_a_weighted_mean() -> None:
    expected = [4.0, (0.5 * 4 + 0) / 1.5, (0.25 * 4 + 0.5 * 0 + 1) / 1.75]
    assert smooth([4.0, 0.0, 1.0], 0.5) == pytest.approx(expected)


def test_a_constant_stays_and_a_value_that_is_not_finite_changes_nothing() -> None:
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smooth([1.0, math.nan, math.inf, 3.0], 0.5) == pytest.approx([1.0, 1.0, 1.0, (0.5 + 3) / 1.5])
    assert math.isnan(RunningMean().value)
