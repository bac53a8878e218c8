"""LyCORIS' LoHa and LoKr from the tensors of a file, and Tucker's decomposition of a convolution taken apart.

Tucker keeps a small kernel `t` `[i, j, kh, kw]` between two matrices, `sum_ij t_ij.. a_ip b_jr` (LyCORIS
functional/general.py, `rebuild_tucker`). Put into the second matrix it is the plain form, of the same rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lorakit.adapters.weights import AnyLayer, LohaLayer, LokrLayer, from_factors
from lorakit.core.errors import LorakitError

# Method -> the small kernel of Tucker's form, and the side that it belongs to.
KERNELS = {"loha": ("hada_t1 hada_w1", "hada_t2 hada_w2"), "lokr": ("lokr_t2 lokr_w2",)}
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def read(path: Path, stem: str, method: str, parts: Mapping[str, torch.Tensor]) -> LohaLayer | LokrLayer:
    """A layer of method "loha" or "lokr"; its alpha is still to be set.

    Raises:
        LorakitError: a factor is missing, they do not fit together, or it has a DoRA magnitude.
    """
    if "magnitude" in parts:
        raise LorakitError(f"{path}: {stem} is {method} with a DoRA magnitude, which lorakit does not read")
    own = dict(parts)
    for kernel, side in (names.split() for names in KERNELS[method]):
        if kernel in own:
            core = own.pop(kernel)
            a, b = _part(path, stem, own, f"{side}_a"), _part(path, stem, own, f"{side}_b")
            own[f"{side}_a"], own[f"{side}_b"] = a.T, _product(path, stem, core, b).flatten(1)
    for name in _HADA if "hada_w1_a" in own else (_side(own, "lokr_w1"), _side(own, "lokr_w2")):
        _part(path, stem, own, name)
    for left in [name for name in own if name.endswith("_a")]:
        a, b = own[left], _part(path, stem, own, f"{left[:-1]}b")
        if a.ndim != 2 or a.shape[1] != b.shape[0]:
            raise LorakitError(f"{path}: the factors of {stem} do not fit together: {_shapes(a, b)}")
        own[f"{left[:-1]}b"] = b.flatten(1)
    layer: AnyLayer = from_factors(own, 1.0)
    if isinstance(layer, LohaLayer) and (len(layer.w1_a), *layer.w1_b.shape) != (len(layer.w2_a), *layer.w2_b.shape):
        raise LorakitError(f"{path}: the two products of {stem} do not fit together: {_shapes(layer.w1_b, layer.w2_b)}")
    assert isinstance(layer, LohaLayer | LokrLayer)
    return layer


def untucked_down(path: Path, stem: str, mid: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """LoCon's `lora_down` `[r, in, 1, 1]` with `lora_mid` `[r, r, kh, kw]` put into it: `[r, in, kh, kw]`."""
    return _product(path, stem, mid, down.flatten(1))


def _product(path: Path, stem: str, core: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[i, j, kh, kw]` and `[j, r]` -> `[i, r, kh, kw]`."""
    if core.ndim != 4 or core.shape[1] != b.shape[0]:
        raise LorakitError(f"{path}: the factors of {stem} do not fit together: {_shapes(core, b)}")
    return torch.einsum("ijkl,jr->irkl", core, b.flatten(1))


def _side(parts: Mapping[str, torch.Tensor], side: str) -> str:
    return f"{side}_a" if f"{side}_a" in parts else side


def _part(path: Path, stem: str, parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in parts:
        raise LorakitError(f"{path}: {stem} has no {name} factor")
    return parts[name]


def _shapes(*tensors: torch.Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
