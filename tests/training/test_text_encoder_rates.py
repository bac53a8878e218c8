"""Tests of text encoders with their own rates and an earlier end, and of adapter files every few steps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from short_run import noise, run_config

from lorakit import config
from lorakit.config import ConfigError, OptimizerConfig
from lorakit.runs import preflight
from lorakit.runs.run_folder import RunFolder
from lorakit.training import optimizers, run as train

pytestmark = pytest.mark.usefixtures("unchecked")


Groups = list[tuple[str, list[torch.nn.Parameter]]]


def groups_of(*parts: str) -> Groups:
    return [(part, [torch.nn.Parameter(torch.ones(4, 4))]) for part in parts]


def moves(
    run_config: OptimizerConfig, optimizer: torch.optim.Optimizer, groups: Groups, steps: int
) -> list[list[bool]]:
    """Whether each group moves in each step of a run."""
    rows = []
    for step in range(steps):
        optimizers.set_learning_rate(optimizer, run_config, step, steps)
        before = [params[0].detach().clone() for _, params in groups]
        for _, params in groups:
            params[0].grad = torch.full((4, 4), 0.3)
        optimizers.step(optimizer)
        rows.append([not torch.equal(old, params[0]) for old, (_, params) in zip(before, groups, strict=True)])
    return rows


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_each_text_encoder_has_its_rate_and_last_step(name: str) -> None:
    run_config = OptimizerConfig(
        name=name,
        learning_rate=1e-2,
        text_encoder_learning_rate=1e-3,
        text_encoder_2_learning_rate=1e-4,
        text_encoder_stop=0.5,
    )
    groups = groups_of("unet", "text_encoder", "text_encoder_2")
    optimizer = optimizers.build(run_config, groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3, 1e-4]
    assert moves(run_config, optimizer, groups, 4) == 2 * [[True] * 3] + 2 * [[True, False, False]]


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_the_unet_stays_as_it_is_before_its_first_step(name: str) -> None:
    run_config = OptimizerConfig(name=name, learning_rate=1e-2, unet_start=0.4, text_encoder_stop=0.8, weight_decay=0.1)
    groups = groups_of("unet", "text_encoder")
    rows = moves(run_config, optimizers.build(run_config, groups), groups, 5)
    assert rows == [[False, True], [False, True], [True, True], [True, True], [True, False]]


def test_a_part_is_trained_at_any_time() -> None:
    options = {"train.steps": 9, "adapter.train_text_encoder": True, "optimizer.text_encoder_stop": 0.5}
    assert config.load(None, options | {"optimizer.unet_start": 0.4}).optimizer.unet_start == 0.4
    message = r"unet_start = 0.5: nothing is trained between optimizer.text_encoder_stop = 0.5 and it"
    with pytest.raises(ConfigError, match=message):
        config.load(None, options | {"optimizer.unet_start": 0.5})


@pytest.mark.parametrize(
    ("name", "value"), [("text_encoder_stop", 0.5), ("text_encoder_2_learning_rate", 1e-5), ("unet_start", 0.5)]
)
def test_options_of_text_encoders_need_a_trained_text_encoder(name: str, value: float) -> None:
    option = {f"optimizer.{name}": value}
    with pytest.raises(ConfigError, match=r"needs adapter.train_text_encoder = true or adapter.new_tokens"):
        config.load(None, {"train.steps": 1, **option})
    run_config = config.load(
        None, {"train.steps": 1, "adapter.train_text_encoder": True, "optimizer.name": "prodigy", **option}
    )
    assert any("has one rate" in line for line in preflight._optimizer_problems(run_config))


@pytest.mark.slow
def test_adapter_files_are_written_at_intervals(tiny_sd1, tmp_path):
    (tmp_path / "photos").mkdir()
    noise(tmp_path / "photos", 2)
    result = train.train(run_config(tiny_sd1, tmp_path / "photos", tmp_path / "run", 5, train__export_every=2))
    names = sorted(path.name for path in result.folder.glob("*.safetensors"))
    assert names == ["sks-toy-step-000002.safetensors", "sks-toy-step-000004.safetensors", "sks-toy.safetensors"]
    second, last = (load_file(result.folder / name) for name in names[::2])
    assert second.keys() == last.keys() and any(not torch.equal(second[name], last[name]) for name in last)


@pytest.mark.slow
def test_the_log_has_the_text_encoders_rate_before_the_unet_starts(tiny_sd1, tmp_path):
    (tmp_path / "photos").mkdir()
    noise(tmp_path / "photos", 2)
    options = {"adapter__train_text_encoder": True, "optimizer__learning_rate": 1e-2, "optimizer__unet_start": 0.5}
    options |= {"optimizer__text_encoder_learning_rate": 1e-3}
    result = train.train(run_config(tiny_sd1, tmp_path / "photos", tmp_path / "run", 4, **options))
    rates = [event["learning_rate"] for event in RunFolder(result.folder).events("step")]
    assert rates == [1e-3, 1e-3, 1e-2, 1e-2]
