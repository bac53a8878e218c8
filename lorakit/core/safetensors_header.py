"""Read the safetensors header of a model file, and recognise the kind of model.

Imports no torch at module level and executes nothing from the file. Errors name damaged files and other formats.

Layout: 8 bytes little-endian length n, n bytes of JSON `{name: {dtype, shape, data_offsets}, "__metadata__": {...}}`,
then the tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core.errors import LorakitError

if TYPE_CHECKING:
    import torch

_MAX_HEADER = 100_000_000  # the library's own limit
_MAGIC = {
    b"PK\x03\x04": "a pickle (.ckpt/.pt): it can run code when opened; convert it to .safetensors first",
    b"\x80\x02": "a pickle (.ckpt/.pt): it can run code when opened; convert it to .safetensors first",
    b"GGUF": "a GGUF file, not safetensors",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it with git lfs pull",
    b"<!": "a web page, not a model: the download failed",
    b"<html": "a web page, not a model: the download failed",
    b"\x89PNG": "a picture, not a model",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: safetensors' dtype name ("F16"), shape, and the offsets of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file: its tensors and metadata."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: info.shape for name, info in self.tensors.items()}


def read(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        LorakitError: no such file, a file of another format (named), or a damaged or incomplete file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            file.seek(8)
            raw = file.read(length) if 2 <= length <= min(_MAX_HEADER, size) else b""
    except FileNotFoundError:
        raise LorakitError(f"{path}: no such file") from None
    except OSError as error:
        raise LorakitError(f"{path}: cannot be read: {error.strerror}") from None
    if size == 0:
        raise LorakitError(f"{path}: the file is empty")
    for magic, kind in _MAGIC.items():
        if start.lower().startswith(magic.lower()):
            raise LorakitError(f"{path}: this is {kind}")
    if not raw.startswith(b"{") and start[8:9] != b"{":
        raise LorakitError(f"{path}: not a safetensors file")
    if len(raw) < length or 8 + length > size:
        raise LorakitError(f"{path}: cut off inside its header ({size} bytes): download it again")
    return _parse(path, raw, size, 8 + length)


def _parse(path: Path, raw: bytes, size: int, data_start: int) -> Header:
    """Parse the JSON of the header. Every offset must be inside the file."""
    try:
        table = json.loads(raw)
        metadata = table.pop("__metadata__", {})
        tensors = {
            name: TensorInfo(
                entry["dtype"],
                tuple(entry["shape"]),
                data_start + entry["data_offsets"][0],
                data_start + entry["data_offsets"][1],
            )
            for name, entry in table.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise LorakitError(f"{path}: damaged: its safetensors header does not parse") from None
    end = max((info.end for info in tensors.values()), default=data_start)
    if end > size:
        share = 100 * size // end
        raise LorakitError(f"{path}: cut off: {size} of {end} bytes are there ({share} %): download it again")
    if end < size:
        raise LorakitError(f"{path}: damaged: {size - end} bytes follow its last tensor")
    return Header(path, tensors, metadata, data_start)


# A file is of the first kind whose pattern matches the name of one of its tensors.
_KINDS = {
    "lycoris": r"\.(oft_|w_norm$|on_input$|diff$)",
    "adapter": r"^lora_(unet|te\d?)_|\.(hada|lokr)_w|\.lora_[AB]\.|\.(lora|lora_linear_layer)\.(down|up)\."
    r"|_lora\.(down|up)\.",
    "controlnet": r"^(control_model|controlnet_cond_embedding)\.",
    "checkpoint": r"^model\.diffusion_model\.",
    "vae": r"^first_stage_model\.|^(encoder|decoder)\.(conv_in|down|up|mid)",
    "unet": r"^(down_blocks|input_blocks|diffusion_model)\.",
    "text encoder": r"^(text_model|encoder\.layers|transformer\.resblocks|cond_stage_model)\.",
    "embedding": r"^(emb_params|clip_[lg]|<.*>)$|string_to_param",
}


def kind(shapes: dict[str, tuple[int, ...]]) -> str:
    """The kind of a file, from the names of its tensors.

    One of "adapter", "lycoris", "checkpoint", "unet", "vae", "text encoder", "embedding", "controlnet", "unknown".
    """
    adapted = sum(1 for name in shapes if re.search(f"{_KINDS['lycoris']}|{_KINDS['adapter']}", name))
    if adapted and sum(1 for name in shapes if re.search(_KINDS["checkpoint"], name)) > 2 * adapted:
        return "checkpoint"  # with a few layers of an adapter left in it by a tool
    for word, pattern in _KINDS.items():
        if any(re.search(pattern, name) for name in shapes):
            return word
    # An embedding may have only the name of its token. Its width is that of CLIP.
    vectors = 0 < len(shapes) <= 4 and all(len(shape) <= 2 for shape in shapes.values())
    return "embedding" if vectors and {s[-1] for s in shapes.values() if s} <= {768, 1024, 1280} else "unknown"


def scalars(header: Header, suffix: str) -> dict[str, float]:
    """Name -> value of all one-element tensors whose name ends in `suffix` (used for `.alpha`)."""
    names = [name for name, info in header.tensors.items() if name.endswith(suffix) and info.shape in ((), (1,))]
    return {name: numbers[0] for name in names if (numbers := values(header, name))}


def values(header: Header, name: str) -> list[float]:
    """The numbers of one tensor in memory order; [] if its dtype is none of F64, F32, F16, BF16, F8, I64 and I32."""
    formats = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i"}
    info = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(info.start)
        raw = file.read(info.end - info.start)
    dtype = info.dtype
    if dtype == "F8_E4M3":
        return [_fp8_e4m3(byte) for byte in raw]
    if dtype == "F8_E5M2":  # the upper half of a float16
        dtype, raw = "F16", b"".join(b"\0" + raw[at : at + 1] for at in range(len(raw)))
    if dtype == "BF16":  # the upper half of a float32
        dtype, raw = "F32", b"".join(b"\0\0" + raw[at : at + 2] for at in range(0, len(raw), 2))
    return [float(value[0]) for value in struct.iter_unpack(f"<{formats[dtype]}", raw)] if dtype in formats else []


def _fp8_e4m3(byte: int) -> float:
    """One sign, four bits of exponent, three of mantissa; no infinity (Micikevicius et al. 2022, arXiv 2209.05433)."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9))


# safetensors' name of a dtype -> torch's.
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"},
    **{"U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
}


def dtype_name(tensor: torch.Tensor) -> str:
    """safetensors' name of a tensor's dtype."""
    return next(name for name, torch_name in DTYPES.items() if torch_name == str(tensor.dtype).removeprefix("torch."))


def tensors(header: Header, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor on the CPU, in the order of the file.

    The tensors are read, not mapped. So memory holds only the tensors that the caller keeps, and replacing the file
    meanwhile does not crash the process.

    Raises:
        LorakitError: torch does not have the dtype of a tensor, or the file became shorter.
    """
    import torch

    with header.path.open("rb") as file:
        for name in sorted(names, key=lambda name: header.tensors[name].start):
            info = header.tensors[name]
            if info.dtype not in DTYPES:
                raise LorakitError(f"{header.path}: {name} is in {info.dtype}, which cannot be read here")
            # Memory of torch has the alignment that its kernels need.
            raw = torch.empty(info.end - info.start, dtype=torch.uint8)
            file.seek(info.start)
            if file.readinto(raw.numpy().data) < len(raw):
                raise LorakitError(f"{header.path}: became shorter while it was read: start again")
            yield name, raw.view(getattr(torch, DTYPES[info.dtype])).reshape(info.shape)
