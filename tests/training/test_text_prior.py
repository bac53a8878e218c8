"""The term of benchmarks/text_prior.py in the loss."""

from importlib import import_module
from pathlib import Path

import pytest
import short_run
import torch
from test_prior import step_of

from lorakit.training.loss_step import LossStep

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_term_is_the_distance_of_texts_without_the_trigger_from_the_base(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("seed", "loss_of"):
        monkeypatch.setattr(LossStep, name, getattr(LossStep, name))  # restored at the end
    short_run.noise(tmp_path, 2)
    step, adapter = step_of(tiny_sd1, tmp_path, train__class_images=2, adapter__train_text_encoder=True)
    texts = ["", "a photo of a toy"]
    before = step.family.encode_text(texts)["encoder_hidden_states"]
    parameters = [parameter for _, group in adapter.groups() for parameter in group]
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05
    difference = step.family.encode_text(texts)["encoder_hidden_states"] - before
    expected = (difference.norm(dim=-1) / before.norm(dim=-1)).square().mean()
    without = step.loss(0)
    import_module("text_prior").install(10.0)
    assert expected > 1e-4 and torch.allclose(step.loss(0), without + 10 * expected, rtol=1e-4)
    step.loss(0).backward()
    assert all(parameter.grad is not None for parameter in parameters)
