"""Tests that layers that save less for backward give torch's and diffusers' results bit by bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from exercise import new_base
from torch import nn
from torch.nn import functional

from lorakit import adapters
from lorakit.config import LoraConfig
from lorakit.engine import recompute

DTYPES = [torch.float32, torch.bfloat16]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv 3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 7, 6)),
    "conv 3x3 stride 2": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 7, 6)),
    "conv 1x1": (lambda: nn.Conv2d(8, 12, 1, bias=False), (2, 8, 7, 6)),
    "layer norm": (lambda: nn.LayerNorm(24), (2, 9, 24)),
    "geglu": (lambda: GEGLU(24, 40), (2, 9, 24)),
}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def autograd_bytes(compute: Callable[[], torch.Tensor], frozen: nn.Module | None = None) -> tuple[int, torch.Tensor]:
    """Return the bytes that autograd saves for the backward pass, without weights, and the result."""
    weights = {p.untyped_storage().data_ptr() for p in frozen.parameters()} if frozen is not None else set()
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return sum(sizes.values()), result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_gives_the_same_and_saves_less(kind: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    theirs = make().to(dtype).requires_grad_(False)
    ours = make().to(dtype).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    recompute.save_less(ours)
    assert type(ours) is not type(theirs)
    actual = []
    for layer in (theirs, ours):
        x = normal(*shape, dtype=dtype).requires_grad_()
        size, y = autograd_bytes(lambda layer=layer, x=x: layer(x), layer)
        actual.append((size, y, torch.autograd.grad(y, x, normal(*y.shape, dtype=dtype))[0]))
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    (before, y, to_x), (after, our_y, our_to_x) = actual
    assert torch.equal(our_y, y) and torch.equal(our_to_x, to_x)
    assert (after == 0) if kind.startswith("conv") else after <= before
    if kind == "geglu":
        assert after == y.nbytes * 2 and before == y.nbytes * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_a_norm_saves_only_its_input(dtype: torch.dtype) -> None:
    norm = nn.GroupNorm(4, 8).to(dtype).requires_grad_(False)
    norm.weight.copy_(normal(8, dtype=dtype))
    norm.bias.copy_(normal(8, dtype=dtype))
    x = normal(2, 8, 7, 6, dtype=dtype).requires_grad_()
    before, y = autograd_bytes(lambda: functional.silu(norm(x)), norm)
    after, ours = autograd_bytes(lambda: recompute.norm_silu(x, norm), norm)
    towards = normal(*y.shape, dtype=dtype)
    assert torch.equal(ours, y)
    assert torch.equal(torch.autograd.grad(ours, x, towards)[0], torch.autograd.grad(y, x, towards)[0])
    # In channels-last layout torch uses another kernel.
    turned = x.detach().to(memory_format=torch.channels_last)
    torch.testing.assert_close(recompute.norm_silu(turned.requires_grad_(), norm), ours)
    statistics = 2 * 2 * 4 * 4  # mean and rstd of 4 groups of 2 pictures, in float32 at most
    assert x.nbytes < after <= x.nbytes + statistics < before


def test_recompute_gives_the_tensor_or_the_saved_input() -> None:
    norm = nn.LayerNorm(8).requires_grad_(False)
    recompute.save_less(norm)
    x = normal(3, 8).requires_grad_()
    result = norm(x)
    recompute_of = recompute.get_recompute(result)
    assert recompute_of.inputs[0] is x and torch.equal(recompute_of.function(*recompute_of.inputs), result)
    assert recompute.get_recompute(x).function(*recompute.get_recompute(x).inputs) is x
    with torch.no_grad():
        assert not hasattr(norm(x), recompute.ATTRIBUTE)


def test_unsupported_layers_stay_torchs_own() -> None:
    for layer in (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(8, 8, 3, groups=2)):
        before = type(layer)
        recompute.save_less(layer)
        assert type(layer) is before
    trained = nn.Conv2d(8, 8, 3)
    recompute.save_less(trained)
    trained(normal(1, 8, 5, 5).requires_grad_()).sum().backward()
    assert trained.weight.grad is not None and trained.weight.grad.abs().sum() > 0


def attached(folder: Any, config: Any, dtype: torch.dtype, **options: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    family = new_base(folder, dtype)
    adapter = adapters.attach(family, config, seed=0)
    for name, parameter in adapter.parameters().items():
        if name.endswith(".up"):
            parameter.data.copy_(0.1 * normal(*parameter.shape))
    if options:
        adapters.optimize_blocks(family, **options)
    return family, adapter.parameters()


def learned(folder: Any, config: Any, dtype: torch.dtype, **options: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the bytes saved for backward, and the prediction with the gradients of its mean square."""
    family, parameters = attached(folder, config, dtype, **options)
    noisy, text = normal(2, 4, 8, 8, dtype=dtype), normal(2, 77, 32, dtype=dtype)

    def predict() -> torch.Tensor:
        predicted: torch.Tensor = family.denoiser(noisy, torch.tensor([10, 700]), text, return_dict=False)[0]
        return predicted

    size, predicted = autograd_bytes(predict, family.denoiser)
    gradients = torch.autograd.grad(predicted.float().square().mean(), list(parameters.values()))
    return size, {"prediction": predicted.detach(), **dict(zip(parameters, gradients, strict=True))}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=4, alpha=2.0, target_modules="linear"),
        LoraConfig(rank=4, alpha=2.0, target_modules="linear+conv"),
        LoraConfig(method="dora", rank=4, target_modules="linear+conv"),
    ],
    ids=["attention", "linear", "linear+conv", "dora"],
)
def test_save_less_gives_the_same_gradients(tiny_sd1: Any, config: Any, dtype: torch.dtype) -> None:
    before, optimized = learned(tiny_sd1, config, dtype, save_less=False)
    after, actual = learned(tiny_sd1, config, dtype, save_less=True)
    for name, right in optimized.items():
        assert torch.equal(actual[name], right), name
    assert after < 0.9 * before
    if config.method == "lora" and dtype is torch.float32:
        _, plain = learned(tiny_sd1, config, dtype)
        for name, right in plain.items():
            torch.testing.assert_close(actual[name], right, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("formats", [(torch.channels_last, torch.contiguous_format), (torch.contiguous_format,) * 2])
def test_a_norm_reads_its_gradient_in_any_layout(formats: tuple[torch.memory_format, torch.memory_format]) -> None:
    """A channels-last convolution returns an NHWC gradient, while x may be NCHW or NHWC."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8).requires_grad_(False)
    norm.weight.normal_()
    expected = None
    for x_format, gradient_format in [
        (torch.contiguous_format,) * 2,
        formats,
        formats[::-1],
        (torch.channels_last,) * 2,
    ]:
        x = normal(2, 8, 7, 6).contiguous(memory_format=x_format).requires_grad_()
        gradient = normal(2, 8, 7, 6).flip(0).contiguous(memory_format=gradient_format)
        (ours,) = torch.autograd.grad(recompute._NormSiluFunction.apply(x, norm, True), x, gradient)
        (theirs,) = torch.autograd.grad(functional.silu(norm(x)), x, gradient)
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
        expected = theirs if expected is None else expected
        assert (ours - expected).norm() <= 1e-6 * expected.norm()
