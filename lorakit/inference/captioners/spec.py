"""A kind of captioners: recognized by its files, and loaded as a function from a picture to a text."""

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
    """The options of a captioner.

    Attributes:
        prompt: question or start of the text, for models that support it; "" selects the model's own.
        max_tokens: maximum number of tokens of a text.
        threshold, character_threshold: minimum probability of a tag, and of a character's name.
    """

    prompt: str = ""
    max_tokens: int = 128
    threshold: float = 0.35
    character_threshold: float = 0.85


@dataclass(frozen=True)
class CaptionerSpec:
    """One kind of captioners.

    Attributes:
        files: names of a model's files -> those that it needs; empty if the model is of another kind.
        load: (folder, options, memory) -> captioner; it imports the packages that models need.
        is_tags: whether its texts are tags separated by commas.
    """

    files: Callable[[Collection[str]], list[str]]
    load: Callable[[Path, CaptionOptions, MemoryConfig], Captioner]
    is_tags: bool = False


def kind_of(title: str, names: Collection[str]) -> tuple[CaptionerSpec, list[str]]:
    """The kind of a model, from the names of its files, and the files that it needs.

    Raises:
        LorakitError: the kind is unknown.
    """
    for spec in registry.CAPTIONERS.values():
        if files := spec.files(names):
            return spec, files
    raise LorakitError(
        "captioner {model}: no captioner there; give a folder or hub id with config.json and .safetensors "
        "weights, or with a .onnx file and selected_tags.csv",
        title,
    )
