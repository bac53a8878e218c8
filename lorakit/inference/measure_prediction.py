"""Measure whether a base predicts noise or v: one of the two errors on photos is far smaller.

Known noise is added to a photo's latents at several timesteps, and the denoiser predicts without a prompt. The
prediction is compared with the target of each prediction type.
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

# Timesteps at which the targets differ: with little noise both are the noise itself; with much noise, v is an unknown
# picture.
TIMESTEPS = (400, 500, 600, 700)
# A larger picture gives the same result and takes longer.
MAX_SIDE = 512
# The right type's error is at most this share of the other's, and of its target.
CLEAR, ERROR_OF_A_MODEL = 0.6, 0.8
_ZERO_SNR = ", or 'v_prediction_zero_snr' where the model's page speaks of zero terminal SNR"


@dataclass(frozen=True)
class Verdict:
    """The errors of both prediction types, relative to the squared target, and the right type.

    Attributes:
        prediction_type: "epsilon" or "v_prediction"; "" if neither is clearly right.
        current: the type that lorakit uses now.
    """

    epsilon: float
    v_prediction: float
    prediction_type: str
    current: str

    def lines(self) -> list[str]:
        """The result as messages."""
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
    """Measure both errors on photos of any size; each is cropped to a square of the base's size.

    Raises:
        LorakitError: the base predicts the flow, or its prediction is not finite.
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
