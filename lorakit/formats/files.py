"""Write safetensors files so that a partly written file never replaces a complete one.

Free space is checked first. Then a temporary file is written in the same folder, flushed to the disk and renamed.
Metadata is sorted, so that equal adapters are equal files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save as serialise

from lorakit.core import atomic, safetensors_header
from lorakit.core.errors import LorakitError

_MARGIN = 1 << 20


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` (CPU, contiguous) with `metadata` and the two hashes that web UIs use, atomically.

    Raises:
        LorakitError: the disk is full, or the folder cannot be written.
    """
    write_bytes(path, to_bytes(tensors, metadata))


def to_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of the file: sorted metadata, with `sshs_model_hash` and `sshs_legacy_hash` added.

    sshs_model_hash is the SHA-256 of everything after the header; ModelSpec also stores it as modelspec.hash_sha256.
    sshs_legacy_hash is the first 8 hex digits of another SHA-256: of bytes 0x100000 to 0x110000 of the file with only
    its `ss_*` metadata (sd-scripts library/train_util.py, precalculate_safetensors_hashes).
    """
    first = serialise(dict(tensors), {name: text for name, text in metadata.items() if name.startswith("ss_")} or None)
    length = struct.unpack("<Q", first[:8])[0]
    table, data = json.loads(first[8 : 8 + length]), first[8 + length :]
    hashes = {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(first[0x100000:0x110000]).hexdigest()[:8],
    }
    if "modelspec.sai_model_spec" in metadata:
        hashes["modelspec.hash_sha256"] = f"0x{hashes['sshs_model_hash']}"
    table["__metadata__"] = dict(sorted({"format": "pt", **metadata, **hashes}.items()))
    table = {"__metadata__": table.pop("__metadata__"), **table}
    head = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + data


class Unwritable(LorakitError):
    """A file cannot be written: the disk is full, or the folder is read-only."""


def write_bytes(path: Path, raw: bytes) -> None:
    """Write `raw` to `path` atomically. The folder is created if needed.

    Raises:
        LorakitError: the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path.parent, len(raw))
        atomic.write(path, raw)
    except OSError as error:
        raise Unwritable(
            "{path}: cannot be written ({reason}); nothing there was changed", path, error.strerror or error
        ) from None


def stream(
    path: Path,
    entries: Sequence[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    tensors: Iterable[torch.Tensor],
) -> None:
    """Write a file of any size atomically, one tensor at a time.

    Args:
        entries: name, safetensors' dtype and shape of each tensor.
        tensors: the tensors in that order; each is requested when it is written.

    Raises:
        LorakitError: the folder cannot be written or is full.
    """
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * getattr(torch, safetensors_header.DTYPES[dtype]).itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    temporary = atomic.temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for (name, dtype, shape), tensor in zip(entries, tensors, strict=True):
                assert (safetensors_header.dtype_name(tensor), tuple(tensor.shape)) == (dtype, shape), name
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        atomic.replace(temporary, path)
    except OSError as error:
        raise Unwritable("{file}: cannot be written ({reason})", path, error.strerror or error) from None
    finally:
        temporary.unlink(missing_ok=True)


def require_space(folder: Path, size: int) -> None:
    """Raise LorakitError if `folder` has no space for `size` bytes and a small reserve."""
    free = shutil.disk_usage(folder).free
    if free < size + _MARGIN:
        raise Unwritable(
            "{folder}: {size:.1f} MiB to write, {free:.1f} MiB free: make room, or write elsewhere with --output",
            folder,
            size / 2**20,
            free / 2**20,
        )
