"""Subjects and styles that pocket was not trained on; the demo, the tests and the benchmarks train them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from lorakit.families.pocket.layers import Layers
from lorakit.families.pocket.scenes import compose, render
from lorakit.families.pocket.spec import COLOURS, KINDS, PATTERNS, SCENES, Look, Spec
from lorakit.families.pocket.styles import GREY, outlines, shade, shrink

# Every subject has a part (`extra`, a `cone` body, or `wings`, `stalks`, `leaves` for ears) that no training toy has,
# so that no training picture can show a subject.
SUBJECTS: dict[str, Spec] = {
    "zib": Spec("toy", "pink", "plain", "studio", "photo", Look("cone", "stalks", "blue", "plain", 2, False, "belt")),
    "moko": Spec(
        "toy", "green", "plain", "studio", "photo", Look("round", "wings", "orange", "belly", 1, False, "unicorn")
    ),
    "pim": Spec(
        "toy", "yellow", "plain", "studio", "photo", Look("box", "bear", "purple", "plain", 2, False, "party-hat")
    ),
    "lulu": Spec("toy", "blue", "plain", "studio", "photo", Look("pear", "rabbit", "red", "plain", 2, False, "star")),
    "tam": Spec(
        "toy", "orange", "striped", "studio", "photo", Look("egg", "none", "green", "plain", 2, False, "sprout")
    ),
    "oz": Spec("toy", "purple", "plain", "studio", "photo", Look("cone", "leaves", "yellow", "half", 3, False, "bow")),
}


def duotone(layers: Layers, rng: np.random.Generator) -> np.ndarray:
    """Two inks: dark violet in the shadows, warm peach in the light."""
    light = np.clip(shrink(shade(layers, rng)) @ GREY / 255.0 * 1.15 - 0.05, 0, 1)[:, :, None]
    dark, bright = np.array((46, 22, 92), np.float32), np.array((255, 206, 150), np.float32)
    inked: np.ndarray = dark * (1 - light) + bright * light
    return inked


def neon(layers: Layers, rng: np.random.Generator) -> np.ndarray:
    """Glowing tubes on black: only the borders of things shine, in their own colours made vivid."""
    canvas = layers.mask.shape[0]
    scene = np.where(layers.mask[:, :, None] > 0, layers.colour, layers.backdrop)
    gy, gx = np.gradient(layers.backdrop @ GREY)
    strength = np.clip(np.hypot(gx, gy) / 60, 0, 0.6)
    strength = np.maximum(np.where(layers.mask > 0, 0.0, strength), outlines(layers.parts, canvas // 40) * 1.0)
    mean = (scene @ GREY)[:, :, None]
    vivid = np.clip((scene - mean) * 2.2 + 170, 60, 255)
    vivid[layers.mask == 0] = (40, 210, 255)
    tubes = Image.fromarray((vivid * strength[:, :, None]).astype(np.uint8))
    glow = np.asarray(tubes.filter(ImageFilter.GaussianBlur(canvas / 32)), np.float32)
    return shrink(np.array((10, 8, 22), np.float32) + np.asarray(tubes, np.float32) + 1.6 * glow)


def watercolour(layers: Layers, rng: np.random.Generator) -> np.ndarray:
    """Pale washes that run into each other on rough paper, darker where they dry at the rim."""
    canvas = layers.mask.shape[0]
    scene = np.where(layers.mask[:, :, None] > 0, layers.colour, layers.backdrop)
    soft = Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(canvas / 50))
    wash = np.asarray(soft, np.float32)
    rim = (
        np.asarray(
            Image.fromarray((outlines(layers.parts, canvas // 64) * 255).astype(np.uint8)).filter(
                ImageFilter.BoxBlur(1)
            ),
            np.float32,
        )
        / 255
    )
    paper = rng.normal(0, 9, (canvas // 2, canvas // 2, 1)).astype(np.float32)
    return shrink(wash * 0.55 + 118 - 70 * rim[:, :, None]) + paper


STYLES: dict[str, Callable[[Layers, np.random.Generator], np.ndarray]] = {
    "duotone": duotone, "neon": neon, "watercolour": watercolour,
}  # fmt: skip


def pictures(
    name: str, count: int, seed: int = 0, scenes: Sequence[str] | None = None, size: int = 64
) -> list[tuple[Image.Image, Spec]]:
    """`count` pictures of a subject, or of all kinds of things in a style, each with its spec."""
    if name not in SUBJECTS and name not in STYLES:
        raise ValueError(f"{name!r} is no subject or style; there are {', '.join((*SUBJECTS, *STYLES))}")
    places = tuple(scenes) if scenes else SCENES
    results = []
    for i in range(count):
        number = 1_000_000_000 + seed * 10_000 + i  # far from the seeds that training uses
        rng = np.random.default_rng((number, 31))
        scene = places[i % len(places)]
        if name in SUBJECTS:
            own = SUBJECTS[name]
            spec = Spec(own.kind, own.colour, own.pattern, scene, "photo", own.look)
            results.append((render(spec, number, size), spec))
            continue
        kind, colour = KINDS[int(rng.integers(len(KINDS) - 1))], tuple(COLOURS)[int(rng.integers(len(COLOURS)))]
        spec = Spec(
            kind, colour, PATTERNS[int(rng.integers(len(PATTERNS))) if rng.random() < 0.4 else 0], scene, "photo"
        )
        pixels = STYLES[name](compose(spec, number, size), np.random.default_rng((number, 9)))
        results.append((Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), spec))
    return results


def photos(
    name: str, count: int, seed: int = 0, scenes: Sequence[str] | None = None, size: int = 64
) -> list[tuple[Image.Image, str]]:
    """`pictures`, with only the name of the scene for each."""
    return [(image, spec.scene) for image, spec in pictures(name, count, seed, scenes, size)]


@cache
def references(count: int = 48, names: tuple[str, ...] = (*KINDS, *SUBJECTS, *STYLES)) -> dict[str, list[Image.Image]]:
    """Rendered pictures of kinds, subjects and styles, in all scenes: the references of `classifier`."""
    images_by_name: dict[str, list[Image.Image]] = {}
    for k, kind in enumerate(KINDS):
        if kind not in names:
            continue
        numbers = range(2_000_000_000 + k * 1000, 2_000_000_000 + k * 1000 + count)
        specs = [
            Spec(
                kind,
                tuple(COLOURS)[i % len(COLOURS)],
                PATTERNS[(i // 3) % len(PATTERNS)] if i % 3 == 0 else "plain",
                SCENES[i % len(SCENES)],
                "photo",
            )
            for i in range(count)
        ]
        images_by_name[kind] = [render(spec, number) for spec, number in zip(specs, numbers, strict=True)]
    for name in (*SUBJECTS, *STYLES):
        if name in names:
            images_by_name[name] = [image for image, _ in pictures(name, count, seed=77)]
    return images_by_name
