"""Export an adapter in every requested format, or raise and leave existing files unchanged.

All checks run before the first byte is written, so a bad adapter never replaces a good file.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lorakit.adapters.weights import AdapterWeights
from lorakit.core import foreign_json
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import quote
from lorakit.core.registry import FORMATS
from lorakit.formats import adapter_math, embeddings, files, keys, metadata as meta


def destination(folder: Path, name: str, fmt: str) -> Path:
    """The path at which `save` writes the adapter `name` in one format."""
    return folder / (name + FORMATS[fmt].ending)


def occupied(folder: Path, name: str, fmt: str) -> list[Path]:
    """The existing files among those that `save` may write for one format, including side files."""
    path = destination(folder, name, fmt)
    mine = [path]
    if FORMATS[fmt].write_side_files is not None:
        mine += [path.with_suffix(".json"), path.with_suffix(".png")]
    mine += [embeddings.bundle(path), embeddings.folder(folder / f"{name}.safetensors")]
    return [file for file in mine if file.exists() or file.is_symlink()]


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
    """Export `weights` as `<folder>/<name>` in each of `formats`. Return format -> path.

    Each format writes its side files, with `preview` (PNG bytes) if given. A trained word gets its own files, see
    `embeddings`; without layers its embedding is `<folder>/<name>.safetensors`, independent of `formats`. If `dtype`
    would turn values into 0 or infinity, float32 is written, and `say` gets a message.

    Raises:
        LorakitError: a format cannot hold the method, a layer is not canonical or not finite, or the disk is full.
    """
    formats = list(dict.fromkeys(formats))
    metadata = {**weights.metadata, **metadata}
    if not name or Path(name).name != name:
        raise LorakitError("{name!r} cannot be a file name: leave out slashes", name)
    if weights.embeddings and not weights.layers:
        word, path = next(iter(weights.embeddings)), Path(folder) / f"{name}.safetensors"
        return {"embedding": embeddings.write_word(weights, word, path, metadata)}
    specs = {fmt: FORMATS[fmt] for fmt in formats}
    for spec in specs.values():
        adapter_math.require_writable(weights, spec.check)
    partly = [name for name in (*weights.layers, *weights.biases) if not keys.is_read_everywhere(name)]
    if partly:
        see = Message("see lorakit inspect {path}", quote(destination(Path(folder), name, formats[0])))
        say(
            Message(
                "export: layers that not every program reads: {count}, such as {partly}; {see}",
                len(partly),
                partly[0],
                see,
            )
        )
    loss = adapter_math.lossy(weights, dtype)
    if loss:
        say(Message("export: {loss}; float32 is written instead", loss))
        dtype = "fp32"
    paths: dict[str, Path] = {}
    for fmt, spec in specs.items():
        path = paths[fmt] = destination(Path(folder), name, fmt)
        spec.write(weights, path, dtype=dtype, metadata=metadata)
        if spec.bundles_embeddings and weights.embeddings:
            tensors = spec.tensors(weights, dtype) | embeddings.bundled(weights.embeddings)
            files.write_safetensors(embeddings.bundle(path), tensors, meta.complete(weights, metadata))
        if spec.write_side_files is not None:
            try:
                spec.write_side_files(weights, path, dtype=dtype, metadata=metadata, preview=preview)
            except files.Unwritable as error:
                say(Message("export: {problem}; {path} itself is complete", error, path.name))
    if weights.embeddings:
        _write_words(weights, embeddings.folder(Path(folder) / f"{name}.safetensors"), metadata, say)
    return paths


def _write_words(weights: AdapterWeights, place: Path, metadata: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Write the words of an adapter with layers into the folder `place`, and say that they belong to it."""
    for file in embeddings.write(weights, place, metadata):
        template = "export: the vectors of {word!r} are in {folder}/{file}: load it together with the adapter"
        say(Message(template, file.stem, place.name, file.name))


def take_along(source: Path, path: Path, fmt: str) -> None:
    """Copy the side files of the adapter `source` to a derived file: the preview, and the user's values in the `.json`.

    An existing picture is kept.
    """
    if FORMATS[fmt].write_side_files is None or source.is_dir():
        return
    previews = [source.with_suffix(ending) for ending in meta.PREVIEWS]
    for preview in [file for file in previews if file.is_file()][:1]:
        target = path.with_suffix(preview.suffix)
        if not target.exists():
            files.write_bytes(target, preview.read_bytes())
    own = path.with_suffix(".json")
    with contextlib.suppress(OSError, ValueError):
        theirs = meta.read_sidecar(source)
        entries = {key: value for key, value in theirs.items() if value not in ("", None) and key != "sd version"}
        table = foreign_json.loads_table(own.read_text(encoding="utf-8")) | entries
        files.write_bytes(own, json.dumps(table, indent=2, ensure_ascii=False).encode())


def save_adapter(
    weights: AdapterWeights, path: str | Path, *, formats: Iterable[str] = ("kohya",), dtype: str = "fp16"
) -> dict[str, Path]:
    """Write an adapter, with its own metadata, at `path` in each format. Return format -> path.

    Args:
        path: the path, with or without `.safetensors`; each format adds its own suffix.
        formats: see `lorakit export --help`.
        dtype: "fp16", "bf16" or "fp32". If it would turn values into 0 or infinity, float32 is written with a warning.

    Raises:
        LorakitError: as `save`.
    """
    path = Path(path)
    name = path.name.removesuffix(".safetensors")
    return save(weights, path.parent, name, formats, dtype, weights.metadata, say=warnings.warn)
