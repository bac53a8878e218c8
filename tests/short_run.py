"""A run of a few steps on pictures of noise, for tests of how steps are computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorakit import config
from lorakit.core import registry
from lorakit.training import selfcheck, validation


def noise(folder: Path, count: int) -> Path:
    """So many photos of 64 px in `folder`."""
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def run_config(base: Path, photos: Path, folder: Path, steps: int, **changes: object) -> config.Config:
    """Batches of two and a checkpoint at the end; no validation, no samples. Dots in names are double underscores."""
    settings: dict[str, Any] = {
        "model.base": str(base),
        "data.folder": str(photos),
        "data.name": "sks toy",
        "data.resolution": 64,
        "adapter.rank": 4,
        "optimizer.learning_rate": 1e-2,
        "train.steps": steps,
        "train.batch_size": 2,
        "train.validate_every": steps,
        "train.validate_at_end": False,
        "train.save_every": steps,
        "train.holdout": 0.0,
        "sample.every": steps,
        "sample.at_start": False,
        "sample.at_end": False,
        "sample.steps": 2,
        "sample.prompts": ("a photo of sks toy",),
        "memory.device": "cpu",
        "output.folder": str(folder),
        "output.dtype": "fp32",
    }
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    if str(changes.get("adapter.method", "lora")) not in registry.adapter_methods():
        del settings["adapter.rank"]
    return config.load(None, settings | changes)


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without the self-check, a third of a short run's time: where a test asks what is trained alone."""
    monkeypatch.setattr(selfcheck, "examine", lambda *_, **__: ())


def short_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each photo once, and one picture of the class: where a test asks when the validation runs, or whether it does."""
    for name, value in (("POINTS", 4), ("CLASS_PICTURES", 1), ("CLASS_BATCH", 1)):
        monkeypatch.setattr(validation, name, value)
