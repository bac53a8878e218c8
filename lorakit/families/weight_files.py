"""The files of a base: which hold a component's weights, what shapes are in them, and what tells bases apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorakit.core import foreign_json, safetensors_header
from lorakit.core.cache_dir import file_hash
from lorakit.core.errors import LorakitError

PRECISIONS = ("fp16", "bf16")


def shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape over all the files of one model."""
    result: dict[str, tuple[int, ...]] = {}
    for path in paths:
        result |= safetensors_header.read(path).shapes()
    return result


def weight_files(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    """Files that hold a component's weights, and the variant in their name (None, "fp16" or "bf16").

    Whole precision is preferred to half, one file to shards.

    Raises:
        LorakitError: there are none, only pickled ones, or a shard is missing.
    """
    for variant in (None, *PRECISIONS):
        infix = f".{variant}" if variant else ""
        single = folder / f"{stem}{infix}.safetensors"
        if single.is_file():
            return [single], variant
        index = folder / f"{stem}.safetensors.index{infix}.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise LorakitError(f"{folder.name}/{missing[0]} is missing: {index.name} speaks of it; get it again")
            return [folder / name for name in names], variant
    pickled = sorted(path.name for pattern in ("*.bin", "*.ckpt", "*.pt") for path in folder.glob(pattern))
    if pickled:
        raise LorakitError(
            f"{folder.name}/{pickled[0]} is a pickle, which can run code when it is read; convert it once: "
            f"lorakit convert {folder.parent}"
        )
    raise LorakitError(f"{folder.name}/{stem}.safetensors is missing in {folder.parent}: get the base again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LorakitError: missing, or not JSON.
    """
    try:
        value = foreign_json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LorakitError(f"{path.parent.name}/{path.name} is missing in {path.parent.parent}") from None
    except ValueError:
        raise LorakitError(f"{path} is not valid JSON: get the base again") from None
    if not isinstance(value, dict):
        raise LorakitError(f"{path} does not hold a JSON object: get the base again")
    return value


def identity(paths: Iterable[Path]) -> str:
    """SHA-256 of the content of each file, in their order: another for any change of a tensor or a setting."""
    return hashlib.sha256("/".join(file_hash(path) for path in paths).encode()).hexdigest()
