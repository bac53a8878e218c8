"""Tests of checkpoints from versions with fewer options, and that commands in messages are complete."""

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import config
from lorakit.cli import main
from lorakit.config import ConfigError, resuming, to_toml
from lorakit.core.errors import LorakitError
from lorakit.training import checkpoint

ADAPTER = {"unet.x.lora_A": torch.ones(2, 2)}
OPTIMIZER: dict[str, Any] = {"state": {}, "param_groups": []}


def settings(**changes: Any) -> config.Config:
    return config.load(None, {"train.steps": 100} | {k.replace("__", "."): v for k, v in changes.items()})


def save(run: Path, *without: str, **changes: Any) -> Path:
    """Write a checkpoint in a run folder as a version without the options in `without` would."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(settings(**changes)), encoding="utf-8")
    path = checkpoint.save(
        run / "checkpoints", 10, ADAPTER, OPTIMIZER, {}, config=settings(**changes), identity={"photos": "0"}
    )
    state_file = path / checkpoint.FILES[2]
    state = json.loads(state_file.read_text(encoding="utf-8"))
    for key in without:
        del state["config"][key]
    state_file.write_text(json.dumps(state), encoding="utf-8")
    marker = json.loads((path / checkpoint.MARKER).read_text(encoding="utf-8"))
    marker[checkpoint.FILES[2]] = checkpoint._digest(state_file)
    (path / checkpoint.MARKER).write_text(json.dumps(marker), encoding="utf-8")
    return path


def commands(message: str) -> list[argparse.Namespace]:
    """Return each `lorakit ...` command of a message, parsed by lorakit's own parser."""
    line = message[re.search(r"\blorakit [a-z-]+ ", message).start() :]  # type: ignore[union-attr]
    return [main.parser().parse_args(shlex.split(part)[1:]) for part in line.split(" && ")]


@pytest.mark.parametrize(
    "names",
    [("data.max_aspect",), ("train.timestep_low", "optimizer.lr_power"), ("adapter.target_modules", "data.keep_tags")],
)
def test_the_default_of_a_newer_option_allows_resume(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = save(tmp_path / "run", *names)
    assert checkpoint.load(path, config=settings()).step == 10
    assert sorted(checkpoint.options_since(path, settings())) == sorted(names)


def test_another_value_of_a_newer_option_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "run", "data.max_aspect")
    with pytest.raises(LorakitError, match=r"data.max_aspect \(was unset, is 2.0\)"):
        checkpoint.load(path, config=settings(data__max_aspect=2.0))


@pytest.mark.parametrize("name", ["run", "my run (2)"])
def test_the_command_for_a_new_run_from_the_weights_is_complete(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name)
    with pytest.raises(LorakitError) as changed:
        checkpoint.load(path, config=settings(train__seed=3))
    with pytest.raises(LorakitError) as identity:
        checkpoint.load(save(tmp_path / f"{name}-b"), identity={"photos": "1"})
    with pytest.raises(ConfigError) as option:
        resuming.load_changed(tmp_path / name / "config.toml", {"train.seed": 3, "data.name": "zwx cat"})
    assert str(option.value).count("lorakit train") == 1
    for message, run in ((changed, name), (option, name)):
        export, train = commands(str(message.value))
        assert Path(export.adapter) == path and export.to == "kohya"
        assert Path(train.init_from) == Path(export.output) / f"{path.name}.safetensors"
        assert Path(train.preset) == tmp_path / run / "config.toml"
        assert not Path(train.output).exists() and not Path(export.output).exists()
    assert dict(config.parse_override(text) for text in train.set) == {"train.seed": 3, "data.name": "zwx cat"}
    assert "lorakit train --preset" in str(identity.value)
