"""What a finished run has learned, in sentences: a sample that is a training photo, the photo that taught least.

A sample is compared with each photo, and its mirror image, by their edges: what is left of a small picture without its
coarse shades, moved by a few pixels. Two photos of one subject have their edges in other places, a copy in the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from lorakit.config import lr_schedule
from lorakit.config.schema import OptimizerConfig
from lorakit.core.messages import Message

# Side of the small pictures, pixels by which one is moved, and the radius of what is taken for a coarse shade.
SIDE, SHIFT, RADIUS = 48, 2, 6.0
# Correlation of edges from which a sample is a copy. Two real photos of one folder reach 0.53 (nine folders; in one of
# drawings 0.82); a photo that went through an autoencoder is at 0.96 or more.
COPY = 0.8
# A photo whose gain is below this share of the median gain contributed least, if there are enough photos. Some photo is
# always the last: in six runs of 5 and 14 ordinary photos on the bundled base it was at 0.45 to 0.76.
LOW_GAIN, FEWEST = 0.25, 4

COPIED = (
    "the sample {sample!r} is a copy of {photo}, edge by edge ({match:.0%}): the run has learned that photo by heart; "
    "train fewer steps, or use more photos"
)
LEAST = (
    "{photo} taught least: the adapter lowers the base's error on it by {gain:.1%}, and on the median photo by "
    "{middle:.1%}; check that it shows what the others show, and that its text says what it shows"
)
WORSE = (
    "{photo}, which was held out, has an error {loss:.1%} above the base's, and the median trained photo one "
    "{middle:.1%} below it: it shows something else than they do, or its text does not say what it shows; change the "
    "text, or leave the photo out (data.exclude)"
)
BY_HEART = (
    "the held-out photos have an error {loss:.1%} above the base's, and the median trained photo one {middle:.1%} "
    "below it: the run has learned its photos, not what they have in common; train fewer steps, or use more photos"
)
# A run whose error falls late as fast as at first, or at this share of it, was too short. Runs of 200 steps and more on
# the bundled base that had learned their subject were at 0.16 to 0.28, runs of 30 and 60 steps at 0.03 to 0.96: many
# short runs are not found by it. A share says nothing unless the error still falls: the last one must be lower than
# the earlier ones by this share of it, and by the largest rise between two of them, which is noise.
STILL_FALLING, SMALLEST_FALL = 0.6, 0.001
SHORT = (
    "the validation error still fell at the end of the {steps} steps as it did at first ({share:.0%} as fast, for the "
    "same learning rate): the run was too short; train at least twice as long"
)


def sentences(
    samples: Mapping[str, Image.Image], photos: Mapping[str, Image.Image], measured: Mapping[str, Any]
) -> list[Message]:
    """A sentence for each fault.

    Args:
        samples: the last ones, by prompt.
        photos: as they were trained, by name.
        measured: the last validation, with "gains" and "holdout_gains" of `Validation.gains` where it has them.
    """
    gains = measured.get("gains", {})
    text = [Message(COPIED, *copy) for copy in copies(samples, photos)]
    if (name := least(gains)) is not None:
        text.append(Message(LEAST, name, gains[name], statistics.median(gains.values())))
    return text + _of_holdout(gains, measured.get("holdout_gains", {}))


def too_short(history: Sequence[Mapping[str, float]], optimizer: OptimizerConfig) -> list[Message]:
    """Whether a run ended while its error still fell fast.

    The fall for the same sum of learning rates is compared: from the first validation to the second quarter of them,
    and from there to the third. After that the learning rate of most schedules is too small to compare, so of the last
    quarter only the last error counts: it must be the lowest. Validations before the UNet's first step do not count.

    Args:
        history: the validations, one dict for each with "step" and "mse"; too few of them say nothing.
    """
    if len(history) < 4 or history[-1]["step"] < len(history):
        return []
    total = int(history[-1]["step"])
    history = [entry for entry in history if entry["step"] >= optimizer.unet_start * total]
    if len(history) < 4:
        return []
    places = [0, len(history) // 4, 3 * len(history) // 4]
    errors, steps = ([history[place]["mse"] for place in places], [int(history[place]["step"]) for place in places])
    early, late = (
        (errors[n] - errors[n + 1])
        / sum(lr_schedule.factor(optimizer, step, total) for step in range(steps[n], steps[n + 1]))
        for n in (0, 1)
    )
    if min(early, late) <= 0 or late < STILL_FALLING * early or not _ends_lowest([entry["mse"] for entry in history]):
        return []
    return [Message(SHORT, total, late / early)]


def _ends_lowest(errors: Sequence[float]) -> bool:
    """Whether the last error is below those of the first three quarters by more than the noise."""
    last, earlier = errors[-1], errors[:-1][: 3 * len(errors) // 4 + 1]
    noise = max(errors[n + 1] - errors[n] for n in range(len(errors) - 1))
    return last < min(earlier) - max(noise, SMALLEST_FALL * last)


def _of_holdout(gains: Mapping[str, float], holdout: Mapping[str, float]) -> list[Message]:
    """What photos say that were not trained on, where the trained ones were learned."""
    middle = statistics.median(gains.values()) if gains else 0.0
    worse = {name: -gain for name, gain in holdout.items() if gain < 0 < middle}
    if len(worse) > 1 and len(worse) == len(holdout):
        return [Message(BY_HEART, statistics.median(worse.values()), middle)]
    return [Message(WORSE, name, loss, middle) for name, loss in worse.items()]


def least(gains: Mapping[str, float]) -> str | None:
    """The photo that clearly taught less than the others, if there is one."""
    if len(gains) < FEWEST:
        return None
    name, middle = min(gains, key=lambda name: gains[name]), statistics.median(gains.values())
    return name if gains[name] < LOW_GAIN * middle else None


def copies(samples: Mapping[str, Image.Image], photos: Mapping[str, Image.Image]) -> Iterator[tuple[str, str, float]]:
    """(prompt, name of the photo, correlation) of each sample that is a training photo."""
    edges = {name: _edges(image) for name, image in photos.items()}
    # Photos that resemble one another, as frames of one film do, say nothing of a sample that resembles them no more.
    alike = max((_match(first, second) for first, second in combinations(edges.values(), 2)), default=0.0)
    limit = max(COPY, (1 + alike) / 2)
    for prompt, image in samples.items() if edges else ():
        sample = _edges(image)
        matches = {name: _match(sample, edge) for name, edge in edges.items()}
        name = max(matches, key=lambda name: matches[name])
        if matches[name] >= limit:
            yield prompt, name, matches[name]


def _edges(image: Image.Image) -> np.ndarray:
    """[SIDE, SIDE, 3] float32 of mean 0: a small copy, less what is coarse in it."""
    small = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)
    coarse = small.filter(ImageFilter.GaussianBlur(RADIUS))
    edges: np.ndarray = np.asarray(small, np.float32) - np.asarray(coarse, np.float32)
    edges -= edges.mean()
    return edges


def _match(first: np.ndarray, second: np.ndarray) -> float:
    """The best correlation of the two over small shifts, and with one of them mirrored."""
    middle = slice(SHIFT, -SHIFT)
    inner = _unit(first[middle, middle])
    shifts: Sequence[int] = range(-SHIFT, SHIFT + 1)
    return max(
        float(inner @ _unit(np.roll(other, (down, right), (0, 1))[middle, middle]))
        for other in (second, second[:, ::-1])
        for down in shifts
        for right in shifts
    )


def _unit(values: np.ndarray) -> np.ndarray:
    flat = values.ravel()
    length = float(np.linalg.norm(flat))
    return flat / length if length > 1e-6 else np.zeros_like(flat)
