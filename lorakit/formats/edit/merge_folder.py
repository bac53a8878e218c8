"""Merge an adapter into a base: the arithmetic, and merging from folder to folder. All arithmetic is in float32.

`merge` handles single files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from lorakit.adapters.weights import AdapterWeights, AnyLayer, ForeignLayer
from lorakit.core import atomic, registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.families import weight_files
from lorakit.formats import files, keys
from lorakit.formats.edit.precision import Precision


def merged(weight: torch.Tensor, layer: AnyLayer, strength: float = 1.0) -> torch.Tensor:
    """A layer's weight with its adapter merged in, in float32: W + strength * (W' - W).

    W' is W + delta W. For DoRA it is magnitude * V / ||V|| with V = W + delta W. The norm is over each input column, or
    over each output row if the magnitude has one value per row.

    Raises:
        RuntimeError: the layer fits a weight of another shape.
    """
    original = weight.float()
    if isinstance(layer, ForeignLayer):
        return original + layer.change(original, layer, strength)
    if layer.size != (len(original), original[0].numel()):
        raise RuntimeError("another shape")
    adapted = original + layer.delta().reshape(original.shape)
    if layer.magnitude is not None:
        scales = layer.magnitude.float()
        axis = int(scales.shape[0] == 1)
        norms = adapted.transpose(0, axis).flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        shape = (-1, 1) if axis == 0 else (1, -1)
        factors = (scales.flatten() / norms).reshape(*shape, *(1 for _ in original.shape[2:]))
        adapted = adapted * factors
    return original + strength * (adapted - original)


class Merger:
    """Merges an adapter into weights, one at a time; `only`: layers of one component."""

    def __init__(self, weights: AdapterWeights, strength: float, only: str = "", *, precision: Precision | None = None):
        self.precision = precision or Precision()

        def is_selected(name: str) -> bool:
            return not only or keys.component(name) == only

        self.strength, self.metadata = strength, weights.metadata
        self.layers = {name: layer for name, layer in weights.layers.items() if is_selected(name)}
        self.biases = {name: bias for name, bias in weights.biases.items() if is_selected(name)}

    def name(self, component: str, tensor: str) -> str | None:
        """The canonical name of the adapted layer that has this weight or bias, or None."""
        stem, _, kind = tensor.rpartition(".")
        name = canonical(component, stem)
        adapted = (kind == "weight" and name in self.layers) or (
            kind == "bias" and (name in self.biases or getattr(self.layers.get(name), "with_bias", False))
        )
        return name if adapted else None

    def require(self, parts: Mapping[str, Iterable[str]]) -> None:
        """Raise LorakitError if a layer of the adapter is missing in the base."""
        there = {canonical(part, tensor) for part, tensors in parts.items() for tensor in tensors}
        expected = {f"{name}.weight" for name in self.layers} | {f"{name}.bias" for name in self.biases}
        if missing := expected - there:
            name = min(missing).removesuffix(".weight")
            raise LorakitError("the base has no layer {name}; the adapter is for another base", name)

    def __call__(
        self, component: str, tensor: str, weight: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The weight with its adapter merged in, in the dtype of the output: by default `Precision.dtype`.

        Raises:
            LorakitError: the shape differs, or the weight is not finite before or after merging.
        """
        name, dtype = self.name(component, tensor), dtype or self.precision.dtype(weight.dtype)
        if name is None:
            return weight.to(dtype)
        try:
            if tensor.endswith(".bias") and name not in self.biases:
                adapted = merged(weight[:, None], self.layers[name], self.strength)[:, 0]
            elif tensor.endswith(".bias"):
                adapted = weight.float() + self.strength * self.biases[name].reshape(weight.shape)
            else:
                adapted = merged(weight, self.layers[name], self.strength)
        except RuntimeError:
            raise LorakitError("{name} has another shape in the base; the adapter is for another base", name) from None
        if not bool(torch.isfinite(weight.float()).all()):
            raise LorakitError(
                "{component}.{tensor} of the base holds NaN or infinity: the base is damaged", component, tensor
            )
        rounded = adapted.to(dtype)
        if not bool(torch.isfinite(rounded.float()).all()):
            raise LorakitError(
                "{name} would hold NaN or infinity in {dtype} at strength {strength:g}", name, dtype, self.strength
            )
        self.precision.measure(weight.float(), adapted, rounded)
        return rounded


def merge_folder(
    weights: AdapterWeights,
    base: Path,
    output: Path,
    strength: float = 1.0,
    finish: Callable[[Path], None] = lambda folder: None,
    without: Collection[str] = (),
    precision: Precision | None = None,
) -> Path:
    """Write `base` with the adapter merged in to the new folder `output`. Tensors keep their names, and their dtype
    unless `precision` changes it.

    Args:
        finish: called with the folder before it is renamed to `output`.
        without: parts to leave out.

    Raises:
        LorakitError: `output` exists, `base` is not in diffusers layout, or it lacks a layer of the adapter.
    """
    base, output, precision = Path(base), Path(output), precision or Precision()
    if output.exists():
        raise LorakitError("{output}: exists already; name a new folder with --output", output)
    if not (base / "model_index.json").is_file():
        raise LorakitError("{base}: not a base model in diffusers layout (no model_index.json)", base)
    index = weight_files.read_json(base / "model_index.json")
    parts = {
        name: [] if name in without or not re.fullmatch(r"\w+", name) else part_files(base / name)
        for name, value in index.items()
        if isinstance(value, list)
    }
    files.require_space(_existing(output), size_of_merged([f for paths in parts.values() for f in paths], precision))
    temporary = atomic.temporary_path(output)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, paths in parts.items():
            for file in paths:
                (temporary / name).mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, temporary / name)
        for file in base.glob("LICEN[CS]E*"):
            shutil.copy2(file, temporary)
        # The index must not name a missing part, such as the safety checker of a base from the hub.
        index |= {name: [None, None] for name, paths in parts.items() if not paths}
        files.write_bytes(temporary / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())
        for part in {keys.component(name) for name in (*weights.layers, *weights.biases)}:
            folder = temporary / keys.to_diffusers_name(part, weights.family)
            _merge_component(folder, part, Merger(weights, strength, only=part, precision=precision))
        precision.require()
        finish(temporary)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


# Duplicates of the weights in formats of other libraries and exporters.
_TWINS = re.compile(r"(openvino|flax|tf|rust)_model.*|.*\.(xml|onnx\w*|pb|msgpack|h5|ot|ckpt|pth?|gguf|tflite)|\..*")


def part_files(folder: Path) -> list[Path]:
    """The files of one part of a base that diffusers and transformers read, with weights in every precision.

    Pickles are included only if a part that lorakit does not read, such as a safety checker, has no other weights.
    """
    if not folder.is_dir():
        return []
    entries = [path for path in sorted(folder.iterdir()) if path.is_file() and not _TWINS.fullmatch(path.name)]
    indexes = [path for path in entries if ".safetensors.index" in path.name]
    shards = {name for path in indexes for name in weight_files.shards(path)}
    stems = registry.weight_stems()
    stem = stems.get(folder.name, "model")
    ours = re.compile(rf"{stem}(\.\w+)?(-\d+-of-\d+(\.\w+)?)?\.safetensors")
    weights = [p for p in entries if p.suffix == ".safetensors" and (p.name in shards or ours.fullmatch(p.name))]
    pickles = [path for path in entries if path.suffix == ".bin" or ".bin.index" in path.name]
    if folder.name not in stems and not weights:
        return entries
    return [p for p in entries if p in weights or not (p in pickles or p.suffix == ".safetensors")]


def size_of_merged(paths: Iterable[Path], precision: Precision) -> int:
    """Bytes of a base's files after merging: 8-bit weights that become float16 take twice as much."""
    size = 0
    for path in paths:
        size += path.stat().st_size
        if path.suffix.lower() == ".safetensors" and not precision.keep_fp8:
            infos = safetensors_header.read(path).tensors.values()
            size += sum(info.end - info.start for info in infos if info.dtype in weight_files.EIGHT_BITS)
    return size


def _existing(path: Path) -> Path:
    """The nearest existing parent folder of `path`."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _merge_component(folder: Path, part: str, merger: Merger) -> None:
    """Merge one component's layers into every safetensors file of its folder (variants, shards)."""
    paths = sorted(folder.glob("*.safetensors"))
    merger.require({part: [name for path in paths for name in safetensors_header.read(path).tensors]})
    for path in paths:
        head = safetensors_header.read(path)
        tensors = {name: merger(part, name, tensor) for name, tensor in safetensors_header.load(head).items()}
        files.write_bytes(path, save(tensors, head.metadata))
