"""The parameterizations of adapter files: functions that build a layer from a module's tensors with LyCORIS' names.

Tucker's form has a small kernel `t` `[i, j, kh, kw]` between two matrices, `sum_ij t_ij.. a_ip b_jr` (LyCORIS
functional/general.py, `rebuild_tucker`). Multiplied into the second matrix it becomes the plain form of the same rank.
`CHANGES` has the methods whose layers stay as they are in the file, each with its formula.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lorakit.adapters.weights import AnyLayer, ForeignLayer, LohaLayer, LokrLayer, from_factors
from lorakit.core.errors import LorakitError
from lorakit.core.messages import join
from lorakit.formats import identify
from lorakit.formats.facts import peft_config

# Method -> the small kernel of Tucker's form, and the matrix pair that it belongs to.
KERNELS = {"loha": ("hada_t1 hada_w1", "hada_t2 hada_w2"), "lokr": ("lokr_t2 lokr_w2",)}
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def read(path: Path, stem: str, method: str, parts: Mapping[str, torch.Tensor]) -> LohaLayer | LokrLayer:
    """Build a layer of method "loha" or "lokr". The caller sets its alpha.

    Raises:
        LorakitError: a factor is missing, or the factors do not fit together.
    """
    own = dict(parts)
    scales = own.pop("magnitude", None)
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
            raise LorakitError("{path}: the factors of {stem} do not fit together: {shapes}", path, stem, _shapes(a, b))
        own[f"{left[:-1]}b"] = b.flatten(1)
    layer: AnyLayer = from_factors(own, 1.0)
    if isinstance(layer, LohaLayer) and (len(layer.w1_a), *layer.w1_b.shape) != (len(layer.w2_a), *layer.w2_b.shape):
        raise LorakitError(
            "{path}: the two products of {stem} do not fit together: {shapes}",
            path,
            stem,
            _shapes(layer.w1_b, layer.w2_b),
        )
    assert isinstance(layer, LohaLayer | LokrLayer)
    return layer if scales is None else replace(layer, magnitude=scales)


def untucked_down(path: Path, stem: str, mid: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """LoCon's `lora_down` `[r, in, 1, 1]` multiplied by `lora_mid` `[r, r, kh, kw]`: `[r, in, kh, kw]`."""
    return _product(path, stem, mid, down.flatten(1))


def magnitude(path: Path, stem: str, scales: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Check and return DoRA's magnitude: `[1, in, ...]` for each input column or `[out, 1, ...]` for each output
    row."""
    outputs, columns = size
    length = scales.numel()
    is_rows = tuple(scales.shape[:2]) == (length, 1) and length == outputs
    is_columns = tuple(scales.shape[:2]) == (1, length) and columns % length == 0
    if not (is_rows or is_columns):
        raise LorakitError(
            "{path}: the DoRA magnitude of {stem} does not fit: {scales} for {size}", path, stem, _shapes(scales), size
        )
    return scales


def _added(name: str) -> Callable[[torch.Tensor, ForeignLayer, float], torch.Tensor]:
    return lambda weight, layer, strength: strength * layer.parts[name].float().reshape(weight.shape)


def _scaled_channels(weight: torch.Tensor, layer: ForeignLayer, strength: float) -> torch.Tensor:
    """(IA)^3: each output, or each input, is multiplied by 1 + its scale (LyCORIS modules/ia3.py)."""
    on_input = bool(layer.parts["on_input"].any())
    scales = layer.parts["weight"].flatten()
    rest = (1,) * (weight.ndim - 2)
    return strength * weight * (scales.reshape(1, -1, *rest) if on_input else scales.reshape(-1, 1, *rest))


def _glora(weight: torch.Tensor, layer: ForeignLayer, strength: float) -> torch.Tensor:
    """GLoRA: (W a1 a2 + b1 b2) * alpha / rank, with a1 and a2 on the input axis (LyCORIS modules/glora.py)."""
    a1, a2, b1, b2 = (layer.parts[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    if "bm.weight" in layer.parts:
        b2 = torch.einsum("rj...,ji->ri...", layer.parts["bm.weight"], b2.flatten(1))
    added = torch.einsum("or,r...->o...", b1.flatten(1), b2).reshape(weight.shape)
    turned = torch.einsum("oi...,ij->oj...", weight, a1.flatten(1) @ a2.flatten(1))
    return strength * layer.alpha / len(a2) * (turned + added)


def _rotation(layer: ForeignLayer, outputs: int) -> torch.Tensor:
    """Cayley transform of each block: (I + Q)(I - Q)^-1, Q = B - B^T, with a norm of at most alpha * outputs."""
    blocks = layer.parts["oft_blocks"]
    skew, limit = blocks - blocks.transpose(-1, -2), layer.alpha * outputs
    norm = float(skew.norm()) + 1e-8
    skew = skew * (limit / norm) if 0 < limit < norm else skew
    one = torch.eye(blocks.shape[-1])
    return torch.matmul(one + skew, torch.linalg.inv(one - skew))


def _rotated(weight: torch.Tensor, layer: ForeignLayer, strength: float) -> torch.Tensor:
    """OFT rotates blocks of outputs. BOFT (four axes) does so in stages, each with outputs that are farther apart."""
    turns = _rotation(layer, len(weight))
    turns = strength * turns + (1 - strength) * torch.eye(turns.shape[-1])
    result, half = weight, turns.shape[-1] // 2
    if turns.ndim == 3:
        result = torch.einsum("bnm,bn...->bm...", turns, weight.unflatten(0, turns.shape[:2])).flatten(0, 1)
    else:
        for stage, turn in enumerate(turns):
            stride = 2**stage * half
            mixed = result.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
            mixed = torch.einsum("bij,bj...->bi...", turn, mixed.unflatten(0, turn.shape[:2]))
            result = mixed.flatten(0, 1).unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    if "rescale" in layer.parts:
        scales = layer.parts["rescale"].reshape(-1, *(1 for _ in weight.shape[1:]))
        result = result * (1 + strength * (scales - 1))
    return torch.sub(result, weight)


# Method -> its required parts, and (weight, layer, strength) -> the change of the weight.
CHANGES: dict[str, tuple[tuple[str, ...], Callable[[torch.Tensor, ForeignLayer, float], torch.Tensor]]] = {
    "full difference": (("diff",), _added("diff")),
    "norm": (("w_norm",), _added("w_norm")),
    "IA3": (("weight", "on_input"), _scaled_channels),
    "GLoRA": (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), _glora),
    "OFT": (("oft_blocks",), _rotated),
}


def _turned_inputs(weight: torch.Tensor, layer: ForeignLayer, strength: float) -> torch.Tensor:
    """PEFT's OFT: blocks of inputs (including the kernel) are rotated stage by stage, and outputs are multiplied by
    `scales`.

    In later stages of BOFT a block consists of inputs from two halves of 2^stage blocks (peft tuners/boft/layer.py).
    """
    result, half = weight.flatten(1), layer.parts["turns"].shape[-1] // 2
    for stage, turns in enumerate(layer.parts["turns"]):
        order = torch.arange(result.shape[1])
        order = order.reshape(-1, 2**stage, 2, half).transpose(1, 2).flatten() if stage else order
        blocks = result[:, order.argsort()].unflatten(1, (-1, turns.shape[-1]))
        result = torch.einsum("obk,bjk->obj", blocks, turns.expand(blocks.shape[1], -1, -1)).flatten(1)[:, order]
    return strength * (result * layer.parts["scales"].reshape(-1, 1) - weight.flatten(1)).reshape(weight.shape)


def of_peft(
    path: Path, stem: str, name: str, parts: Mapping[str, torch.Tensor], config: peft_config.Scaling
) -> AnyLayer:
    """Build a layer of PEFT's (IA)^3, OFT or BOFT from its tensors and `adapter_config.json`.

    Raises:
        LorakitError: a number in the config is missing, or the tensors do not fit it.
    """
    if "ia3_l" in parts:
        scales = parts["ia3_l"]
        on_input = peft_config.is_feedforward(name, config) if scales.ndim > 2 else scales.shape[0] == 1
        changes = {"weight": scales.flatten() - 1, "on_input": torch.tensor(on_input)}
        # Scaling the outputs also scales the bias, if the layer has one.
        biased = not on_input and not re.search(r"^unet\..*\.attn[12]\.to_[qkv]$", name)
        return ForeignLayer("IA3 with biases" if biased else "IA3", changes, 0.0, _scaled_channels, biased)
    blocks = parts.get("oft_R", parts.get("oft_r", parts.get("boft_R", torch.zeros(0))))
    limit = float(config.get("eps") or 6e-5) / math.sqrt(len(blocks)) if config.get("coft") else math.inf
    if "oft_R" in parts:
        blocks = blocks / math.sqrt(blocks.shape[1]) if "scaled_oft" in parts else blocks  # OneTrainer's
        size = round((1 + math.sqrt(1 + 8 * blocks.shape[1])) / 2)
        upper = torch.zeros(len(blocks), size, size)
        upper[:, *torch.triu_indices(size, size, 1)] = blocks
        blocks = upper
    if "oft_r" in parts and "oft_s" not in parts:  # of PEFT before 0.14: on outputs, as in LyCORIS
        blocks = -0.5 * _limited(blocks, limit * blocks.shape[-1] ** 2)
        if len(blocks) == 1:  # with `block_share` all blocks share it
            blocks = blocks.expand(peft_config.rank(name, config), -1, -1).clone()
        return ForeignLayer("OFT", {"oft_blocks": blocks}, 0.0, _rotated)
    skew = blocks - blocks.transpose(-1, -2) if "oft_R" in parts else 0.5 * (blocks - blocks.transpose(-1, -2))
    skew, one = _limited(skew, limit), torch.eye(blocks.shape[-1])
    if "oft_R" in parts and config.get("use_cayley_neumann", True):
        terms = int(config.get("num_cayley_neumann_terms", 5))
        last = max(terms - 1, 3) if terms > 2 else 0  # as PEFT's loop has it
        powers = [torch.linalg.matrix_power(skew, n) for n in range(max(last + 1, terms))]
        turns = powers[0] + sum((1.0 if n == last else 2.0) * powers[n] for n in range(1, len(powers)))
    else:
        turns = torch.linalg.solve(one + skew, one - skew, left=False)
    scales = parts.get("oft_s", parts.get("boft_s", torch.ones(1)))
    method = next(method for part, method in PEFT_METHODS.items() if part in parts)
    return ForeignLayer(method, {"turns": turns.reshape(-1, *turns.shape[-3:]), "scales": scales}, 0.0, _turned_inputs)


# Part -> PEFT method whose change depends on the weight.
PEFT_METHODS = {"oft_R": "OFTv2", "oft_r": "PEFT's older OFT", "boft_R": "PEFT's BOFT", "ia3_l": "IA3"}


def _limited(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """The blocks, scaled to a norm of at most `limit` (PEFT's `coft`)."""
    norms = blocks.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, *(1,) * (blocks.ndim - 1))
    return blocks * (limit / norms).clamp(max=1.0) if limit < math.inf else blocks


def foreign(path: Path, stem: str, method: str, parts: Mapping[str, torch.Tensor], alpha: float | None) -> ForeignLayer:
    """Build a layer of one of `CHANGES`, with its parts as in the file.

    Raises:
        LorakitError: a part is missing, or it has a magnitude, which is not defined for it.
    """
    needed, change = CHANGES[method]
    if "oft_diag" in parts:  # of LyCORIS before 3: the rotations themselves, (I + Q)(I - Q)^-1
        turns = parts["oft_diag"]
        one = torch.eye(turns.shape[-1])
        skew = torch.linalg.solve(turns + one, turns - one, left=False)
        parts = {**{n: part for n, part in parts.items() if n != "oft_diag"}, "oft_blocks": skew / 2}
    for name in needed:
        _part(path, stem, parts, name)
    if "magnitude" in parts:
        raise LorakitError(
            "{path}: {stem} is {method} with a DoRA magnitude, which lorakit does not read", path, stem, method
        )
    if method == "GLoRA":
        a1, a2, b1, b2 = (parts[name] for name in needed)
        if identify.is_older_glora(*(tuple(parts[name].shape) for name in needed)):
            a1, a2, b1, b2 = a2, a1, b2, b1
            parts = {**parts, **dict(zip(needed, (a1, a2, b1, b2), strict=True))}
        if not a1.shape[:2] == a2.shape[1::-1] or b1.shape[1] != len(b2) or len(a2) != len(b2):
            raise LorakitError(
                "{path}: the factors of {stem} do not fit together: {shapes}", path, stem, _shapes(a1, a2, b1, b2)
            )
    missing = len(parts["a2.weight"]) if method == "GLoRA" else 0  # GLoRA: the rank; OFT: no constraint
    return ForeignLayer(method, parts, float(missing) if alpha is None else alpha, change)


def _product(path: Path, stem: str, core: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[i, j, kh, kw]` and `[j, r]` -> `[i, r, kh, kw]`."""
    if core.ndim != 4 or core.shape[1] != b.shape[0]:
        raise LorakitError("{path}: the factors of {stem} do not fit together: {shapes}", path, stem, _shapes(core, b))
    return torch.einsum("ijkl,jr->irkl", core, b.flatten(1))


def _side(parts: Mapping[str, torch.Tensor], side: str) -> str:
    return f"{side}_a" if f"{side}_a" in parts else side


def _part(path: Path, stem: str, parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in parts:
        raise LorakitError("{path}: {stem} has no {name} factor", path, stem, name)
    return parts[name]


def _shapes(*tensors: torch.Tensor) -> str:
    return join(" and ", (str(tuple(tensor.shape)) for tensor in tensors))
