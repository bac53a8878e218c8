"""The things of pocket's world as polygons: object coordinates are about [-1, 1], x to the right, y down."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lorakit.families.pocket.spec import COLOURS, RGB, Look

# The fill of a polygon: the object's colour with its pattern ("main"), a darker or lighter shade of it without the
# pattern, a fixed colour, or nothing (None: a hole that shows the backdrop).
Paint = str | RGB | None
Part = tuple[np.ndarray, Paint]

DARK, WHITE, CREAM, WOOD, GLASS, LEAF, STEEL = (
    (38, 36, 44), (248, 248, 246), (242, 228, 198), (116, 76, 44), (168, 214, 240), (58, 140, 60), (150, 156, 166),
)  # fmt: skip


def polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, np.float64)


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> np.ndarray:
    """Ellipse, or the arc from `start` to `end` degrees (clockwise from the right, as y points down)."""
    angles = np.radians(np.linspace(start, end, 29))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def box(x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> np.ndarray:
    if radius == 0.0:
        return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    corners = ((x1 - radius, y0 + radius, -90), (x1 - radius, y1 - radius, 0),
               (x0 + radius, y1 - radius, 90), (x0 + radius, y0 + radius, 180))  # fmt: skip
    return np.concatenate([ellipse(x, y, radius, radius, a, a + 90)[::4] for x, y, a in corners])


def spikes(count: int, inner: float, outer: float = 1.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    angles = np.arange(2 * count) * math.pi / count - math.pi / 2
    radii = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1)


def eye(x: float, y: float, radius: float) -> list[Part]:
    return [(ellipse(x, y, radius, radius), WHITE), (ellipse(x, y + 0.02, radius * 0.58, radius * 0.62), (20, 20, 34))]


def _ball() -> list[Part]:
    return [(ellipse(0, 0, 1, 1), "main")]


def _star() -> list[Part]:
    return [(spikes(5, 0.45), "main")]


def _heart() -> list[Part]:
    t = np.linspace(0, 2 * math.pi, 48)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(np.stack([np.sin(t) ** 3, -y / 16], axis=1), "main")]


def _mug() -> list[Part]:
    return [
        (ellipse(0.55, 0.1, 0.48, 0.5), "main"), (ellipse(0.55, 0.1, 0.25, 0.27), None),
        (box(-0.85, -0.75, 0.5, 1, 0.14), "main"),
        (ellipse(-0.175, -0.72, 0.675, 0.2), "tint"), (ellipse(-0.175, -0.71, 0.54, 0.13), (74, 44, 28)),
    ]  # fmt: skip


def _fish() -> list[Part]:
    return [
        (polygon((0.45, 0), (1, -0.6), (0.88, 0), (1, 0.6)), "shade"),
        (polygon((-0.4, -0.35), (0.05, -0.85), (0.4, -0.3)), "shade"),
        (polygon((-0.2, 0.35), (0.15, 0.75), (0.3, 0.3)), "shade"),
        (ellipse(-0.2, 0, 0.8, 0.56), "main"), *eye(-0.62, -0.12, 0.17),
    ]  # fmt: skip


def _house() -> list[Part]:
    return [
        (box(0.45, -0.95, 0.68, -0.3), (110, 60, 52)), (box(-0.78, -0.15, 0.78, 1), "main"),
        (polygon((-1, -0.1), (0, -0.95), (1, -0.1)), (104, 58, 58)),
        (box(-0.2, 0.38, 0.2, 1), (70, 44, 34)), (box(-0.64, 0.1, -0.32, 0.42), GLASS),
        (box(0.32, 0.1, 0.64, 0.42), GLASS),
    ]  # fmt: skip


def _tree() -> list[Part]:
    return [
        (box(-0.15, 0.6, 0.15, 1), WOOD), (polygon((-0.8, 0.7), (0, -0.1), (0.8, 0.7)), "main"),
        (polygon((-0.64, 0.22), (0, -0.55), (0.64, 0.22)), "main"),
        (polygon((-0.46, -0.25), (0, -1), (0.46, -0.25)), "main"),
    ]  # fmt: skip


def _car() -> list[Part]:
    return [
        (polygon((-0.7, -0.05), (-0.45, -0.62), (0.35, -0.62), (0.66, -0.05)), "main"),
        (polygon((-0.52, -0.08), (-0.36, -0.48), (-0.07, -0.48), (-0.07, -0.08)), GLASS),
        (polygon((0.07, -0.08), (0.07, -0.48), (0.27, -0.48), (0.48, -0.08)), GLASS),
        (box(-1, -0.1, 1, 0.5, 0.16), "main"), (box(0.84, 0.05, 1, 0.2), (255, 236, 130)),
        (ellipse(-0.55, 0.46, 0.29, 0.29), DARK), (ellipse(0.55, 0.46, 0.29, 0.29), DARK),
        (ellipse(-0.55, 0.46, 0.13, 0.13), STEEL), (ellipse(0.55, 0.46, 0.13, 0.13), STEEL),
    ]  # fmt: skip


def _mushroom() -> list[Part]:
    return [
        (box(-0.3, -0.05, 0.3, 1, 0.16), CREAM),
        (ellipse(0, 0.1, 0.98, 0.2), CREAM),
        (ellipse(0, 0.1, 1, 1.05, 180, 360), "main"),
    ]


def _boat() -> list[Part]:
    return [
        (box(-0.06, -1, 0.06, 0.5), WOOD), (polygon((0.1, -0.95), (0.85, 0.28), (0.1, 0.28)), WHITE),
        (polygon((-0.1, -0.8), (-0.72, 0.28), (-0.1, 0.28)), "main"),
        (polygon((-1, 0.4), (1, 0.4), (0.68, 1), (-0.68, 1)), "main"),
    ]  # fmt: skip


def _flower() -> list[Part]:
    petals = [
        (ellipse(0.46 * math.cos(a), -0.38 + 0.46 * math.sin(a), 0.32, 0.32), "main")
        for a in np.arange(6) * math.pi / 3 + 0.5
    ]
    return [
        (box(-0.06, 0, 0.06, 1), LEAF), (ellipse(-0.32, 0.66, 0.3, 0.13), LEAF), (ellipse(0.32, 0.78, 0.3, 0.13), LEAF),
        *petals, (ellipse(0, -0.38, 0.27, 0.27), (250, 200, 60)), (ellipse(0, -0.38, 0.15, 0.15), (150, 90, 40)),
    ]  # fmt: skip


def _bottle() -> list[Part]:
    body = polygon(
        (-0.16, -0.8),
        (0.16, -0.8),
        (0.17, -0.45),
        (0.46, -0.12),
        (0.46, 0.93),
        (0.4, 1),
        (-0.4, 1),
        (-0.46, 0.93),
        (-0.46, -0.12),
        (-0.17, -0.45),
    )
    return [(body, "main"), (box(-0.2, -1, 0.2, -0.74), (64, 60, 66))]


def _robot() -> list[Part]:
    return [
        (box(-0.05, -1, 0.05, -0.75), STEEL), (ellipse(0, -0.98, 0.12, 0.12), (240, 70, 60)),
        (box(-0.86, -0.08, -0.6, 0.5, 0.08), STEEL), (box(0.6, -0.08, 0.86, 0.5, 0.08), STEEL),
        (box(-0.42, 0.5, -0.12, 1), STEEL), (box(0.12, 0.5, 0.42, 1), STEEL),
        (box(-0.52, -0.8, 0.52, -0.2, 0.06), "main"), (box(-0.64, -0.14, 0.64, 0.66, 0.06), "main"),
        (box(-0.38, -0.64, -0.1, -0.4), (255, 244, 150)), (box(0.1, -0.64, 0.38, -0.4), (255, 244, 150)),
        (box(-0.28, -0.33, 0.28, -0.25), DARK),
    ]  # fmt: skip


def _cat() -> list[Part]:
    return [
        (ellipse(0.62, 0.55, 0.36, 0.42), "shade"), (ellipse(0.56, 0.45, 0.24, 0.3), None),
        (ellipse(0, 0.55, 0.56, 0.46), "main"),
        (polygon((-0.62, -0.3), (-0.58, -1), (-0.1, -0.66)), "main"),
        (polygon((0.62, -0.3), (0.58, -1), (0.1, -0.66)), "main"),
        (ellipse(0, -0.3, 0.64, 0.5), "main"),
        (ellipse(-0.26, -0.34, 0.14, 0.17), (170, 230, 90)), (ellipse(0.26, -0.34, 0.14, 0.17), (170, 230, 90)),
        (ellipse(-0.26, -0.34, 0.05, 0.15), (16, 16, 20)), (ellipse(0.26, -0.34, 0.05, 0.15), (16, 16, 20)),
        (polygon((-0.1, -0.14), (0.1, -0.14), (0, -0.02)), (255, 130, 150)),
    ]  # fmt: skip


def _umbrella() -> list[Part]:
    canopy = np.concatenate(
        [
            ellipse(0, 0.02, 1, 0.92, 180, 360),
            *[ellipse(x, 0.02, 0.25, 0.14, 0, -180)[::4] for x in (0.75, 0.25, -0.25, -0.75)],
        ]
    )
    return [
        (ellipse(0.17, 0.8, 0.22, 0.2), WOOD), (ellipse(0.17, 0.77, 0.12, 0.13), None),
        (box(0.1, 0.55, 0.45, 0.76), None),
        (box(-0.06, -1, 0.05, 0.85), WOOD), (canopy, "main"),
    ]  # fmt: skip


def _rocket() -> list[Part]:
    body = polygon(
        (0, -1),
        (0.22, -0.72),
        (0.36, -0.3),
        (0.38, 0.2),
        (0.28, 0.62),
        (-0.28, 0.62),
        (-0.38, 0.2),
        (-0.36, -0.3),
        (-0.22, -0.72),
    )
    return [
        (polygon((-0.24, 0.6), (0, 1), (0.24, 0.6)), (255, 170, 40)),
        (polygon((-0.3, 0.1), (-0.78, 0.78), (-0.25, 0.62)), (196, 60, 56)),
        (polygon((0.3, 0.1), (0.78, 0.78), (0.25, 0.62)), (196, 60, 56)), (body, "main"),
        (ellipse(0, -0.2, 0.23, 0.23), STEEL), (ellipse(0, -0.2, 0.16, 0.16), GLASS),
    ]  # fmt: skip


def _butterfly() -> list[Part]:
    wings = [(ellipse(s * 0.55, -0.3, 0.46, 0.5), "main") for s in (-1, 1)] + [
        (ellipse(s * 0.42, 0.42, 0.36, 0.4), "main") for s in (-1, 1)
    ]
    feelers = [
        (polygon((s * 0.04, -0.45), (s * 0.28, -0.95), (s * 0.36, -0.9), (s * 0.1, -0.42)), DARK) for s in (-1, 1)
    ]
    return [*feelers, *wings, (ellipse(0, 0, 0.11, 0.66), DARK)]


def _hat() -> list[Part]:
    return [
        (ellipse(0, 0.5, 1, 0.26), "main"), (polygon((-0.6, -0.75), (0.6, -0.75), (0.52, 0.5), (-0.52, 0.5)), "main"),
        (ellipse(0, 0.5, 0.52, 0.13), "main"), (ellipse(0, -0.75, 0.6, 0.14), "tint"),
        (polygon((-0.545, 0.2), (0.545, 0.2), (0.52, 0.48), (-0.52, 0.48)), "shade"),
    ]  # fmt: skip


def _crown() -> list[Part]:
    body = polygon((-0.9, -0.5), (-0.48, 0.05), (0, -0.72), (0.48, 0.05), (0.9, -0.5), (0.72, 0.8), (-0.72, 0.8))
    jewels = [(ellipse(x, y, 0.13, 0.13), (255, 222, 90)) for x, y in ((-0.9, -0.55), (0, -0.78), (0.9, -0.55))]
    return [(body, "main"), *jewels, (box(-0.74, 0.55, 0.74, 0.82), "shade")]


def _ears(look: Look, second: RGB) -> list[Part]:
    parts: list[Part] = []
    for s in (-1, 1):
        if look.ears == "cat":
            parts.append((polygon((s * 0.62, -0.3), (s * 0.56, -1), (s * 0.08, -0.6)), second))
        elif look.ears == "rabbit":
            parts.append((ellipse(s * 0.28, -0.95, 0.15, 0.5), second))
        elif look.ears == "bear":
            parts.append((ellipse(s * 0.48, -0.62, 0.27, 0.27), second))
        elif look.ears == "horns":
            parts.append((polygon((s * 0.2, -0.55), (s * 0.78, -1.05), (s * 0.52, -0.38)), second))
        elif look.ears == "antennae":
            parts += [
                (polygon((s * 0.12, -0.5), (s * 0.34, -1), (s * 0.42, -0.96), (s * 0.22, -0.5)), DARK),
                (ellipse(s * 0.38, -1.0, 0.15, 0.15), second),
            ]
        elif look.ears == "leaves":  # this and the two below: subjects only
            parts.append((ellipse(s * 0.34, -0.78, 0.34, 0.14), second))
        elif look.ears == "wings":
            parts.append(
                (
                    polygon(
                        (s * 0.5, 0.1),
                        (s * 1.15, -0.65),
                        (s * 1.2, 0.0),
                        (s * 0.95, 0.1),
                        (s * 1.0, 0.4),
                        (s * 0.5, 0.4),
                    ),
                    second,
                )
            )
        elif look.ears == "stalks":
            parts += [(box(s * 0.3 - 0.07, -1, s * 0.3 + 0.07, -0.4), "main"), *eye(s * 0.3, -0.98, 0.24)]
    return parts


def _bodies(body: str) -> np.ndarray:
    if body == "round":
        return ellipse(0, 0.12, 0.76, 0.76)
    if body == "egg":
        return ellipse(0, 0.14, 0.6, 0.8)
    if body == "box":
        return box(-0.62, -0.58, 0.62, 0.86, 0.16)
    if body == "pear":
        return np.concatenate([ellipse(0, -0.22, 0.5, 0.44, 180, 360), ellipse(0, 0.4, 0.76, 0.52, 0, 180)])
    if body == "cone":  # subjects only
        return polygon((-0.16, -0.75), (0.16, -0.75), (0.78, 0.8), (0.6, 0.92), (-0.6, 0.92), (-0.78, 0.8))
    raise ValueError(f"unknown body {body!r}")


def _extra(name: str, second: RGB) -> list[Part]:
    """Parts that only subjects have."""
    if name == "unicorn":
        return [(polygon((-0.13, -0.55), (0, -1.3), (0.13, -0.55)), (255, 214, 70))]
    if name == "belt":
        teeth = [(0.8 - 0.2 * i, 0.38 if i % 2 else 0.2) for i in range(9)]
        return [(polygon(*teeth, *[(x, y + 0.26) for x, y in teeth[::-1]]), (250, 246, 230))]
    if name == "star":
        return [(spikes(5, 0.18, 0.42, 0, 0.42), (255, 226, 80))]
    if name == "party-hat":
        return [
            (polygon((-0.36, -0.5), (0, -1.25), (0.36, -0.5)), (236, 60, 130)),
            (ellipse(0, -1.22, 0.13, 0.13), WHITE),
        ]
    if name == "bow":
        return [(polygon((0, 0.3), (-0.5, 0.05), (-0.5, 0.55)), (220, 40, 50)),
            (polygon((0, 0.3), (0.5, 0.05), (0.5, 0.55)), (220, 40, 50)),
                (ellipse(0, 0.3, 0.13, 0.13), (150, 20, 30))]  # fmt: skip
    if name == "sprout":
        return [
            (box(-0.05, -0.95, 0.05, -0.5), LEAF),
            (ellipse(0.24, -0.95, 0.26, 0.14), (110, 200, 70)),
            (ellipse(-0.24, -0.88, 0.26, 0.14), (110, 200, 70)),
        ]
    return []


def toy(look: Look) -> list[Part]:
    """A small creature: body, ears, eyes, feet, sometimes a belly, a second half or a tail."""
    second = COLOURS[look.second]
    outline = _bodies(look.body)
    parts: list[Part] = [(ellipse(0.82, 0.5, 0.26, 0.2), second)] if look.tail else []
    parts += _ears(look, second)
    parts += [(ellipse(s * 0.34, 0.9, 0.27, 0.14), second) for s in (-1, 1)]
    parts.append((outline, "main"))
    if look.detail == "belly":
        parts.append((ellipse(0, 0.48, 0.36, 0.34), second))
    elif look.detail == "half":
        parts.append((np.stack([np.maximum(outline[:, 0], 0.0), outline[:, 1]], axis=1), second))
    parts += _extra(look.extra, second)
    if look.ears != "stalks":
        for x in {1: (0.0,), 2: (-0.26, 0.26), 3: (-0.4, 0.0, 0.4)}[look.eyes]:
            parts += eye(x, -0.14, {1: 0.3, 2: 0.22, 3: 0.18}[look.eyes])
    parts.append((box(-0.14, 0.2, 0.14, 0.28), DARK))
    return parts


_DRAWERS: dict[str, Callable[[], list[Part]]] = {
    "ball": _ball, "star": _star, "heart": _heart, "mug": _mug, "fish": _fish, "house": _house, "tree": _tree,
    "car": _car, "mushroom": _mushroom, "boat": _boat, "flower": _flower, "bottle": _bottle, "robot": _robot,
    "cat": _cat, "umbrella": _umbrella, "rocket": _rocket, "butterfly": _butterfly, "hat": _hat, "crown": _crown,
}  # fmt: skip


def parts_of(kind: str, look: Look) -> list[Part]:
    """The polygons of one object, back to front, scaled so that it fits [-1, 1] and stands on y = 1."""
    parts = toy(look) if kind == "toy" else _DRAWERS[kind]()
    every = np.concatenate([points for points, _ in parts])
    low, high = every.min(axis=0), every.max(axis=0)
    scale = 2.0 / (high - low).max()
    middle = (low[0] + high[0]) / 2
    return [((points - (middle, high[1])) * scale + (0.0, 1.0), paint) for points, paint in parts]
