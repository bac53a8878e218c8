"""A UNet's repeated blocks compiled (`torch.compile`), one by one, for training.

Each kind of block is compiled as a function of its own, for each shape that comes: a compiler makes one kernel of the
norms, activations and sums between two products. The UNet as a whole is never given to it, of which torch 2.13 makes
wrong gradients. Modules, parameters and names stay what they are, and only passes that are trained on are compiled:
validation and pictures are computed as ever. What was compiled is kept on disk and asked for by the next run.
A block is believed only once the step has the loss and the gradients with it that it has without.
"""

from __future__ import annotations

import contextlib
import os
import time
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.config import Config
from lorakit.core.cache_dir import cache_dir
from lorakit.engine import cuda_graphs
from lorakit.engine.cuda_graphs import Compute

# From a function of a block and its inputs to the same, compiled.
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
# What a UNet, and the transformer of Stable Diffusion 3, is made of.
KINDS = ("LeanResnet", "ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock")
# A batch shape takes up to so many versions of one kind of block; torch gives up at 8.
VERSIONS = 32 * cuda_graphs.MOST
CACHE = "TORCHINDUCTOR_CACHE_DIR"
# A compiler rounds elsewhere. In bf16, at SD1.5's depth, gradients with and without were 6 % apart, the worst of them
# 18 %; from those in float32 both were 4 %.
FULL, HALF = cuda_graphs.Allowed(1e-2, 1e-2, 0.1), cuda_graphs.Allowed(1e-2, 0.2, 0.5)
# While results are compared the trained weights are moved by so much: a factor that begins with zeros would leave half
# of the gradients 0, and whatever a compiler makes of 0 is right.
NUDGE = 0.02


def inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own compiler, which needs a C++ compiler on a CPU and triton on CUDA."""
    # Left to itself it turns the weights of convolutions into channels_last, in each step anew, and keeps these copies
    # until the backward pass: of SD1.5 that would be most of the UNet.
    options: dict[str, Any] = {"layout_optimization": False}
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    return compiled


def blocks(config: Config, family: Any, parameters: Sequence[torch.Tensor], say: Callable[[str], Any]) -> Blocks | None:
    """The blocks of a loaded base, slim and with its adapter, where the config asks that they be compiled."""
    if not config.memory.compile:
        return None
    return Blocks(family.unet, parameters, say, inductor, FULL if family.dtype is torch.float32 else HALF)


def folder() -> Path:
    """Where compiled code is kept."""
    return cache_dir() / "compiled"


class Blocks:
    """The repeated blocks of a UNet, and for which batches they are compiled.

    Args:
        unet: slim, its adapter attached.
        parameters: what is trained; each has a gradient.
        say: takes a line for the person.
        compiler: compiles one kind of block.
        allowed: how far compiled steps may lie from others.
    """

    def __init__(
        self,
        unet: nn.Module,
        parameters: Sequence[torch.Tensor],
        say: Callable[[str], Any],
        compiler: Compiler,
        allowed: cuda_graphs.Allowed = FULL,
    ):
        self._parameters, self._say, self._allowed = parameters, say, allowed
        found = [module for module in unet.modules() if type(module).__name__ in KINDS]
        self._blocks = [module for module in found if "forward" not in vars(module)]
        groups: list[Any] = [getattr(module, "group", None) for module in unet.modules()]
        self._groups = [group for group in groups if group is not None]
        with _settings():
            compiled = {kind: compiler(_own(kind.forward)) for kind in {type(block) for block in self._blocks}}
        self._forwards = [_trained(block, compiled[type(block)]) for block in self._blocks]
        self._shapes: set[Hashable] = set()

    @contextlib.contextmanager
    def compiled(self, shape: Hashable, compute: Compute) -> Iterator[None]:
        """Inside, the blocks are compiled, unless that was found not to be right.

        Args:
            shape: equal for batches of equal shape.
            compute: forward and backward of the batch, which adds to the gradients. At the first batch of a shape it is
                done with and without; afterwards weights, gradients and torch's generators are as they were.
        """
        with _settings():
            if self._blocks and shape not in self._shapes and len(self._shapes) < cuda_graphs.MOST:
                self._try(compute)
                self._shapes.add(shape)
                if self._blocks and len(self._shapes) == cuda_graphs.MOST:
                    self._say(f"batches of further shapes go without: {cuda_graphs.MOST} are compiled")
            # A group that does not hold is asked layer by layer, which is not what was compiled.
            with self._on(shape in self._shapes and all(group.holds() for group in self._groups)):
                yield

    def _try(self, compute: Compute) -> None:
        """Compile for a batch; say what that took, or why it is not used."""
        seconds = 0.0

        def compiled() -> torch.Tensor:
            nonlocal seconds
            start = time.perf_counter()
            with self._on(True):
                found = compute()
                found.item()  # until the device has done it
            seconds = time.perf_counter() - start
            return found

        try:
            with _nudged(self._parameters):
                cuda_graphs.believed(self._parameters, compute, lambda: compiled, self._allowed)
        except cuda_graphs.NotCaptured as problem:
            self._blocks, self._forwards = [], []
            self._say(f"the UNet's blocks are not compiled, the run goes on without: {problem}")
        else:
            self._say(
                f"compiled the UNet's blocks for this batch shape in {seconds:.0f} s; kept in {folder()}, "
                "so that the next run takes less"
            )

    @contextlib.contextmanager
    def _on(self, on: bool) -> Iterator[None]:
        # An attribute of the block itself: nothing is wrapped, so nothing has another name.
        try:
            for block, forward in zip(self._blocks, self._forwards, strict=True) if on else ():
                block.__dict__["forward"] = forward
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)


def _trained(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The block's forward, compiled where there are gradients to come: what the base says by itself, in validation,
    pictures and as a teacher, is computed as without."""
    with_gradients, without = partial(compiled, block), partial(type(block).forward, block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (with_gradients if torch.is_grad_enabled() else without)(*args, **kwargs)

    return forward


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with code of its own. Torch keeps what it compiled with the code: so it is forgotten with the run, and
    counts for nobody else who compiles the same class."""
    known: Any = function
    made = types.FunctionType(
        known.__code__.replace(), known.__globals__, known.__name__, known.__defaults__, known.__closure__
    )
    made.__kwdefaults__ = known.__kwdefaults__
    return made


@contextlib.contextmanager
def _nudged(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, the parameters are moved a little; then they are, to the bit, what they were."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.device), alpha=NUDGE)
        try:
            with torch.enable_grad():
                yield
        finally:
            torch._foreach_copy_(list(parameters), before)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """What torch is to know while something may be compiled; afterwards it is as it was."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = str(folder())
    import torch._dynamo

    try:
        with torch._dynamo.config.patch(cache_size_limit=VERSIONS, accumulated_cache_size_limit=VERSIONS):
            yield
    finally:
        if before is None:
            os.environ.pop(CACHE)
        else:
            os.environ[CACHE] = before
