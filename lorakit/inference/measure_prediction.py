"""Measure what a base predicts, noise or v: its error on photos under both readings, of which one is far smaller.

A photo's latents get known noise at several timesteps, and the denoiser is asked without a prompt. What it answers is
compared with what each prediction type would have it answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.families import loading
from lorakit.families.prediction import of_schedule
from lorakit.families.spec import EPSILON, VELOCITY
from lorakit.inference.mode import inference

if TYPE_CHECKING:
    from lorakit.families import Family

# Where the two answers differ: with little noise both are the noise itself; with much, v is a picture to be guessed.
TIMESTEPS = (400, 500, 600, 700)
# A larger picture says the same and takes longer.
MAX_SIDE = 512
# The right reading's error is at most this share of the other's, and of what it should answer.
CLEAR, ERROR_OF_A_MODEL = 0.6, 0.8
_ZERO_SNR = ", or 'v_prediction_zero_snr' where the model's page speaks of zero terminal SNR"


@dataclass(frozen=True)
class Verdict:
    """Errors of both readings, as a share of the true answer's square, and the one that is right.

    Attributes:
        prediction_type: "epsilon" or "v_prediction"; "" where neither is clearly right.
        current: how the base is read now.
    """

    epsilon: float
    v_prediction: float
    prediction_type: str
    current: str

    def lines(self) -> list[str]:
        """What a person reads."""
        errors: list[str] = [
            Message("read as {kind}: error {error:.3f}", kind, getattr(self, kind)) for kind in (EPSILON, VELOCITY)
        ]
        if not self.prediction_type:
            return [*errors, "neither is clearly right: give photos of the kind that the model draws (--photo)"]
        if self.prediction_type == self.current:
            return [*errors, Message("it predicts {kind}, as lorakit reads it", self.prediction_type)]
        value = f"{self.prediction_type!r}{_ZERO_SNR if self.prediction_type == VELOCITY else ''}"
        return [
            *errors,
            Message(
                "it predicts {kind}, and lorakit reads it as {other}: set model.prediction_type = {value}",
                *(self.prediction_type, self.current, value),
            ),
        ]

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def measure(family: Family, pictures: Sequence[Image.Image]) -> Verdict:
    """Measure the errors of both readings on photos of any size; each is cut to a square of the base's own size.

    Raises:
        LorakitError: the base predicts the flow, or its answer is not finite.
    """
    info = family.info
    if info.spec.predicts_flow:
        raise LorakitError("base {info} predicts the flow, as every model of its family", info.title)
    side = min(MAX_SIDE, int(info.configs["unet"].get("sample_size") or MAX_SIDE) * info.downscale)
    side = max(info.bucket_multiple, side // info.bucket_multiple * info.bucket_multiple)
    alphas = loading.noise_schedule(loading.load_scheduler(info), family.device)
    readings = {kind: of_schedule(kind, alphas) for kind in (EPSILON, VELOCITY)}
    timesteps = torch.tensor(TIMESTEPS, device=family.device)
    errors = dict.fromkeys(readings, 0.0)
    with inference([*family.modules().values(), family.vae]):
        text = family.encode_text([""]).with_sizes(family.size_conditions((side, side), (0, 0), (side, side)))
        for number, picture in enumerate(pictures):
            square = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1
            latents = family.encode_image(pixels)[0].expand(len(timesteps), -1, -1, -1)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(number)).to(latents)
            noisy = readings[EPSILON].add_noise(latents, noise, timesteps)
            answer = family.predict(noisy, timesteps, text.expand(len(timesteps)))
            for kind, reading in readings.items():
                target = reading.target(latents, noise, timesteps)
                shares = (answer - target).square().mean((1, 2, 3)) / target.square().mean((1, 2, 3))
                errors[kind] += float(shares.mean()) / len(pictures)
    if not all(np.isfinite(error) for error in errors.values()):
        raise LorakitError("base {info} answers with NaN or infinity: it is damaged, or needs fp32", info.title)
    right, wrong = sorted(errors, key=lambda kind: errors[kind])
    clear = errors[right] < min(CLEAR * errors[wrong], ERROR_OF_A_MODEL)
    return Verdict(errors[EPSILON], errors[VELOCITY], right if clear else "", info.prediction_type)
