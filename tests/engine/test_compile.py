"""Tests that compiled blocks give the step's gradients and log their cost, and that a run continues without them.

Most tests check only that the compiler is called in the right places. They use fast compilers: torch's `aot_eager`,
which generates no code, or none.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import short_run
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file

from lorakit import adapters, config
from lorakit.engine import compile, cuda_graphs
from lorakit.training import run as train

COMPILED = re.compile(
    r"compiled the UNet's blocks for this batch shape in \d+ s; the code is stored in (.+) for the next run"
)


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with a backend that traces and differentiates but runs torch's ordinary kernels."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")


def untouched(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Small:
    """Three resnets and a transformer block; computes a step's loss and gradients with and without compiled blocks."""

    def __init__(self, compiler: compile.Compiler, width: int = 16, dtype: torch.dtype = torch.float32, **options: Any):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.denoiser = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(width,),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=4,
                cross_attention_dim=16,
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("UpBlock2D",),
                mid_block_type=None,
            )
        self.denoiser.to(dtype).eval().requires_grad_(False)
        family: Any = SimpleNamespace(
            denoiser=self.denoiser,
            info=SimpleNamespace(family="sd1"),
            modules=lambda: {"unet": self.denoiser},
            dtype=dtype,
        )
        settings = config.load(
            None, {"train.steps": 1, **{f"adapter.{name}": value for name, value in options.items()}}
        )
        adapter = adapters.attach(family, replace(settings.adapter, rank=4), seed=0)
        adapters.optimize_blocks(family)
        self.flat = adapters.flatten(family, adapter)[0]
        self.parameters, self.messages = self.flat.parameters, list[str]()
        self.dtype, self.calls = dtype, 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            compiled = compiler(function)

            def call(*args: Any, **kwargs: Any) -> Any:
                self.calls += 1
                return compiled(*args, **kwargs)

            return call

        self.blocks = compile.CompiledBlocks(self.denoiser, self.parameters, self.messages.append, counted)

    def step(self, batch: int = 2) -> torch.Tensor:
        draw = torch.Generator().manual_seed(batch)
        noisy, towards = (torch.randn(batch, 4, 8, 8, generator=draw) for _ in range(2))
        states = torch.randn(batch, 5, 16, generator=draw)
        times = torch.arange(batch) * 400
        messages = self.denoiser(noisy.to(self.dtype), times, states.to(self.dtype), return_dict=False)[0]
        loss = (messages.float() - towards).square().mean()
        loss.backward()
        return loss.detach()

    def loss_and_gradients(self, batch: int = 2, *, by_compiled: bool) -> list[torch.Tensor]:
        """Return the loss and all gradients."""
        within = self.blocks.compiled(batch, lambda: self.step(batch)) if by_compiled else nullcontext()
        self.flat.gradient.zero_()
        with within:
            loss = self.step(batch)
        return [loss, *(parameter.grad.clone() for parameter in self.parameters)]

    def train(self) -> None:
        """Set weights as after some steps: no factor is 0."""
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)


def assert_close(result: list[torch.Tensor], expected: list[torch.Tensor], allowed: float = 1e-5) -> None:
    norm = torch.stack([tensor.norm() for tensor in expected[1:]]).norm()
    assert norm > 0
    for one, two in zip(result, expected, strict=True):
        assert (one - two).norm() <= allowed * (two.norm() + 1e-2 * norm)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compiled"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU by a C++ compiler")
def test_compiled_gradients_are_right_and_code_is_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        # Generate C++ for one of the four blocks only, because all of them would take a minute.
        by_cpp = compile.inductor(function)
        return lambda block, *args, **kwargs: (by_cpp if getattr(block, "conv_shortcut", block) is None else function)(
            block, *args, **kwargs
        )

    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    small = Small(compiler)
    names, random = list(small.denoiser.state_dict()), torch.get_rng_state()
    small.train()
    weights = small.flat.weights.detach().clone()
    without = small.loss_and_gradients(by_compiled=False)
    assert small.calls == 0
    assert_close(small.loss_and_gradients(by_compiled=True), without)
    assert small.calls == 8
    assert_close(small.loss_and_gradients(by_compiled=True), without)
    assert small.calls == 12
    (line,) = small.messages
    match = COMPILED.match(line)
    assert match and match[1] == str(cache)
    assert list(small.denoiser.state_dict()) == names and torch.equal(torch.get_rng_state(), random)
    assert torch.equal(small.flat.weights, weights)
    libraries = {path: path.stat().st_mtime_ns for path in cache.rglob("*.so")}
    assert len(libraries) > 2
    repeat = Small(compiler)
    repeat.train()
    assert_close(repeat.loss_and_gradients(by_compiled=True), without)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.so")} == libraries and len(repeat.messages) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"target_modules": "linear+conv", "alpha": 8.0}), ("dora", {})]
)
def test_methods_and_convolutions_compile(method: str, options: dict[str, Any]) -> None:
    small = Small(traced, method=method, **options)
    small.train()
    without = small.loss_and_gradients(by_compiled=False)
    assert_close(small.loss_and_gradients(by_compiled=True), without)
    assert small.calls == 8 and COMPILED.match(small.messages[0])


@pytest.mark.slow
def test_half_precision_differs_by_rounding_only() -> None:
    small = Small(traced, dtype=torch.bfloat16)
    small.train()
    small.blocks._tolerance = compile.HALF
    without = small.loss_and_gradients(by_compiled=False)
    assert_close(small.loss_and_gradients(by_compiled=True), without, 0.2)
    assert COMPILED.match(small.messages[0])


def test_each_shape_is_tried_once_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    small, calls = Small(untouched), []
    for batch in (1, 2, 1, 3, 2):
        before = small.calls
        small.loss_and_gradients(batch, by_compiled=True)
        calls.append(small.calls - before)
    assert calls == [8, 8, 4, 0, 4]
    assert [line.partition(" in ")[0] for line in small.messages] == [
        *["compiled the UNet's blocks for this batch shape"] * 2,
        "batches of further shapes run uncompiled: at most 2 are compiled",
    ]


def test_passes_without_gradients_are_not_compiled() -> None:
    small = Small(untouched)
    small.loss_and_gradients(by_compiled=True)
    before = small.calls
    with small.blocks.compiled(2, lambda: small.step(2)), torch.no_grad():
        small.denoiser(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 5, 16))
    small.denoiser(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 5, 16))
    assert small.calls == before


@pytest.mark.slow
def test_blocks_of_stable_diffusion_3_are_compiled() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
        )
    weight, messages = model.proj_out.weight, list[str]()
    weight.grad = torch.zeros_like(weight)

    def step() -> torch.Tensor:
        inputs = torch.ones(1, 4, 8, 8), torch.ones(1, 3, 16), torch.ones(1, 8), torch.tensor([5])
        loss = model(*inputs, return_dict=False)[0].square().mean()
        loss.backward()
        return loss.detach()

    blocks = compile.CompiledBlocks(model, [weight], messages.append, traced)
    step()
    without = weight.grad.clone()
    weight.grad.zero_()
    with blocks.compiled(1, step):
        step()
    assert COMPILED.match(messages[0])
    assert not torch.equal(weight.grad, torch.zeros_like(weight)) and torch.allclose(weight.grad, without, rtol=1e-4)


def test_layers_with_moved_memory_run_uncompiled() -> None:
    small = Small(untouched)
    small.loss_and_gradients(by_compiled=True)
    for layer in small.denoiser.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = layer.weight.data.clone()
    before = small.calls
    small.loss_and_gradients(by_compiled=True)
    assert small.calls == before


def stops_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a block with the right output in which a resnet passes no gradient to its input."""
    if "Resnet" not in function.__qualname__:
        return function
    return lambda block, x, temb: function(block, x.detach(), temb.detach()) + 0 * x.sum()


def is_off(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: 1.5 * function(*args, **kwargs)


def fails(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler for this\nand much more")

    return call


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (stops_gradients, "its loss differs by 0.0e+00"),
        (is_off, "its loss differs by"),
        (fails, "no compiler for this"),
    ],
)
def test_a_wrong_compiled_block_is_not_used(compiler: compile.Compiler, reason: str) -> None:
    small = Small(compiler)
    small.train()
    without, weights = small.loss_and_gradients(by_compiled=False), small.flat.weights.detach().clone()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(small.loss_and_gradients(by_compiled=True), without, strict=True))
    (line,) = small.messages
    assert line.startswith(f"the UNet's blocks are not compiled, training continues without: {reason}")
    assert "\n" not in line and torch.equal(small.flat.weights, weights)


def test_a_trial_keeps_existing_gradients() -> None:
    small = Small(untouched)
    small.flat.gradient.normal_(generator=torch.Generator().manual_seed(0))
    before = small.flat.gradient.clone()
    with small.blocks.compiled(2, lambda: small.step(2)):
        pass
    assert torch.equal(small.flat.gradient, before) and len(small.messages) == 1


@pytest.mark.slow
def test_without_a_compiler_the_run_continues() -> None:
    import torch._inductor.config

    small = Small(compile.inductor, width=24)
    without = small.loss_and_gradients(by_compiled=False)
    with torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",)}):
        loss_and_gradients = small.loss_and_gradients(by_compiled=True)
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients, without, strict=True))
    (line,) = small.messages
    assert (
        line.startswith("the UNet's blocks are not compiled, training continues without: ") and "C++ compiler" in line
    )


run_config = partial(short_run.run_config, steps=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos: a batch of two and a batch of one."""
    return short_run.noise(tmp_path_factory.mktemp("photos"), 3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
def test_a_run_compiles_only_training_steps_per_batch_shape(
    tiny_sd1: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return function(*args, **kwargs)

        return call

    options: dict[str, Any] = {"adapter__train_text_encoder": True, "train__prior": "teacher"}
    plain = load_file(train.train(run_config(tiny_sd1, photos, tmp_path / "plain", **options)).adapter)
    monkeypatch.setattr(compile, "inductor", watched)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    result = train.train(run_config(tiny_sd1, photos, tmp_path / "run", memory__compile=True, **options))
    loss_and_gradients = load_file(result.adapter)
    assert plain.keys() == loss_and_gradients.keys() and all(
        torch.equal(plain[name], loss_and_gradients[name]) for name in plain
    )
    # Twelve blocks run in four steps and in one trial for each of two shapes.
    assert calls == [True] * (6 * 12)
    log = (result.folder / "log.jsonl").read_text(encoding="utf-8")
    assert log.count('"message": "compiled the UNet\'s blocks for this batch shape in ') == 2
    assert log.count('"message": "batches of further shapes run uncompiled: at most 2 are compiled') == 1
    assert "a CPU compiles for minutes" in log


@pytest.fixture
def one_tensor_core_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_compiled_blocks_are_captured_in_the_graph(
    tiny_sd1: Path, photos: Path, tmp_path: Path, one_tensor_core_precision: None, precision: str
) -> None:
    options: dict[str, Any] = {"memory__device": "cuda", "memory__mixed_precision": precision}
    plain = load_file(train.train(run_config(tiny_sd1, photos, tmp_path / "plain", **options)).adapter)
    result = train.train(run_config(tiny_sd1, photos, tmp_path / "run", memory__compile=True, **options))
    log = (result.folder / "log.jsonl").read_text(encoding="utf-8")
    assert log.count('"message": "compiled the UNet\'s blocks for this batch shape in ') == 2
    assert "CUDA graphs are off" not in log and "without a CUDA graph" not in log
    loss_and_gradients = load_file(result.adapter)
    assert plain.keys() == loss_and_gradients.keys()
    for name, tensor in plain.items():
        assert (loss_and_gradients[name] - tensor).norm() <= (1e-3 if precision == "fp32" else 0.3) * tensor.norm()
