"""An adapter's trained weights in one flat tensor for each component, and their gradients in another.

The parameters become views. Zeroing, measuring and clipping gradients then takes a few operations, and an elementwise
optimizer steps once. In half precision all factors are cast at once for each pass. LoRA layers read these copies and
add their gradients to a buffer; autograd would need one more operation for each factor.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.engine import fused_blocks, fused_lora

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter
    from lorakit.families import Family

# Each parameter starts at a multiple of this many values: kernels are fastest on aligned memory.
ALIGNMENT = 64
# The norm is first summed over rows of this many values. A CPU adds float32 values one by one, and a sum of 20 million
# has only two correct digits. The length of every flat tensor is a multiple of it.
ROW_LENGTH = 1024
# bitsandbytes' names for the scale of each block in 8-bit state, and for the table of values that the codes index.
BLOCK_SCALES, CODE_BOOKS = "absmax", "qmap"
# The state of an optimizer, or a part of it, by name.
State = dict[str, Any]


def flatten(
    target: Family,
    adapter: Adapter,
    *,
    groups: Sequence[tuple[str, Sequence[nn.Parameter]]] | None = None,
    copies: bool = True,
    block_size: int = 1,
) -> list[FlatParameters]:
    """See `lorakit.adapters.flatten`."""
    groups = adapter.groups() if groups is None else groups
    flats = [FlatParameters(name, each, block_size) for name, each in groups]
    layers = [layer for module in target.modules().values() for layer in module.modules()]
    for layer in layers:
        # Layers with different learning rates are in different tensors, so they cannot share a product.
        if isinstance(layer, fused_blocks.FusedAttention) and layer.fused_qkv is not None:
            layer.fused_qkv = layer.fused_qkv if layer.fused_qkv.refresh() else None
    adapter.scaled_gradients = True  # `half_precision_pass` divides all gradients at once
    if copies and target.dtype is not torch.float32:
        _add_copies(layers, flats, target.dtype)
    return flats


class FlatParameters:
    """The trained weights of one component in one tensor.

    Args:
        name: the component.
        parameters: float32, on one device; each becomes a view of `weights`, and its gradient one of `gradient`.
        block_size: see `registry.OptimizerSpec`; no block spans two parameters.

    Attributes:
        name, parameters, block_size: as given.
        weights: `[n]`, float32; padded with zeros, whose gradients are 0.
        gradient: `[n]`, float32, the `grad` of `weights`; its address never changes, and it is never None.
    """

    def __init__(self, name: str, parameters: Sequence[nn.Parameter], block_size: int = 1):
        self.name, self.parameters, self.copies_switch = name, list(parameters), fused_lora.CopiesSwitch()
        self.block_size = block_size
        offsets, size = _offsets(self.parameters, block_size)
        self.weights = nn.Parameter(torch.zeros(size, device=self.parameters[0].device))
        self.gradient = self.weights.grad = torch.zeros_like(self.weights)
        self._layout = [(p.shape, p.stride(), offset) for p, offset in zip(self.parameters, offsets, strict=True)]
        self._views, self._gradients = self.split(self.weights), self.split(self.gradient)
        self.ensure_views()
        self._half: tuple[torch.Tensor, torch.Tensor] | None = None

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Split a tensor of the shape of `weights` into views, one for each parameter."""
        return [tensor.detach().as_strided(*layout) for layout in self._layout]

    def split_blocks(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Split a tensor of one value for each block into views, one for each parameter."""
        return [tensor[at // self.block_size :][: self._block_count(shape)] for shape, _, at in self._layout]

    def join(self, tensors: Sequence[torch.Tensor | None], *, blocks: bool = False) -> torch.Tensor:
        """The inverse of `split` (or of `split_blocks`), as a new tensor; None becomes 0."""
        dtype = next(tensor.dtype for tensor in tensors if tensor is not None)
        length = len(self.weights) // self.block_size if blocks else len(self.weights)
        result = torch.zeros(length, dtype=dtype, device=self.weights.device)
        views = self.split_blocks(result) if blocks else self.split(result)
        for view, tensor in zip(views, tensors, strict=True):
            if tensor is not None:
                view.copy_(tensor)
        return result

    def _block_count(self, shape: torch.Size) -> int:
        return math.ceil(shape.numel() / self.block_size)

    def ensure_views(self) -> bool:
        """Make the parameters views again, with their current values. Return whether they were views already.

        A module that moves to another device and back gets new memory for its parameters.
        """
        first, memory = self.parameters[0], self.weights.untyped_storage()
        if first.untyped_storage() is memory and first.grad is self._gradients[0]:
            return True
        for parameter, weight, gradient in zip(self.parameters, self._views, self._gradients, strict=True):
            if parameter.untyped_storage() is not memory:
                weight.copy_(parameter.detach())
                parameter.data = weight
            parameter.grad = gradient
        return False

    def cast_copies(self) -> None:
        """Cast the weights to half precision for a pass, if any layer has half-precision copies."""
        if self._half is not None:
            copies, gradient = self._half
            copies.copy_(self.weights.detach())
            gradient.zero_()
            self.copies_switch.on = True

    def deactivate_copies(self) -> None:
        """Make the layers use the parameters again."""
        self.copies_switch.on = False

    def begin_scaled(self, scale: float | torch.Tensor) -> None:
        """Prepare for a pass whose gradients are multiplied by `scale`."""
        if isinstance(scale, torch.Tensor) or scale != 1:
            self.gradient.mul_(scale)

    def end_scaled(self, scale: float | torch.Tensor) -> None:
        """Add the half-precision gradients of the pass, and divide the sum by `scale`."""
        if self._half is not None:
            self.gradient.add_(self._half[1])
        if isinstance(scale, torch.Tensor) or scale != 1:
            self.gradient.div_(scale)

    def copy_views(self, tensor: torch.Tensor, half: torch.dtype) -> list[torch.Tensor]:
        """The half-precision copy of a part of `weights`, and the copy's gradient. The first call allocates them."""
        if self._half is None:
            copies = torch.zeros_like(self.weights.detach(), dtype=half)
            self._half = copies, torch.zeros_like(copies)
        return [each.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()) for each in self._half]


def _add_copies(layers: Sequence[nn.Module], flats: Sequence[FlatParameters], half: torch.dtype) -> None:
    """Give LoRA layers half-precision copies of their factors, as views into the flat copies."""
    by_memory = {flat.weights.data_ptr(): flat for flat in flats}
    switch = fused_lora.CopiesSwitch()
    for flat in flats:
        flat.copies_switch = switch
    for layer in layers:
        holder: Any = layer.fused_qkv if isinstance(layer, fused_blocks.FusedAttention) else layer
        if isinstance(holder, fused_blocks.FusedQKV) and holder.down is not None and holder.up is not None:
            pair = holder.down, holder.up
        elif isinstance(holder, fused_lora.FusedLinear):
            (pair,) = zip(_weights(holder.lora_A), _weights(holder.lora_B), strict=True)
        else:
            continue
        views = [by_memory[each.untyped_storage().data_ptr()].copy_views(each, half) for each in pair]
        (down, to_down), (up, to_up) = views
        holder.half_copies = fused_lora.HalfCopies(down, up, to_down, to_up, switch)


@contextlib.contextmanager
def half_precision_pass(flats: Sequence[FlatParameters], scale: float | torch.Tensor = 1.0) -> Iterator[None]:
    """Use the half-precision copies for one forward and backward pass, then add their gradients to every `gradient`.

    Outside, layers use the parameters, and autograd computes their gradients.

    Args:
        scale: `Family.gradient_scale`, the factor of the pass's gradients.
    """
    try:
        for each in flats:
            each.cast_copies()
            each.begin_scaled(scale)
        yield
    finally:
        for each in flats:
            each.deactivate_copies()
    for each in flats:
        each.end_scaled(scale)


def norm(flats: Sequence[FlatParameters]) -> torch.Tensor:
    """The norm of all gradients, a scalar on the device."""
    rows = [torch.linalg.vector_norm(flat.gradient.view(-1, ROW_LENGTH), dim=1) for flat in flats]
    return torch.linalg.vector_norm(rows[0] if len(rows) == 1 else torch.cat(rows))  # type: ignore[no-any-return]


def clip(flats: Sequence[FlatParameters], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most `max_norm`, like `torch.nn.utils.clip_grad_norm_`; 0 means no
    limit. Return the norm before."""
    total = norm(flats)
    if max_norm:
        factor = (max_norm / (total + 1e-6)).clamp_(max=1.0)
        for flat in flats:
            flat.gradient.mul_(factor)
    return total


def save_per_parameter(optimizer: torch.optim.Optimizer, flats: Sequence[FlatParameters]) -> None:
    """Make an optimizer with one `FlatParameters.weights` per group save and load its state parameter by parameter,
    like an optimizer over the parameters."""

    def split(_: object, state_dict: State) -> State:
        state: dict[int, State] = {}
        groups = []
        for flat, group in zip(flats, state_dict["param_groups"], strict=True):
            numbers = _indices(flats, flat)
            for key, value in state_dict["state"].get(group["params"][0], {}).items():
                if key.startswith(BLOCK_SCALES):
                    parts = flat.split_blocks(value)
                else:
                    is_flat = isinstance(value, torch.Tensor) and value.shape == flat.weights.shape
                    parts = flat.split(value) if is_flat else [copy.deepcopy(value) for _ in numbers]
                for number, part in zip(numbers, parts, strict=True):
                    state.setdefault(number, {})[key] = part
            groups.append({**group, "lr": float(group["lr"]), "params": list(numbers)})
        return {**state_dict, "state": state, "param_groups": groups}

    def join(state_dict: State) -> State:
        state: dict[int, State] = {}
        groups = []
        for at, (flat, group) in enumerate(zip(flats, state_dict["param_groups"], strict=True)):
            parts = _in_8_bits([_unnest(state_dict["state"].get(number, {})) for number in group["params"]])
            for key, first in next((part for part in parts if part), {}).items():
                is_flat = isinstance(first, torch.Tensor) and first.ndim > 0 and not key.startswith(CODE_BOOKS)
                tensors = [part.get(key) for part in parts]
                joined = flat.join(tensors, blocks=key.startswith(BLOCK_SCALES)) if is_flat else first
                state.setdefault(at, {})[key] = joined
            groups.append({**group, "params": [at]})
        return {**state_dict, "state": state, "param_groups": groups}

    optimizer.register_state_dict_post_hook(split)
    load = optimizer.load_state_dict  # bitsandbytes' own calls no hooks
    vars(optimizer)["load_state_dict"] = lambda state_dict: load(join(state_dict))


def _unnest(state: State) -> State:
    """A parameter's state with the entries of nested dicts, in which bitsandbytes puts some of them, at the top."""
    nested = [value for value in state.values() if isinstance(value, dict)]
    result = {key: value for key, value in state.items() if not isinstance(value, dict)}
    for each in nested:
        result |= each
    return result


def _in_8_bits(states: list[State]) -> list[State]:
    """The states of a component's parameters: all in 8 bits if some are. bitsandbytes keeps those of small parameters
    in float32."""
    books = next((state for state in states if "qmap1" in state), None)
    if books is None:
        return states
    from bitsandbytes.functional import quantize_blockwise

    result = []
    for state in states:
        if state and "qmap1" not in state:
            state = {**state, **{key: books[key] for key in books if key.startswith(CODE_BOOKS)}}
            for number in ("1", "2")[: sum(key.startswith(CODE_BOOKS) for key in books)]:
                values, code = state["state" + number], books["qmap" + number]
                quantized, scales = quantize_blockwise(values.flatten(), code.to(values.device), blocksize=256)
                state |= {"state" + number: quantized.view(values.shape), "absmax" + number: scales.absmax}
        result.append(state)
    return result


def _indices(flats: Sequence[FlatParameters], flat: FlatParameters) -> range:
    """The indices of a component's parameters among all parameters."""
    first = sum(len(other.parameters) for other in flats[: flats.index(flat)])
    return range(first, first + len(flat.parameters))


def _offsets(parameters: Sequence[nn.Parameter], block_size: int) -> tuple[list[int], int]:
    """The offset of each parameter and the total length.

    Parameters that share memory stay adjacent, because one product reads them together (`FusedQKV`), unless a block
    would then span two parameters.
    """
    starts: dict[Any, int] = {}
    offsets, size, alignment = [], 0, max(ALIGNMENT, block_size)
    for parameter in parameters:
        if parameter.numel() % block_size:
            offsets.append(size)
            size += math.ceil(parameter.numel() / alignment) * alignment
            continue
        memory = parameter.untyped_storage()
        if memory not in starts:
            starts[memory] = size
            size += math.ceil(memory.nbytes() / parameter.element_size() / alignment) * alignment
        offsets.append(starts[memory] + int(parameter.storage_offset()))
    return offsets, math.ceil(size / ROW_LENGTH) * ROW_LENGTH


def _weights(matrices: nn.ModuleDict) -> list[torch.Tensor]:
    return [matrix.get_parameter("weight") for matrix in matrices.values()]
