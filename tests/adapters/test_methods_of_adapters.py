"""Tests of PiSSA, LoHa and LoKr alone: their initial weights, numbers of parameters and names in PEFT."""

from typing import Any

import numpy as np
import pytest
import torch
from exercise import METHODS, predict, train

from lorakit import adapters
from lorakit.adapters import targets
from lorakit.config import ADAPTER_SECTIONS, AdapterConfig, LoraConfig
from lorakit.core.errors import LorakitError
from lorakit.runs.plan import count_weights


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_the_trained_weights(sd1: Any, attach: Any, method: str) -> None:
    config = METHODS[method](rank=5, target_modules="linear+conv", train_text_encoder=True)
    adapter = attach(sd1, config)
    announced = sum(targets.trained(config, sd1.info.layers[name]) for name in adapter.layers)
    assert sum(parameter.numel() for parameter in adapter.parameters().values()) == announced


def test_the_plan_counts_the_vectors_of_a_word(sd1: Any, attach: Any) -> None:
    config = LoraConfig(rank=2, new_tokens=3)
    adapter = attach(sd1, config, trigger="sks")
    assert count_weights([*adapter.layers], sd1.info.layers, config) == adapter.describe()
    assert adapter.describe()["text_encoder"] == (0, 3 * 32)


def test_pissa_starts_from_the_principal_part_of_the_weight(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(method="pissa", rank=6, alpha=3.0, target_modules="linear+conv"))
    state = adapter.state()
    for name, layer in adapter._layers.items():
        weight = layer.base_layer.weight.detach().double().flatten(1).numpy()
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        down, up = (state[f"{name}.{factor}"].double().flatten(1).numpy() for factor in ("down", "up"))
        actual = 0.5 * up @ down
        best = (left[:, :6] * values[:6]) @ right[:6]
        # The product is as near to the weight as rank 6 allows, up to the error of the randomized SVD.
        assert np.linalg.norm(weight - actual) <= 1.01 * np.linalg.norm(weight - best)
        assert np.linalg.norm(actual) >= 0.98 * np.linalg.norm(best)


def test_pissa_exports_the_change_of_the_paper(sd1: Any, attach: Any) -> None:
    """The adapted weight is W - s B0 A0 + s B A. The base keeps W, so the exported change is s (B A - B0 A0)."""
    adapter = attach(sd1, LoraConfig(method="pissa", rank=2, target_modules="linear+conv", train_text_encoder=True))
    before = adapter.state()
    train(sd1, adapter)
    after, weights = adapter.state(), adapter.weights()
    for name, layer in weights.layers.items():
        old, new = (
            state[f"{name}.up"].double().flatten(1) @ state[f"{name}.down"].double().flatten(1)
            for state in (before, after)
        )
        assert layer.rank == 4 and layer.alpha == 4.0
        np.testing.assert_allclose(layer.delta().flatten(1).numpy(), (new - old).numpy(), atol=1e-6)
        assert torch.equal(before[f"{name}.down_0"], after[f"{name}.down_0"])


def test_pissa_is_applied_as_plain_lora(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, LoraConfig(method="pissa", rank=2))
    train(sd1, adapter)
    trained, weights = predict(sd1), adapter.weights()
    adapter.detach()
    applied = adapters.apply(sd1, weights)
    assert (weights.method, applied.method) == ("pissa", "lora")
    torch.testing.assert_close(predict(sd1), trained, rtol=1e-4, atol=1e-5)
    applied.detach()


def test_pissa_works_with_a_rank_above_the_layers_size(sd1: Any, attach: Any) -> None:
    before = predict(sd1)
    adapter = attach(sd1, LoraConfig(method="pissa", rank=200))
    assert all(torch.isfinite(parameter).all() for parameter in adapter.parameters().values())
    assert torch.equal(predict(sd1), before)


def test_pissa_is_not_fused_into_the_base(sd1: Any, attach: Any) -> None:
    attach(sd1, LoraConfig(method="pissa", rank=2, target_modules="linear+conv"))
    block = sd1.denoiser.mid_block
    for layer in (block.resnets[0].conv1, block.attentions[0].transformer_blocks[0].attn1.to_q):
        with pytest.raises(LorakitError, match="PiSSA adapter that is being trained cannot be fused"):
            layer.merge()


def test_initial_weights_follow_lycoris(sd1: Any, attach: Any) -> None:
    adapter = attach(sd1, AdapterConfig(method="loha", rank=8, target_modules="linear+conv"), seed=3)
    for layer in adapter.weights().layers.values():
        assert not layer.w2_a.any()
        assert layer.w1_a.std() == pytest.approx(0.1, rel=0.2) and layer.w2_b.std() == pytest.approx(1, rel=0.2)
    adapter.detach()
    adapter = attach(sd1, AdapterConfig(method="lokr", rank=2, target_modules="linear+conv"), seed=3)
    for layer in adapter.weights().layers.values():
        assert not layer.w2[-1].any() and layer.w1[0].any()
        assert layer.scale == 1


def test_a_full_lokr_has_no_scale(sd1: Any, attach: Any) -> None:
    """LyCORIS' rule: if both matrices are stored in full, no rank exists to divide alpha by."""
    adapter = attach(sd1, AdapterConfig(method="lokr", rank=64, alpha=1.0))
    train(sd1, adapter)
    trained, weights = predict(sd1), adapter.weights()
    assert all(layer.is_full and layer.scale == 1 for layer in weights.layers.values())
    adapter.detach()
    applied = adapters.apply(sd1, weights)
    torch.testing.assert_close(predict(sd1), trained, rtol=1e-4, atol=1e-5)
    applied.detach()


@pytest.mark.parametrize(("method", "kind"), [("loha", "LOHA"), ("lokr", "LOKR"), ("lora", "LORA")])
def test_pefts_config_names_the_method(sd1: Any, attach: Any, method: str, kind: str) -> None:
    attach(sd1, ADAPTER_SECTIONS[method](method=method, rank=4, alpha=2.0))
    assert sd1.denoiser.peft_config["default"].peft_type == kind


@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize("conv", [False, True])
def test_no_delta_is_saved_for_the_backward_pass(sd1: Any, attach: Any, method: str, conv: bool) -> None:
    attach(sd1, ADAPTER_SECTIONS[method](method=method, rank=2, target_modules="linear+conv"))
    block = sd1.denoiser.mid_block
    layer = block.resnets[0].conv1 if conv else block.attentions[0].transformer_blocks[0].attn1.to_q
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda t: t):
        output = layer(torch.randn((2, 64, 8, 8) if conv else (2, 16, 64)))
    assert layer.base_layer.weight.shape not in shapes
    output.sum().backward()
    named = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    assert any(grad is not None and bool(grad.any()) for grad in named.values())
