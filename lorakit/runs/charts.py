"""The curves of a run as SVG text, for the report, for curves.svg and for the front end: no library, no script.

Colours are variables (`--lk-ink` and so on) that the page around a chart sets; `PALETTE` sets them for a page
without colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 64, 24
# Lines with more points than this are thinned, because a chart cannot show more points than pixels.
MAX_POINTS = 600
LEGEND_COLUMNS = 3
# Losses above this quantile do not affect the scale.
LOSS_PERCENTILE = 0.99

# Lines ordered from little noise to much noise use the colours t1 to t4.
COLOURS = ("accent", "ink", "soft", "t1", "t2", "t3", "t4")
LIGHT = """
:root { --lk-ink: #22221f; --lk-soft: #8a8984; --lk-grid: #e3e1db; --lk-accent: #2a6fb8; --lk-t1: #9cc4ea;
  --lk-t2: #5f9fdb; --lk-t3: #2a6fb8; --lk-t4: #123e6d; }
"""
PALETTE = (
    LIGHT
    + """@media (prefers-color-scheme: dark) { :root { --lk-ink: #e8e7e2; --lk-soft: #96958f; --lk-grid: #36352f;
  --lk-accent: #6fb0ee; --lk-t1: #2f5f91; --lk-t2: #4a8bcb; --lk-t3: #7cb8f0; --lk-t4: #c4e0fa; } }
"""
)
STYLE = """
.lk-chart { width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; }
.lk-chart text { fill: var(--lk-soft); } .lk-chart .lk-title { fill: var(--lk-ink); font-weight: 600; font-size: 14px; }
.lk-chart .lk-value { fill: var(--lk-ink); } .lk-chart .lk-grid { stroke: var(--lk-grid); }
.lk-chart polyline { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.lk-chart .lk-faint { stroke-width: 0.8; opacity: 0.55; } .lk-chart circle, .lk-chart .lk-dot { fill: currentColor; }
""" + "".join(f".lk-{name} {{ color: var(--lk-{name}); }} " for name in COLOURS)
# Texts of the charts by key. The front end passes the same keys in the language of the page.
ENGLISH = {
    "loss": "Training loss",
    "each_step": "each step",
    "smoothed": "smoothed",
    "rate": "Learning rate",
    "validation": "Validation error (MSE) on {photos} {source}",
    "all_timesteps": "all timesteps",
    "drift": "Prior drift: change on the class prompt, %",
}


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: name in the legend; a chart with one line needs none.
        points: (step, value) pairs in order of steps.
        colour: one of `COLOURS`.
        dots: whether to mark each point.
        faint: whether to draw the line thin, behind a more important line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = "accent"
    dots: bool = False
    faint: bool = False


def run_charts(
    events: Iterable[Mapping[str, Any]],
    *,
    labels: Mapping[str, str] = ENGLISH,
    smoothing: float = 0.0,
    start: float = 0.0,
) -> list[str]:
    """Charts of loss, learning rate, validation error by timestep band, and prior drift, over optimizer steps.

    What the log has no events of gets no chart. A step that was done twice (a resume goes back to its checkpoint)
    counts as it was done last.

    Args:
        events: of the log, kinds "step" and "validation".
        labels: a text for each key of `ENGLISH`; that of "validation" may name keys of the event.
        smoothing: weight of what was before in the mean of the loss; 0: the mean that the run logged.
        start: share of the run's steps after which the charts begin.
    """
    latest: dict[str, dict[int, Mapping[str, Any]]] = {"step": {}, "validation": {}}
    for event in events:
        if event["event"] in latest and isinstance(event.get("step"), int):
            latest[event["event"]][event["step"]] = event
    steps, validations = ([kind[step] for step in sorted(kind)] for kind in latest.values())
    losses = _points(steps, "loss")
    means = smooth(losses, smoothing) if smoothing else _points(steps, "smoothed_loss")
    first = start * max((step for step, _ in losses), default=0.0)
    steps, validations = ([event for event in kind if event["step"] >= first] for kind in (steps, validations))
    losses, means = ([point for point in line if point[0] >= first] for line in (losses, means))
    rates = _points(steps, "learning_rate")
    ordered = sorted(loss for _, loss in losses)
    drift = [(step, 100 * value) for step, value in _points(validations, "prior_drift")]
    loss = [
        Line(labels["each_step"], losses, "soft", faint=True),
        Line(labels["smoothed"], means),
    ]
    mse = [*_bands(validations), Line(labels["all_timesteps"], _points(validations, "mse"), "ink", dots=True)]
    top = 1.15 * ordered[math.ceil(LOSS_PERCENTILE * (len(ordered) - 1))] if ordered else None
    charts = [
        chart(labels["loss"], loss, top=top, first=first),
        chart(labels["rate"], [Line("", rates)], first=first),
        chart(labels["validation"].format(**validations[-1]) if validations else "", mse, first=first),
        chart(labels["drift"], [Line("", drift, dots=True)], first=first),
    ]
    return [svg for svg in charts if svg]


def sheet(charts: Sequence[str]) -> str:
    """One SVG file of several charts, two side by side, on white paper."""
    gap = 24
    box = f"0 0 {2 * WIDTH + gap} {-(-len(charts) // 2) * (HEIGHT + gap)}"
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    panels = [
        svg.replace("<svg ", f'<svg x="{n % 2 * (WIDTH + gap)}" y="{n // 2 * (HEIGHT + gap)}" {size} ', 1)
        for n, svg in enumerate(charts)
    ]
    style = f"{LIGHT}:root {{ background: #fff; }}{STYLE}.lk-chart {{ width: {WIDTH}px; height: {HEIGHT}px; }}"
    root = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">'
    return f"{root}<style>{style}</style>{''.join(panels)}</svg>\n"


def smooth(points: Sequence[tuple[float, float]], weight: float) -> list[tuple[float, float]]:
    """The exponential moving average of the values, with this weight for earlier values, without bias towards the
    first."""
    mean, result = 0.0, []
    for number, (step, value) in enumerate(points, 1):
        mean = weight * mean + (1 - weight) * value
        result.append((step, mean / (1 - weight**number)))
    return result


def chart(title: str, lines: Sequence[Line], *, top: float | None = None, first: float = 0.0) -> str:
    """An SVG of several lines over the steps, with a legend; empty where no line has a point.

    Args:
        top: upper end of the scale; larger values are drawn at it.
        first: step at which the axis begins.
    """
    drawable = [line for line in lines if line.points]
    if not drawable:
        return ""
    low, high = _scale([value for line in drawable for _, value in line.points], top)
    last = max(first + 1.0, *(step for line in drawable for step, _ in line.points))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(value, high)) / (high - low)

    parts = [f'<text class="lk-title" x="{LEFT}" y="16">{escape(title)}</text>', *_legend(drawable)]
    for tick in _ticks(low, high):
        parts.append(f'<line class="lk-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in _ticks(first, last):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:g}</text>')
    for line in drawable:
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thin(line.points))
        faint = " lk-faint" if line.faint else ""
        parts.append(f'<polyline class="lk-{line.colour}{faint}" points="{points}"/>')
        if line.dots:
            parts += [
                f'<circle class="lk-{line.colour}" r="3" cx="{x(s):.1f}" cy="{y(v):.1f}"/>' for s, v in line.points
            ]
    values = "; ".join(f"{line.name} {line.points[-1][1]:.4g}".lstrip() for line in drawable)
    label = escape(f"{title}: {values}")
    return (
        f'<svg class="lk-chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MAX_POINTS` of them, evenly, the last always among them."""
    every = max(1, math.ceil(len(points) / MAX_POINTS))
    points_left = list(points[::every])
    return points_left if not points or points_left[-1] == points[-1] else [*points_left, points[-1]]


def _points(events: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    values = [(event["step"], event.get(key)) for event in events]
    return [(step, value) for step, value in values if value is not None and math.isfinite(value)]


def _bands(validations: Sequence[Mapping[str, Any]]) -> list[Line]:
    """A line for each band of timesteps that validation has measured."""
    bands = [(event["step"], event["bands"]) for event in validations if event.get("bands")]
    if not bands:
        return []
    names = ["t {}-{}".format(*band["timesteps"]) for band in bands[-1][1]]
    return [
        Line(name, [(step, bands_of_event[n]["mse"]) for step, bands_of_event in bands], f"t{n + 1}")
        for n, name in enumerate(names)
    ]


def _legend(lines: Sequence[Line]) -> list[str]:
    rows = [lines[n : n + LEGEND_COLUMNS] for n in range(0, len(lines), LEGEND_COLUMNS)]
    texts = []
    for number, row in enumerate(rows):
        entries = "".join(
            f'<tspan class="lk-dot lk-{line.colour}" dx="{12 if n else 0}">●</tspan> {escape(line.name)} '
            f'<tspan class="lk-value">{line.points[-1][1]:.4g}</tspan>'
            for n, line in enumerate(row)
        )
        texts.append(f'<text x="{LEFT}" y="{34 + 17 * number}">{entries}</text>')
    return texts


def _scale(values: Sequence[float], top: float | None) -> tuple[float, float]:
    """The ends of an axis: from 0 for what is never negative, with some room above."""
    low, high = min(0.0, *values), max(values) if top is None else top
    return low, high + (high - low) * 0.05 if high > low else low + 1


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    tick = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    first = math.ceil(low / tick)
    return [number * tick for number in range(first, math.floor(high / tick) + 1)]
