"""Between adapters and whole bases in diffusers layout: merge an adapter in, or extract the difference of two bases.

All arithmetic is in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from lorakit.adapters.weights import AdapterWeights, AnyLayer, LoraLayer
from lorakit.core import atomic, registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.families import ldm
from lorakit.formats import files, keys
from lorakit.formats.edit.resize_combine import resize


def merged(weight: torch.Tensor, layer: AnyLayer, strength: float = 1.0) -> torch.Tensor:
    """A layer's weight with its adapter inside, in float32: W + strength * (W' - W).

    W' is W + delta W, for DoRA magnitude * V / ||V|| with V = W + delta W and the norm of each input column.
    """
    plain = weight.float()
    adapted = plain + layer.delta().reshape(plain.shape)
    if layer.magnitude is not None:
        norms = adapted.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1 for _ in plain.shape[2:]))
        adapted = adapted * (layer.magnitude.float() / norms.clamp_min(torch.finfo(torch.float32).tiny))
    return plain + strength * (adapted - plain)


def merge(weights: AdapterWeights, base: Path, output: Path, strength: float = 1.0) -> Path:
    """Write `base` with the adapter merged in to the new folder `output`; every tensor keeps its name and dtype.

    Raises:
        LorakitError: `output` exists, `base` is no diffusers folder, or it lacks a layer of the adapter.
    """
    base, output = Path(base), Path(output)
    if output.exists():
        raise LorakitError(f"{output}: exists already; name a new folder")
    if not (base / "model_index.json").is_file():
        raise LorakitError(f"{base}: not a base model in diffusers layout (no model_index.json)")
    files.require_space(_existing(output), sum(f.stat().st_size for f in base.rglob("*.safetensors")))
    temporary = atomic.temporary_path(output)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(base, temporary, ignore=shutil.ignore_patterns("*.bin", "*.ckpt", "*.msgpack", ".*"))
        for part in {keys.component(name) for name in weights.layers}:
            layers = {name: layer for name, layer in weights.layers.items() if keys.component(name) == part}
            _merge_component(temporary / keys.to_diffusers_name(part, weights.family), part, layers, strength)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def extract(
    base: Path, tuned: Path, family: str, *, rank: int | None = None, energy: float | None = None
) -> AdapterWeights:
    """The adapter that makes `tuned` of `base`, as nearly as its rank allows: an SVD of each layer's difference.

    Layers that no adapter can hold (norms, embeddings, the VAE) are left out, and so are those that did not change.

    Raises:
        LorakitError: no folder in diffusers layout, different models, nothing that changed, or a wrong rank or energy.
    """
    layers: dict[str, AnyLayer] = {}
    for part in registry.version_of(family).kohya.text.keys() | {"unet"}:
        before, after = (_tensors(Path(model), part, keys.to_diffusers_name(part, family)) for model in (base, tuned))
        for name in before:
            if not keys.is_read_everywhere(name):
                continue
            if name not in after or before[name].shape != after[name].shape:
                raise LorakitError(
                    f"{Path(tuned).name} has no layer {name} like the base's: not the same kind of model"
                )
            difference = after[name].float() - before[name].float()
            if bool(difference.any()):
                layers[name] = _exact(difference)
    if not layers:
        raise LorakitError(
            f"{Path(tuned).name} does not differ from {Path(base).name} in any layer that an adapter holds"
        )
    return resize(AdapterWeights(family, "lora", layers), rank=rank, energy=energy)


def _exact(difference: torch.Tensor) -> LoraLayer:
    """A layer of full rank whose delta W is `difference`: one factor is the identity."""
    outputs, inputs = difference.shape[0], difference[0].numel()
    kernel = difference.shape[2:]
    if outputs <= inputs:
        up = torch.eye(outputs).reshape(outputs, outputs, *(1 for _ in kernel))
        return LoraLayer(difference, up, float(outputs))
    up = difference.reshape(outputs, inputs, *(1 for _ in kernel))
    return LoraLayer(torch.eye(inputs).reshape(inputs, *difference.shape[1:]), up, float(inputs))


def _tensors(folder: Path, part: str, place: str) -> dict[str, torch.Tensor]:
    """Canonical name -> weight of one component of a base, a folder or a single file."""
    if folder.is_file():
        header = safetensors_header.read(folder)
        loaded = ldm.tensors(header, ldm.read(header).parts[part])
        return {canonical(part, key.removesuffix(".weight")): tensor for key, tensor in loaded}
    paths = sorted((folder / place).glob("*.safetensors"))
    if not paths:
        raise LorakitError(f"{folder}: not a base model in diffusers layout (no {place}/*.safetensors)")
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        safetensors_header.read(path)
        tensors |= {canonical(part, key.removesuffix(".weight")): tensor for key, tensor in load_file(path).items()}
    return tensors


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _merge_component(folder: Path, part: str, layers: Mapping[str, AnyLayer], strength: float) -> None:
    """Merge one component's layers into every safetensors file of its folder that has them (variants, shards)."""
    missing = set(layers)
    for path in sorted(folder.glob("*.safetensors")):
        head = safetensors_header.read(path)
        tensors = load_file(path)
        names = {canonical(part, key.removesuffix(".weight")): key for key in tensors}
        for name in layers.keys() & names.keys():
            tensor, layer = tensors[names[name]], layers[name]
            if (len(tensor), tensor[0].numel()) != layer.size:
                raise LorakitError(f"{name} has another shape in the base; the adapter is for another base")
            tensors[names[name]] = merged(tensor, layer, strength).to(tensor.dtype)
        missing -= names.keys()
        files.write_bytes(path, save(tensors, head.metadata))
    if missing:
        raise LorakitError(f"the base has no layer {min(missing)}; the adapter is for another base")
