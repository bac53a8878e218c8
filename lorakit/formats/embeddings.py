"""The vectors of a trained word, in their own file and bundled with the adapter.

`<name>-embedding/<word>.safetensors` is a textual-inversion embedding for A1111, ComfyUI and diffusers; its file name
is the word. `<name>-bundled.safetensors` is the kohya file plus `bundle_emb.<word>.*`: A1111 uses the word from there
while the adapter is active, ComfyUI if the file is also in its folder of embeddings. diffusers refuses such a file, so
the plain one is written, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.weights import AdapterWeights
from lorakit.core import registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import is_file_name, printable, shorten
from lorakit.core.registry import FORMATS
from lorakit.formats import metadata

if TYPE_CHECKING:
    import torch

WordVectors = dict[str, dict[str, "torch.Tensor"]]
ONE_ENCODER = "text_encoder"
# Text encoder -> name of its vectors, in a file for one encoder and in a file for two.
ONE, TWO = {ONE_ENCODER: "emb_params"}, {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_BUNDLED = re.compile(r"bundle_emb\.(.+)\.(string_to_param\.\*|emb_params|clip_l|clip_g)")
_ENCODERS = {"string_to_param.*": "text_encoder", "emb_params": "text_encoder"}
_ENCODERS |= {name: part for part, name in TWO.items()}
_BUNDLED_ENDING = "-bundled.safetensors"


def folder(path: Path) -> Path:
    """The folder of the embeddings of an adapter's file or PEFT folder, for any of its formats."""
    endings = sorted((_BUNDLED_ENDING, *(spec.ending for spec in FORMATS.values())), key=len, reverse=True)
    ending = next((ending for ending in endings if path.name.endswith(ending)), "")
    return path.with_name(f"{path.name.removesuffix(ending)}-embedding")


def bundle(path: Path) -> Path:
    """The copy of an adapter's file that also contains the vectors of its words."""
    return path.with_name(path.name.removesuffix(".safetensors") + _BUNDLED_ENDING)


def tensors(vectors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an embedding file: `emb_params` `[n, width]`, or for SDXL `clip_l` and `clip_g`."""
    return {tensor_name(vectors, part): rows.float().contiguous() for part, rows in vectors.items()}


def tensor_name(vectors: Mapping[str, torch.Tensor], encoder: str) -> str:
    """The name of a text encoder's vectors in the file."""
    return (TWO if "text_encoder_2" in vectors else ONE)[encoder]


def bundled(vectors_of_words: WordVectors) -> dict[str, torch.Tensor]:
    """The same tensors under their names in a bundled file."""
    return {
        f"bundle_emb.{word}.{'string_to_param.*' if name == 'emb_params' else name}": rows
        for word, vectors in vectors_of_words.items()
        for name, rows in tensors(vectors).items()
    }


def write(weights: AdapterWeights, place: Path, adapter_metadata: Mapping[str, str]) -> list[Path]:
    """Write the embedding file of every word into the folder `place`, with the adapter's metadata."""
    return [write_word(weights, word, place / f"{word}.safetensors", adapter_metadata) for word in weights.embeddings]


def write_word(weights: AdapterWeights, word: str, path: Path, adapter_metadata: Mapping[str, str]) -> Path:
    """Write one word's embedding file.

    Raises:
        LorakitError: a value is not finite.
    """
    import torch

    from lorakit.formats import files

    vectors = weights.embeddings[word]
    if not all(bool(torch.isfinite(rows).all()) for rows in vectors.values()):
        raise LorakitError("the vectors of {word!r} are not finite (NaN or infinity): nothing is written", word)
    header = metadata.complete(weights, adapter_metadata)
    architecture = header["modelspec.architecture"].replace("/lora", "/textual-inversion")
    header |= {"modelspec.architecture": architecture, "modelspec.title": word, "ss_output_name": word}
    embedding_header = {key: value for key, value in header.items() if not key.startswith("ss_network_")}
    files.write_safetensors(path, tensors(vectors), embedding_header)
    return path


def read_alone(head: safetensors_header.Header) -> AdapterWeights:
    """Read an embedding without an adapter, as an adapter without layers.

    Its word is in its metadata, or is the name of its only tensor as diffusers writes it, or the file name.

    Raises:
        LorakitError: its tensors are not vectors of CLIP text encoders.
    """
    parts = safetensors_header.load(head)
    own, one = parts.keys() <= _ENCODERS.keys(), len(parts) == 1
    if not (own or one) or any(rows.ndim not in (1, 2) for rows in parts.values()):
        raise LorakitError("{path}: an embedding of a kind that lorakit does not read", head.path)
    vectors = {
        _ENCODERS.get(name, ONE_ENCODER): rows.float().reshape(-1, rows.shape[-1]) for name, rows in parts.items()
    }
    return AdapterWeights(family(head), "embedding", {}, dict(head.metadata), {word_of(head): vectors})


def word_of(head: safetensors_header.Header) -> str:
    """The word of an embedding without an adapter."""
    name = next(iter(head.tensors))
    return head.metadata.get(metadata.WORDS, "") or (head.path.stem if name in _ENCODERS else name)


def family(head: safetensors_header.Header) -> str:
    """The family of an embedding, from its metadata or its width.

    Raises:
        LorakitError: no family has text encoders of this width.
    """
    shapes = head.shapes()
    if tagged := metadata.family(head.metadata):
        return tagged
    if set(TWO.values()) & shapes.keys():
        return "sdxl"
    width = next(iter(shapes.values()))[-1]
    by_width = {version.cross_dim: name for name, (_, version) in registry.versions().items()}
    if width not in by_width:
        raise LorakitError("{path}: vectors of width {width}, which no base known here has", head.path, width)
    return by_width[width]


def unbundle(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], WordVectors]:
    """Split a file's tensors into those of the adapter and those of bundled words.

    Raises:
        LorakitError: a word is not a valid file name, which it becomes.
    """
    own, vectors_of_words = {}, WordVectors()
    for name, tensor in tensors.items():
        match = _BUNDLED.fullmatch(name)
        if match and not is_file_name(match[1]):
            raise LorakitError(
                "carries the word {match!r}, which no file can have as its name", shorten(printable(match[1]), 60)
            )
        if match:
            vectors_of_words.setdefault(match[1], {})[_ENCODERS[match[2]]] = tensor.float()
        else:
            own[name] = tensor
    return own, vectors_of_words


def word_files(path: Path, adapter_metadata: Mapping[str, str]) -> dict[str, Path]:
    """Each word of the adapter at `path` -> the file of its embedding.

    Raises:
        LorakitError: the metadata names a word whose file is missing or whose name is invalid.
    """
    result = {}
    for word in filter(None, adapter_metadata.get(metadata.WORDS, "").split()):
        if not re.fullmatch(r"[\w-]+", word) or not is_file_name(word):  # it becomes a path
            label = shorten(printable(word), 60)
            raise LorakitError("{path}: its metadata names the word {label!r}, which is no word", path, label)
        file = result[word] = folder(path) / f"{word}.safetensors"
        if not file.is_file():
            raise LorakitError(
                "{path}: its embedding {parent}/{file} is not beside it: put it back", path, file.parent.name, file.name
            )
    return result


def read(path: Path, adapter_metadata: Mapping[str, str]) -> WordVectors:
    """Read the words of the adapter at `path` from their files.

    Raises:
        LorakitError: as `word_files`, or a file has other content.
    """
    result = WordVectors()
    for word, file in word_files(path, adapter_metadata).items():
        parts = safetensors_header.load(safetensors_header.read(file))
        if not parts or not parts.keys() <= _ENCODERS.keys() or any(rows.ndim != 2 for rows in parts.values()):
            raise LorakitError("{file}: not the embedding that {path} needs", file, path.name)
        result[word] = {_ENCODERS[name]: rows.float() for name, rows in parts.items()}
    return result


def problems(vectors_of_words: WordVectors, trained: WordVectors) -> list[tuple[str, str]]:
    """(word, problem) for words in a file that differ from the trained ones."""
    import torch

    wrong = [(word, "embedding that was not trained") for word in vectors_of_words if word not in trained]
    for word, vectors in trained.items():
        there = vectors_of_words.get(word, {})
        if there.keys() != vectors.keys():
            wrong.append((word, "embedding missing" if not there else "embedding of a text encoder missing"))
            continue
        for part, rows in vectors.items():
            if there[part].shape != rows.shape or not bool(torch.isfinite(there[part]).all()):
                wrong.append((word, Message("embedding for {part} is broken", part)))
            elif not torch.allclose(there[part], rows.float(), rtol=1e-5, atol=1e-7):
                wrong.append((word, Message("embedding for {part} differs from the trained one", part)))
    return wrong
