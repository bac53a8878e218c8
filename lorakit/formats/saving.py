"""Exporting an adapter: every format that was asked for, or an error and the files as they were.

All that can be refused is refused before the first byte is written, so a bad adapter never replaces a good file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lorakit.adapters.weights import AdapterWeights
from lorakit.core.errors import LorakitError
from lorakit.core.registry import EXPORTS, load
from lorakit.formats import adapter_math, embeddings, files, kohya, metadata as meta

# What a file or folder of each format is called; kohya's is the plain name, as it is the one people move about.
ENDINGS = {"kohya": ".safetensors", "diffusers": "-diffusers.safetensors", "peft": "-peft"}


def destination(folder: Path, name: str, fmt: str) -> Path:
    """Where `save` puts the adapter `name` in one format."""
    return folder / (name + ENDINGS[fmt])


def save(
    weights: AdapterWeights,
    folder: Path,
    name: str,
    formats: Iterable[str],
    dtype: str,
    metadata: Mapping[str, str],
    *,
    preview: bytes | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Path]:
    """Export `weights` as `<folder>/<name>` in each of `formats`; returns format -> the file or folder written.

    A kohya file gets `<name>.json` beside it, which A1111 and InvokeAI read trigger words from, and `<name>.png` where
    `preview` (PNG bytes) is given. A trained word gets its own files, see `embeddings`. Where `dtype` would turn
    numbers into 0 or infinity, float32 is written and said.

    Raises:
        LorakitError: a method that a format cannot carry, a layer that is not portable or not finite, too little space.
    """
    formats = list(dict.fromkeys(formats))
    metadata = {**weights.metadata, **metadata}
    if not name or Path(name).name != name:
        raise LorakitError(f"{name!r} cannot be a file name: leave out slashes")
    writers = {fmt: load(EXPORTS, fmt) for fmt in formats}
    for writer in writers.values():
        adapter_math.require_writable(weights, writer.check(adapter_math.method(weights), weights.family))
    loss = adapter_math.lossy(weights, dtype)
    if loss:
        say(f"export: {loss}; float32 is written instead")
        dtype = "fp32"
    written: dict[str, Path] = {}
    for fmt, writer in writers.items():
        path = destination(Path(folder), name, fmt)
        writer.write(weights, path, dtype=dtype, metadata=metadata)
        written[fmt] = path
    if weights.embeddings:
        embeddings.write(weights, embeddings.folder(Path(folder) / f"{name}.safetensors"), metadata)
    if "kohya" in written and weights.embeddings:
        tensors = kohya.tensors(weights, dtype) | embeddings.bundled(weights.embeddings)
        bundle = Path(folder) / f"{name}-bundled.safetensors"
        files.write_safetensors(bundle, tensors, meta.complete(weights, metadata))
    if "kohya" in written:
        text = json.dumps(meta.sidecar(meta.complete(weights, metadata)), indent=2, ensure_ascii=False)
        files.write_bytes(Path(folder) / f"{name}.json", text.encode())
        if preview is not None:
            files.write_bytes(Path(folder) / f"{name}.png", preview)
    return written
