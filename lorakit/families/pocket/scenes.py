"""Pictures of pocket's world: `render(spec, seed)` draws one, `scene_captions.caption` describes it."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from lorakit.families.pocket import backdrops, styles
from lorakit.families.pocket.layers import Layers
from lorakit.families.pocket.shapes import parts_of
from lorakit.families.pocket.spec import COLOURS, RGB, Spec, look_of

SHADES = {"main": 1.0, "shade": 0.62, "tint": 1.18}


def contrast(colour: RGB) -> RGB:
    """The second colour of a pattern: cream on dark colours, dark blue on light ones."""
    r, g, b = colour
    return (250, 246, 236) if 0.3 * r + 0.59 * g + 0.11 * b < 150 else (52, 48, 96)


def pattern(name: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """1 where the second colour applies. `u`, `v`: object coordinates; elements are a quarter of the object wide."""
    if name == "striped":
        angle = (0.0 if rng.random() < 0.5 else math.pi / 2) + rng.uniform(-0.25, 0.25)
        across = u * math.cos(angle) + v * math.sin(angle)
        return (np.mod(across / 0.56 + rng.random(), 1.0) < 0.5).astype(np.float32)
    if name == "dotted":
        row = np.floor(v / 0.5 + 0.5)
        x = np.mod(u / 0.56 + 0.5 * np.mod(row, 2), 1.0) - 0.5
        return ((x * 0.56) ** 2 + (v - row * 0.5) ** 2 < 0.155**2).astype(np.float32)
    if name == "checked":
        checks: np.ndarray = np.mod(np.floor(u / 0.4 + 0.5) + np.floor(v / 0.4), 2.0).astype(np.float32)
        return checks
    if name == "zigzag":
        wave = np.abs(np.mod(u / 0.64 + rng.random(), 1.0) - 0.5) * 0.72
        return (np.mod((v + wave) / 0.56, 1.0) < 0.5).astype(np.float32)
    return np.zeros_like(u)


def compose(spec: Spec, seed: int, size: int) -> Layers:
    """Draw backdrop and object of one picture, without a manner."""
    rng = np.random.default_rng((seed, 5))
    canvas = 2 * size
    backdrop, ground = backdrops.paint(spec.scene, rng, canvas)
    half = rng.uniform(0.33, 0.44)
    foot = max(rng.uniform(*ground), 2 * half + 0.02)
    x = float(np.clip(rng.normal(0.5, 0.07), half * 0.95, 1 - half * 0.95))
    y, tilt, mirror = foot - half, rng.normal(0, 0.06), -1.0 if rng.random() < 0.5 else 1.0
    cos, sin = math.cos(tilt), math.sin(tilt)
    index = Image.new("L", (canvas, canvas), 0)
    draw = ImageDraw.Draw(index)
    main = np.clip(np.array(COLOURS[spec.colour]) + rng.normal(0, 6, 3), 0, 255)
    table, has_pattern = [np.zeros(3)], [0.0]
    for points, paint in parts_of(spec.kind, look_of(spec, seed)):
        px, py = points[:, 0] * mirror, points[:, 1]
        corners = np.stack([x + half * (px * cos - py * sin), y + half * (px * sin + py * cos)], axis=1) * canvas
        draw.polygon([tuple(c) for c in corners.tolist()], fill=0 if paint is None else len(table))
        if paint is not None:
            table.append(main * SHADES[paint] if isinstance(paint, str) else np.array(paint, np.float64))
            has_pattern.append(1.0 if paint == "main" else 0.0)
    parts = np.asarray(index)
    colour = np.array(table, np.float32)[parts]
    if spec.pattern != "plain":
        ys, xs = np.mgrid[0:canvas, 0:canvas].astype(np.float32) / canvas
        u, v = ((xs - x) * cos + (ys - y) * sin) / half, ((ys - y) * cos - (xs - x) * sin) / half
        where = (pattern(spec.pattern, u, v, rng) * np.array(has_pattern, np.float32)[parts])[:, :, None]
        colour = colour * (1 - where) + np.array(contrast(COLOURS[spec.colour]), np.float32) * where
    mask = (parts > 0).astype(np.float32)
    return Layers(np.asarray(backdrop, np.float32), colour, mask, parts, (x, y), half)


def render(spec: Spec, seed: int, size: int = 64) -> Image.Image:
    """The picture of `spec` and `seed`, size x size px: the same bytes for the same arguments."""
    return styles.apply(spec.manner, compose(spec, seed, size), np.random.default_rng((seed, 9)))
