"""Tests that parameters in one flat tensor train as separate ones: equal optimizer steps, norm within 1e-6."""

from typing import Any

import pytest
import torch
from exercise import METHODS, new_base, predict, randomize

from lorakit import adapters
from lorakit.config import ADAPTER_SECTIONS, LoraConfig, OptimizerConfig
from lorakit.core import registry
from lorakit.engine import flat_parameters, fused_blocks, fused_lora
from lorakit.training import optimizers

# A CPU's vectors hold 4 to 16 values, and torch rounds an incomplete vector differently. So only the `EVEN` shapes,
# which real layers have, can be compared bit by bit.
EVEN = [(4, 32), (48,), (32, 4), (16, 3, 3, 3), (1, 16)]
ODD = [(4, 32), (7,), (33, 4), (5, 3, 3, 3), (1, 1)]
ELEMENTWISE = [name for name, spec in registry.OPTIMIZERS.items() if spec.elementwise and spec.block_size == 1]


def parameters(shapes: Any = ODD) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def gradients(step: int, like: list[Any]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(step + 1)
    return [torch.randn(tensor.shape, generator=draw) for tensor in like]


def flats(separate_parameters: list[torch.nn.Parameter]) -> list[flat_parameters.FlatParameters]:
    """Group the first three parameters, and the others separately."""
    return [
        flat_parameters.FlatParameters("unet", separate_parameters[:3]),
        flat_parameters.FlatParameters("text_encoder", separate_parameters[3:]),
    ]


def as_flat(
    name: str, separate_parameters: list[torch.nn.Parameter]
) -> tuple[list[flat_parameters.FlatParameters], torch.optim.Optimizer]:
    flat = flats(separate_parameters)
    rates = OptimizerConfig(name=name, learning_rate=1e-2, text_encoder_learning_rate=1e-3, weight_decay=0.1)
    optimizer = optimizers.build(rates, [(each.name, [each.weights]) for each in flat])
    flat_parameters.save_per_parameter(optimizer, flat)
    return flat, optimizer


def separate(name: str, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    rates = OptimizerConfig(name=name, learning_rate=1e-2, text_encoder_learning_rate=1e-3, weight_decay=0.1)
    return optimizers.build(rates, [("unet", weights[:3]), ("text_encoder", weights[3:])])


def step(number: int, weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for parameter, gradient in zip(weights, gradients(number, weights), strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)
    optimizer.step()


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(("shapes", "allowed"), [(EVEN, 0.0), (ODD, 1e-6)])
def test_an_optimizer_steps_and_saves_as_over_separate_parameters(name: str, shapes: Any, allowed: float) -> None:
    one, two = parameters(shapes), parameters(shapes)
    (_, optimizer), other = as_flat(name, one), separate(name, two)
    assert optimizer.state_dict()["state"] == {} == other.state_dict()["state"]
    for number in range(5):
        step(number, one, optimizer)
        step(number, two, other)
    mine, theirs = optimizer.state_dict(), other.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys() == set(range(5))
    for number in range(5):
        torch.testing.assert_close(one[number], two[number], rtol=allowed, atol=allowed)
        torch.testing.assert_close(mine["state"][number], theirs["state"][number], rtol=allowed, atol=allowed)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(("make", "shapes"), [(as_flat, ODD), (lambda *weights: (None, separate(*weights)), EVEN)])
def test_a_saved_state_continues_bit_by_bit_in_either_form(name: str, make: Any, shapes: Any) -> None:
    straight = parameters(shapes)
    _, straight_optimizer = make(name, straight)
    for number in range(6):
        step(number, straight, straight_optimizer)

    begun = parameters(shapes)
    _, first = make(name, begun)
    for number in range(3):
        step(number, begun, first)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in begun]
    flat, optimizer = as_flat(name, resumed)
    optimizer.load_state_dict(first.state_dict())
    for number in range(3, 6):
        step(number, resumed, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    # The padding between the parameters stays 0.
    for each in flat:
        assert torch.equal(each.join(each.split(each.weights)), each.weights.detach())


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_gradients_are_clipped_as_by_torch(max_norm: float) -> None:
    one, two = parameters(), parameters()
    flat = flats(one)
    for mine, theirs, gradient in zip(one, two, gradients(0, one), strict=True):
        mine.grad.copy_(gradient)
        theirs.grad = gradient
    exact = torch.cat([p.grad.double().flatten() for p in two]).norm().item()
    assert flat_parameters.clip(flat, max_norm).item() == pytest.approx(exact, rel=1e-6)
    torch.nn.utils.clip_grad_norm_(two, max_norm or float("inf"))
    for mine, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=0)


def test_the_norm_of_twenty_million_values_is_accurate() -> None:
    many = flat_parameters.FlatParameters("unet", [torch.nn.Parameter(torch.zeros(20_000_000))])
    many.gradient.normal_(generator=torch.Generator().manual_seed(0)).mul_(1e-4)
    exact = torch.linalg.vector_norm(many.gradient, dtype=torch.float64).item()
    assert flat_parameters.norm([many]).item() == pytest.approx(exact, rel=1e-6)
    # A single float32 reduction is not accurate enough.
    assert torch.linalg.vector_norm(many.gradient).item() != pytest.approx(exact, rel=1e-4)


def test_a_gradient_that_is_not_finite_is_detected() -> None:
    separate_parameters = parameters()
    flat = flats(separate_parameters)
    separate_parameters[4].grad.fill_(float("nan"))
    assert not torch.isfinite(flat_parameters.norm(flat))


def test_moved_parameters_become_views_again() -> None:
    separate_parameters = parameters()
    flat = flats(separate_parameters)
    assert all(each.ensure_views() for each in flat)
    for parameter in separate_parameters:
        parameter.data, parameter.grad = parameter.data.clone() + 1, None
    copies = [p.detach().clone() for p in separate_parameters]
    assert [each.ensure_views() for each in flat] == [False, False] and all(each.ensure_views() for each in flat)
    for each in flat:
        each.weights.detach().mul_(2)
    assert all(torch.equal(p, 2 * before) for p, before in zip(separate_parameters, copies, strict=True))
    assert all(p.grad is not None for p in separate_parameters)


# -- inside a base ----------------------------------------------------------------------------------------------


def attached(target: Any, config: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    family = new_base(target, dtype)
    adapter = adapters.attach(family, config, seed=0, trigger="sks")
    randomize(adapter)
    adapters.optimize_blocks(family)
    return family, adapter


def backward(family: Any) -> None:
    predict(family, grad=True).float().square().mean().backward()


def gradients_of(adapter: Any) -> list[torch.Tensor]:
    """Return all gradients; a layer without a part in the prediction has zeros."""
    own = adapter.parameters().values()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own]


TEXT = {"train_text_encoder": True, "new_tokens": 2, "alpha": 2.0}
CASES = [("tiny_sd1", method, {}) for method in METHODS]
CASES += [("tiny_sdxl", "lora", {}), *((base, "lora", TEXT) for base in ("tiny_sd1", "tiny_sdxl"))]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "method", "more"), CASES)
def test_flattening_keeps_an_adapters_gradients_and_names(method: str, more: Any, base: str, request: Any) -> None:
    target = request.getfixturevalue(base)
    config = ADAPTER_SECTIONS[method](method=method, rank=4, **more)
    plain, other = attached(target, config, torch.float32)
    family, adapter = attached(target, config, torch.float32)
    names = {name: module.state_dict().keys() for name, module in family.modules().items()}
    flat = adapters.flatten(family, adapter)
    assert [each.name for each in flat] == [name for name, _ in adapter.groups()]
    assert names == {name: module.state_dict().keys() for name, module in family.modules().items()}
    assert torch.equal(predict(family), predict(plain))
    for _ in range(2):
        backward(plain)
        with flat_parameters.half_precision_pass(flat, family.gradient_scale):
            backward(family)
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(adapter), gradients_of(other), strict=True))
    state = adapter.state()
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state().items())
    for each in flat:
        each.weights.detach().zero_()
    assert not any(parameter.any() for parameter in adapter.parameters().values())
    adapter.load_state(state)
    assert torch.equal(predict(family), predict(plain))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alpha", "modules", "dtype"),
    [  # every pair of values
        (4.0, "attention", torch.bfloat16),
        (4.0, "linear+conv", torch.float16),
        (2.0, "attention", torch.float16),
        (2.0, "linear+conv", torch.bfloat16),
    ],
)
def test_in_half_precision_gradients_equal_autograds(
    tiny_sd1: Any, dtype: torch.dtype, modules: Any, alpha: float
) -> None:
    config = LoraConfig(rank=4, alpha=alpha, target_modules=modules, train_text_encoder=True)
    plain, other = attached(tiny_sd1, config, dtype)
    family, adapter = attached(tiny_sd1, config, dtype)
    flat = adapters.flatten(family, adapter)
    kinds = {
        type(layer.half_copies) for layer in family.denoiser.modules() if isinstance(layer, fused_lora.FusedLinear)
    }
    assert kinds == {fused_lora.HalfCopies}
    groups = [m.fused_qkv for m in family.denoiser.modules() if isinstance(m, fused_blocks.FusedAttention)]
    assert groups and all(group.half_copies is not None and group.is_valid() for group in groups)
    for _ in range(2):
        with torch.no_grad():  # an optimizer changes weights in place: older half-precision copies must not be used
            for weights in [*other.parameters().values(), *(each.weights for each in flat)]:
                weights.mul_(0.5)
        backward(plain)
        with flat_parameters.half_precision_pass(flat, family.gradient_scale):
            backward(family)
        assert torch.equal(predict(family), predict(plain))
    for name, mine, theirs in zip(adapter.parameters(), gradients_of(adapter), gradients_of(other), strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm(), name
