"""The files of a base: those with a component's weights, the shapes in them, and a hash that identifies the base."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.core import foreign_json, registry, safetensors_header
from lorakit.core.cache_dir import file_hash
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.core.names import is_file_name, printable, shorten

if TYPE_CHECKING:
    import torch

    from lorakit.families.vae_source import Source

PRECISIONS = ("fp16", "bf16")


def shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, over all files of one component."""
    result: dict[str, tuple[int, ...]] = {}
    for path in paths:
        result |= safetensors_header.read(path).shapes()
    return result


def weight_files(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    """The files with a component's weights, and the variant in their name (None, "fp16" or "bf16").

    Full precision is preferred to half, one file to shards.

    Raises:
        LorakitError: there are none, only pickles, or a shard is missing.
    """
    for variant in (None, *PRECISIONS):
        infix = f".{variant}" if variant else ""
        single = folder / f"{stem}{infix}.safetensors"
        if single.is_file():
            return [single], variant
        index = folder / f"{stem}.safetensors.index{infix}.json"
        if index.is_file():
            names = shards(index)
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                file = f"{folder.name}/{missing[0]}"
                raise LorakitError("{file} is missing, although {index} lists it: get the base again", file, index.name)
            return [folder / name for name in names], variant
    pickled = sorted(path.name for pattern in ("*.bin", "*.ckpt", "*.pt") for path in folder.glob(pattern))
    if pickled:
        raise LorakitError(
            "{file} is a pickle, which can run code when it is read; convert it once: {how}",
            *(f"{folder.name}/{pickled[0]}", f"lorakit convert {folder.parent}"),
        )
    file = f"{folder.name}/{stem}.safetensors"
    raise LorakitError("{file} is missing in {folder}: get the base again", file, folder.parent)


def count_weights(source: Source) -> int:
    """Number of values in the weights and biases of one component."""
    return sum(math.prod(shape) for name, shape in of_source(source).items() if name.endswith((".weight", ".bias")))


def of_source(source: Source) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of one component."""
    if source.slots is not None:
        return {name: slot.shape for name, slot in source.slots.items()}
    return shapes(weight_files(source.path, registry.weight_stems()[source.path.name])[0])


def shards(index: Path) -> list[str]:
    """The file names in an index of weights; the files are in the same folder.

    Raises:
        LorakitError: the index cannot be read, or an entry is not a file name.
    """
    table = read_json(index).get("weight_map")
    names: list[Any] = list(table.values()) if isinstance(table, dict) else [None]
    if strange := [name for name in names if not isinstance(name, str) or not is_file_name(name)]:
        label = shorten(printable(str(strange[0])), 60)
        raise LorakitError(
            "{index}: lists {label!r}, which is no name of a file beside it: get the base again", index, label
        )
    return sorted(set(names))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        LorakitError: missing, or not JSON.
    """
    try:
        value = foreign_json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        file = f"{path.parent.name}/{path.name}"
        raise LorakitError("{file} is missing in {folder}", file, path.parent.parent) from None
    except ValueError:
        raise LorakitError("{file} is not valid JSON: get the base again", path) from None
    if not isinstance(value, dict):
        raise LorakitError("{file} does not hold a JSON object: get the base again", path)
    return value


def identity(paths: Iterable[Path]) -> str:
    """SHA-256 over the content of the files, in order. It changes with any tensor or setting."""
    return hashlib.sha256("/".join(file_hash(path) for path in paths).encode()).hexdigest()


# CLIP's and T5's embedding tables of tokens and positions.
_TABLES = re.compile(r"embeddings\.|^shared\.|embed_tokens\.|relative_attention_bias\.")


def layers(component: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Linear and convolutional layers: weights with two or four axes that are not embedding tables."""
    return {
        canonical(component, name.removesuffix(".weight")): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4) and not _TABLES.search(name)
    }


def of_last(layers: Iterable[str], stack: str, count: int = 1) -> list[str]:
    """The layers of the last `count` blocks of a stack, such as `unet.transformer_blocks`."""
    numbered = {name: int(match[1]) for name in layers if (match := re.match(rf"{stack}\.(\d+)\.", name))}
    last = max(numbered.values(), default=-1)
    return [name for name, number in numbered.items() if number > last - count]


# -- weights in 8 bits with a scale beside them: weight = stored * scale ----------------------------------------
# Names: ComfyUI's comfy/ops.py and comfy/utils.py (`scaled_fp8`, `scale_weight`; since 2025 `comfy_quant`,
# `weight_scale`).

SCALE_NAMES = ("scale_weight", "weight_scale")
# Other entries of such weights that are not needed: markers, and scales of activations.
MARKS = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$")
SCALE = re.compile(rf"(^|\.)({'|'.join(SCALE_NAMES)})$")
# safetensors' names of 8-bit dtypes, and of all dtypes that a weight may have.
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
READABLE = ("F64", "F32", "F16", "BF16", *EIGHT_BITS)


def scale_of(weight: str, names: Container[str]) -> str | None:
    """The name of the scale of a weight, if it has one."""
    stem = weight.removesuffix(".weight")
    return next((name for kind in SCALE_NAMES if (name := f"{stem}.{kind}") in names), None)


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight in float32. The scale is for the whole tensor, for each row, or for blocks of each row."""
    weight, scale = weight.float(), scale.float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    rows = len(weight)
    return (weight.reshape(rows, scale.numel() // rows, -1) * scale.reshape(rows, -1, 1)).reshape(weight.shape)
