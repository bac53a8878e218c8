"""An adapter's trained weights in one tensor for each component, their gradients in another.

To everyone outside the parameters are what they were: each is a view. But gradients are cleared, measured and clipped
in a few operations whatever their number, an optimizer that goes number by number steps in one, and in half precision
the factors are cast together once a pass: LoRA's layers then read the copies, and add to the copies' gradients by
themselves, where autograd would issue one more operation for each factor.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lorakit.engine import fused_blocks, fused_lora

# Numbers from which on a parameter may begin: kernels read aligned memory fastest.
ALIGNED = 64
# Numbers that are summed in a row for the norm: a CPU adds float32 one after the other, and 20 million of them lose the
# third digit. Every tensor here is a multiple of it long.
ROW = 1024


def flatten(target: Any, adapter: Any, *, copies: bool = True) -> list[Flat]:
    """See `lorakit.adapters.flatten`."""
    modules, half = target.modules(), target.dtype if copies and target.dtype is not torch.float32 else None
    return [
        Flat(name, parameters, modules[name], half, getattr(target, "gradient_scale", 1.0))
        for name, parameters in adapter.groups()
    ]


class Flat:
    """The trained weights of one component.

    Args:
        name: the component.
        parameters: float32, on one device; each becomes a view of `weights`, and its gradient one of `gradient`.
        module: what they are in.
        half: the precision in which LoRA's layers compute there, if they are to have copies of the factors in it.
        gradient_scale: gradients in half precision are so many times too large.

    Attributes:
        weights: `[n]`, float32; padded with zeros, whose gradients are 0, too.
        gradient: `[n]`, float32, the `grad` of `weights`: it stays where it is, and is never None.
        on: whether a pass computes with the copies in half precision.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        module: nn.Module,
        half: torch.dtype | None = None,
        gradient_scale: float = 1.0,
    ):
        self.name, self.parameters, self.on = name, list(parameters), False
        places, size = _places(self.parameters)
        self.weights = nn.Parameter(torch.zeros(size, device=self.parameters[0].device))
        self.gradient = self.weights.grad = torch.zeros_like(self.weights)
        self._layout = [(p.shape, p.stride(), place) for p, place in zip(self.parameters, places, strict=True)]
        self._views, self._gradients = self.apart(self.weights), self.apart(self.gradient)
        self.hold()
        for layer in module.modules():
            if isinstance(layer, fused_blocks.LeanAttention) and layer.group is not None:
                layer.group.find()
        self._scale = gradient_scale
        self._half: tuple[torch.Tensor, torch.Tensor] | None = None
        if half is not None:
            self._add_copies(module, half)

    def apart(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views of a tensor like `weights`, each where a parameter is in that."""
        return [tensor.detach().as_strided(*place) for place in self._layout]

    def together(self, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The inverse of `apart`, a new tensor; what is None becomes 0."""
        made = torch.zeros_like(self.weights.detach())
        for view, tensor in zip(self.apart(made), tensors, strict=True):
            if tensor is not None:
                view.copy_(tensor)
        return made

    def hold(self) -> bool:
        """Let the parameters be views, with the values that they have; whether they were. Who moves a model to another
        place and back makes them tensors of their own."""
        first, memory = self.parameters[0], self.weights.untyped_storage()
        if first.untyped_storage() is memory and first.grad is self._gradients[0]:
            return True
        for parameter, weight, gradient in zip(self.parameters, self._views, self._gradients, strict=True):
            if parameter.untyped_storage() is not memory:
                weight.copy_(parameter.detach())
                parameter.data = weight
            parameter.grad = gradient
        return False

    def begin(self) -> None:
        """Cast the weights for a pass, if there are layers that compute in half precision."""
        if self._half is not None:
            copies, gradient = self._half
            copies.copy_(self.weights.detach())
            gradient.zero_()
            self.on = True

    def collect(self) -> None:
        """Add what the pass has found in half precision to `gradient`."""
        if self._half is not None:
            self.gradient.add_(self._half[1], alpha=1 / self._scale)

    def _add_copies(self, module: nn.Module, half: torch.dtype) -> None:
        copies = torch.zeros_like(self.weights.detach(), dtype=half)
        gradient = torch.zeros_like(copies)

        def at(tensor: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
            return within.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        for layer in module.modules():
            holder: Any = layer.group if isinstance(layer, fused_blocks.LeanAttention) else layer
            if isinstance(holder, fused_blocks.Group) and holder.down is not None and holder.up is not None:
                down, up = holder.down, holder.up
            elif isinstance(holder, fused_lora.FusedLinear):
                ((down, up),) = zip(_weights(holder.lora_A), _weights(holder.lora_B), strict=True)
            else:
                continue
            holder.place = fused_lora.Place(
                at(down, copies), at(up, copies), at(down, gradient), at(up, gradient), self
            )
            self._half = copies, gradient


@contextlib.contextmanager
def computing(flats: Sequence[Flat]) -> Iterator[None]:
    """For one forward and backward pass; afterwards every `gradient` has what the pass adds to it. Outside, layers
    compute with the parameters themselves, and gradients come by autograd."""
    try:
        for each in flats:
            each.begin()
        yield
    finally:
        for each in flats:
            each.on = False
    for each in flats:
        each.collect()


def norm(flats: Sequence[Flat]) -> torch.Tensor:
    """The norm of all gradients together, a scalar on the device."""
    rows = [torch.linalg.vector_norm(flat.gradient.view(-1, ROW), dim=1) for flat in flats]
    return torch.linalg.vector_norm(rows[0] if len(rows) == 1 else torch.cat(rows))


def clip(flats: Sequence[Flat], most: float) -> torch.Tensor:
    """Scale all gradients down to a norm of `most`, as `torch.nn.utils.clip_grad_norm_` does; the norm before. With 0
    they stay as they are."""
    found = norm(flats)
    if most:
        factor = (most / (found + 1e-6)).clamp_(max=1.0)
        for flat in flats:
            flat.gradient.mul_(factor)
    return found


def save_apart(optimizer: torch.optim.Optimizer, flats: Sequence[Flat]) -> None:
    """Let an optimizer that has one `Flat.weights` in each group save and load its state parameter by parameter, as one
    does that was given these."""

    def split(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for flat, group in zip(flats, saved["param_groups"], strict=True):
            numbers = _numbers(flats, flat)
            for key, value in saved["state"].get(group["params"][0], {}).items():
                whole = isinstance(value, torch.Tensor) and value.shape == flat.weights.shape
                parts = flat.apart(value) if whole else [copy.deepcopy(value) for _ in numbers]
                for number, part in zip(numbers, parts, strict=True):
                    state.setdefault(number, {})[key] = part
            groups.append({**group, "lr": float(group["lr"]), "params": list(numbers)})
        return {**saved, "state": state, "param_groups": groups}

    def join(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for at, (flat, group) in enumerate(zip(flats, saved["param_groups"], strict=True)):
            parts = [saved["state"].get(number, {}) for number in group["params"]]
            for key, first in next((part for part in parts if part), {}).items():
                whole = isinstance(first, torch.Tensor) and first.ndim > 0
                state.setdefault(at, {})[key] = flat.together([part.get(key) for part in parts]) if whole else first
            groups.append({**group, "params": [at]})
        return {**saved, "state": state, "param_groups": groups}

    optimizer.register_state_dict_post_hook(split)
    optimizer.register_load_state_dict_pre_hook(join)


def _numbers(flats: Sequence[Flat], flat: Flat) -> range:
    """The numbers of a component's parameters among all."""
    first = sum(len(other.parameters) for other in flats[: flats.index(flat)])
    return range(first, first + len(flat.parameters))


def _places(parameters: Sequence[nn.Parameter]) -> tuple[list[int], int]:
    """Where each parameter begins, and how long all are together. Those that share memory stay neighbours: one product
    takes them all (`lean.Group`)."""
    starts: dict[Any, int] = {}
    places, size = [], 0
    for parameter in parameters:
        memory = parameter.untyped_storage()
        if memory not in starts:
            starts[memory] = size
            size += math.ceil(memory.nbytes() / parameter.element_size() / ALIGNED) * ALIGNED
        places.append(starts[memory] + int(parameter.storage_offset()))
    return places, math.ceil(size / ROW) * ROW


def _weights(matrices: Any) -> list[torch.Tensor]:
    return [matrix.weight for matrix in matrices.values()]
