"""Config and photos of noise for a run of a few steps, and patches that make runs shorter."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorakit import config
from lorakit.core import registry
from lorakit.families import loading
from lorakit.training import selfcheck, validation


def noise(folder: Path, count: int) -> Path:
    """Write `count` photos of 64 px into `folder`."""
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def run_config(base: Path, photos: Path, folder: Path, steps: int, **changes: object) -> config.Config:
    """Return a config with batches of two and a checkpoint at the end. In option names, `__` stands for a dot."""
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
    """Skip the self-check, which takes a third of a short run's time. Use it in tests of training only."""
    monkeypatch.setattr(selfcheck, "examine", lambda *_, **__: ())


def short_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten a validation to 4 points and one class picture. Use it in tests that do not check its values."""
    for name, value in (("POINTS", 4), ("CLASS_PICTURES", 1), ("CLASS_BATCH", 1)):
        monkeypatch.setattr(validation, name, value)


_modules: dict[tuple[Any, ...], Any] = {}


def copy_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read each component of a folder once, and copy it for each later load while its files are unchanged.

    A copy takes a third of the time. Use it in tests that are not about loading.
    """
    read = loading.load_module

    def load(info: Any, component: str, cls: Any, dtype: Any) -> Any:
        source = None if info.components else info.weights(component)
        if source is None or source.slots is not None or not source.path.is_dir():
            return read(info, component, cls, dtype)
        files = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(source.path.iterdir())]
        key = source.path, source.variant, cls, dtype, tuple(files)
        if key not in _modules:
            module = read(info, component, cls, dtype)
            if len(_modules) == 32:  # some tests write bases of their own
                del _modules[next(iter(_modules))]
            _modules[key] = module
        return copy.deepcopy(_modules[key])

    monkeypatch.setattr(loading, "load_module", load)
