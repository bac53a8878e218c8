"""The vectors of a trained word, in their own files and bundled with the adapter.

`<name>-embedding/<word>.safetensors` is what A1111, ComfyUI and diffusers call a textual-inversion embedding; its name
is the word. `<name>-bundled.safetensors` is the kohya file with `bundle_emb.<word>.*` in it: A1111 takes the word from
there while the adapter is on, ComfyUI where the file lies among its embeddings too. diffusers refuses such a file, so
the plain one stays beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.weights import AdapterWeights
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import is_file_name, printable, shorten
from lorakit.core.registry import FORMATS
from lorakit.formats import metadata

if TYPE_CHECKING:
    import torch

WordVectors = dict[str, dict[str, "torch.Tensor"]]
# Text encoder -> what its vectors are called, where there is one encoder and where there are two.
ONE, TWO = {"text_encoder": "emb_params"}, {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_BUNDLED = re.compile(r"bundle_emb\.(.+)\.(string_to_param\.\*|emb_params|clip_l|clip_g)")
_ENCODERS = {"string_to_param.*": "text_encoder", "emb_params": "text_encoder"}
_ENCODERS |= {name: part for part, name in TWO.items()}
_BUNDLED_ENDING = "-bundled.safetensors"


def folder(path: Path) -> Path:
    """Where the embedding of an adapter's file or PEFT folder lies, whichever of its formats `path` is."""
    endings = sorted((_BUNDLED_ENDING, *(spec.ending for spec in FORMATS.values())), key=len, reverse=True)
    ending = next((ending for ending in endings if path.name.endswith(ending)), "")
    return path.with_name(f"{path.name.removesuffix(ending)}-embedding")


def bundle(path: Path) -> Path:
    """The copy of an adapter's file that holds the vectors of its words too."""
    return path.with_name(path.name.removesuffix(".safetensors") + _BUNDLED_ENDING)


def tensors(vectors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an embedding file holds: `emb_params` `[n, width]`, or for SDXL `clip_l` and `clip_g`."""
    names = TWO if "text_encoder_2" in vectors else ONE
    return {names[part]: rows.float().contiguous() for part, rows in vectors.items()}


def bundled(vectors_of_words: WordVectors) -> dict[str, torch.Tensor]:
    """The same as it stands among an adapter's tensors."""
    return {
        f"bundle_emb.{word}.{'string_to_param.*' if name == 'emb_params' else name}": rows
        for word, vectors in vectors_of_words.items()
        for name, rows in tensors(vectors).items()
    }


def write(weights: AdapterWeights, place: Path, adapter_metadata: Mapping[str, str]) -> list[Path]:
    """Write every word's embedding file into the folder `place`, with what the adapter says of itself."""
    from lorakit.formats import files

    paths = []
    for word, vectors in weights.embeddings.items():
        header = metadata.complete(weights, adapter_metadata)
        architecture = header["modelspec.architecture"].replace("/lora", "/textual-inversion")
        header |= {"modelspec.architecture": architecture, "modelspec.title": word, "ss_output_name": word}
        embedding_header = {key: value for key, value in header.items() if not key.startswith("ss_network_")}
        files.write_safetensors(place / f"{word}.safetensors", tensors(vectors), embedding_header)
        paths.append(place / f"{word}.safetensors")
    return paths


def unbundle(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], WordVectors]:
    """An adapter's tensors taken apart: the adapter's own, and the words bundled with it.

    Raises:
        LorakitError: a word cannot be the name of a file, which it becomes.
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
    """Each word that belongs to the adapter at `path`, and the file beside it that has its embedding.

    Raises:
        LorakitError: the adapter says that it has a word, and its file is not there or cannot be named so.
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
    """The words that belong to the adapter at `path`, from the files beside it.

    Raises:
        LorakitError: as `word_files`, or one of the files is something else.
    """
    result = WordVectors()
    for word, file in word_files(path, adapter_metadata).items():
        parts = safetensors_header.load(safetensors_header.read(file))
        if not parts or not parts.keys() <= _ENCODERS.keys() or any(rows.ndim != 2 for rows in parts.values()):
            raise LorakitError("{file}: not the embedding that {path} needs", file, path.name)
        result[word] = {_ENCODERS[name]: rows.float() for name, rows in parts.items()}
    return result


def problems(vectors_of_words: WordVectors, trained: WordVectors) -> list[tuple[str, str]]:
    """(word, what is wrong) where the words of a file are not the trained ones."""
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
