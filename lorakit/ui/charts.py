"""Line charts as SVG text: no library, no script; colours come from the page, so that light and dark both fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 24
# More points than this are thinned: a line cannot show more than it has pixels.
MOST_POINTS = 600


@dataclass(frozen=True)
class Line:
    """One line: its name, its points (step, value) in order of steps, and its class in the style sheet."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    dots: bool = False


def chart(title: str, lines: Sequence[Line], steps: int) -> str:
    """An SVG of several lines over steps 0 to `steps`, with a legend; values that are not finite are left out."""
    lines = [Line(line.name, _finite(line.points), line.style, line.dots) for line in lines]
    shown = [line for line in lines if line.points]
    if not shown:
        return ""
    values = [value for line in shown for _, value in line.points]
    low, high = _padded(min(values), max(values))
    last = max(steps, *(point[0] for line in shown for point in line.points), 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = []
    for tick in _ticks(low, high):
        parts.append(f'<line class="lk-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in _ticks(0, last):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:g}</text>')
    for line in shown:
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thinned(line.points))
        parts.append(f'<polyline class="{line.style}" points="{points}"/>')
        if line.dots:
            parts += [f'<circle class="{line.style}" r="3" cx="{x(s):.1f}" cy="{y(v):.1f}"/>' for s, v in line.points]
    legend = "".join(
        f'<span><i class="{line.style}"></i>{escape(line.name)} <b>{line.points[-1][1]:.4g}</b></span>'
        for line in shown
    )
    told = "; ".join(f"{line.name} {line.points[-1][1]:.4g}" for line in shown)
    return (
        f'<figure class="lk-chart"><figcaption><strong>{escape(title)}</strong>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {told}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MOST_POINTS` of them, evenly, the last always among them."""
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = list(points[::every])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if value is not None and math.isfinite(value)]


def _padded(low: float, high: float) -> tuple[float, float]:
    if high == low:
        return low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    margin = (high - low) * 0.05
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between low and high."""
    raw = (high - low) / most
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]
