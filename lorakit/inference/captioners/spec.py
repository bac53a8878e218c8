"""What a kind of captioners is: recognised by its files, and loaded to a function from a picture to a text."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorakit.config import MemoryConfig
from lorakit.core import registry
from lorakit.core.errors import LorakitError

Captioner = Callable[[Image.Image], str]


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """What a captioner is asked for.

    Attributes:
        prompt: question or beginning, for models that take one; "" is the kind's own.
        max_tokens: tokens of a text at most.
        threshold, character_threshold: probability from which a tag, and the name of a character, is taken.
    """

    prompt: str = ""
    max_tokens: int = 128
    threshold: float = 0.35
    character_threshold: float = 0.85


@dataclass(frozen=True)
class CaptionerSpec:
    """One kind of captioners.

    Attributes:
        files: of the names of a model's files those that it needs; none where the model is of another kind.
        load: (folder, options, memory) -> a captioner; it imports what models need.
        is_tags: its text is tags with commas between them.
    """

    files: Callable[[Collection[str]], list[str]]
    load: Callable[[Path, CaptionOptions, MemoryConfig], Captioner]
    is_tags: bool = False


def kind_of(title: str, names: Collection[str]) -> tuple[CaptionerSpec, list[str]]:
    """The kind of a model by the names of its files, and the files that it needs.

    Raises:
        LorakitError: it is of no kind that lorakit knows.
    """
    for spec in registry.CAPTIONERS.values():
        if files := spec.files(names):
            return spec, files
    raise LorakitError(
        "captioner {model}: no captioner there; give a folder or hub id with config.json and .safetensors "
        "weights, or with a .onnx file and selected_tags.csv",
        title,
    )
