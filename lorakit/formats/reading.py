"""Read an adapter of any format into `AdapterWeights`. For other files, the error says what the file is.

Supported: kohya files with diffusers' or sgm's block names; diffusers files in the spelling of PEFT (`lora_A`), of the
training scripts (`lora.down`, `lora_linear_layer.down`) and the old one (`processor.to_q_lora.down`); PEFT folders.
LoRA, DoRA, LoHa and LoKr, also in Tucker's form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lorakit.adapters.weights import AdapterWeights, AnyLayer, LokrLayer, LoraLayer, from_factors
from lorakit.core import registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join
from lorakit.formats import adapter_math, embeddings, identify, keys, lycoris, metadata as meta
from lorakit.formats.facts import peft_config
from lorakit.formats.facts.peft_config import Scaling

_BIASES = {"diff_b", "b_norm", "up_bias"}


def read(path: Path, *, embedding: bool = False) -> AdapterWeights:
    """Read an adapter: a `.safetensors` file, a PEFT folder, or a folder with one adapter file.

    Args:
        embedding: also accept a textual-inversion embedding, as an adapter without layers.

    Returns:
        Weights in float32 on the CPU. A layer without an alpha has alpha = rank, as in other programs.

    Raises:
        LorakitError: it is not an adapter (the message says what it is), has a layer that is not in the tables, or is
            malformed.
    """
    path = identify.adapter_file(Path(path))
    if not path.is_dir():
        head = safetensors_header.read(path)
        if embedding and identify.kind(head.shapes()) == "embedding":
            weights = embeddings.read_alone(head)
            _require_finite(path, next(iter(weights.embeddings.values())))
            return weights
        return _read_file(head)
    parts = identify.peft_parts(path)
    if parts:
        return _read_peft(path, parts)
    if (path / identify.PEFT_CONFIG).is_file():
        return _read_peft(path, {_component(identify.peft_weights(path)): path})
    holds = Message("holds {count} .safetensors files and no PEFT adapter", len(list(path.glob("*.safetensors"))))
    raise LorakitError("{path}: {holds}{pickles}: name the file itself", path, holds, identify.pickles(path))


def _read_file(head: safetensors_header.Header) -> AdapterWeights:
    path = head.path
    what = identify.kind(head.shapes())
    if what == "embedding":
        raise LorakitError(
            "{file}: this is a textual-inversion embedding, not an adapter, and has no layers to convert or merge: put "
            "it as it is into your program's folder of embeddings, or draw with it by lorakit sample",
            path,
        )
    if what != "adapter":
        raise LorakitError("{file}: this is {kind}", path, identify.DESCRIPTIONS[what])
    if all(name.startswith(identify.PEFT_PREFIX) for name in head.tensors):
        if path.name == identify.PEFT_MODEL and (path.parent / identify.PEFT_CONFIG).is_file():
            return _read_peft(path.parent, {_component(path): path.parent})
        identify.require_whole(path)
    try:
        tensors, words = embeddings.unbundle(safetensors_header.load(head))
    except LorakitError as error:
        raise LorakitError("{path}: {problem}", path, error) from None
    return _weights(path, tensors, head.metadata, peft_config.of_header(path, head.metadata), words)


def _read_peft(path: Path, folders: Mapping[str, Path]) -> AdapterWeights:
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    scalings: dict[str, Scaling] = {}
    for part, folder in folders.items():
        head = safetensors_header.read(identify.peft_weights(folder))
        metadata |= head.metadata
        scalings[part] = peft_config.of_folder(folder)
        weights = safetensors_header.load(head)
        tensors |= {path: weights[name] for name, path in identify.peft_names(part, weights).items()}
    return _weights(path, tensors, metadata, scalings)


def _component(path: Path) -> str:
    return identify.peft_component(safetensors_header.read(path).shapes())


OTHER_KIND = "{path}: this is an adapter for {other}; lorakit has no base of that kind"
OTHER_LAYERS = (
    "{path}: this is an adapter for {other} with names of layers that lorakit does not read ({count}), e.g. {strange}"
)
NO_LAYER = "{path}: names of no layer of Stable Diffusion and of no part that lorakit reads: {count}, e.g. {strange}"


def _weights(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    scalings: Mapping[str, Scaling],
    word_vectors: embeddings.WordVectors | None = None,
) -> AdapterWeights:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    other = identify.other_model(shapes, metadata)
    if other and other[0].family is None:
        raise LorakitError(OTHER_KIND, path, other[0].title)
    modules = identify.modules(tensors, identify.layers_per_block(metadata))
    identify.require_shapes(modules, shapes)
    names = {name for module in modules.values() for name in module.parts.values()}
    strange = [name for name in tensors if name not in names]
    strange += [module.stem for module in modules.values() if module.canonical is None]
    _require_finite(path, tensors)
    if strange and other:
        raise LorakitError(OTHER_LAYERS, path, other[0].title, len(strange), strange[0])
    if strange:
        raise LorakitError(NO_LAYER, path, len(strange), strange[0])
    family, _ = identify.adapter_family(modules, shapes, metadata)
    for scaling in scalings.values():
        peft_config.require_numbers(path, scaling)
    layers, biases = dict[str, AnyLayer](), dict[str, torch.Tensor]()
    for module in modules.values():
        name = str(module.canonical)
        shares = keys.fused_parts(name, family) or (name,)
        if any(share in layers or share in biases for share in shares):
            raise LorakitError("{path}: {name} is there twice, the second time as {module}", path, name, module.stem)
        scaling = scalings.get(keys.component(name), {})
        by_file_name = "adaLN_modulation" in module.stem
        layer = None
        if module.method != "bias" and not _has_rank_0(module, shapes):
            layer = _layer(path, module, tensors, scaling)
            layer = adapter_math.swapped(name, layer, family) if by_file_name else layer
            layers |= adapter_math.split(name, layer, family)
        for part in _BIASES & module.parts.keys():
            if by_file_name and keys.is_swapped(name, family):
                raise LorakitError(
                    "{path}: {module} changes a bias whose order differs between programs", path, module.stem
                )
            scale = layer.scale if part == "up_bias" and layer is not None else 1.0
            for share, bias in adapter_math.split_bias(name, tensors[module.parts[part]].float(), family).items():
                biases[share] = biases.get(share, 0) + scale * bias
    _require_parts(path, modules.values())
    special = {layer.method for layer in layers.values() if not layer.is_lora}
    method = min(special) if special else metadata.get("lorakit.method", "lora")
    if (
        meta.rank_stabilized(method)
        and not any(scalings.values())
        and not any("alpha" in module.parts for module in modules.values())
    ):
        method = "lora"  # its scale is folded into the factors
    words = word_vectors or embeddings.read(path, metadata)
    return AdapterWeights(family, method, layers, dict(metadata), words, biases)


def _require_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise LorakitError for the first tensor with NaN or infinity, or with integers."""
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise LorakitError(
                "{path}: {name} holds whole numbers ({kind}), a quantization that lorakit does not read",
                path,
                name,
                kind,
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise LorakitError(
                "{path}: {name} holds NaN or infinity: the file is damaged; make or download it again", path, name
            )


def _require_parts(path: Path, modules: Iterable[identify.Module]) -> None:
    """Raise LorakitError for the first tensor that modules of its method do not have."""
    strange = {name: module.method for module in modules for name in module.strange_parts}
    if strange:
        name, method = next(iter(strange.items()))
        has_title = method != identify.UNKNOWN and identify.PARTS.get(method) == set()
        what = Message("{method}, which lorakit does not read", method) if has_title else "no method that lorakit reads"
        raise LorakitError("{path}: tensors of {what}: {count}, e.g. {name}", path, what, len(strange), name)


def _has_rank_0(module: identify.Module, shapes: identify.Shapes) -> bool:
    """Whether its factors have no rows: such a module changes nothing and is skipped."""
    return identify.rank(module, shapes) == 0


def _layer(path: Path, module: identify.Module, tensors: Mapping[str, torch.Tensor], scaling: Scaling) -> AnyLayer:
    parts = {part: tensors[name].float() for part, name in module.parts.items() if part not in ("alpha", *_BIASES)}
    if "scalar" in parts:  # LyCORIS' `use_scalar`, as `state_dict` gives it
        first = next((part for part in ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a") if part in parts), "")
        if not first or parts["scalar"].numel() != 1:
            raise LorakitError("{path}: the scalar of {module} is not one number beside factors", path, module.stem)
        parts[first] = parts[first] * parts.pop("scalar").flatten()
    rows = parts.pop("row_magnitude", None)
    flat = parts.get("magnitude")
    if flat is not None and flat.ndim == 1:  # as diffusers' converter to kohya writes PEFT's
        rows = parts.pop("magnitude")
    if rows is not None:  # PEFT's, [out] or [1, out, 1, 1]
        parts["magnitude"] = rows.flatten().reshape(-1, *(1 for _ in parts.get("down", rows).shape[1:] or (1,)))
    if not lycoris.PEFT_METHODS.keys().isdisjoint(parts):
        return lycoris.of_peft(path, module.stem, str(module.canonical), parts, scaling)
    if own := registry.own_kinds().get(module.method):
        if missing := [part for part in own.factors if part not in parts]:
            raise LorakitError("{path}: {stem} has no {name} factor", path, module.stem, missing[0])
        return from_factors(parts, 1.0)
    if module.method in lycoris.CHANGES:
        there = _alpha(path, module, tensors, 0, scaling) if "alpha" in module.parts else None
        return lycoris.foreign(path, module.stem, module.method, parts, there)
    if module.method in lycoris.KERNELS:
        layer = lycoris.read(path, module.stem, module.method, parts)
        if layer.magnitude is not None:
            lycoris.magnitude(path, module.stem, layer.magnitude, layer.size)
        # PEFT divides by the rank in its config, even if a LoKr has no factors. Other programs use the file's alpha.
        is_full = isinstance(layer, LokrLayer) and layer.is_full
        alpha = _alpha(
            path, module, tensors, peft_config.rank(str(module.canonical), scaling) if is_full else layer.rank, scaling
        )
        if isinstance(layer, LokrLayer) and is_full:
            by_peft = (
                alpha / peft_config.rank(str(module.canonical), scaling) if module.is_peft and "r" in scaling else 1.0
            )
            return replace(layer, w1=(layer.w1[0] * by_peft,))
        return replace(layer, alpha=alpha)
    missing = [part for part in ("down", "up") if part not in parts]
    if len(missing) == 2:  # of another method
        _require_parts(path, [module])
    if missing:
        raise LorakitError("{path}: {stem} has no {name} factor", path, module.stem, missing[0])
    down, up, magnitude = parts["down"], parts["up"], parts.get("magnitude")
    if down.ndim != up.ndim or down.ndim not in (2, 4) or up.shape[1] != len(down) or up[0, 0].numel() != 1:
        shapes = join(" and ", (str(tuple(factor.shape)) for factor in (down, up)))
        raise LorakitError("{path}: the factors of {stem} do not fit together: {shapes}", path, module.stem, shapes)
    if "mid" in parts:
        down = lycoris.untucked_down(path, module.stem, parts["mid"], down)
    if magnitude is not None:
        lycoris.magnitude(path, module.stem, magnitude, (len(up), down[0].numel()))
    return _without_padding(LoraLayer(down, up, _alpha(path, module, tensors, len(down), scaling), magnitude))


def _without_padding(layer: LoraLayer) -> LoraLayer:
    """The layer without the ranks whose row and column are both zero, which exporters add as padding. Scale and delta W
    do not change. A layer of zeros stays as it is."""
    nonzero = layer.down.flatten(1).any(1) | layer.up.flatten(1).any(0)
    count = int(nonzero.sum())
    if count in (0, layer.rank):
        return layer
    return replace(layer, down=layer.down[nonzero], up=layer.up[:, nonzero], alpha=layer.scale * count)


def _alpha(
    path: Path, module: identify.Module, tensors: Mapping[str, torch.Tensor], rank: int, scaling: Scaling
) -> float:
    if "alpha" not in module.parts:
        return peft_config.alpha(str(module.canonical), rank, scaling)
    value = tensors[module.parts["alpha"]]
    if value.numel() != 1:
        raise LorakitError("{path}: the alpha of {module} is not one number", path, module.stem)
    return float(value)
