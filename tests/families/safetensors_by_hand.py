"""A writer of safetensors files that uses neither the library nor lorakit's reader."""

import json
from pathlib import Path


def write(path: Path, shapes: dict[str, tuple[int, ...]], *, missing_bytes: int = 0) -> Path:
    """Write float32 zeros with these shapes; omit `missing_bytes` at the end of the file."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    content = len(head).to_bytes(8, "little") + head + bytes(at)
    path.write_bytes(content[: len(content) - missing_bytes])
    return path
