"""Tests of resume with other options: some may change; those that would change the run are refused by name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from short_run import noise, run_config

from lorakit import config
from lorakit.config import ConfigError, resuming
from lorakit.core.errors import LorakitError
from lorakit.training import run as train

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.slow
def test_an_extended_run_equals_a_run_planned_that_long(tiny_sd1, tmp_path):
    (tmp_path / "photos").mkdir()
    noise(tmp_path / "photos", 3)
    straight = train.train(run_config(tiny_sd1, tmp_path / "photos", tmp_path / "straight", 4))
    folder = train.train(run_config(tiny_sd1, tmp_path / "photos", tmp_path / "run", 2)).folder
    before = (folder / "state.json").read_bytes(), (folder / "config.toml").read_bytes()
    for changes, message in (
        ({"train.steps": 1}, r"is at step 2 already, beyond 1: give more steps, or go back with --from"),
        ({"train.steps": 4, "train.seed": 5}, r"train.seed cannot change from 0 to 5 in a run that goes on"),
        ({"train.step": 4}, r"unknown option train.step"),
    ):
        with pytest.raises(LorakitError, match=message):
            train.resume(folder, overrides=changes)
    assert ((folder / "state.json").read_bytes(), (folder / "config.toml").read_bytes()) == before

    lines: list[str] = []
    more = {"train.steps": 4, "output.formats": ["kohya", "peft"], "sample.seed": 3, "train.keep_checkpoints": 1}
    result = train.resume(
        folder, overrides=more, listeners=[lambda event: lines.append(event.facts.get("message", ""))]
    )
    assert "the run now ends at step 4, not 2; the learning rate at step 2 is 0.01" in lines
    longer, planned = load_file(result.adapter), load_file(straight.adapter)
    assert longer.keys() == planned.keys() and all(torch.equal(longer[name], planned[name]) for name in planned)
    assert result.exports.keys() == {"kohya", "peft"} and result.steps == 4
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000004"]
    reloaded = config.load(folder / "config.toml")
    assert (reloaded.train.steps, reloaded.sample.seed) == (4, 3)


def test_a_stretched_schedule_is_reported(tmp_path):
    class Folder:
        path, steps = tmp_path, 100

    lines: list[str] = []
    events = train.Events(lambda event: lines.append(f"{event.kind}: {event.facts['message']}"))
    for schedule, total in (("cosine", 200), ("constant", 200), ("cosine", 100)):
        ready = type("Ready", (), {})()
        ready.config = config.load(None, {"train.steps": total, "optimizer.lr_scheduler": schedule})
        ready.plan = type("Plan", (), {"steps": total})
        train._compare_lengths(Folder, ready, 100, events)
    assert lines == [
        "warning: the run now ends at step 200, not 100; the learning rate at step 100 is 5e-05, not 0: "
        "cosine now ends at step 200",
        "message: the run now ends at step 200, not 100; the learning rate at step 100 is 0.0001",
    ]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"sample.prompts": ("x",), "sample.every": 3, "output.dtype": "fp32", "train.epochs": 3}, ()),
        ({"memory.gradient_checkpointing": True, "memory.device": "cpu", "train.on_nan": "rollback"}, ()),
        ({"data.folder": "/moved", "model.base": "/moved/base"}, ()),
        ({"optimizer.learning_rate": 1e-3, "adapter.rank": 2}, ("optimizer.learning_rate", "adapter.rank")),
        ({"data.resolution": 256, "train.batch_size": 4}, ("data.resolution", "train.batch_size")),
        ({"optimizer.name": "prodigy"}, ("optimizer.name",)),
        ({"adapter.method": "loha"}, ("adapter.method",)),
        ({"memory.mixed_precision": "fp32", "memory.base_storage": "int8"}, ("memory.mixed_precision", "memory.base")),
        ({"output.folder": "there"}, ("output.folder",)),
    ],
)
def test_only_permitted_options_may_change(tmp_path, changes, refused):
    (tmp_path / "checkpoints" / "step-000005").mkdir(parents=True)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(config.load(None, {"train.steps": 5})), encoding="utf-8")
    if not refused:
        assert resuming.load_changed(file, changes) == config.load(file, changes)
        return
    with pytest.raises(ConfigError) as caught:
        resuming.load_changed(file, changes)
    text = str(caught.value)
    assert all(f"{key}" in text for key in refused) and "start one from its weights with" in text
