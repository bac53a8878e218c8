"""Tests that NaN or infinity in loss, gradients, weights or optimizer state ends a run or triggers a rollback."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_run import noise, run_config

from lorakit.core.errors import LorakitError
from lorakit.core.events import Event
from lorakit.training import checkpoint, run as train
from lorakit.training.loss_step import LossStep
from lorakit.training.optimizer_step import OptimizerStep

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("photos"), 5)


def run(
    base: Path, photos: Path, folder: Path, listener: Callable[[Event], object] = print, **changes: object
) -> train.Result:
    """Train six steps with a checkpoint every three steps."""
    config = run_config(base, photos, folder, 6, train__save_every=3, train__prior="none", **changes)
    return train.train(config, listeners=[listener])


def not_finite_at(index: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss of one batch NaN the first `times` times."""
    loss, left = LossStep.loss, [times]

    def poisoned(self, at):
        value = loss(self, at)
        if at == index and left[0]:
            left[0] -= 1
            return value * float("nan")
        return value

    monkeypatch.setattr(LossStep, "loss", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_photo(tiny_sd1, photos, tmp_path, monkeypatch):
    not_finite_at(4, 1, monkeypatch)
    with pytest.raises(LorakitError, match=r"step 5: the loss is not finite \(.*\.png") as caught:
        run(tiny_sd1, photos, tmp_path / "run")
    assert "\n" not in str(caught.value)
    checkpoint_state = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert checkpoint_state is not None and checkpoint_state.name == "step-000003"
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.load(checkpoint_state).adapter.values())
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_base_with_nan_is_reported_as_the_cause(tiny_sd1, photos, tmp_path):
    base = shutil.copytree(tiny_sd1, tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("attn1.to_q.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        LorakitError, match=rf"^the base holds NaN or infinity in unet\.{re.escape(name)}: it is damaged"
    ):
        run(base, photos, tmp_path / "run")


def overflow_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, after step `step`, put infinity into the optimizer's state; loss and gradients stay finite."""
    call, left = OptimizerStep.__call__, [1]

    def poisoned(self, at):
        result = call(self, at)
        if at + 1 == step and left[0]:
            left[0] -= 1
            next(iter(self.optimizer.state.values()))["exp_avg_sq"].flatten()[0] = float("inf")
        return result

    monkeypatch.setattr(OptimizerStep, "__call__", poisoned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poison", "text"),
    [
        (lambda patch: not_finite_at(4, 1, patch), r"step 5: the loss is not finite .*"),
        (lambda patch: overflow_after(6, patch), r"step 6: optimizer\.state\.0\.exp_avg_sq is not finite; .*"),
    ],
)
def test_rollback_continues_from_the_newest_checkpoint_once(tiny_sd1, photos, tmp_path, monkeypatch, poison, text):
    poison(monkeypatch)
    events: list[Event] = []
    result = run(tiny_sd1, photos, tmp_path / "run", events.append, train__on_nan="rollback")
    assert result.steps == 6
    warnings = [event.facts["message"] for event in events if event.kind == "warning"]
    assert any(re.fullmatch(text + "going back to step-000003 once, with other noise", line) for line in warnings)
    final = checkpoint.load(checkpoint.latest(result.folder / "checkpoints"))
    assert final.step == 6 and all(bool(torch.isfinite(tensor).all()) for tensor in final.adapter.values())


def test_rollback_does_not_repeat_forever(tiny_sd1, photos, tmp_path, monkeypatch):
    not_finite_at(4, 100, monkeypatch)
    with pytest.raises(LorakitError, match="step 5: the loss is not finite"):
        run(tiny_sd1, photos, tmp_path / "run", train__on_nan="rollback")
