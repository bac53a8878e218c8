"""`FormatSpec`: which adapters a format can hold, and how it is written and recognized. Each format is one file, named
by one entry of `registry.FORMATS`. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.registry import FORMATS

if TYPE_CHECKING:
    from lorakit.adapters.weights import AdapterWeights


class Write(Protocol):
    """Writes the adapter to a file or folder. Returns the files written."""

    def __call__(
        self, weights: AdapterWeights, path: Path, *, dtype: str, metadata: Mapping[str, str]
    ) -> list[Path]: ...


class WriteSideFiles(Protocol):
    """Writes the files that programs expect next to the adapter at `path`; `preview` is a PNG or None."""

    def __call__(
        self, weights: AdapterWeights, path: Path, *, dtype: str, metadata: Mapping[str, str], preview: bytes | None
    ) -> None: ...


@dataclass(frozen=True)
class Spelling:
    """The tensor names of a format.

    Attributes:
        pattern: matches a full tensor name and has two groups: the module, and its part.
        parts: part in the file -> part of a layer ("down", "up", "alpha", "magnitude", "hada_w1_a", ...).
        canonical: module -> canonical name of the layer, or None if no such layer exists.
    """

    pattern: re.Pattern[str]
    parts: Mapping[str, str]
    canonical: Callable[[str], str | None]


@dataclass(frozen=True)
class FormatSpec:
    """One format.

    Attributes:
        ending: suffix of the file or folder after the adapter's name.
        check: (kind of layers, family) -> why the format cannot hold the adapter, or None.
        tensors: (weights, dtype) -> {tensor name: tensor}; for a folder {component: {tensor name: tensor}}.
        write: writes the adapter.
        recognizes: tensor names -> whether a file with them has this format; unused for a folder.
        is_folder: whether it is a folder with a file for each component.
        consumers: keys of `compatibility.CONSUMERS` that read the format.
        spelling: its tensor names; None if `identify` knows them.
        bundles_embeddings: whether a copy, `<name>-bundled<ending>`, also gets the vectors of a trained word.
        write_side_files: writes the side files, or None.
    """

    ending: str
    check: Callable[[str, str], str | None]
    tensors: Callable[[AdapterWeights, str], dict[str, Any]]
    write: Write
    recognizes: Callable[[Iterable[str]], bool]
    is_folder: bool = False
    consumers: tuple[str, ...] = ()
    spelling: Spelling | None = None
    bundles_embeddings: bool = False
    write_side_files: WriteSideFiles | None = None


# Changes in other programs' files that only kohya's format can hold.
_KOHYA_ONLY = {
    "bias": "changes of biases",
    "full difference": "full differences",
    "norm": "changes of norms",
    **{method: method for method in ("GLoRA", "IA3", "OFT", "DoRA over loha", "DoRA over lokr")},
}
# Methods that only PEFT's format can hold, and that lorakit does not write.
MERGE_ONLY = ("IA3 with biases", "OFTv2", "PEFT's older OFT", "PEFT's BOFT")


def merge_only(method: str) -> str | None:
    """The reason why no format can hold layers that only PEFT reads, or None."""
    title = {"IA3 with biases": "PEFT's (IA)^3 on layers with a bias"}.get(method, method)
    return (
        Message("{title} has no place in another file: merge it into a base", title) if method in MERGE_ONLY else None
    )


def kohya_only(method: str, fmt: str) -> str | None:
    """The reason why the format `fmt` (not kohya's) cannot hold some layers of other programs, or None."""
    if refusal := merge_only(method):
        return refusal
    what = method if method in registry.own_kinds() else _KOHYA_ONLY.get(method)
    return (
        Message("the {fmt} format cannot carry {what}: export it as kohya, or merge it into a base", fmt, what)
        if what
        else None
    )


def of_file(path: Path, names: Iterable[str]) -> FormatSpec:
    """The format of an adapter file or folder, from its tensors' names.

    Raises:
        LorakitError: no format has such names.
    """
    names = list(names)
    for spec in FORMATS.values():
        if spec.is_folder if path.is_dir() else not spec.is_folder and spec.recognizes(names):
            return spec
    raise LorakitError("{file}: no format has names like {name}", path.name, names[0] if names else "none")
