"""Read the safetensors header of a model file, and recognize the kind of model.

Nothing from the file is executed, and importing this module does not import torch. Errors name damaged files and other
formats. Layout: 8 bytes little-endian length n, n bytes of JSON `{name: {dtype, shape, data_offsets}, "__metadata__":
{...}}`, then the tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import printable, shorten

if TYPE_CHECKING:
    import torch

_MAX_HEADER = 100_000_000  # the library's own limit
_EXCERPT_LENGTH = 80
_NAME_LENGTH = 1000  # longer than any program's tensor names, which are matched with patterns
_MAX_DIMENSIONS = 64  # of PyTorch and NumPy
_PICKLE = "a pickle (.ckpt/.pt): it can run code when opened; convert it once: lorakit convert FILE"
_ARCHIVE = "a zip archive: unpack it and give the file in it"
_PAGE = "a web page, not a model: the download failed"
_MAGIC = {
    **dict.fromkeys((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _PICKLE),
    **dict.fromkeys((b"<!", b"<html", b"<?xml"), _PAGE),
    b"SQLite format 3": "a database, as Draw Things keeps its models: give the file that was imported there",
    b"GGUF": "a GGUF file, not safetensors",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it with git lfs pull",
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff"), "a picture, not a model"),
}


# safetensors' dtype -> bits per value.
BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{
        "F8_E5M2FNUZ": 8,
        "F8_E4M3FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
    },
    **{"C64": 64, "F64": 64, "I64": 64, "U64": 64},
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
    """Read and check the header of a safetensors file, as strictly as the safetensors library does.

    Raises:
        LorakitError: the file does not exist, has another format (the message names it), or is damaged or incomplete.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            raw = file.read(length) if length <= min(_MAX_HEADER, size) else b""
    except FileNotFoundError:
        raise LorakitError("{file}: no such file", path) from None
    except OSError as error:
        raise LorakitError("{file}: cannot be read: {why}", path, error.strerror) from None
    if size == 0:
        raise LorakitError("{file}: the file is empty", path)
    # The length may look like the magic of any other format, so the brace after it is checked first.
    if start[8:9] != b"{" or length > _MAX_HEADER:
        for magic, kind in _MAGIC.items():
            if start.lstrip().lower().startswith(magic.lower()):
                raise LorakitError("{file}: this is {kind}", path, kind if _is_pickle(path, magic) else _ARCHIVE)
        raise LorakitError("{file}: not a safetensors file", path)
    if len(raw) < length:
        raise LorakitError("{file}: cut off inside its header ({size} bytes): download it again", path, size)
    try:
        tensors, metadata = _parse(raw)
        return Header(path, _placed(tensors, size, 8 + length), metadata, 8 + length)
    except ValueError as error:
        raise LorakitError("{file}: {problem}", path, error) from None


def _parse(raw: bytes) -> tuple[dict[str, object], dict[str, str]]:
    """The tensors' entries and the metadata of a header.

    Raises:
        ValueError: it is not JSON of that form.
    """
    try:
        table = json.loads(raw.decode(), object_pairs_hook=_without_twins, parse_int=_size, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("damaged: its safetensors header is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("damaged: its safetensors header is not UTF-8") from None
    except json.JSONDecodeError:
        raise ValueError("damaged: its safetensors header does not parse") from None
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise ValueError("damaged: the __metadata__ in its header is no table")
    for key, text in metadata.items():
        if not isinstance(text, str):
            raise ValueError(Message("damaged: {key} in the __metadata__ of its header is no text", _excerpt(key)))
    if longest := max(table, key=len, default="")[_NAME_LENGTH:]:
        raise ValueError(Message("damaged: its header has a name of {count} characters", len(longest) + _NAME_LENGTH))
    for text in (*table, *metadata, *metadata.values()):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(Message("damaged: {text} in its header is not Unicode", _excerpt(text)))
    return table, metadata


def _placed(table: dict[str, object], size: int, data_start: int) -> dict[str, TensorInfo]:
    """The tensors in the order of the header. Their bytes must fill the rest of the file, without overlaps or gaps.

    Raises:
        ValueError: they do not, or an entry is inconsistent.
    """
    result = {name: _tensor(name, entry, data_start) for name, entry in table.items()}
    end, before = data_start, ""
    for name, info in sorted(result.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            overlap, gap = "damaged: {name} overlaps {other}", "damaged: {name} leaves a gap after {other}"
            other = _excerpt(before) if before else "the header"
            raise ValueError(Message(overlap if info.start < end else gap, _excerpt(name), other))
        end, before = info.end, name
    if end > size:
        raise ValueError(
            Message(
                "cut off: {size} of {end} bytes are there ({value} %): download it again", size, end, 100 * size // end
            )
        )
    if end < size:
        raise ValueError(Message("damaged: {size} bytes follow its last tensor", size - end))
    return result


def _tensor(name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise ValueError(Message("damaged: {name} has no table in the header", _excerpt(name)))
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(
            Message("{name} has the dtype {dtype}, which safetensors does not have", _excerpt(name), _excerpt(dtype))
        )
    if not _are_sizes(shape):
        raise ValueError(Message("damaged: the shape of {name} is {shape}", _excerpt(name), _excerpt(shape)))
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(Message("damaged: {name} has {count} dimensions", _excerpt(name), len(shape)))
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(Message("damaged: the offsets of {name} are {offsets}", _excerpt(name), _excerpt(offsets)))
    size = offsets[1] - offsets[0]
    # Bounded, because the product of a million sides would have a million digits.
    count = functools.reduce(lambda product, side: min(product * side, 1 << 64), shape, 1)
    if count * BITS[dtype] != 8 * size:
        raise ValueError(
            Message(
                "damaged: {name} has {size} bytes, and not those of {shape} in {dtype}",
                _excerpt(name),
                size,
                _excerpt(shape),
                dtype,
            )
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _size(digits: str) -> int:
    """A number in the header: not negative, at most 64 bits."""
    if digits.startswith("-") or len(digits) > 20 or int(digits) >= 1 << 64:
        raise ValueError(Message("damaged: its header has the number {digits}", _excerpt(digits)))
    return int(digits)


def _is_pickle(path: Path, magic: bytes) -> bool:
    """Whether a file that starts like an archive of torch.save is one."""
    if magic != b"PK\x03\x04":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return True


def _refuse(word: str) -> float:
    raise ValueError(Message("damaged: its header has the number {word}", word))


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table: dict[str, object] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(Message("damaged: its header has {name} twice", _excerpt(name)))
        table[name] = value
    return table


def _excerpt(value: object) -> str:
    """A name or value from a file on one line, shortened if it is long."""
    return shorten(printable(value if isinstance(value, str) else repr(value)), _EXCERPT_LENGTH)


# The first kind with a pattern that matches the name of a tensor is the file's kind.
_KINDS = {
    "ip-adapter": r"^(ip_adapter|image_proj)\.",
    "lycoris": r"\.(oft_|w_norm$|on_input$|diff$)",
    "adapter": r"^lora_(unet|te\d?)_|\.(hada|lokr)_w|\.lora_[AB]\.|\.(lora|lora_linear_layer)\.(down|up)\."
    r"|_lora\.(down|up)\.",
    "numbered": r"^(unet|text_encoder):\d+:(up|down)$",
    "controlnet": r"^(control_model|controlnet_cond_embedding)\.|^lora_controlnet$",
    "checkpoint": r"^model\.diffusion_model\.",
    "vae": r"^first_stage_model\.|^(encoder|decoder)\.(conv_in|down|up|mid)",
    "unet": r"^(down_blocks|input_blocks|diffusion_model)\.",
    "text encoder": r"^(text_model|encoder\.layers|transformer\.resblocks|cond_stage_model)\.",
    "embedding": r"^(emb_params|clip_[lg]|<.*>)$|string_to_param",
}


def kind(shapes: dict[str, tuple[int, ...]]) -> str:
    """The kind of a file, from the names of its tensors.

    One of "adapter", "lycoris", "checkpoint", "unet", "vae", "text encoder", "embedding", "controlnet", "ip-adapter",
    "numbered" (an adapter of cloneofsimo's lora), "unknown".
    """
    strange = re.compile("|".join(_KINDS[word] for word in ("lycoris", "adapter", "controlnet")))
    others = sum(1 for name in shapes if strange.search(name))
    # A ControlNet with its full model has half as many layers of its own.
    if others and sum(1 for name in shapes if re.search(_KINDS["checkpoint"], name)) > 4 * others:
        return "checkpoint"  # a tool left a few layers of another kind in it
    for word, pattern in _KINDS.items():
        if has_name(shapes, pattern):
            return word
    # An embedding may only have the name of its token. Its width is that of CLIP.
    vectors = 0 < len(shapes) <= 4 and all(len(shape) <= 2 for shape in shapes.values())
    return "embedding" if vectors and {s[-1] for s in shapes.values() if s} <= {768, 1024, 1280} else "unknown"


def has_name(names: Collection[str], pattern: str) -> bool:
    """Whether the pattern is found in one of the names. It is compiled once: a file has thousands of names."""
    return any(map(re.compile(pattern).search, names))


def scalars(header: Header, suffix: str) -> dict[str, float]:
    """Name -> value of all one-element tensors whose name ends in `suffix` (used for `.alpha`)."""
    names = [name for name, info in header.tensors.items() if name.endswith(suffix) and info.shape in ((), (1,))]
    return {name: numbers[0] for name in names if (numbers := values(header, name))}


def values(header: Header, name: str) -> list[float]:
    """The values of one tensor in memory order; [] if its dtype is not one of F64, F32, F16, BF16, F8, I64 and I32."""
    formats = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i"}
    info = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(info.start)
        raw = file.read(info.end - info.start)
    dtype = info.dtype
    if dtype == "F8_E4M3":
        return [fp8_e4m3(byte) for byte in raw]
    if dtype == "F8_E5M2":  # the upper half of a float16
        dtype, raw = "F16", b"".join(b"\0" + raw[at : at + 1] for at in range(len(raw)))
    if dtype == "BF16":  # the upper half of a float32
        dtype, raw = "F32", b"".join(b"\0\0" + raw[at : at + 2] for at in range(0, len(raw), 2))
    return [float(value[0]) for value in struct.iter_unpack(f"<{formats[dtype]}", raw)] if dtype in formats else []


def fp8_e4m3(byte: int) -> float:
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


def load(header: Header) -> dict[str, torch.Tensor]:
    """Every tensor of a file, see `tensors`."""
    return dict(tensors(header, header.tensors))


def tensors(header: Header, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor on the CPU, in the order of the file.

    The tensors are read, not memory-mapped. So memory only holds tensors that the caller keeps, and replacing the file
    during the read does not crash the process.

    Raises:
        LorakitError: torch does not have the dtype of a tensor, or the file became shorter.
    """
    import torch

    with header.path.open("rb") as file:
        for name in sorted(names, key=lambda name: header.tensors[name].start):
            info = header.tensors[name]
            if info.dtype not in DTYPES:
                raise LorakitError(
                    "{header}: {name} is in {dtype}, which cannot be read here", header.path, name, info.dtype
                )
            # torch's memory has the alignment that its kernels need.
            raw = torch.empty(info.end - info.start, dtype=torch.uint8)
            file.seek(info.start)
            if file.readinto(raw.numpy().data) < len(raw):
                raise LorakitError("{header}: became shorter while it was read: start again", header.path)
            yield name, raw.view(getattr(torch, DTYPES[info.dtype])).reshape(info.shape)
