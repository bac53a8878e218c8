"""Adapters inside a base: what they compute, where they begin, what they give back."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

import lorakit
from lorakit import adapters, families, objective
from lorakit.adapters.adapter import Adapter
from lorakit.config import DoraConfig, LoraConfig, RsLoraConfig
from lorakit.errors import LorakitError
from lorakit.weights import AdapterWeights, Layer

METHODS = {"lora": LoraConfig, "rslora": RsLoraConfig, "dora": DoraConfig}
TEXTS = ["a photo of sks toy", "a toy"]


@pytest.fixture(scope="module")
def sd1(tiny_sd1: Path) -> Any:
    return families.load(families.describe(tiny_sd1), "cpu", torch.float32)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> Any:
    return families.load(families.describe(tiny_sdxl), "cpu", torch.float32)


@pytest.fixture
def attach() -> Iterator[Callable[..., Adapter]]:
    """`adapters.attach`, undone after the test: the bases are shared."""
    made: list[Adapter] = []

    def call(*args: Any, **options: Any) -> Adapter:
        made.append(adapters.attach(*args, **options))
        return made[-1]

    yield call
    for adapter in made:
        adapter.detach()


def predict(family: Any, grad: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    noisy = torch.randn((2, 4, 8, 8), generator=draw)
    condition = family.encode_text(TEXTS, grad=grad)
    ids = family.time_ids((64, 64), (0, 0), (64, 64))
    if ids is not None:
        condition = condition.with_sizes(torch.tensor([ids, ids]))
    with torch.set_grad_enabled(grad):
        return family.predict(noisy, torch.tensor([100, 700]), condition)


def train(family: Any, adapter: Adapter, steps: int = 2, rate: float = 1e-2) -> None:
    parameters = list(adapter.parameters().values())
    optimizer = torch.optim.SGD(parameters, lr=rate)
    draw = torch.Generator().manual_seed(3)
    for _ in range(steps):
        target = torch.randn((2, 4, 8, 8), generator=draw)
        optimizer.zero_grad()
        (objective.loss(predict(family, grad=True), target) * 100).backward()
        optimizer.step()


def randomize(adapter: Adapter, size: float = 0.1) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            noise = torch.randn(parameter.shape, generator=draw)
            if name.endswith(".magnitude"):
                parameter.mul_(1 + size * noise)
            else:
                parameter.copy_(size * noise)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_new_adapter_changes_nothing_to_the_bit(
    request: pytest.FixtureRequest, attach: Any, name: str, method: str
) -> None:
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_after_two_steps_every_announced_layer_has_learned(
    request: pytest.FixtureRequest, attach: Any, name: str, method: str, text: bool, checkpointing: bool
) -> None:
    family = request.getfixturevalue(name)
    adapter = attach(family, METHODS[method](rank=2, target_modules="linear+conv", train_text_encoder=text))
    before = adapter.weights().layers
    if checkpointing:
        family.unet.enable_gradient_checkpointing()
    train(family, adapter)
    family.unet.disable_gradient_checkpointing()
    assert len(adapter.layers) == sum(modules for modules, _ in adapter.describe().values())
    assert set(adapter.describe()) == {"unet", *(family.text_encoders if text else ())}
    for layer, weights in adapter.weights().layers.items():
        assert bool(weights.up.any()) is (layer not in family.info.idle), layer
        if layer not in family.info.idle and method == "dora":
            assert not torch.equal(weights.magnitude, before[layer].magnitude), layer


def test_gradients_are_the_same_with_checkpointing_and_blocks_run_twice(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=4, target_modules="linear+conv"))
    randomize(adapter)
    calls = []
    block = sd1.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    hook = block.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[list[torch.Tensor], int]:
        calls.clear()
        parameters = list(adapter.parameters().values())
        return list(torch.autograd.grad(predict(sd1, grad=True).square().mean(), parameters)), len(calls)

    plain, once = gradients()
    sd1.unet.enable_gradient_checkpointing()
    again, twice = gradients()
    sd1.unet.disable_gradient_checkpointing()
    hook.remove()
    assert (once, twice) == (1, 2)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_keeps_its_precision_and_the_adapter_float32(tiny_sd1: Path, method: str, dtype: torch.dtype) -> None:
    family = families.load(families.describe(tiny_sd1), "cpu", dtype)
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
    assert all(layer.up.any() for layer in adapter.weights().layers.values())


@pytest.mark.parametrize("method", METHODS)
def test_float16_gradients_are_kept_from_vanishing_and_come_out_in_the_right_size(tiny_sd1: Path, method: str) -> None:
    def gradients(dtype: torch.dtype, scale: float | None = None) -> torch.Tensor:
        family = families.load(families.describe(tiny_sd1), "cpu", dtype)
        family.gradient_scale = family.gradient_scale if scale is None else scale
        config = METHODS[method](rank=2, target_modules="linear+conv", train_text_encoder=True)
        adapter = adapters.attach(family, config)
        randomize(adapter, 0.05)
        # A real latent has some hundred times as many values, and its mean gradients as much smaller.
        (predict(family, grad=True).square().mean() * 1e-4).backward()
        assert {p.grad.dtype for p in adapter.parameters().values()} == {torch.float32}
        return torch.cat([p.grad.flatten() for p in adapter.parameters().values()])

    right = gradients(torch.float32)
    errors = [
        ((gradients(torch.float16, scale) - right).norm() / right.norm()).item() for scale in (None, 2.0**13, 1.0)
    ]
    assert errors[0] == errors[1] < 0.02
    assert errors[2] > 0.1


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


@pytest.mark.parametrize("method", METHODS)
def test_disabled_is_the_base_and_comes_back(sd1: Any, attach: Any, method: str) -> None:
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


@pytest.mark.parametrize("method", METHODS)
def test_detach_leaves_the_base_as_it_was(sd1: Any, method: str) -> None:
    names = {part: list(module.state_dict()) for part, module in sd1.modules().items()}
    before = predict(sd1)
    for _ in range(2):
        adapter = adapters.attach(sd1, METHODS[method](rank=2, target_modules="linear+conv", train_text_encoder=True))
        randomize(adapter)
        adapter.detach()
        assert {part: list(module.state_dict()) for part, module in sd1.modules().items()} == names
        assert torch.equal(predict(sd1), before)


# -- the arithmetic, against numpy ------------------------------------------------------------------------------


def merged(base: np.ndarray, layer: Layer, strength: float = 1.0) -> np.ndarray:
    """W + strength (W' - W) by the formulas of `weights.Layer`, in float64."""
    down, up = layer.down.double().numpy(), layer.up.double().numpy()
    delta = (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(base.shape) * layer.alpha / len(down)
    new = base + delta
    if layer.magnitude is not None:
        columns = np.moveaxis(new, 1, 0).reshape(new.shape[1], -1)
        norms = np.sqrt((columns**2).sum(axis=1))
        new = new * (layer.magnitude.double().numpy().reshape(-1) / norms).reshape(1, -1, *[1] * (new.ndim - 2))
    return base + strength * (new - base)


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("method", METHODS)
def test_output_equals_that_of_the_merged_weights(sd1: Any, attach: Any, method: str, strength: float) -> None:
    config = METHODS[method](rank=4, alpha=3.0, target_modules="linear+conv", train_text_encoder=True)
    adapter = attach(sd1, config)
    randomize(adapter)
    adapter.set_strength(strength)
    with_adapter = predict(sd1)
    weights = adapter.weights()
    adapter.detach()
    kept = {}
    with torch.no_grad():
        for name, layer in weights.layers.items():
            module = module_of(sd1, name)
            kept[name] = module.weight.clone()
            module.weight.copy_(torch.from_numpy(merged(module.weight.double().numpy(), layer, strength)))
    with_weights = predict(sd1)
    with torch.no_grad():
        for name, weight in kept.items():
            module_of(sd1, name).weight.copy_(weight)
    torch.testing.assert_close(with_adapter, with_weights, rtol=1e-4, atol=1e-5)


def module_of(family: Any, name: str) -> torch.nn.Module:
    component, _, path = name.partition(".")
    part = family.modules()[component]
    names = dict(part.named_modules())
    return names[path] if path in names else names[path.removeprefix("text_model.")]


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(4, None, 1.0), (4, 1.0, 0.25), (4, 8.0, 2.0)])
def test_the_scale_is_alpha_by_rank(sd1: Any, attach: Any, rank: int, alpha: float | None, scale: float) -> None:
    weights = attach(sd1, LoraConfig(rank=rank, alpha=alpha)).weights()
    assert {layer.rank for layer in weights.layers.values()} == {rank}
    assert {layer.scale for layer in weights.layers.values()} == {scale}


def test_rslora_folds_its_scale_into_alpha(sd1: Any, attach: Any) -> None:
    weights = attach(sd1, RsLoraConfig(rank=16, alpha=8.0)).weights()
    assert {layer.alpha for layer in weights.layers.values()} == {8.0 * 4}
    assert {layer.scale for layer in weights.layers.values()} == {8.0 / 4}


def test_rank_dropout_and_targets_reach_pefts_layers(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=7, alpha=5.0, dropout=0.25))
    config = sd1.unet.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (7, 5.0, 0.25)
    layer = sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.lora_A["default"].weight.shape == (7, 64)
    assert layer.lora_dropout["default"].p == 0.25
    assert len(adapter.layers) == len([m for m in sd1.unet.modules() if hasattr(m, "lora_A")])


@pytest.mark.parametrize("convolution", [False, True])
def test_dora_gradients_are_those_of_the_formula_with_the_norm_held(sd1: Any, attach: Any, convolution: bool) -> None:
    attach(sd1, DoraConfig(rank=4, target_modules="linear+conv"))
    block = sd1.unet.mid_block
    layer = block.resnets[0].conv1 if convolution else block.attentions[0].transformer_blocks[0].attn1.to_q
    draw = torch.Generator().manual_seed(1)
    shape = (2, 64, 4, 4) if convolution else (2, 16, 64)
    x, towards = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    down, up = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        up.copy_(0.1 * torch.randn(up.shape, generator=draw))
        magnitude.mul_(1 + 0.1 * torch.randn(magnitude.shape, generator=draw))
    found = torch.autograd.grad((layer(x) * towards).sum(), [down, up, magnitude])

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
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dora_learns_its_magnitude_in_a_bfloat16_base(tiny_sd1: Path) -> None:
    # Around 1, bfloat16 has steps of 0.8 %: s itself must not be rounded to it, only the product.
    family = families.load(families.describe(tiny_sd1), "cpu", torch.bfloat16)
    adapters.attach(family, DoraConfig(rank=2))
    layer = family.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn((64, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    before = layer(x).float()
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.006)
    change = (layer(x).float() - before).norm() / before.norm()
    assert 0.004 < change < 0.008


def test_dora_is_not_fused_into_the_base(sd1: Any, attach: Any) -> None:
    attach(sd1, DoraConfig(rank=2, target_modules="linear+conv"))
    with pytest.raises(LorakitError, match="DoRA adapter cannot be fused"):
        sd1.unet.fuse_lora()
    with pytest.raises(LorakitError, match="DoRA adapter cannot be fused"):
        sd1.unet.mid_block.resnets[0].conv1.merge()


# -- in and out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_applied_weights_do_what_the_trained_adapter_did(
    request: pytest.FixtureRequest, attach: Any, name: str, method: str
) -> None:
    family = request.getfixturevalue(name)
    config = METHODS[method](rank=4, alpha=2.0, target_modules="linear+conv", train_text_encoder=True)
    adapter = attach(family, config)
    randomize(adapter)
    trained, weights = predict(family), adapter.weights()
    adapter.detach()
    base = predict(family)
    applied = adapters.apply(family, weights)
    torch.testing.assert_close(predict(family), trained, rtol=1e-4, atol=1e-5)
    applied.set_strength(0)
    assert torch.equal(predict(family), base)
    applied.set_strength(1)
    torch.testing.assert_close(predict(family), trained, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for part in family.modules().values() for p in part.parameters())
    applied.detach()


def test_applied_weights_may_have_a_rank_and_scale_for_each_layer(sd1: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    to_q, conv = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.mid_block.resnets.0.conv1"
    layers = {
        to_q: Layer(torch.randn((3, 64), generator=draw), torch.randn((64, 3), generator=draw), 1.0),
        conv: Layer(
            0.1 * torch.randn((5, 64, 3, 3), generator=draw), 0.1 * torch.randn((64, 5, 1, 1), generator=draw), 2.0
        ),
    }
    originals = {name: module_of(sd1, name).weight.detach().clone() for name in layers}
    applied = adapters.apply(sd1, AdapterWeights("sd1", "lora", layers))
    found = predict(sd1)
    again = applied.weights()
    applied.detach()
    for name, layer in layers.items():
        assert torch.equal(again.layers[name].down, layer.down)
        assert again.layers[name].alpha == pytest.approx(layer.alpha)
        with torch.no_grad():
            module_of(sd1, name).weight.add_(layer.delta())
    expected = predict(sd1)
    with torch.no_grad():
        for name, weight in originals.items():
            module_of(sd1, name).weight.copy_(weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_brings_every_bit_back(sd1: Any, attach: Any, method: str) -> None:
    adapter = attach(sd1, METHODS[method](rank=2, train_text_encoder=True))
    randomize(adapter)
    state, held = adapter.state(), list(adapter.parameters().values())
    train(sd1, adapter, steps=1)
    adapter.load_state(state)
    assert all(torch.equal(p, state[name]) for name, p in adapter.parameters().items())
    assert all(a is b for a, b in zip(held, adapter.parameters().values(), strict=True))
    with torch.no_grad():
        held[0].add_(1)
    assert not torch.equal(held[0], state[next(iter(state))])


def test_a_checkpoint_of_another_adapter_is_refused(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=2))
    state = adapter.state()
    first = next(iter(state))
    with pytest.raises(LorakitError, match=r"does not fit this adapter: .*\.down \(1 such\)"):
        adapter.load_state({name: value for name, value in state.items() if name != first})
    with pytest.raises(LorakitError, match="does not fit"):
        adapter.load_state({**state, "another": torch.zeros(1)})
    with pytest.raises(LorakitError, match="does not fit"):
        adapter.load_state({**state, first: torch.zeros(1)})


@pytest.mark.parametrize("method", METHODS)
def test_starting_from_another_adapter_gives_its_delta_whatever_the_scale(sd1: Any, attach: Any, method: str) -> None:
    first = attach(sd1, METHODS[method](rank=4, alpha=1.0))
    randomize(first)
    weights, output = first.weights(), predict(sd1)
    first.detach()
    second = attach(sd1, METHODS[method](rank=4, alpha=8.0))
    second.load(weights)
    torch.testing.assert_close(predict(sd1), output, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in second.parameters().values())


def test_starting_from_an_adapter_that_does_not_fit_says_what_to_set(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=4))
    weights = adapter.weights()
    name, layer = next(iter(weights.layers.items()))

    def refused(other: AdapterWeights, words: str) -> None:
        with pytest.raises(LorakitError, match=words) as caught:
            adapter.load(other)
        assert "\n" not in str(caught.value)

    refused(replace(weights, family="sdxl"), "is for sdxl, this base is sd1")
    refused(replace(weights, method="dora"), "set adapter.method = 'dora'")
    refused(replace(weights, layers={name: layer}), "has other layers: .* lacking, 0 too many")
    refused(replace(weights, layers={**weights.layers, "unet.conv_in": layer}), "0 lacking, 1 too many")
    half = replace(layer, down=layer.down[:2], up=layer.up[:, :2])
    refused(replace(weights, layers={**weights.layers, name: half}), "set adapter.rank = 2")
    other = replace(layer, down=layer.down[:, :3])
    refused(replace(weights, layers={**weights.layers, name: other}), "another shape")
    assert torch.equal(adapter.weights().layers[name].down, layer.down)


def test_applying_what_does_not_fit_says_why(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=2))
    weights = adapter.weights()
    name, layer = next(iter(weights.layers.items()))
    with pytest.raises(LorakitError, match="unet already carries an adapter"):
        adapters.apply(sd1, weights)
    adapter.detach()
    with pytest.raises(LorakitError, match="the adapter is for sdxl, the base is sd1"):
        adapters.apply(sd1, replace(weights, family="sdxl"))
    with pytest.raises(LorakitError, match=r"has no layer unet\.nowhere"):
        adapters.apply(sd1, replace(weights, layers={"unet.nowhere": layer}))
    wrong = replace(layer, down=torch.zeros(2, 3))
    with pytest.raises(LorakitError, match=r"in the base, .* in the adapter"):
        adapters.apply(sd1, replace(weights, layers={name: wrong}))
    with pytest.raises(LorakitError, match="object has no UNet"):
        adapters.attach(object(), LoraConfig())


def test_it_stays_a_peft_model_to_everyone_else(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=2))
    randomize(adapter)
    state = get_peft_model_state_dict(sd1.unet)
    assert len(state) == 2 * len(adapter.layers)
    for name, layer in adapter.weights().layers.items():
        module = name.removeprefix("unet.")
        assert torch.equal(state[f"{module}.lora_A.weight"], layer.down)
        assert torch.equal(state[f"{module}.lora_B.weight"], layer.up)


def test_attach_takes_any_diffusers_pipeline(tiny_sdxl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
        return pipe("a toy", generator=torch.Generator().manual_seed(0), **options).images

    before = draw()
    adapter = lorakit.attach(pipe, LoraConfig(rank=2, train_text_encoder=True))
    assert adapter.family == "sdxl"
    assert set(adapter.describe()) == {"unet", "text_encoder", "text_encoder_2"}
    assert np.array_equal(draw(), before)
    randomize(adapter, 0.5)
    assert not np.array_equal(draw(), before)
    adapter.detach()
    assert np.array_equal(draw(), before)
