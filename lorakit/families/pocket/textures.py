"""Pictures with natural statistics, dead leaves and 1/f noise. They keep the autoencoder accurate on photos."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw


def dead_leaves(seed: int, size: int = 64) -> Image.Image:
    """Overlapping discs and boxes whose radii follow a power law, like the sizes of things in photos."""
    rng = np.random.default_rng((seed, 21))
    canvas = 2 * size
    image = Image.fromarray(np.full((canvas, canvas, 3), rng.integers(0, 256, 3), np.uint8))
    draw = ImageDraw.Draw(image)
    palette = np.clip(rng.normal(rng.uniform(60, 200, 3), 60, (12, 3)), 0, 255).astype(int)
    for _ in range(90):
        radius = canvas * 0.02 * (1 - rng.random() * 0.995) ** -0.55
        x, y = rng.uniform(0, canvas, 2)
        stretch = rng.uniform(0.5, 1.6)
        bounds = (x - radius * stretch, y - radius, x + radius * stretch, y + radius)
        fill = tuple(int(c) for c in np.clip(palette[rng.integers(12)] + rng.normal(0, 12, 3), 0, 255))
        (draw.ellipse if rng.random() < 0.7 else draw.rectangle)(bounds, fill=fill)
    return image.resize((size, size), Image.Resampling.BOX)


def pink_noise(seed: int, size: int = 64) -> Image.Image:
    """Colour noise whose amplitude falls as 1/f."""
    rng = np.random.default_rng((seed, 22))
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    falloff = 1.0 / np.maximum(np.hypot(fx, fy), 1.0 / size) ** rng.uniform(1.0, 1.6)
    planes = np.stack(
        [np.fft.irfft2(falloff * np.exp(2j * np.pi * rng.random(falloff.shape)), (size, size)) for _ in range(3)],
        axis=-1,
    )
    planes = planes / (planes.std(axis=(0, 1)) + 1e-6)
    channels = planes @ (np.full((3, 3), 0.45) + 0.4 * rng.random((3, 3)))
    return Image.fromarray(np.clip(128 + 45 * channels + rng.normal(0, 25, 3), 0, 255).astype(np.uint8))


def texture(seed: int, size: int = 64) -> Image.Image:
    """Dead leaves or pink noise, depending on the seed."""
    return dead_leaves(seed, size) if seed % 3 else pink_noise(seed, size)
