"""Values whose meaning depends on another option, values that train nothing, and values that Python cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit import config
from lorakit.config import ConfigError, Option

PRESET = "subject-sd15"  # its learning rate is 1e-4


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ({}, 1e-4),
        ({"optimizer.name": "lion"}, 1e-4),
        ({"optimizer.name": "prodigy"}, 1.0),
        ({"optimizer.name": "prodigyopt:Prodigy"}, 1.0),
        ({"optimizer.name": "dadaptation:DAdaptAdam"}, 1.0),
        ({"optimizer.name": "torch.optim:RAdam"}, 1e-4),
        ({"optimizer.name": "prodigy", "optimizer.learning_rate": 0.5}, 0.5),
    ],
)
def test_a_learning_rate_that_is_a_factor_has_its_own_default(overrides: dict[str, Any], rate: float) -> None:
    loaded = config.load(PRESET, overrides)
    assert loaded.optimizer.learning_rate == rate
    assert config.from_tables(config.as_tables(loaded)) == loaded


def test_a_factor_is_not_taken_for_a_rate(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[optimizer]\nname = "prodigy"\n[train]\nsteps = 9\n')
    assert config.load(tmp_path / "mine.toml").optimizer.learning_rate == 1.0
    assert config.load(tmp_path / "mine.toml", {"optimizer.name": "adamw"}).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"optimizer.learning_rate": 0}, "optimizer.learning_rate = 0 trains nothing: give a rate above 0"),
        (
            {"optimizer.text_encoder_learning_rate": 0, "adapter.train_text_encoder": True},
            "optimizer.text_encoder_learning_rate = 0 trains no text encoder: leave it out",
        ),
        (
            {"optimizer.text_encoder_learning_rate": 0.0, "adapter.new_tokens": 1, "data.name": "sks dog"},
            "optimizer.text_encoder_learning_rate = 0 trains no text encoder: leave it out",
        ),
    ],
)
def test_a_rate_of_zero_is_refused_before_the_first_step(overrides: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(PRESET, overrides)
    assert [line for line in caught.value.problems if line.startswith(problem)]


@pytest.mark.parametrize("key", ["train.steps", "optimizer.learning_rate", "data.name", "optimizer.args.eps"])
@pytest.mark.parametrize("value", ["9" * 5000, "9" * 400, "[" * 2000, "{a=" * 2000, "1e" + "9" * 5000])
def test_a_value_that_python_cannot_read_is_refused_with_a_short_line(key: str, value: str) -> None:
    try:
        config.load(PRESET, dict([config.parse_override(f"{key}={value}")]))
    except ConfigError as error:
        assert all(key.rpartition(".")[0] in line and len(line) < 300 for line in error.problems)
    else:
        assert key in ("data.name", "optimizer.args.eps")


@pytest.mark.parametrize("text", ["steps = " + "9" * 5000, "steps = " + "[" * 5000])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.toml").write_text(f"[train]\n{text}\n")
    with pytest.raises(ConfigError, match=r"mine\.toml: not valid TOML"):
        config.load(tmp_path / "mine.toml")


@pytest.mark.parametrize("option", config.options(), ids=lambda option: option.key)
def test_every_option_has_a_help_text(option: Option) -> None:
    assert option.help.endswith((".", "'"))
    assert len(option.help) <= 120


def test_auto_is_refused_for_options_without_an_automatic_value() -> None:
    assert config.load("subject-sd15", {"memory.limit_gib": "auto"}).memory.limit_gib is None
    with pytest.raises(ConfigError, match=r"adapter\.alpha = 'auto': must be a number"):
        config.load("subject-sd15", {"adapter.alpha": "auto"})


@pytest.mark.parametrize(
    "overrides",
    [
        {"data.folder": "/photos/f\udcf6lder"},
        {"output.folder": "\udcff"},
        {"model.base": "caf\udce9.safetensors"},
        {"data.name": "sks\udcff dog"},
        {"sample.prompts": ["a dog", "\ud800"]},
        {"adapter.ranks": {"\udcff": 4}},
    ],
)
def test_a_text_outside_of_utf8_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        config.load("subject-sd15", overrides)
    assert f"{next(iter(overrides))} = " in str(error.value) and "not UTF-8; write it in UTF-8" in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize("name", ["", "sks/toy toy", "a.b toy"])
def test_new_tokens_need_a_trigger_that_can_be_a_file_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.new_tokens needs a trigger of letters and digits: begin data\.n"):
        config.load(PRESET, {"adapter.new_tokens": 1, "data.name": name})
