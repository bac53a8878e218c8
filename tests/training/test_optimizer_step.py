"""Tests that an optimizer step equals a plain loop over separate parameters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exercise import new_base
from PIL import Image

from lorakit import adapters, config
from lorakit.core.events import Events
from lorakit.data import checks
from lorakit.training import optimizers
from lorakit.training.loss_step import LossStep
from lorakit.training.optimizer_step import OptimizerStep
from lorakit.training.precompute import precompute

STEPS, PARTS = 3, 2


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (folder := tmp_path / "photos").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def run_config(base: Path, photos: Path, **changes: Any) -> config.Config:
    options = {
        "model.base": str(base),
        "data.folder": str(photos),
        "data.name": "sks toy",
        "data.resolution": 64,
        "adapter.rank": 8,
        "adapter.train_text_encoder": True,
        "optimizer.learning_rate": 1e-2,
        "optimizer.text_encoder_learning_rate": 1e-3,
        "train.steps": STEPS,
        "train.batch_size": 2,
        "train.gradient_accumulation_steps": PARTS,
        "train.holdout": 0.0,
        "memory.device": "cpu",
    }
    return config.load(None, options | {name.replace("__", "."): value for name, value in changes.items()})


def prepared(settings: config.Config, dtype: torch.dtype = torch.float32) -> tuple[Any, LossStep]:
    family = new_base(Path(settings.model.base), dtype)
    adapter = adapters.attach(family, settings.adapter, seed=0, trigger=settings.data.trigger)
    encoded = precompute(settings, family, adapter, checks.check(settings.data, family.info), Events())
    adapters.optimize_blocks(family)
    return adapter, LossStep(family, adapter, encoded, settings.train)


def plainly(settings: config.Config, dtype: torch.dtype = torch.float32) -> tuple[Any, list[float]]:
    """Train with a plain loop over unchanged parameters; return the adapter and the gradient norms."""
    adapter, step = prepared(settings, dtype)
    optimizer = optimizers.build(settings.optimizer, adapter.groups())
    parameters = list(adapter.parameters().values())
    for parameter in parameters:  # in a run, the gradient of a layer without a part in the loss is 0, not None
        parameter.grad = torch.zeros_like(parameter)
    norms = []
    for number in range(STEPS):
        optimizers.set_learning_rate(optimizer, settings.optimizer, number, STEPS)
        for part in range(PARTS):
            (step.loss(number * PARTS + part) / PARTS).backward()
        max_norm = settings.train.max_grad_norm or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, max_norm).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return adapter, norms


def updated(settings: config.Config, dtype: torch.dtype = torch.float32) -> tuple[Any, list[float]]:
    adapter, step = prepared(settings, dtype)
    update = OptimizerStep(settings, step, STEPS, print)
    return adapter, [update(number)[1].item() for number in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("base", ["tiny_sd1", "tiny_sdxl"])
def test_without_clipping_weights_equal_a_plain_loops_bit_by_bit(
    name: str, base: str, photos: Path, request: Any
) -> None:
    settings = run_config(request.getfixturevalue(base), photos, optimizer__name=name, train__max_grad_norm=0.0)
    (mine, norms_of_step), (theirs, norms) = updated(settings), plainly(settings)
    state, other = mine.state(), theirs.state()
    assert state.keys() == other.keys() and {key.partition(".")[0] for key in state} >= {"unet", "text_encoder"}
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert norms_of_step == pytest.approx(norms, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_clipping_and_in_half_precision_weights_are_close(
    tiny_sd1: Path, photos: Path, dtype: torch.dtype
) -> None:
    settings = run_config(tiny_sd1, photos, train__max_grad_norm=0.01, adapter__new_tokens=2)
    (mine, norms_of_step), (theirs, norms) = updated(settings, dtype), plainly(settings, dtype)
    assert min(norms) > 0.01
    assert norms_of_step == pytest.approx(norms, rel=1e-6 if dtype is torch.float32 else 1e-2)
    begun, _ = prepared(settings, dtype)
    start, state, other = begun.state(), mine.state(), theirs.state()
    update = torch.cat([(other[key] - start[key]).flatten() for key in other])
    off = torch.cat([(other[key] - state[key]).flatten() for key in other])
    assert update.norm() > 0 and off.norm() <= (1e-4 if dtype is torch.float32 else 0.05) * update.norm()
