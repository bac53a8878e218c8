"""Frozen weights kept in 8 or 4 bits, and made whole again for as long as one operation needs them.

A `QuantizedWeight` is a tensor like any other to whoever uses it: it has the shape, dtype and device of the weight it
stands for, and every operation of torch takes it. Each operation is given the whole weight, which it then drops; what
autograd keeps for the backward pass is the quantized tensor itself, made whole once more when its turn comes. Layers,
adapters and exporters therefore need to know nothing of it, and no whole copy outlives the operation it was made for.
Computing is in the weight's own dtype: this saves memory and costs time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lorakit.errors import LorakitError
from lorakit.storage import BLOCK, stays_in_full

# The 16 values of NF4, quantiles of a normal distribution scaled into [-1, 1] with an exact zero (Dettmers et al. 2023,
# arXiv 2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_aten = torch.ops.aten


class QuantizedWeight(torch.Tensor):
    """A frozen weight in few bits.

    Attributes:
        codes: int8 in the weight's shape; for NF4 uint8 `[numel / 2]`, the first of each two values in the high half.
        scales: in the weight's dtype; int8: one for each output channel, `[out, 1, ...]`; NF4: one for each block of 64
            values in memory order, `[numel / 64, 1]`.
        kind: "int8" or "nf4".
        transposed: whether this stands for the transpose.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    kind: str
    transposed: bool

    @staticmethod
    def __new__(
        cls, codes: torch.Tensor, scales: torch.Tensor, kind: str, shape: tuple[int, ...], transposed: bool = False
    ) -> QuantizedWeight:
        """`shape` is the weight's own; a transpose has it turned round."""
        seen = tuple(reversed(shape)) if transposed else tuple(shape)
        made: QuantizedWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, seen, dtype=scales.dtype, device=codes.device, requires_grad=False
        )
        return made

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, kind: str, shape: tuple[int, ...], transposed: bool = False
    ):
        self.codes, self.scales, self.kind, self.transposed = codes, scales, kind, transposed

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any operation: on the whole weight, but for the few that leave it as it is."""
        kwargs = kwargs or {}
        if function in (_aten.detach.default, _aten.alias.default, _aten.clone.default):
            return args[0]._like(args[0].transposed)
        if function is _aten.t.default and args[0].ndim == 2:
            return args[0]._like(not args[0].transposed)
        if function is _aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0]._like(args[0].transposed, device=kwargs.get("device"))
        if function._schema.is_mutable and isinstance(args[0], QuantizedWeight):
            raise LorakitError(f"a weight in {args[0].kind} cannot be changed: load the base with its weights in full")
        args, kwargs = tree_map_only(QuantizedWeight, QuantizedWeight.whole, (args, kwargs))
        return function(*args, **kwargs)

    def whole(self) -> torch.Tensor:
        """The weight as a plain tensor in its dtype."""
        shape = tuple(reversed(self.shape)) if self.transposed else tuple(self.shape)
        if self.kind == "int8":
            made = self.codes.to(self.dtype).mul_(self.scales)
        else:
            pairs = _pairs(self.dtype, self.device).index_select(0, self.codes.int())
            made = pairs.view(-1, BLOCK).mul_(self.scales).view(shape)
        return made.t() if self.transposed else made

    @property
    def stored(self) -> int:
        """Bytes that it really takes."""
        return self.codes.nbytes + self.scales.nbytes

    def _like(self, transposed: bool, device: Any = None) -> QuantizedWeight:
        """The same weight, maybe elsewhere; it shares the codes where it is not."""
        codes, scales = self.codes, self.scales
        if device is not None:
            codes, scales = codes.to(device), scales.to(device)
        shape = tuple(reversed(self.shape)) if self.transposed else tuple(self.shape)
        return QuantizedWeight(codes, scales, self.kind, shape, transposed)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.kind}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """What torch needs to move it with its module."""
        return ["codes", "scales"], (self.kind, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> QuantizedWeight:
        """The counterpart of `__tensor_flatten__`."""
        kind, transposed = context
        shape = tuple(reversed(size)) if transposed else tuple(size)
        return QuantizedWeight(inner["codes"], inner["scales"], kind, shape, transposed)


def quantize(weight: torch.Tensor, kind: str) -> QuantizedWeight:
    """A linear or convolutional weight in few bits.

    int8 is symmetric, the largest magnitude of an output channel being 127. Scales are rounded to the weight's dtype
    first and the codes chosen for those, so that rounding them costs nothing.

    Raises:
        ValueError: NF4 of a weight that is not whole blocks of 64 values.
    """
    values = weight.detach().float()
    if kind == "int8":
        scales = (values.flatten(1).abs().amax(1) / 127).to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
        codes = (values / _nonzero(scales)).round_().clamp_(-127, 127).to(torch.int8)
        return QuantizedWeight(codes, scales, kind, tuple(weight.shape))
    if weight.numel() % BLOCK:
        raise ValueError(f"{weight.numel()} values are not whole blocks of {BLOCK}")
    blocks = values.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).to(weight.dtype)
    levels = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize(blocks / _nonzero(scales), (levels[1:] + levels[:-1]) / 2).to(torch.uint8).reshape(-1, 2)
    return QuantizedWeight(nearest[:, 0] << 4 | nearest[:, 1], scales, kind, tuple(weight.shape))


def quantize_layers(unet: nn.Module, kind: str, device: torch.device | str) -> None:
    """Put the weights of linear and convolutional layers into few bits on `device`, one after the other.

    Left in full: biases, norms, and the layers of which `storage.stays_in_full` says so.
    """
    for path, layer in unet.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not stays_in_full(path, layer.weight.numel()):
            layer.weight = nn.Parameter(quantize(layer.weight.to(device), kind), requires_grad=False)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as they are kept."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.stored if isinstance(t, QuantizedWeight) else t.nbytes for t in tensors)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    """Float32 divisors; where everything is zero any will do."""
    scales = scales.float()
    return torch.where(scales == 0, torch.ones_like(scales), scales)


@functools.lru_cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two values of every byte, `[256, 2]`: one look-up instead of two and the shifting between them."""
    levels = torch.tensor(NF4, dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
