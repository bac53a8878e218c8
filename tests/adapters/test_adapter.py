"""Tests of what an adapter in a base computes and how its weights are initialized."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exercise import METHODS, module_of, new_base, predict, randomize, train

from lorakit import adapters
from lorakit.adapters.weights import LoraLayer
from lorakit.config import LoraConfig
from lorakit.core.errors import LorakitError


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_new_adapter_changes_no_bit(request: pytest.FixtureRequest, attach: Any, name: str, method: str) -> None:
    family = request.getfixturevalue(name)
    before = predict(family)
    attach(family, METHODS[method](rank=4, target_modules="linear+conv", train_text_encoder=True))
    assert torch.equal(predict(family), before)


def test_first_weights_follow_from_seed_and_name_alone(sd1: Any, attach: Any) -> None:
    state = torch.get_rng_state()
    narrow = attach(sd1, LoraConfig(rank=4), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    first = narrow.weights()
    narrow.detach()
    wide = attach(sd1, LoraConfig(rank=4, target_modules="linear+conv", train_text_encoder=True), seed=1).weights()
    assert set(first.layers) < set(wide.layers)
    for name, layer in first.layers.items():
        assert torch.equal(layer.down, wide.layers[name].down)
        assert not layer.up.any()
        bound = layer.down.shape[1] ** -0.5
        assert layer.down.abs().max() <= bound
        assert layer.down.std() == pytest.approx(bound / 3**0.5, rel=0.35)


def test_another_seed_gives_other_weights(sd1: Any, attach: Any) -> None:
    first = attach(sd1, LoraConfig(rank=4), seed=1)
    one = first.weights().layers
    first.reset(2)
    two = first.weights().layers
    assert not any(torch.equal(one[name].down, two[name].down) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "method"),
    [("sd1", False, "lora"), ("sd1", True, "lora"), *(("sdxl", True, method) for method in METHODS)],
)
def test_every_reported_layer_learns_with_and_without_checkpointing(
    request: pytest.FixtureRequest, attach: Any, name: str, method: str, text: bool
) -> None:
    family = request.getfixturevalue(name)
    adapter = attach(family, METHODS[method](rank=2, target_modules="linear+conv", train_text_encoder=text))
    assert len(adapter.layers) == sum(modules for modules, _ in adapter.describe().values())
    assert set(adapter.describe()) == {"unet", *(family.text_encoders if text else ())}
    for checkpointing in (False, True):
        before = adapter.weights().layers
        deltas = {layer: weights.delta() for layer, weights in before.items()}
        if checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        train(family, adapter, steps=1)
        family.denoiser.disable_gradient_checkpointing()
        for layer, weights in adapter.weights().layers.items():
            is_trained = layer not in family.info.untrained_layers
            assert torch.equal(weights.delta(), deltas[layer]) is not is_trained, layer
            if is_trained and method == "dora":
                assert not torch.equal(weights.magnitude, before[layer].magnitude), layer


def test_gradients_are_the_same_with_checkpointing_and_blocks_run_twice(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=4, target_modules="linear+conv"))
    randomize(adapter)
    calls = []
    block = sd1.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    hook = block.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[list[torch.Tensor], int]:
        calls.clear()
        parameters = list(adapter.parameters().values())
        return list(torch.autograd.grad(predict(sd1, grad=True).square().mean(), parameters)), len(calls)

    plain, once = gradients()
    sd1.denoiser.enable_gradient_checkpointing()
    first, second = gradients()
    sd1.denoiser.disable_gradient_checkpointing()
    hook.remove()
    assert (once, second) == (1, 2)
    for a, b in zip(plain, first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", torch.float32), *((method, torch.bfloat16) for method in METHODS)]
)
def test_the_base_keeps_its_precision_and_the_adapter_float32(tiny_sd1: Path, method: str, dtype: torch.dtype) -> None:
    family = new_base(tiny_sd1, dtype)
    config = METHODS[method](rank=2, target_modules="linear+conv", train_text_encoder=True)
    adapter = adapters.attach(family, config)
    train(family, adapter)
    adapter.train(True)
    mine = {id(p) for p in adapter.parameters().values()}
    for module in family.modules().values():
        for parameter in module.parameters():
            trained = id(parameter) in mine
            assert parameter.requires_grad is trained
            assert parameter.dtype is (torch.float32 if trained else dtype)
    assert {p.dtype for p in family.vae.parameters()} == {torch.float32}
    flags = {module.training for part in family.modules().values() for module in part.modules()}
    assert flags == {False}
    assert all(layer.delta().any() for layer in adapter.weights().layers.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_float16_gradients_do_not_vanish_and_are_unscaled(tiny_sd1: Path, method: str) -> None:
    def gradients(dtype: torch.dtype, scaled: bool = True) -> torch.Tensor:
        family = new_base(tiny_sd1, dtype)
        assert family.gradient_scale == (2**13 if dtype is torch.float16 else 1)
        family.gradient_scale = family.gradient_scale if scaled else 1.0
        config = METHODS[method](rank=2, target_modules="linear+conv", train_text_encoder=True)
        adapter = adapters.attach(family, config)
        randomize(adapter, 0.05)
        # A real latent has some hundred times as many values, so its mean gradients are as many times smaller.
        (predict(family, grad=True).square().mean() * 1e-4).backward()
        assert {p.grad.dtype for p in adapter.parameters().values()} == {torch.float32}
        return torch.cat([p.grad.flatten() for p in adapter.parameters().values()])

    right = gradients(torch.float32)
    scaled_error, unscaled_error = (
        ((gradients(torch.float16, scaled) - right).norm() / right.norm()).item() for scaled in (True, False)
    )
    assert scaled_error < 0.02
    assert unscaled_error > 0.1


def test_only_the_adapters_dropout_is_ever_in_training_mode(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=2, dropout=0.5))
    randomize(adapter)
    assert torch.equal(predict(sd1), predict(sd1))
    adapter.train(True)
    on = [type(m).__name__ for part in sd1.modules().values() for m in part.modules() if m.training]
    assert on == ["Dropout"] * len(adapter.layers)
    assert not torch.equal(predict(sd1), predict(sd1))
    adapter.train(False)
    assert torch.equal(predict(sd1), predict(sd1))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_disabling_gives_the_base_and_enabling_the_adapter(sd1: Any, attach: Any, method: str) -> None:
    before = predict(sd1)
    adapter = attach(sd1, METHODS[method](rank=4, target_modules="linear+conv", train_text_encoder=True))
    randomize(adapter)
    after = predict(sd1)
    with adapter.disabled():
        assert torch.equal(predict(sd1), before)
        with adapter.disabled():
            pass
        assert torch.equal(predict(sd1), before)
    assert torch.equal(predict(sd1), after)
    assert (after - before).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="stop"), adapter.disabled():
        raise RuntimeError("stop")
    assert torch.equal(predict(sd1), after)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_detach_restores_the_base(sd1: Any, method: str) -> None:
    names = {part: list(module.state_dict()) for part, module in sd1.modules().items()}
    before = predict(sd1)
    for _ in range(2):
        adapter = adapters.attach(sd1, METHODS[method](rank=2, target_modules="linear+conv", train_text_encoder=True))
        randomize(adapter)
        adapter.detach()
        assert {part: list(module.state_dict()) for part, module in sd1.modules().items()} == names
        assert torch.equal(predict(sd1), before)


# -- the arithmetic, against numpy ------------------------------------------------------------------------------


def merged(base: np.ndarray, layer: LoraLayer, strength: float = 1.0) -> np.ndarray:
    """Return W + strength (W' - W) in float64, where W' follows from the formulas of the adapter's method."""
    part = {name: tensor.double().numpy() for name, tensor in layer.factors().items()}
    if layer.method == "loha":
        product = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
        delta = product * layer.alpha / part["hada_w1_b"].shape[0]
    elif layer.method == "lokr":
        is_full = "lokr_w2" in part
        w2 = part["lokr_w2"].reshape(len(part["lokr_w2"]), -1) if is_full else part["lokr_w2_a"] @ part["lokr_w2_b"]
        delta = np.kron(part["lokr_w1"], w2) * (1 if is_full else layer.alpha / part["lokr_w2_b"].shape[0])
    else:
        down, up = part["down"], part["up"]
        delta = (up.reshape(len(up), -1) @ down.reshape(len(down), -1)) * layer.alpha / len(down)
    new = base + delta.reshape(base.shape)
    if layer.magnitude is not None:
        columns = np.moveaxis(new, 1, 0).reshape(new.shape[1], -1)
        norms = np.sqrt((columns**2).sum(axis=1))
        new = new * (layer.magnitude.double().numpy().reshape(-1) / norms).reshape(1, -1, *[1] * (new.ndim - 2))
    return base + strength * (new - base)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_output_equals_the_output_of_merged_weights(sd1: Any, attach: Any, method: str) -> None:
    config = METHODS[method](rank=4, alpha=3.0, target_modules="linear+conv", train_text_encoder=True)
    adapter = attach(sd1, config)
    randomize(adapter)
    with_adapter = {}
    for strength in (1.0, 0.5, -1.0, 0.0):
        adapter.set_strength(strength)
        with_adapter[strength] = predict(sd1)
    weights = adapter.weights()
    adapter.detach()
    modules = {name: module_of(sd1, name) for name in weights.layers}
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    for strength, expected in with_adapter.items():
        with torch.no_grad():
            for name, layer in weights.layers.items():
                new = merged(before[name].double().numpy(), layer, strength)
                modules[name].weight.copy_(torch.from_numpy(new))
        with_weights = predict(sd1)
        with torch.no_grad():
            for name, weight in before.items():
                modules[name].weight.copy_(weight)
        torch.testing.assert_close(expected, with_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(4, None, 1.0), (4, 1.0, 0.25), (4, 8.0, 2.0)])
def test_the_scale_is_alpha_over_rank(sd1: Any, attach: Any, rank: int, alpha: float | None, scale: float) -> None:
    weights = attach(sd1, LoraConfig(rank=rank, alpha=alpha)).weights()
    assert {layer.rank for layer in weights.layers.values()} == {rank}
    assert {layer.scale for layer in weights.layers.values()} == {scale}


def test_rslora_folds_its_scale_into_alpha(sd1: Any, attach: Any) -> None:
    weights = attach(sd1, LoraConfig(method="rslora", rank=16, alpha=8.0)).weights()
    assert {layer.alpha for layer in weights.layers.values()} == {8.0 * 4}
    assert {layer.scale for layer in weights.layers.values()} == {8.0 / 4}


def test_rank_dropout_and_targets_reach_pefts_layers(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=7, alpha=5.0, dropout=0.25))
    config = sd1.denoiser.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (7, 5.0, 0.25)
    layer = sd1.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.lora_A["default"].weight.shape == (7, 64)
    assert layer.lora_dropout["default"].p == 0.25
    assert len(adapter.layers) == len([m for m in sd1.denoiser.modules() if hasattr(m, "lora_A")])


@pytest.mark.parametrize("convolution", [False, True])
def test_dora_gradients_follow_the_formula_with_a_constant_norm(sd1: Any, attach: Any, convolution: bool) -> None:
    attach(sd1, LoraConfig(method="dora", rank=4, target_modules="linear+conv"))
    block = sd1.denoiser.mid_block
    layer = block.resnets[0].conv1 if convolution else block.attentions[0].transformer_blocks[0].attn1.to_q
    draw = torch.Generator().manual_seed(1)
    shape = (2, 64, 4, 4) if convolution else (2, 16, 64)
    x, towards = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    down, up = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        up.copy_(0.1 * torch.randn(up.shape, generator=draw))
        magnitude.mul_(1 + 0.1 * torch.randn(magnitude.shape, generator=draw))
    actual = torch.autograd.grad((layer(x) * towards).sum(), [down, up, magnitude])

    base = layer.base_layer
    direction = base.weight + (up.flatten(1) @ down.flatten(1)).reshape(base.weight.shape)
    axes = [axis for axis in range(direction.ndim) if axis != 1]
    norms = direction.detach().square().sum(dim=axes, keepdim=True).sqrt()
    weight = magnitude * direction / norms
    output = (
        torch.nn.functional.conv2d(x, weight, base.bias, padding=1)
        if convolution
        else torch.nn.functional.linear(x, weight, base.bias)
    )
    expected = torch.autograd.grad((output * towards).sum(), [down, up, magnitude])
    torch.testing.assert_close(layer(x), output, rtol=1e-4, atol=1e-5)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dora_learns_its_magnitude_in_a_bfloat16_base(tiny_sd1: Path) -> None:
    # Near 1, bfloat16 has steps of 0.8 %: only the product may be rounded to it, not the magnitude itself.
    family = new_base(tiny_sd1, torch.bfloat16)
    adapters.attach(family, LoraConfig(method="dora", rank=2))
    layer = family.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn((64, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    before = layer(x).float()
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.006)
    change = (layer(x).float() - before).norm() / before.norm()
    assert 0.004 < change < 0.008


def test_dora_is_finite_with_a_column_of_zeros(sd1: Any, attach: Any) -> None:
    weight = sd1.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, 3] = 0
    adapter = attach(sd1, LoraConfig(method="dora", rank=2))
    train(sd1, adapter)
    assert torch.isfinite(predict(sd1)).all()
    assert all(torch.isfinite(p).all() for p in adapter.parameters().values())
    with torch.no_grad():
        weight.copy_(before)


def test_dora_is_not_fused_into_the_base(sd1: Any, attach: Any) -> None:
    attach(sd1, LoraConfig(method="dora", rank=2, target_modules="linear+conv"))
    with pytest.raises(LorakitError, match="DoRA adapter cannot be fused"):
        sd1.denoiser.fuse_lora()
    with pytest.raises(LorakitError, match="DoRA adapter cannot be fused"):
        sd1.denoiser.mid_block.resnets[0].conv1.merge()
