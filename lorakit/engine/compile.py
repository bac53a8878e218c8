"""Compile a UNet's repeated blocks (`torch.compile`), one class at a time, for training.

Each class of block is compiled as one function for each shape: the compiler fuses norms, activations and sums between
two matrix products. The UNet as one graph is never compiled: torch 2.13 computes wrong gradients for it. Modules,
parameters and names stay the same. Only training passes are compiled, not validation or samples.

Compiled code is stored on disk, and the next run reuses it. It is used only after one step with it gave the same loss
and gradients as without.
"""

from __future__ import annotations

import contextlib
import os
import time
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.config import Config
from lorakit.core.cache_dir import cache_dir
from lorakit.core.messages import Message
from lorakit.engine import cuda_graphs
from lorakit.engine.cuda_graphs import Compute

if TYPE_CHECKING:
    from lorakit.families import Family

# Compiles a function of a block and its inputs.
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
# The repeated blocks of a UNet, and of the transformer of Stable Diffusion 3.
COMPILED_CLASSES = ("FusedResnet", "ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock")
# Limit of compiled versions of one class: 32 for each batch shape. torch's own limit is 8.
MAX_VERSIONS = 32 * cuda_graphs.MAX_GRAPHS
CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Compiled code rounds differently. In bf16, at SD1.5's depth, gradients with and without it differed by 6 %, the worst
# single one by 18 %; both differed from those in float32 by 4 %.
FULL, HALF = cuda_graphs.Tolerance(1e-2, 1e-2, 0.1), cuda_graphs.Tolerance(1e-2, 0.2, 0.5)
# Standard deviation of the noise that is added to the trained weights for the comparison. With a factor of zeros half
# of the gradients would be 0, and comparing zeros would prove nothing.
PERTURBATION = 0.02


def inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with torch's inductor, which needs a C++ compiler on a CPU and Triton on CUDA."""
    # By default inductor copies the weights of convolutions to channels_last in each step and saves the copies for the
    # backward pass: in SD1.5 these are most of the UNet.
    options: dict[str, Any] = {"layout_optimization": False}
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    return compiled


def blocks(
    config: Config, family: Family, parameters: Sequence[torch.Tensor], say: Callable[[str], Any]
) -> CompiledBlocks | None:
    """Compile the blocks of a base whose adapter is attached, after `optimize_blocks`; None without memory.compile."""
    if not config.memory.compile:
        return None
    return CompiledBlocks(family.denoiser, parameters, say, inductor, FULL if family.dtype is torch.float32 else HALF)


def folder() -> Path:
    """The folder of compiled code."""
    return cache_dir() / "compiled"


class CompiledBlocks:
    """The repeated blocks of a UNet, compiled for some batch shapes.

    Args:
        unet: with its adapter attached, after `optimize_blocks`.
        parameters: the trained parameters; each has a gradient.
        say: takes a message for the user.
        compiler: compiles the forward of one class.
        tolerance: how much the results of a compiled step may differ.
    """

    def __init__(
        self,
        unet: nn.Module,
        parameters: Sequence[torch.Tensor],
        say: Callable[[str], Any],
        compiler: Compiler,
        tolerance: cuda_graphs.Tolerance = FULL,
    ):
        self._parameters, self._say, self._tolerance = parameters, say, tolerance
        candidates = [module for module in unet.modules() if type(module).__name__ in COMPILED_CLASSES]
        self._blocks = [module for module in candidates if "forward" not in vars(module)]
        fused: list[Any] = [getattr(module, "fused_qkv", None) for module in unet.modules()]
        self._fused_qkv = [layers for layers in fused if layers is not None]
        with _settings():
            compiled = {
                kind: compiler(_copy_function(kind.forward)) for kind in {type(block) for block in self._blocks}
            }
        self._forwards = [_trained(block, compiled[type(block)]) for block in self._blocks]
        self._shapes: set[Hashable] = set()

    @contextlib.contextmanager
    def compiled(self, shape: Hashable, compute: Compute) -> Iterator[None]:
        """Inside, the blocks run compiled, unless the check at the first batch of a shape failed.

        Args:
            shape: equal for batches of equal shape.
            compute: forward and backward of the batch, which adds to the gradients. At the first batch of a shape it
                runs with and without compiled blocks; weights, gradients and torch's generators are restored.
        """
        with _settings():
            if self._blocks and shape not in self._shapes and len(self._shapes) < cuda_graphs.MAX_GRAPHS:
                self._try(compute)
                self._shapes.add(shape)
                if self._blocks and len(self._shapes) == cuda_graphs.MAX_GRAPHS:
                    self._say(
                        Message(
                            "batches of further shapes run uncompiled: at most {MAX_GRAPHS} are compiled",
                            cuda_graphs.MAX_GRAPHS,
                        )
                    )
            # If layers are no longer fused, they run one by one, and the compiled code does not apply.
            with self._on(shape in self._shapes and all(layers.is_valid() for layers in self._fused_qkv)):
                yield

    def _try(self, compute: Compute) -> None:
        """Compile for a batch; report the time, or why it failed."""
        seconds = 0.0

        def compiled() -> torch.Tensor:
            nonlocal seconds
            start = time.perf_counter()
            with self._on(True):
                loss = compute()
                loss.item()  # wait for the device
            seconds = time.perf_counter() - start
            return loss

        try:
            with _perturbed(self._parameters):
                cuda_graphs.verified(self._parameters, compute, lambda: compiled, self._tolerance)
        except cuda_graphs.CaptureFailed as problem:
            self._blocks, self._forwards = [], []
            self._say(Message("the UNet's blocks are not compiled, training continues without: {problem}", problem))
        else:
            self._say(
                Message(
                    "compiled the UNet's blocks for this batch shape in {seconds:.0f} s; the code is stored in "
                    "{folder} for the next run",
                    seconds,
                    folder(),
                )
            )

    @contextlib.contextmanager
    def _on(self, on: bool) -> Iterator[None]:
        # The attribute is set on the block: no module is wrapped, so no name changes.
        try:
            for block, forward in zip(self._blocks, self._forwards, strict=True) if on else ():
                block.__dict__["forward"] = forward
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)


def _trained(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The block's forward, compiled only while gradients are enabled. Validation, samples and the prior's teacher run
    uncompiled."""
    with_gradients, without = partial(compiled, block), partial(type(block).forward, block)

    def forward(*args: object, **kwargs: object) -> Any:
        return (with_gradients if torch.is_grad_enabled() else without)(*args, **kwargs)

    return forward


def _copy_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function together with its code object.

    torch stores compiled versions with the code object. Those of the copy are freed with the run, and do not count for
    other code that compiles the same class.
    """
    source: Any = function
    result = types.FunctionType(
        source.__code__.replace(), source.__globals__, source.__name__, source.__defaults__, source.__closure__
    )
    result.__kwdefaults__ = source.__kwdefaults__
    return result


@contextlib.contextmanager
def _perturbed(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, the parameters have noise added; on exit their exact values are restored."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.device), alpha=PERTURBATION)
        try:
            with torch.enable_grad():
                yield
        finally:
            torch._foreach_copy_(list(parameters), before)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """torch's settings for compilation; restored on exit."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = str(folder())
    import torch._dynamo

    try:
        with torch._dynamo.config.patch(cache_size_limit=MAX_VERSIONS, accumulated_cache_size_limit=MAX_VERSIONS):
            yield
    finally:
        if before is None:
            os.environ.pop(CACHE)
        else:
            os.environ[CACHE] = before
