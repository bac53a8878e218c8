"""An adapter merged into a base in diffusers layout: a whole model that needs no adapter. All arithmetic in float32."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from lorakit import modelfile
from lorakit.errors import LorakitError
from lorakit.export import files, keys
from lorakit.weights import AdapterWeights, Layer


def merged(weight: torch.Tensor, layer: Layer, strength: float = 1.0) -> torch.Tensor:
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
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(base, temporary, ignore=shutil.ignore_patterns("*.bin", "*.ckpt", "*.msgpack", ".*"))
        for part in {keys.component(name) for name in weights.layers}:
            layers = {name: layer for name, layer in weights.layers.items() if keys.component(name) == part}
            _merge_component(temporary / part, part, layers, strength)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _merge_component(folder: Path, part: str, layers: Mapping[str, Layer], strength: float) -> None:
    """Merge one component's layers into the safetensors files of its folder (one, or several shards)."""
    left = {name.removeprefix(f"{part}."): layer for name, layer in layers.items()}
    for path in sorted(folder.glob("*.safetensors")):
        head = modelfile.read(path)
        tensors = load_file(path)
        for key, tensor in tensors.items():
            # Text encoders are stored with `text_model.` by everybody but transformers 5.6 and later.
            module = key.removesuffix(".weight")
            layer = left.pop(module, None) or left.pop(f"text_model.{module}", None)
            if layer is None:
                continue
            if tensor.numel() != layer.up.shape[0] * layer.down[0].numel():
                raise LorakitError(
                    f"{part}.{module}: the base's layer has another shape; the adapter is for another base"
                )
            tensors[key] = merged(tensor, layer, strength).to(tensor.dtype)
        files.write_bytes(path, save(tensors, head.metadata))
    if left:
        missing = next(iter(left))
        raise LorakitError(
            f"{folder.parent.name}: the base has no layer {part}.{missing}; the adapter is for another base"
        )
