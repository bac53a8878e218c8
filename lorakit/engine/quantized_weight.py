"""Frozen weights kept in 8 or 4 bits, or in the host's memory, or both, and whole only while an operation needs them.

A `StoredWeight` is a tensor like any other to whoever uses it: it has the shape, dtype and device of the weight it
stands for, and every operation of torch takes it. Each operation is given the whole weight, which it then drops; what
autograd keeps for the backward pass is the stored tensor itself, made whole once more when its turn comes. Layers,
adapters and exporters therefore need to know nothing of it, and no whole copy outlives the operation it was made for,
but for the few that `lorakit.engine.weight_offload` has copied ahead. Computing is in the weight's own dtype: this
saves memory and costs time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.core.errors import LorakitError
from lorakit.engine.weight_offload import Stream
from lorakit.engine.weight_storage import BLOCK, size_of, stays_in_full

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


@dataclass(frozen=True)
class Home:
    """Where a weight's parts lie in the host's memory: the `number`-th of a stream."""

    stream: Stream
    number: int


class StoredWeight(torch.Tensor):
    """A frozen weight that is not simply there.

    Attributes:
        codes: int8 in the weight's shape; for NF4 uint8 `[numel / 2]`, the first of each two values in the high half;
            for "full" the weight.
        scales: in the weight's dtype; int8: one for each output channel, `[out, 1, ...]`; NF4: one for each block of 64
            values in memory order, `[numel / 64, 1]`; "full": None.
        kind: "int8", "nf4" or "full".
        transposed: whether this stands for the transpose.
        home: where codes and scales lie in the host's memory, whatever device the weight is to compute on; None where
            they lie on that.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    kind: str
    transposed: bool
    home: Home | None

    @staticmethod
    def __new__(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        kind: str,
        shape: tuple[int, ...],
        transposed: bool = False,
        home: Home | None = None,
        device: torch.device | None = None,
    ) -> StoredWeight:
        """`shape` is the weight's own; a transpose has it turned round. `device` is the codes', but for one at home."""
        seen = tuple(reversed(shape)) if transposed else tuple(shape)
        dtype = codes.dtype if scales is None else scales.dtype
        made: StoredWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, seen, dtype=dtype, device=codes.device if device is None else device, requires_grad=False
        )
        made.codes, made.scales, made.kind, made.transposed, made.home = codes, scales, kind, transposed, home
        return made

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
        if function._schema.is_mutable and isinstance(args[0], StoredWeight):
            raise LorakitError(f"{args[0].described} cannot be changed: load the base with its weights in full")
        return function(*_whole(args), **{name: _whole(value) for name, value in kwargs.items()})

    def whole(self) -> torch.Tensor:
        """The weight as a plain tensor in its dtype, on its device."""
        codes, scales = self._parts()
        if scales is None:
            made = codes
        elif self.kind == "int8":
            made = codes.to(self.dtype).mul_(scales)
        else:
            pairs = _pairs(self.dtype, self.device).index_select(0, codes.int())
            made = pairs.view(-1, BLOCK).mul_(scales).view(self._shape())
        return made.t() if self.transposed else made

    @property
    def stored(self) -> int:
        """Bytes that it really takes, on its device or in the host's memory."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def described(self) -> str:
        """What it is, for a person."""
        return "a weight in the host's memory" if self.kind == "full" else f"a weight in {self.kind}"

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes and scales on its device."""
        parts = [self.codes] if self.scales is None else [self.scales, self.codes]
        if self.home is not None and self.device.type == self.home.stream.device.type:
            parts = self.home.stream.fetch(self.home.number, parts)
        elif self.home is not None:
            parts = [part.to(self.device) for part in parts]
        return parts[-1], None if self.scales is None else parts[0]

    def _shape(self) -> tuple[int, ...]:
        """The weight's own, of whose transpose this may be."""
        return tuple(reversed(self.shape)) if self.transposed else tuple(self.shape)

    def _like(self, transposed: bool, device: Any = None) -> StoredWeight:
        """The same weight, maybe elsewhere; it shares the codes where it is not, and always where they are at home."""
        codes, scales, device = self.codes, self.scales, self.device if device is None else torch.device(device)
        if self.home is None:
            codes, scales = codes.to(device), scales if scales is None else scales.to(device)
        elif device.type != self.device.type:
            self.home.stream.drop()
        return StoredWeight(codes, scales, self.kind, self._shape(), transposed, self.home, device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        where = self.device if self.home is None else f"{self.codes.device} for {self.device}"
        return f"StoredWeight({self.kind}, {tuple(self.shape)}, {self.dtype}, {where})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """What torch needs to move it with its module."""
        names = ["codes"] if self.scales is None else ["codes", "scales"]
        return names, (self.kind, self.transposed, self.home, self.device)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> StoredWeight:
        """The counterpart of `__tensor_flatten__`."""
        kind, transposed, home, device = context
        shape = tuple(reversed(size)) if transposed else tuple(size)
        return StoredWeight(inner["codes"], inner.get("scales"), kind, shape, transposed, home, device)


def quantize(weight: torch.Tensor, kind: str) -> StoredWeight:
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
        return StoredWeight(codes, scales, kind, tuple(weight.shape))
    if weight.numel() % BLOCK:
        raise ValueError(f"{weight.numel()} values are not whole blocks of {BLOCK}")
    blocks = values.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).to(weight.dtype)
    levels = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize(blocks / _nonzero(scales), (levels[1:] + levels[:-1]) / 2).to(torch.uint8).reshape(-1, 2)
    return StoredWeight(nearest[:, 0] << 4 | nearest[:, 1], scales, kind, tuple(weight.shape))


def store_layers(unet: nn.Module, kind: str, device: torch.device | str, *, streamed: bool = False) -> Stream | None:
    """Keep the frozen weights of linear and convolutional layers as `kind` has it, one after the other: on `device` or,
    streamed there, in the host's memory; what streams them comes back.

    Left in full: biases, norms, and the layers of which `storage.stays_in_full` says so.

    Raises:
        LorakitError: the host's memory does not hold them.
    """
    layers = {
        path: layer
        for path, layer in unet.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
        and not (layer.weight.requires_grad or stays_in_full(path, layer.weight.numel()))
    }
    sizes = [size_of(path, layer.weight.shape, kind, layer.weight.element_size()) for path, layer in layers.items()]
    stream = Stream(sizes, device) if streamed else None
    for number, layer in enumerate(layers.values()):
        weight = layer.weight if kind == "full" else quantize(layer.weight.to(device), kind)
        if stream is not None:
            weight = _at_home(weight.detach(), Home(stream, number))
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return stream


def _at_home(weight: torch.Tensor, home: Home) -> StoredWeight:
    """The same weight, in the host's memory."""
    device = home.stream.device
    if isinstance(weight, StoredWeight):
        assert weight.scales is not None, "what is in few bits has scales"
        scales, codes = home.stream.put(home.number, [weight.scales, weight.codes])
        return StoredWeight(codes, scales, weight.kind, tuple(weight.shape), home=home, device=device)
    (whole,) = home.stream.put(home.number, [weight])
    return StoredWeight(whole, None, "full", tuple(weight.shape), home=home, device=device)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as they are kept."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.stored if isinstance(t, StoredWeight) else t.nbytes for t in tensors)


def _whole(value: Any) -> Any:
    """An operation's argument with every stored weight made whole; torch's own way through trees costs the host more
    than the operation."""
    if isinstance(value, StoredWeight):
        return value.whole()
    return [_whole(each) for each in value] if isinstance(value, (list, tuple)) else value


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
