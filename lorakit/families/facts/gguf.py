"""Recognize the content of a GGUF file by its tensor names. Weights are not read. No torch.

Layout: ggml's docs/gguf.md. Names: those of ComfyUI-GGUF (the model's own names without a prefix), stable-diffusion.cpp
(with a prefix) and llama.cpp (text encoder blocks are `enc.blk.`).
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import BinaryIO

MAGIC = b"GGUF"
# Type of a value -> its `struct` format; 8 is a string and 9 an array.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MAX_COUNT, _MAX_LENGTH = 1 << 20, 1 << 24
# Tensor of a model that lorakit trains from other formats -> its title. The first match counts.
_TITLES = {
    r"(^|\.)joint_blocks\.\d": "Stable Diffusion 3",
    r"(^|\.)label_emb\.|(^|\.)add_embedding\.": "Stable Diffusion XL",
    r"(^|\.)(input_blocks|down_blocks)\.\d": "Stable Diffusion",
}


def names(path: Path) -> list[str]:
    """The tensor names; [] if the file is missing, damaged or not GGUF."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                return []
            _, tensors, pairs = _numbers(file, "IQQ")
            for _ in range(_bounded(pairs, _MAX_COUNT)):
                _text(file)
                _skip(file, _numbers(file, "I")[0])
            return [_tensor(file) for _ in range(_bounded(tensors, _MAX_COUNT))]
    except (OSError, ValueError, KeyError, struct.error):
        return []


def title(tensors: list[str]) -> str:
    """The title of a model that lorakit trains from other formats, or ""."""
    return next((what for pattern, what in _TITLES.items() if any(re.search(pattern, n) for n in tensors)), "")


def _numbers(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _bounded(number: int, limit: int) -> int:
    if number > limit:
        raise ValueError("damaged")
    return number


def _text(file: BinaryIO) -> str:
    return file.read(_bounded(_numbers(file, "Q")[0], _MAX_LENGTH)).decode("utf-8", "replace")


def _skip(file: BinaryIO, kind: int) -> None:
    """Skip a value."""
    if kind == _TEXT:
        _text(file)
    elif kind != _ARRAY:
        _numbers(file, _FORMATS[kind])
    else:
        inner, count = _numbers(file, "IQ")
        _bounded(count, _MAX_COUNT)
        if inner in _FORMATS:
            file.seek(count * struct.calcsize(_FORMATS[inner]), 1)
        else:
            for _ in range(count):
                _text(file)


def _tensor(file: BinaryIO) -> str:
    name = _text(file)
    dimensions = _bounded(_numbers(file, "I")[0], 8)
    _numbers(file, f"{dimensions}QIQ")
    return name
