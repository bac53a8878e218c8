"""Tests of the limit on each layer's norm, and of dropout of ranks, rows and layers, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exercise import predict, randomize

from lorakit import config
from lorakit.adapters.method import NAME
from lorakit.adapters.weights import delta_norm
from lorakit.config import ConfigError
from lorakit.families import prediction
from lorakit.training.run import dropped_layers


def settings(**options: object) -> config.Config:
    return config.load(None, {"train.steps": 1} | options)


@pytest.mark.parametrize("method", ["lora", "rslora", "loha", "lokr"])
@pytest.mark.parametrize("modules", ["attention", "linear+conv"])
def test_norms_are_limited_as_in_kohyas_scripts(method: str, modules: str, sd1: Any, attach: Any) -> None:
    options = {"adapter.method": method, "adapter.rank": 4, "adapter.target_modules": modules, "adapter.alpha": 2.0}
    adapter = attach(sd1, settings(**options).adapter, seed=0)
    randomize(adapter, size=0.3)
    before = {name: layer.delta() for name, layer in adapter.weights().layers.items()}
    norms = sorted(float(delta.norm()) for delta in before.values())
    limit = norms[len(norms) // 2] * 1.001
    count = adapter.limit_norms(limit)
    assert int(count) == sum(norm > limit for norm in norms) > 0
    for name, layer in adapter.weights().layers.items():
        share = min(1.0, limit / float(before[name].norm()))
        torch.testing.assert_close(layer.delta(), before[name] * share, rtol=1e-4, atol=1e-6)


def test_the_norm_of_factors_equals_the_norm_of_their_product() -> None:
    draw = torch.Generator().manual_seed(0)
    factors = {"down": torch.randn(4, 6, 3, 3, generator=draw), "up": torch.randn(8, 4, 1, 1, generator=draw)}
    expected = (factors["up"].flatten(1) @ factors["down"].flatten(1)).norm() * 0.5
    assert float(delta_norm(factors, 0.5)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["to_q", "conv1"])
def test_rank_dropout_draws_for_each_picture(kind: str, sd1: Any, attach: Any) -> None:
    options = {"adapter.rank": 4, "adapter.rank_dropout": 0.5, "adapter.target_modules": "linear+conv"}
    adapter = attach(sd1, settings(**options).adapter, seed=0)
    randomize(adapter)
    name = next(name for name in adapter.layers if name.endswith(kind))
    layer = sd1.denoiser.get_submodule(name.removeprefix("unet."))
    weights = adapter.weights().layers[name]
    down, up = weights.down, weights.up
    channels = down.shape[1]
    x = torch.randn((8, channels, 4, 4) if kind == "conv1" else (8, 5, channels), generator=torch.Generator())
    adapter.train(True)
    torch.manual_seed(3)
    actual = layer(x).detach() - layer.base_layer(x).detach()
    torch.manual_seed(3)
    torch.rand(())
    shape = (8, 4, 1, 1) if kind == "conv1" else (8, 1, 4)
    stays = (torch.rand(shape) >= 0.5).float() * 2
    assert stays.flatten(1).unique(dim=0).shape[0] > 1, "other ranks for other pictures"
    if kind == "conv1":
        inner = torch.nn.functional.conv2d(x, down, padding=layer.base_layer.padding) * stays
        expected = torch.nn.functional.conv2d(inner, up)
    else:
        expected = x @ down.T * stays @ up.T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    adapter.train(False)
    full = layer(x).detach() - layer.base_layer(x).detach()
    assert not torch.allclose(full, actual, atol=1e-4)


def test_module_dropout_skips_a_layers_adapter_in_some_passes(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, settings(**{"adapter.module_dropout": 0.4}).adapter, seed=0)
    randomize(adapter)
    layer = sd1.denoiser.get_submodule(adapter.layers[0].removeprefix("unet."))
    x = torch.randn(2, 5, layer.base_layer.in_features)
    adapter.train(False)
    full, base = layer(x).detach(), layer.base_layer(x).detach()
    adapter.train(True)
    torch.manual_seed(0)
    passes = [layer(x).detach() for _ in range(200)]
    without = sum(torch.equal(each, base) for each in passes)
    assert 0.28 < without / 200 < 0.52
    assert all(torch.equal(each, base) or torch.allclose(each, full, atol=1e-6) for each in passes)
    torch.manual_seed(1)
    first = predict(sd1)
    torch.manual_seed(1)
    assert torch.equal(predict(sd1), first), "sampled from the seeded generator"
    assert layer.lora_dropout[NAME].training


@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize("kind", ["to_q", "conv1"])
def test_rank_dropout_of_lycoris_drops_rows_for_each_picture(method: str, kind: str, sd1: Any, attach: Any) -> None:
    options = {"adapter.method": method, "adapter.rank": 2, "adapter.target_modules": "linear+conv"}
    adapter = attach(sd1, settings(**options, **{"adapter.rank_dropout": 0.5, "adapter.module_dropout": 0.3}).adapter)
    randomize(adapter)
    name = next(name for name in adapter.layers if name.endswith(kind))
    layer = sd1.denoiser.get_submodule(name.removeprefix("unet."))
    channels = layer.base_layer.weight.shape[1]
    x = torch.randn((8, channels, 4, 4) if kind == "conv1" else (8, 5, channels))
    base = layer.base_layer(x).detach()
    full = layer(x).detach() - base
    rows = full.transpose(1, -1) if kind == "conv1" else full
    adapter.train(True)
    passes = [layer(x).detach() - base for _ in range(40)]
    assert 4 < sum(not each.any() for each in passes) < 21, "of the whole adapter in 3 passes of 10"
    each = next(each for each in passes if each.any())
    each = each.transpose(1, -1) if kind == "conv1" else each
    used = each.flatten(1, -2).abs().amax(1) > 1e-5
    assert used.unique(dim=0).shape[0] > 1 and 0.2 < used.float().mean() < 0.8, "other rows for other pictures"
    expected = rows * used.reshape(8, *(1,) * (rows.ndim - 2), -1) * 2
    torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-4)
    layer(x).sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in adapter.parameters().values())


@pytest.mark.parametrize("method", ["lora", "loha", "lokr"])
def test_layers_that_dropout_always_skipped_pass_the_check(method: str, sd1: Any, attach: Any) -> None:
    options = {"adapter.method": method, "adapter.rank": 2, "adapter.module_dropout": 0.5}
    section = settings(**options).adapter
    adapter = attach(sd1, section)
    assert dropped_layers(adapter.weights(), section) == [], "all are zero: that is a fault"
    first = {name: parameter.clone() for name, parameter in adapter.parameters().items()}
    randomize(adapter)
    assert dropped_layers(adapter.weights(), section) == []
    for name, parameter in adapter.parameters().items():
        if name.startswith(f"{adapter.layers[3]}."):
            parameter.data.copy_(first[name])
    assert dropped_layers(adapter.weights(), section) == [adapter.layers[3]]
    assert dropped_layers(adapter.weights(), settings(**options | {"adapter.module_dropout": 0.0}).adapter) == []


@pytest.mark.parametrize("method", ["dora", "pissa"])
@pytest.mark.parametrize("option", ["train.max_weight_norm", "adapter.rank_dropout", "adapter.module_dropout"])
def test_norm_limits_and_dropout_are_refused_for_unfit_methods(method: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} needs a method whose change is the product of its factors alone"):
        settings(**{"adapter.method": method, option: 0.5})
    with pytest.raises(ConfigError, match=r"memory.compile needs adapter.dropout = 0"):
        settings(**{"adapter.rank_dropout": 0.5, "memory.compile": True})


def test_timestep_shift_moves_timesteps_to_more_noise() -> None:
    of = prediction.Epsilon(torch.linspace(0.999, 0.01, 1000))
    sampled = of.sample_timesteps(4000, torch.Generator().manual_seed(0), "cpu", shift=3.0).float() / 1000
    shares = (torch.arange(4000) + 0.5) / 4000
    torch.testing.assert_close(sampled.sort().values, 3 * shares / (1 + 2 * shares), rtol=0, atol=2e-3)
    part = of.sample_timesteps(4000, torch.Generator(), "cpu", shift=3.0, between=(0.5, 1.0))
    assert part.min() >= 500 and part.float().mean() > 780
