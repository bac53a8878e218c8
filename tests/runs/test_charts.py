"""Tests of a run's curves as SVG."""

import math
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from lorakit.runs import charts
from lorakit.runs.charts import Line

SVG = "{http://www.w3.org/2000/svg}"


def step(number: int, loss: float | None, rate: float = 1e-4) -> dict[str, Any]:
    smoothed = None if loss is None else (loss + 2) / 2
    return {"event": "step", "step": number, "loss": loss, "smoothed_loss": smoothed, "learning_rate": rate}


def validation(number: int, mse: float) -> dict[str, Any]:
    bands = [{"timesteps": [250 * n, 250 * n + 249], "mse": mse * (n + 1) / 2} for n in range(4)]
    photos = {"photos": 2, "source": "held-out photos"}
    return {"event": "validation", "step": number, "mse": mse, "bands": bands, "prior_drift": 0.01, **photos}


def points(svg: str, number: int = 0) -> list[tuple[float, ...]]:
    text = svg.split('points="')[number + 1].split('"')[0]
    return [tuple(map(float, point.split(","))) for point in text.split()]


def test_a_chart_is_drawn_to_scale_and_escaped() -> None:
    svg = charts.chart("a & b", [Line("<loss>", [(0, 1.0), (100, 3.0)])])
    assert "&lt;loss&gt;" in svg and "a &amp; b" in svg and "<loss>" not in svg
    (x0, y0), (x1, y1) = points(svg)
    assert x0 == charts.LEFT and x1 == charts.WIDTH - charts.RIGHT
    bottom = charts.HEIGHT - charts.BOTTOM
    assert (bottom - y1) / (bottom - y0) == pytest.approx(3, abs=0.01), "heights are from 0"
    assert charts.chart("empty", [Line("x", [])]) == ""


def test_values_above_the_top_of_the_scale_are_drawn_at_it() -> None:
    svg = charts.chart("loss", [Line("x", [(0, 1.0), (1, 50.0), (2, 2.0)])], top=2.0)
    assert [y >= charts.TOP for _, y in points(svg)] == [True] * 3
    assert points(svg)[1][1] == charts.TOP


def test_thinning_keeps_the_last_point() -> None:
    many = [(n, float(n)) for n in range(5000)]
    thinned = charts.thin(many)
    assert len(thinned) <= charts.MAX_POINTS + 1 and thinned[0] == many[0] and thinned[-1] == many[-1]


def test_each_measured_quantity_has_a_chart() -> None:
    events = [step(n, 1 / n) for n in range(1, 31)]
    measured = [validation(10, 0.3), validation(20, 0.2)]
    assert len(charts.run_charts(events)) == 2
    loss, rate, error, drift = charts.run_charts([*events, *measured])
    assert "Training loss" in loss and "Learning rate" in rate and "Prior drift" in drift
    assert error.count("<polyline") == 5 and "t 750-999" in error and "on 2 held-out photos" in error
    assert charts.run_charts([]) == []
    labels = dict.fromkeys(charts.ENGLISH, "損失")
    assert "Training loss" not in charts.run_charts(events, labels=labels)[0]


def test_the_smoothed_loss_is_drawn_over_the_raw_one() -> None:
    loss, _ = charts.run_charts([step(1, 4.0), step(2, 2.0)])
    raw, smoothed = points(loss, 0), points(loss, 1)
    assert raw[0][1] < smoothed[0][1] and raw[1] == smoothed[1]


def test_a_loss_that_is_not_a_number_is_omitted() -> None:
    loss, rate = charts.run_charts([step(1, 1.0), step(2, None), step(3, math.nan), step(4, 2.0)])
    assert len(points(loss)) == 2 and len(points(rate)) == 4


def test_a_repeated_step_counts_with_its_last_values() -> None:
    first, repeat, second = step(1, 9.0), step(1, 1.0), step(2, 1.0)
    assert charts.run_charts([first, second, repeat]) == charts.run_charts([repeat, second])
    assert charts.run_charts([repeat, second, first]) != charts.run_charts([repeat, second])


def test_a_sheet_is_one_svg_with_inline_colours() -> None:
    four = charts.run_charts([step(1, 1.0), validation(1, 0.2)])
    root = ET.fromstring(charts.sheet(four))
    assert root.tag == f"{SVG}svg" and len(root.findall(f"{SVG}svg")) == 4
    assert {(chart.get("x"), chart.get("y")) for chart in root.findall(f"{SVG}svg")} == {
        (x, y) for x in ("0", "664") for y in ("0", "284")
    }
    style = root.findtext(f"{SVG}style") or ""
    assert "--lk-accent: #2a6fb8" in style and "prefers-color-scheme" not in style
    assert ET.fromstring(charts.sheet([])).tag == f"{SVG}svg"


def test_the_loss_is_smoothed_and_its_start_omitted() -> None:
    points = [(float(number), value) for number, value in enumerate([4.0, 2.0, 2.0, 8.0], 1)]
    weights = [0.5**k for k in range(4)]
    expected = [
        sum(w * v for w, (_, v) in zip(weights, reversed(points[:n]), strict=False)) / sum(weights[:n])
        for n in range(1, 5)
    ]
    assert [value for _, value in charts.smooth(points, 0.5)] == pytest.approx(expected)
    events = [{**step(int(at), value), "smoothed_loss": 1.0} for at, value in points]
    logged, own, late = (
        charts.run_charts(events, **view)[0] for view in ({}, {"smoothing": 0.5}, {"smoothing": 0.5, "start": 0.75})
    )
    assert "smoothed 1;" in logged.replace('"', ";") and f"smoothed {expected[-1]:.4g}" in own
    assert "smoothed " + f"{expected[-1]:.4g}" in late and 'middle">3<' in late and 'middle">1<' not in late
