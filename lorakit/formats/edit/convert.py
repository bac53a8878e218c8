"""Convert pickled weights (.ckpt, .pt, .bin) to .safetensors next to them. No code from the file is run.

A separate process reads the pickle with `torch.load(weights_only=True)`, which only calls functions that create
tensors. Objects that training programs leave in checkpoints are replaced by empty ones; other names are refused.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core import registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.formats import files

if TYPE_CHECKING:
    import torch

# Suffix of a shard: its number, and the number of shards.
_SHARD = r"-(\d+)-of-(?P<count>\d+)"
# Packages whose objects training programs store next to the weights (callbacks, numbers, configurations).
_LEFT_BEHIND = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|numpy|_codecs|omegaconf|ldm|sgm|diffusers|transformers|argparse"
    r"|pathlib|typing|collections)\..+"
)


def convert(path: Path) -> dict[str, Path]:
    """Write the weights of a file, or of each part of a folder in diffusers layout, as .safetensors in the same folder.

    Returns:
        Pickle -> the file that was written.

    Raises:
        LorakitError: it is not a pickle of weights, contains other objects, or the .safetensors file exists.
    """
    if path.is_dir():
        pairs = {file: target for part in registry.weight_stems() for file, target in _pickles(path / part)}
        if not pairs and not any(_indexes(path)):
            raise LorakitError("{path}: no part of it has weights in .bin alone: there is nothing to convert", path)
    elif path.suffix.lower() == ".safetensors":
        raise LorakitError("{path}: is named .safetensors already; if it is a pickle, rename it to .ckpt first", path)
    else:
        pairs = {path: path.with_suffix(".safetensors")}
    for source, target in pairs.items():
        if not source.is_file():
            raise LorakitError("{file}: no such file", source)
        if target.exists():
            raise LorakitError("{target} exists already: move it away, or use it", target)
        files.require_space(source.absolute().parent, source.stat().st_size)
    if pairs:
        _in_a_process([str(path) for pair in pairs.items() for path in pair])
    results = {str(source): target for source, target in pairs.items()}
    for index, shards in _indexes(path):
        headers = {shard.name: safetensors_header.read(shard).tensors for shard in shards}
        size = sum(info.end - info.start for tensors in headers.values() for info in tensors.values())
        names = {name: file for file, tensors in headers.items() for name in tensors}
        content = json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2)
        files.write_bytes(index, content.encode())
        results[str(index)] = index
    return results


def _pickles(folder: Path) -> Iterable[tuple[Path, Path]]:
    """The pickled weights of a part without other weights, and their new names.

    Raises:
        LorakitError: a shard is missing.
    """
    stem = registry.weight_stems()[folder.name]
    names = {path.name for path in folder.glob("*.bin")}
    for name in sorted(names):
        match = re.fullmatch(rf"((?:{stem}|pytorch_model)(\.\w+)?)({_SHARD})?(\.\w+)?\.bin", name)
        if match is None:
            continue
        for number in range(1, int(match["count"] or 0) + 1):
            shard = f"{match[1]}-{number:05}-of-{match['count']}{match[6] or ''}.bin"
            if shard not in names:
                raise LorakitError("{folder} is missing: get the base again", folder / shard)
        target = folder / f"{stem}{match[2] or ''}{match[3] or ''}{match[6] or ''}.safetensors"
        if not target.exists():
            yield folder / name, target


def _indexes(path: Path) -> Iterable[tuple[Path, list[Path]]]:
    """The missing indexes of sharded weights in a base in diffusers layout, and the shards, all of which exist."""
    for part, stem in registry.weight_stems().items() if path.is_dir() else ():
        groups: dict[str, list[Path]] = {}
        for shard in sorted((path / part).glob("*.safetensors")):
            if match := re.fullmatch(rf"{stem}(\.\w+)?{_SHARD}(\.\w+)?\.safetensors", shard.name):
                groups.setdefault(f"{match[1] or match[4] or ''} {match['count']}", []).append(shard)
        for group, shards in groups.items():
            variant, _, count = group.partition(" ")
            index = path / part / f"{stem}.safetensors.index{variant}.json"
            if len(shards) == int(count) and not index.exists():
                yield index, shards


def _in_a_process(paths: list[str]) -> None:
    """Convert in a separate process. `paths`: a source, its target, the next source and so on."""
    # -P: modules in the current folder are not imported.
    command = [sys.executable, "-P", "-m", __name__, *paths]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if child.returncode:
        lines = child.stdout.strip().splitlines()
        reason = (
            lines[-1]
            if lines
            else Message(
                "{paths}: cannot be converted (its process ended with {returncode})", paths[0], child.returncode
            )
        )
        raise LorakitError(reason)


class _Nothing:
    """Placeholder for an object of a training program."""

    def __new__(cls, *_: object) -> _Nothing:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        return None


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a pickle: name -> tensor.

    Raises:
        LorakitError: it is not a pickle of weights, or contains other objects.
    """
    import pickle
    import warnings

    import torch
    from torch.serialization import safe_globals

    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    names: list[str] = []
    warnings.simplefilter("ignore")  # about files that are refused
    while True:
        try:
            with safe_globals([(_Nothing, name) for name in names]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
            break
        except (
            pickle.UnpicklingError,
            EOFError,
            LookupError,
            ValueError,
            TypeError,
            RuntimeError,
            AttributeError,
        ) as error:
            name = match[1] if (match := re.search(r"GLOBAL (\S+)", str(error))) else ""
            if not name:
                raise LorakitError("{path}: is no pickle of weights", path) from None
            if name in names or not _LEFT_BEHIND.fullmatch(name):
                raise LorakitError(
                    "{path}: names {name}, which could run code: do not open this file", path, name
                ) from None
            names.append(name)
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): value for name, value in entries if isinstance(value, torch.Tensor)}
    if not tensors:
        raise LorakitError("{path}: holds no weights under names", path)
    return tensors


def _write(source: Path, target: Path) -> None:
    tensors = _weights(source)
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in safetensors_header.DTYPES.values() or str(tensor.layout) != "torch.strided":
            raise LorakitError(
                "{source}: {name} is a tensor of a kind that .safetensors does not have ({dtype})", source, name, dtype
            )
    entries = [(name, safetensors_header.dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]
    files.stream(target, entries, {"format": "pt"}, (tensor.detach().contiguous() for tensor in tensors.values()))


def _main(paths: list[str]) -> int:
    try:
        for source, target in zip(paths[::2], paths[1::2], strict=True):
            _write(Path(source), Path(target))
    except LorakitError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
