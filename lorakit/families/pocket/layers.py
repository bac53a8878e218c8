"""The layers of a rendered scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layers:
    """One scene before its manner is applied: float32 arrays at twice the picture's size."""

    backdrop: np.ndarray  # (S, S, 3), 0 to 255
    colour: np.ndarray  # (S, S, 3), the object's flat colours
    mask: np.ndarray  # (S, S), 1 where the object is
    parts: np.ndarray  # (S, S) uint8, which polygon is in front; 0 is the backdrop
    middle: tuple[float, float]  # of the object, as shares of the frame
    half: float  # half of its longer side, as a share of the frame
