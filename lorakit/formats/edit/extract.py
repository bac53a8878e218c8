"""Extract an adapter from the difference of two bases: an SVD of each layer's difference, in float32."""

from __future__ import annotations

from pathlib import Path

import torch

from lorakit.adapters.weights import AdapterWeights, AnyLayer
from lorakit.core import registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.families import ldm, weight_files
from lorakit.formats import keys
from lorakit.formats.edit.resize_combine import full_rank, resize


def extract(
    base: Path, tuned: Path, family: str, *, rank: int | None = None, energy: float | None = None
) -> AdapterWeights:
    """The adapter that best turns `base` into `tuned` at its rank: an SVD of each layer's difference.

    Layers that no adapter can hold (norms, embeddings, the VAE) and unchanged layers are left out.

    Raises:
        LorakitError: the models are not in diffusers layout or are of different kinds, no layer changed, or rank or
            energy is invalid.
    """
    layers: dict[str, AnyLayer] = {}
    for part in registry.version_of(family).kohya.text.keys() | {"unet"}:
        before, after = (_tensors(Path(model), part, keys.to_diffusers_name(part, family)) for model in (base, tuned))
        for name in before:
            if not keys.is_read_everywhere(name):
                continue
            if name not in after or before[name].shape != after[name].shape:
                raise LorakitError(
                    "{tuned} has no layer {name} like the base's: not the same kind of model", Path(tuned).name, name
                )
            difference = after[name].float() - before[name].float()
            if bool(difference.any()):
                layers[name] = full_rank(difference)
    if not layers:
        raise LorakitError(
            "{tuned} does not differ from {base} in any layer that an adapter holds", Path(tuned).name, Path(base).name
        )
    return resize(AdapterWeights(family, "lora", layers), rank=rank, energy=energy)


def _tensors(folder: Path, part: str, place: str) -> dict[str, torch.Tensor]:
    """Canonical name -> weight of one component of a base in a folder or a single file."""
    if folder.is_file():
        header = safetensors_header.read(folder)
        loaded = ldm.tensors(header, ldm.read(header).parts[part])
        return {canonical(part, key.removesuffix(".weight")): tensor for key, tensor in loaded}
    if not any((folder / place).glob("*.safetensors")):
        raise LorakitError("{folder}: not a base model in diffusers layout (no {place}/*.safetensors)", folder, place)
    paths, _ = weight_files.weight_files(folder / place, registry.weight_stems()[place])
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        content = safetensors_header.load(safetensors_header.read(path))
        tensors |= {canonical(part, key.removesuffix(".weight")): tensor for key, tensor in content.items()}
    return tensors
