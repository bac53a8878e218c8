"""Frozen weights in 8 or 4 bits, in host memory, or both, dequantized for each operation.

A `QuantizedWeight` has the shape, dtype and device of the original weight, and every torch operation accepts it. Each
operation receives the dequantized weight, which is freed afterwards. Autograd saves the quantized tensor and
dequantizes it again in the backward pass. Layers, adapters and exporters need no code for it. Only copies that
`lorakit.engine.weight_offload` has prefetched stay in memory longer. Operations run in the weight's own dtype: this
saves memory and costs time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.engine import quantized_kernels
from lorakit.engine.weight_offload import WeightOffloader
from lorakit.engine.weight_storage import BLOCK_SIZE, EIGHT_BITS, is_quantizable, weight_nbytes

_aten = torch.ops.aten
_linear_pointwise = getattr(torch.ops.mkldnn._linear_pointwise, "default", None)


@dataclass(frozen=True)
class HostSlot:
    """The place of a weight in host memory: weight `number` of an offloader."""

    offloader: WeightOffloader
    number: int


class QuantizedWeight(torch.Tensor):
    """A frozen weight that is quantized, in host memory, or both.

    Attributes:
        qdata: int8 in the weight's shape; NF4: uint8 `[numel / 2]`, the first of each two values in the high half;
            "full": the weight itself.
        scales: in the weight's dtype; int8: one for each output channel, `[out, 1, ...]`; NF4: one for each block of 64
            values in memory order, `[numel / 64, 1]`; "full": None.
        scheme: "int8", "w8a8" (int8 whose products with a matrix are computed in int8), "nf4" or "full".
        transposed: whether this is the transpose of the weight.
        host_slot: the place of qdata and scales in host memory, or None if they are on the weight's device.
    """

    qdata: torch.Tensor
    scales: torch.Tensor | None
    scheme: str
    transposed: bool
    host_slot: HostSlot | None

    @staticmethod
    def __new__(
        cls,
        qdata: torch.Tensor,
        scales: torch.Tensor | None,
        scheme: str,
        shape: tuple[int, ...],
        transposed: bool = False,
        host_slot: HostSlot | None = None,
        device: torch.device | None = None,
    ) -> QuantizedWeight:
        """`shape` is that of the untransposed weight. `device` is by default that of qdata."""
        visible_shape = tuple(reversed(shape)) if transposed else tuple(shape)
        dtype = qdata.dtype if scales is None else scales.dtype
        result: QuantizedWeight = torch.Tensor._make_wrapper_subclass(
            cls, visible_shape, dtype=dtype, device=qdata.device if device is None else device, requires_grad=False
        )
        result.qdata, result.scales, result.scheme = qdata, scales, scheme
        result.transposed, result.host_slot = transposed, host_slot
        return result

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the dequantized weight, except the few that keep it quantized."""
        kwargs = kwargs or {}
        if function in (_aten.detach.default, _aten.alias.default, _aten.clone.default):
            return args[0]._like(args[0].transposed)
        if function is _aten.t.default and args[0].ndim == 2:
            return args[0]._like(not args[0].transposed)
        if function is _aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0]._like(args[0].transposed, device=kwargs.get("device"))
        if (product := _int8_product(function, args)) is not None:
            return product
        if function._schema.is_mutable and isinstance(args[0], QuantizedWeight):
            raise LorakitError(
                "{description} cannot be changed: load the base with its weights in full", args[0].description
            )
        return function(*_dequantized(args), **{name: _dequantized(value) for name, value in kwargs.items()})

    def dequantize(self) -> torch.Tensor:
        """The weight as a plain tensor in its dtype, on its device."""
        qdata, scales = self._parts()
        if scales is None:
            result = qdata
        elif self.scheme in EIGHT_BITS:
            result = torch.mul(qdata, scales)  # in the dtype of the scales, without a copy of qdata
        else:
            result = quantized_kernels.dequantize(qdata, scales, self._shape())
        return result.t() if self.transposed else result

    @property
    def storage_nbytes(self) -> int:
        """Bytes in memory, on its device or on the host."""
        return self.qdata.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def description(self) -> str:
        """A phrase for messages."""
        return (
            "a weight in the host's memory" if self.scheme == "full" else Message("a weight in {scheme}", self.scheme)
        )

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """qdata and scales on the weight's device."""
        parts = [self.qdata] if self.scales is None else [self.scales, self.qdata]
        if self.host_slot is not None and self.device.type == self.host_slot.offloader.device.type:
            parts = self.host_slot.offloader.fetch(self.host_slot.number, parts)
        elif self.host_slot is not None:
            parts = [part.to(self.device) for part in parts]
        return parts[-1], None if self.scales is None else parts[0]

    def _shape(self) -> tuple[int, ...]:
        """The shape of the untransposed weight."""
        return tuple(reversed(self.shape)) if self.transposed else tuple(self.shape)

    def _like(self, transposed: bool, device: Any = None) -> QuantizedWeight:
        """The same weight, transposed or on another device. On the same device and in host memory, qdata is shared."""
        qdata, scales, device = self.qdata, self.scales, self.device if device is None else torch.device(device)
        if self.host_slot is None:
            qdata, scales = qdata.to(device), scales if scales is None else scales.to(device)
        elif device.type != self.device.type:
            self.host_slot.offloader.release_all()
        return QuantizedWeight(qdata, scales, self.scheme, self._shape(), transposed, self.host_slot, device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        where = self.device if self.host_slot is None else f"{self.qdata.device} for {self.device}"
        return f"QuantizedWeight({self.scheme}, {tuple(self.shape)}, {self.dtype}, {where})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """The inner tensors and the rest, which torch needs to move a module."""
        names = ["qdata"] if self.scales is None else ["qdata", "scales"]
        return names, (self.scheme, self.transposed, self.host_slot, self.device)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> QuantizedWeight:
        """The inverse of `__tensor_flatten__`."""
        scheme, transposed, host_slot, device = context
        shape = tuple(reversed(size)) if transposed else tuple(size)
        return QuantizedWeight(inner["qdata"], inner.get("scales"), scheme, shape, transposed, host_slot, device)


def quantize(weight: torch.Tensor, scheme: str) -> QuantizedWeight:
    """Quantize a linear or convolutional weight.

    int8 is symmetric: the largest magnitude of each output channel becomes 127. Scales are rounded to the weight's
    dtype first and values are quantized by the rounded scales, so that this rounding adds no error.

    Raises:
        ValueError: the scheme is NF4 and the weight does not fill whole blocks of 64 values.
    """
    values = weight.detach().float()
    if scheme in EIGHT_BITS:
        scales = (values.flatten(1).abs().amax(1) / 127).to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
        qdata = (values / _nonzero(scales)).round_().clamp_(-127, 127).to(torch.int8)
        return QuantizedWeight(qdata, scales, scheme, tuple(weight.shape))
    if weight.numel() % BLOCK_SIZE:
        raise ValueError(Message("{weight} values are not whole blocks of {block_size}", weight.numel(), BLOCK_SIZE))
    blocks = values.reshape(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(1, keepdim=True).to(weight.dtype)
    levels = torch.tensor(quantized_kernels.NF4, device=weight.device)
    nearest = torch.bucketize(blocks / _nonzero(scales), (levels[1:] + levels[:-1]) / 2).to(torch.uint8).reshape(-1, 2)
    return QuantizedWeight(nearest[:, 0] << 4 | nearest[:, 1], scales, scheme, tuple(weight.shape))


def store_layers(
    unet: nn.Module, scheme: str, device: torch.device | str, *, offload: bool = False
) -> WeightOffloader | None:
    """Quantize the frozen weights of linear and convolutional layers one by one, on `device`. With `offload`, keep them
    in host memory and return their offloader.

    Biases, norms and the layers that `weight_storage.is_quantizable` excludes stay as they are.

    Raises:
        LorakitError: there is not enough host memory, or the device cannot multiply in int8.
    """
    if scheme == "w8a8" and torch.device(device).type != "meta":
        quantized_kernels.require_int8(torch.device(device))
    layers = {
        path: layer
        for path, layer in unet.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
        and not layer.weight.requires_grad
        and is_quantizable(path, layer.weight.numel())
    }
    sizes = [
        weight_nbytes(path, layer.weight.shape, scheme, layer.weight.element_size()) for path, layer in layers.items()
    ]
    offloader = WeightOffloader(sizes, device) if offload else None
    for number, layer in enumerate(layers.values()):
        weight = layer.weight if scheme == "full" else quantize(layer.weight.to(device), scheme)
        if offloader is not None:
            weight = _to_host(weight.detach(), HostSlot(offloader, number))
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return offloader


def _to_host(weight: torch.Tensor, host_slot: HostSlot) -> QuantizedWeight:
    """The same weight with its data in host memory."""
    device = host_slot.offloader.device
    if isinstance(weight, QuantizedWeight):
        assert weight.scales is not None, "a quantized weight has scales"
        scales, qdata = host_slot.offloader.put(host_slot.number, [weight.scales, weight.qdata])
        return QuantizedWeight(qdata, scales, weight.scheme, tuple(weight.shape), host_slot=host_slot, device=device)
    (data,) = host_slot.offloader.put(host_slot.number, [weight])
    return QuantizedWeight(data, None, "full", tuple(weight.shape), host_slot=host_slot, device=device)


def is_pinned(unet: nn.Module) -> bool:
    """Whether all weights in host memory, if any, are pinned."""
    weights = (weight for weight in unet.parameters() if isinstance(weight, QuantizedWeight))
    return all(weight.host_slot is None or weight.host_slot.offloader.pinned for weight in weights)


def storage_nbytes(module: nn.Module) -> int:
    """Bytes in memory of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.storage_nbytes if isinstance(t, QuantizedWeight) else t.nbytes for t in tensors)


def _int8_product(function: object, args: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The int8 result of a matrix product whose second factor is a "w8a8" weight; None for other operations."""
    if function is _aten.mm.default:
        x, weight, bias = args[0], args[1], None
    elif function is _aten.addmm.default and args[0].ndim == 1:
        bias, x, weight = args
    elif function is _linear_pointwise and args[0].ndim == 2 and isinstance(args[1], QuantizedWeight):
        x, weight, bias = args[0], args[1].t(), args[2]
    else:
        return None
    if not isinstance(weight, QuantizedWeight) or weight.scheme != "w8a8" or isinstance(x, QuantizedWeight):
        return None
    if not quantized_kernels.int8_fits(len(x), weight.shape):
        return None
    qdata, scales = weight._parts()
    assert scales is not None, "a quantized weight has scales"
    result = quantized_kernels.int8_product(x, qdata, scales, transposed=weight.transposed)
    return result if bias is None else result + bias


def _dequantized(value: Any) -> Any:
    """An operation's argument with every quantized weight dequantized. torch's `tree_map` takes longer than the
    operation."""
    if isinstance(value, QuantizedWeight):
        return value.dequantize()
    return [_dequantized(each) for each in value] if isinstance(value, (list, tuple)) else value


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32 divisors, 0 replaced by 1."""
    scales = scales.float()
    return torch.where(scales == 0, torch.ones_like(scales), scales)
