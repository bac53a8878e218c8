"""Tests that apply, save, restore and start from an adapter's weights, and that other programs see a PEFT model."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exercise import METHODS, module_of, predict, randomize, train
from peft import get_peft_model_state_dict

import lorakit
from lorakit import adapters
from lorakit.adapters.dora import column_norms
from lorakit.adapters.weights import AdapterWeights, LohaLayer, LoraLayer
from lorakit.config import LoraConfig
from lorakit.core.errors import LorakitError

TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [*(("sd1", method) for method in METHODS), ("sdxl", "lora"), ("sdxl", "dora")]
)
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
        to_q: LoraLayer(torch.randn((3, 64), generator=draw), torch.randn((64, 3), generator=draw), 1.0),
        conv: LoraLayer(
            0.1 * torch.randn((5, 64, 3, 3), generator=draw), 0.1 * torch.randn((64, 5, 1, 1), generator=draw), 2.0
        ),
    }
    originals = {name: module_of(sd1, name).weight.detach().clone() for name in layers}
    applied = adapters.apply(sd1, AdapterWeights("sd1", "lora", layers))
    actual = predict(sd1)
    copy = applied.weights()
    applied.detach()
    for name, layer in layers.items():
        assert torch.equal(copy.layers[name].down, layer.down)
        assert copy.layers[name].alpha == pytest.approx(layer.alpha)
        with torch.no_grad():
            module_of(sd1, name).weight.add_(layer.delta())
    expected = predict(sd1)
    with torch.no_grad():
        for name, weight in originals.items():
            module_of(sd1, name).weight.copy_(weight)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_dora_file_may_have_layers_that_are_plain_lora(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(method="dora", rank=4, target_modules="linear+conv"))
    randomize(adapter)
    weights = adapter.weights()
    adapter.detach()
    plain = {name for number, name in enumerate(weights.layers) if number % 2}
    layers = {n: replace(layer, magnitude=None) if n in plain else layer for n, layer in weights.layers.items()}
    applied = adapters.apply(sd1, replace(weights, layers=layers))
    mixed = predict(sd1)
    copy = applied.weights().layers
    applied.detach()
    assert {name for name, layer in copy.items() if layer.magnitude is None} == plain
    # The same with explicit magnitudes: a plain layer's magnitudes are the norms of W + delta W.
    merged_weights = {
        name: replace(layer, magnitude=column_norms(module_of(sd1, name).weight.detach() + layer.delta()))
        for name, layer in weights.layers.items()
        if name in plain
    }
    applied = adapters.apply(sd1, replace(weights, layers={**weights.layers, **merged_weights}))
    torch.testing.assert_close(predict(sd1), mixed, rtol=1e-4, atol=1e-5)
    applied.detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_restores_every_bit(sd1: Any, attach: Any, method: str) -> None:
    adapter = attach(sd1, METHODS[method](rank=2, train_text_encoder=True))
    randomize(adapter)
    state, parameters = adapter.state(), list(adapter.parameters().values())
    train(sd1, adapter, steps=1)
    adapter.load_state(state)
    assert all(torch.equal(p, state[name]) for name, p in adapter.parameters().items())
    assert all(a is b for a, b in zip(parameters, adapter.parameters().values(), strict=True))
    with torch.no_grad():
        parameters[0].add_(1)
    assert not torch.equal(parameters[0], state[next(iter(state))])


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


@pytest.mark.parametrize("method", [method for method in METHODS if method != "pissa"])
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
    dora = replace(layer, magnitude=torch.ones(1, layer.down.shape[1]))
    refused(replace(weights, layers={**weights.layers, name: dora}), "is dora: set adapter.method = 'dora'")
    refused(replace(weights, layers={name: layer}), "has other layers: .* are missing, 0 are too many")
    refused(replace(weights, layers={**weights.layers, "unet.conv_in": layer}), "0 are missing, 1 are too many")
    half = replace(layer, down=layer.down[:2], up=layer.up[:, :2])
    refused(replace(weights, layers={**weights.layers, name: half}), "has ranks 2, 4: .* lorakit resize FILE --rank 2")
    halves = {n: replace(own, down=own.down[:2], up=own.up[:, :2]) for n, own in weights.layers.items()}
    refused(replace(weights, layers=halves), "set adapter.rank = 2")
    other = replace(layer, down=layer.down[:, :3])
    refused(replace(weights, layers={**weights.layers, name: other}), "another shape")
    assert torch.equal(adapter.weights().layers[name].down, layer.down)
    adapter.detach()
    adapter = attach(sd1, LoraConfig(method="pissa", rank=4))
    refused(weights, "pissa begins from the base's own weights and not from an adapter: set adapter.method = 'lora'")


def test_applying_unfit_weights_says_why(sd1: Any, attach: Any) -> None:
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
    loha = LohaLayer(*(torch.ones(2, 2) for _ in range(4)), alpha=2.0)
    with pytest.raises(LorakitError, match="mixes loha and lora: only one method"):
        fitting = {n: x for n, x in weights.layers.items() if x.size != (2, 2)}
        square = LohaLayer(*(torch.ones(s) for s in ((64, 2), (2, 64)) * 2), alpha=2.0)
        adapters.apply(sd1, replace(weights, layers={**fitting, TO_Q: square}))
    with pytest.raises(LorakitError, match=r"in the base, \(2, 2\) in the adapter"):
        adapters.apply(sd1, replace(weights, layers={name: loha}))
    wrong = replace(layer, down=torch.zeros(2, 3))
    with pytest.raises(LorakitError, match=r"in the base, .* in the adapter"):
        adapters.apply(sd1, replace(weights, layers={name: wrong}))
    with pytest.raises(LorakitError, match="object has no UNet: give a pipeline of Stable Diffusion 1, "):
        adapters.attach(object(), LoraConfig())
    bare = SimpleNamespace(components={"unet": torch.nn.Sequential(torch.nn.Linear(2, 2))})
    with pytest.raises(LorakitError, match="'linear' selects no layer of this base"):
        adapters.attach(bare, LoraConfig(target_modules="linear"))


def test_peft_reads_the_adapters_state_dict(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(rank=2))
    randomize(adapter)
    state = get_peft_model_state_dict(sd1.denoiser)
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
