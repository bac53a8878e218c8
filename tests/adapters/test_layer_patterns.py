"""Tests of ranks, alphas and rates by layer pattern: in the base, in the plan and in every exported format."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exercise import METHODS, new_base, predict, randomize
from peft import PeftModel
from safetensors.torch import load_file

from lorakit import adapters, config, formats
from lorakit.adapters import targets
from lorakit.config import ConfigError
from lorakit.core.errors import LorakitError
from lorakit.formats.facts import peft_config
from lorakit.runs import plan, plan_lines
from lorakit.training import optimizers

RANKS = {"*.attn1.*": 1, "*.attn2.to_[kv]": 6, "unet.mid_block.*": 0}
ALPHAS = {"*.attn2.to_v": 3.0}
BASE = {"adapter.rank": 4, "adapter.ranks": RANKS, "adapter.alphas": ALPHAS}


def settings(**options: object) -> config.Config:
    return config.load(None, {"train.steps": 1, "data.name": "sks toy"} | options)


def expected_size(name: str) -> tuple[int, float]:
    """Return (rank, alpha) by the rule that the last pattern that matches wins."""
    rank, alpha = 4, 0.0
    for pattern, own in RANKS.items():
        rank = own if fnmatch.fnmatchcase(name, pattern) else rank
    for pattern, other in ALPHAS.items():
        alpha = other if fnmatch.fnmatchcase(name, pattern) else alpha
    return rank, alpha or float(rank)


@pytest.mark.parametrize("method", METHODS)
def test_each_layer_has_its_rank_and_alpha_in_every_format(method: str, sd1: Any, attach: Any, tmp_path: Path) -> None:
    config_of_run = settings(**BASE, **{"adapter.method": method})
    adapter = attach(sd1, config_of_run.adapter, seed=0)
    randomize(adapter)
    weights = adapter.weights()
    assert not any(".mid_block." in name for name in weights.layers)
    counted = plan.count_weights(adapter.layers, sd1.info.layers, config_of_run.adapter)
    assert counted == adapter.describe()
    for name, layer in weights.layers.items():
        rank, alpha = expected_size(name)
        if method in ("lora", "dora"):
            assert (layer.rank, layer.scale) == (rank, pytest.approx(alpha / rank))
        if method in ("rslora", "pissa", "loha"):
            scale = alpha / (rank**0.5 if method == "rslora" else rank)
            assert layer.scale == pytest.approx(scale) and layer.rank == (2 * rank if method == "pissa" else rank)
    carriers = ["kohya"] + ["peft"] * (method != "dora") + ["diffusers"] * (method in ("lora", "rslora", "pissa"))
    paths = formats.save(weights, tmp_path, "x", carriers, "fp32", {}, say=lambda line: None)
    for path in paths.values():
        read = formats.read(path)
        assert read.layers.keys() == weights.layers.keys()
        for name, layer in weights.layers.items():
            mine, theirs = layer.delta().flatten(1), read.layers[name].delta().flatten(1)
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)
    if method == "lora":
        unet_config = json.loads((paths["peft"] / "unet" / "adapter_config.json").read_text(encoding="utf-8"))
        assert set(unet_config["rank_pattern"].values()) | {unet_config["r"]} == {1, 4, 6}
        assert unet_config["alpha_pattern"]["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"] == 3


@pytest.mark.parametrize("method", ["lora", "loha", "lokr"])
def test_peft_itself_opens_the_folder(method: str, tiny_sd1: Path, tmp_path: Path) -> None:
    family = new_base(tiny_sd1)
    adapter = adapters.attach(family, settings(**BASE, **{"adapter.method": method}).adapter, seed=0)
    randomize(adapter)
    expected = predict(family)
    paths = formats.save(adapter.weights(), tmp_path, "x", ["peft"], "fp32", {}, say=lambda line: None)
    adapter.detach()
    PeftModel.from_pretrained(family.denoiser, paths["peft"] / "unet")
    torch.testing.assert_close(predict(family), expected, rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_an_export_with_padded_ranks(sd1: Any, attach: Any, tmp_path: Path) -> None:
    config_of_run = settings(**BASE).adapter
    adapter = attach(sd1, config_of_run, seed=0)
    randomize(adapter)
    weights, expected = adapter.weights(), predict(sd1)
    path = formats.save(weights, tmp_path, "x", ["kohya"], "fp32", {}, say=lambda line: None)["kohya"]
    downs = {tensor.shape[0] for name, tensor in load_file(path).items() if name.endswith("lora_down.weight")}
    assert downs == {6}, "one rank for all, as diffusers reads a mix wrongly"
    adapter.reset(1)
    adapter.load(formats.read(path))
    torch.testing.assert_close(predict(sd1), expected, rtol=1e-4, atol=1e-5)


def test_rates_by_pattern_multiply(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, settings().adapter, seed=0)
    rates = settings(
        **{
            "optimizer.learning_rate": 1e-3,
            "optimizer.loraplus_lr_ratio": 4.0,
            "optimizer.rates": {"unet.down_blocks.*": 0.5, "*.to_q": 2.0},
        }
    ).optimizer
    optimizer = optimizers.build(rates, *optimizers.rate_groups(rates, adapter.parameters()))
    optimizers.set_learning_rate(optimizer, rates, 0, 10)
    by_parameter = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(by_parameter) == len(adapter.parameters())
    for name, parameter in adapter.parameters().items():
        layer, _, factor = name.rpartition(".")
        own = 2.0 if layer.endswith(".to_q") else 0.5 if layer.startswith("unet.down_blocks.") else 1.0
        assert by_parameter[id(parameter)] == pytest.approx(1e-3 * own * (4.0 if factor == "up" else 1.0))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"adapter.ranks": {"attn2": 8}},
            r"adapter\.ranks: 'attn2' matches none of the adapted layers \(\d+\); '\*attn2\*'",
        ),
        (
            {"optimizer.rates": {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": 0.5}},
            r"optimizer\.rates: .* are such as unet\.mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q",
        ),
        ({"adapter.ranks": {"*.atn2.*": 8}}, r"'\*\.atn2\.\*' matches none of the .* layers are such as .*\.attn2\."),
        ({"adapter.alphas": {"*.ff.*": 8.0}}, r"adapter\.alphas: '\*\.ff\.\*' matches none of the"),
        (
            {"adapter.ranks": {"*.attn2.*": 8, "*attn*": 4}},
            r"'\*\.attn2\.\*' has no effect, as later patterns match all",
        ),
        ({"adapter.ranks": {"*": 0}}, r"adapter\.ranks leaves out every layer"),
        (
            {"adapter.ranks": {"text_encoder.*": 0}, "adapter.train_text_encoder": True},
            r"adapter\.ranks leaves out the text encoders: leave out adapter\.train_text_encoder",
        ),
    ],
)
def test_patterns_without_effect_are_refused_by_check_and_by_attach(
    options: dict[str, Any], problem: str, sd1: Any
) -> None:
    config_of_run = settings(**options)
    with pytest.raises(LorakitError, match=problem):
        raise LorakitError("\n".join(plan.problems(config_of_run, sd1.info)))
    if "optimizer.rates" not in options:
        with pytest.raises(LorakitError, match=problem):
            adapters.attach(sd1, config_of_run.adapter)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"*": 2.5}, r"adapter\.ranks\.\* = 2\.5: must be a whole number"),
        ({"*": 2000}, r"adapter\.ranks\.\* = 2000: must be between 0 and 1024"),
        ({"unet": {"mid_block": 4}}, r"adapter\.ranks: put quotes around a pattern with dots"),
        ({"*" * 300: 4}, r"at most 200 patterns of at most 200 characters"),
        (8, r"adapter\.ranks = 8: must be a table, such as \{'\*\.attn2\.\*' = 8\}"),
    ],
)
def test_wrong_values_are_refused(value: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        settings(**{"adapter.ranks": value})


def test_a_table_comes_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nsteps = 1\n[adapter.ranks]\n'*.attn1.*' = 8\n'unet.mid_block.*' = 4\n", encoding="utf-8")
    key, value = config.parse_override("adapter.ranks.unet.mid_block.*=2")
    table = config.parse_override("optimizer.rates={'*to_q' = 0.5}")
    read = config.load(file, {key: value, table[0]: table[1]})
    assert read.adapter.ranks == {"*.attn1.*": 8, "unet.mid_block.*": 2}
    assert read.optimizer.rates == {"*to_q": 0.5}
    shutil.copy(file, tmp_path / "copy.toml")
    (tmp_path / "copy.toml").write_text(config.to_toml(read), encoding="utf-8")
    assert config.load(tmp_path / "copy.toml") == read


def test_the_plan_counts_layers_by_size_and_rate(sd1: Any) -> None:
    config_of_run = settings(**BASE, **{"optimizer.rates": {"*.attn1.*": 0.25}})
    layers = targets.adapted("sd1", sd1.info.layers, config_of_run.adapter)
    lines = plan_lines.layers(config_of_run, layers)
    assert sum(int(line.split()[1]) for line in lines if line.startswith("layers: ")) == len(layers)
    assert any("of rank 6, alpha 3, effective scale 0.5" in line for line in lines)
    assert any(re.fullmatch(r"rates: 0\.25 of the learning rate for \d+ layers", line) for line in lines)


@pytest.mark.parametrize(
    ("scaling", "problem"),
    [
        ({"r": 4, "rank_pattern": {"to_q": 0}}, "the rank in its config is not a number above 0: 0"),
        ({"r": 4, "rank_pattern": [1]}, "the rank_pattern in its config is no table"),
    ],
)
def test_a_wrong_rank_of_a_peft_config_is_named(scaling: dict[str, Any], problem: str) -> None:
    assert peft_config.rank("unet.a.to_k", {"r": 4, "rank_pattern": {"to_q": 2}}) == 4
    assert peft_config.rank("unet.a.to_q", {"r": 4, "rank_pattern": {"to_q": 2}}) == 2
    with pytest.raises(LorakitError, match=problem):
        peft_config.rank("unet.a.to_q", scaling)
