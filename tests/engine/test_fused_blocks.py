"""Tests that blocks with fewer operations give the results of diffusers' and PEFT's blocks."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from exercise import new_base
from peft import LoraConfig as PeftConfig
from torch import nn

from lorakit import adapters
from lorakit.config import LoraConfig
from lorakit.engine import fused_blocks, quantized_weight

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    noisy, text = torch.randn((2, 4, 8, 8), generator=draw), torch.randn((2, 77, 32), generator=draw)
    return noisy.to(dtype), torch.tensor([10, 700]), text.to(dtype)


def outcome(unet: Any, parameters: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the prediction, and the gradients of its mean square."""
    prediction = unet(*inputs(dtype), return_dict=False)[0]
    gradients = torch.autograd.grad(prediction.float().square().mean(), list(parameters.values()))
    return prediction.detach(), dict(zip(parameters, gradients, strict=True))


def pair(folder: Any, dtype: torch.dtype, alpha: float = 2.0) -> tuple[Any, Any, Any]:
    """Return our optimized UNet, its adapter, and PEFT's UNet, with the same weights and B not zero."""
    family = new_base(folder, dtype)
    adapter = adapters.attach(family, LoraConfig(rank=4, alpha=alpha), seed=0)
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet").to(dtype).eval().requires_grad_(False)
    theirs.add_adapter(PeftConfig(r=4, lora_alpha=alpha, target_modules=TARGETS))
    draw = torch.Generator().manual_seed(3)
    for name, parameter in adapter.parameters().items():
        component, _, path = name.partition(".")
        path, _, factor = path.rpartition(".")
        own = family.denoiser.get_submodule(path) if component == "unet" else None
        peft = theirs.get_submodule(path)
        assert own is not None
        weight = 0.2 * torch.randn(parameter.shape, generator=draw)
        parameter.data.copy_(weight)
        matrix = (peft.lora_A if factor == "down" else peft.lora_B)["default"]
        matrix.weight = torch.nn.Parameter(weight.clone())
    return family, adapter, theirs


def peft_parameters(unet: Any, names: list[str]) -> dict[str, torch.Tensor]:
    parameters = {}
    for name in names:
        path, _, factor = name.removeprefix("unet.").rpartition(".")
        layer = unet.get_submodule(path)
        parameters[name] = (layer.lora_A if factor == "down" else layer.lora_B)["default"].weight
    return parameters


@pytest.mark.parametrize("alpha", [4.0, 2.0])
def test_an_optimized_unet_has_pefts_outputs_and_gradients(tiny_sd1: Any, alpha: float) -> None:
    family, adapter, theirs = pair(tiny_sd1, torch.float32, alpha)
    fused_blocks.optimize_blocks(family.denoiser)
    kinds = {type(module) for module in family.denoiser.modules()}
    assert fused_blocks.FusedAttention in kinds and fused_blocks.FusedResnet in kinds
    mine, expected = adapter.parameters(), peft_parameters(theirs, list(adapter.parameters()))
    (a, own), (b, other) = outcome(family.denoiser, mine, torch.float32), outcome(theirs, expected, torch.float32)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name in own:
        assert (own[name] - other[name]).norm() <= 1e-5 * other[name].norm() + 1e-9, name


def test_in_bfloat16_the_gradients_are_float32_and_close(tiny_sd1: Any) -> None:
    family, adapter, _ = pair(tiny_sd1, torch.bfloat16)
    full, reference, _ = pair(tiny_sd1, torch.float32)
    fused_blocks.optimize_blocks(family.denoiser)
    _, own = outcome(family.denoiser, adapter.parameters(), torch.bfloat16)
    _, other = outcome(full.denoiser, reference.parameters(), torch.float32)
    assert {gradient.dtype for gradient in own.values()} == {torch.float32}
    a, b = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (own, other))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_disabling_gives_the_base_and_detaching_restores_it(tiny_sd1: Any) -> None:
    family, adapter, _ = pair(tiny_sd1, torch.float32)
    plain = new_base(tiny_sd1)
    fused_blocks.optimize_blocks(family.denoiser)
    with torch.no_grad():
        expected = plain.denoiser(*inputs(), return_dict=False)[0]
        with adapter.disabled():
            torch.testing.assert_close(family.denoiser(*inputs(), return_dict=False)[0], expected, rtol=1e-4, atol=1e-5)
        adapter.detach()
        torch.testing.assert_close(family.denoiser(*inputs(), return_dict=False)[0], expected, rtol=1e-4, atol=1e-5)
    own, other = family.denoiser.state_dict(), plain.denoiser.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_shared_tensors_follow_the_optimizer_and_a_restored_state(tiny_sd1: Any) -> None:
    family, adapter, _ = pair(tiny_sd1, torch.float32)
    fused_blocks.optimize_blocks(family.denoiser)
    state = adapter.state()
    with torch.no_grad():
        before = family.denoiser(*inputs(), return_dict=False)[0]
        for parameter in adapter.parameters().values():
            parameter.mul_(3)
        assert not torch.equal(family.denoiser(*inputs(), return_dict=False)[0], before)
        adapter.load_state(state)
        assert torch.equal(family.denoiser(*inputs(), return_dict=False)[0], before)


def test_a_layer_with_a_replaced_weight_is_computed_alone(tiny_sd1: Any) -> None:
    family, adapter, theirs = pair(tiny_sd1, torch.float32)
    fused_blocks.optimize_blocks(family.denoiser)
    name = next(name for name in adapter.parameters() if "attn1.to_q.down" in name)
    path = name.removeprefix("unet.").removesuffix(".down")
    matrix = family.denoiser.get_submodule(path).lora_A["default"]
    matrix.weight = torch.nn.Parameter(matrix.weight.detach() * 2)
    peft_parameters(theirs, [name])[name].data.mul_(2)
    with torch.no_grad():
        actual, expected = (unet(*inputs(), return_dict=False)[0] for unet in (family.denoiser, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_left_to_peft(tiny_sd1: Any) -> None:
    family = new_base(tiny_sd1)
    adapter = adapters.attach(family, LoraConfig(rank=4, dropout=0.5), seed=0)
    for name, parameter in adapter.parameters().items():
        if name.endswith("up"):
            parameter.data.fill_(0.1)
    fused_blocks.optimize_blocks(family.denoiser)
    adapter.train(True)
    with torch.no_grad():
        torch.manual_seed(0)
        first = family.denoiser(*inputs(), return_dict=False)[0]
        assert not torch.equal(family.denoiser(*inputs(), return_dict=False)[0], first)


def test_products_are_shared_on_fake_tensors() -> None:
    """Memory is counted on fake tensors, so they must take the same path as real tensors on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layers = [nn.Linear(8, 8, bias=False) for _ in range(3)]
    assert fused_blocks._can_share(layers)
    quantized = [nn.Linear(64, 64, bias=False).requires_grad_(False) for _ in range(2)]
    for layer in quantized:
        layer.weight = nn.Parameter(quantized_weight.quantize(layer.weight, "int8"), requires_grad=False)
    assert not fused_blocks._can_share(quantized)
