"""Taggers in ONNX like those of WD 1.4 and later: a .onnx file and selected_tags.csv."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.config import MemoryConfig
from lorakit.core import install
from lorakit.core.errors import LorakitError
from lorakit.inference.captioners.spec import CaptionerSpec, CaptionOptions

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from PIL import Image

Values = np.ndarray[Any, np.dtype[np.float32]]
TAGS = "selected_tags.csv"
# Categories in the table.
GENERAL, CHARACTER = "0", "4"
# Device of `memory.device` -> ONNX Runtime's execution provider.
PROVIDERS = {"cuda": "CUDAExecutionProvider", "mps": "CoreMLExecutionProvider", "cpu": "CPUExecutionProvider"}


def files(names: Collection[str]) -> list[str]:
    """The network and the table of tags among a model's files."""
    networks = sorted(name for name in names if name.endswith(".onnx") and "/" not in name)
    network = "model.onnx" if "model.onnx" in networks else next(iter(networks), None)
    return [network, TAGS, *(n for n in names if n == f"{network}.data")] if network and TAGS in names else []


@dataclass(frozen=True)
class Tag:
    """One row of the table."""

    name: str
    category: str


class Tagger:
    """A loaded tagger. Call it with a picture; it returns the tags above the threshold: characters first, then by
    probability.

    Args:
        side: side of the network's square input.
    """

    def __init__(self, session: InferenceSession, tags: list[Tag], side: int, options: CaptionOptions):
        self.session, self.tags, self.side, self.options = session, tags, side, options
        self._input = session.get_inputs()[0].name

    def __call__(self, image: Image.Image) -> str:
        """The tags of a picture."""
        (probabilities,) = self.session.run(None, {self._input: self.pixels(image)})[0]
        if len(probabilities) != len(self.tags):
            raise LorakitError(
                "{tags} has another number of tags, {count}, than the network, {outputs}",
                TAGS,
                len(self.tags),
                len(probabilities),
            )
        limits = {CHARACTER: self.options.character_threshold, GENERAL: self.options.threshold}
        order = sorted(range(len(self.tags)), key=lambda n: (self.tags[n].category != CHARACTER, -probabilities[n]))
        hits = (n for n in order if probabilities[n] >= limits.get(self.tags[n].category, np.inf))
        return ", ".join(self.tags[n].name for n in hits)

    def pixels(self, image: Image.Image) -> Values:
        """The picture on a white square, `[1, side, side, 3]`, in BGR order, 0 to 255."""
        from PIL import Image as images

        square = images.new("RGB", (max(image.size), max(image.size)), "white")
        square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
        resized = square.resize((self.side, self.side), images.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(resized, np.float32)[None, :, :, ::-1])


def load(folder: Path, options: CaptionOptions, memory: MemoryConfig) -> Tagger:
    """Load a tagger from its folder.

    Raises:
        LorakitError: ONNX Runtime is missing or does not support the device, or network or table are damaged or of
            another kind.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise LorakitError("captioner {model} needs onnxruntime; {hint}", folder, install.hint("onnx"))
    if options.prompt:
        raise LorakitError("captioner {model}: a tagger takes no --prompt; leave it out", folder)
    import onnxruntime

    network = folder / files([path.name for path in folder.iterdir()])[0]
    providers = _providers(memory, onnxruntime.get_available_providers())
    onnxruntime.set_default_logger_severity(4)
    try:
        session = onnxruntime.InferenceSession(str(network), providers=providers)
    except Exception as error:  # its exceptions have no other common class
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        text = "captioner {model}: {file} cannot be loaded ({reason}); get the model again"
        raise LorakitError(text, folder, network.name, first) from None
    if memory.device != "auto" and providers[0] not in session.get_providers():
        raise LorakitError(
            "memory.device = {device!r}: {providers} does not start here; memory.device = 'cpu' takes the processor",
            memory.device,
            providers[0],
        )
    shape = session.get_inputs()[0].shape
    is_square = len(shape) == 4 and shape[3] == 3 and isinstance(shape[1], int) and shape[1] == shape[2]
    if len(session.get_inputs()) != 1 or not is_square:
        raise LorakitError(
            "captioner {model}: {file} takes {shape}, a WD tagger takes one picture [1, side, side, 3]",
            *(folder, network.name, shape),
        )
    return Tagger(session, _tags(folder / TAGS), shape[1], options)


def _providers(memory: MemoryConfig, available: Sequence[str]) -> list[str]:
    kind = memory.device.partition(":")[0]
    if kind == "auto":
        return [name for name in PROVIDERS.values() if name in available]
    if PROVIDERS[kind] not in available:
        raise LorakitError(
            "memory.device = {device!r}: onnxruntime has no {providers} here; memory.device = 'cpu' takes "
            "the processor",
            memory.device,
            PROVIDERS[kind],
        )
    return [PROVIDERS[kind]]


def _tags(path: Path) -> list[Tag]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            tags = [Tag(_words(row["name"]), row["category"].strip()) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, AttributeError, csv.Error):
        tags = []
    if not tags:
        raise LorakitError("{path}: not a table with the columns name and category; get the model again", path)
    return tags


def _words(tag: str) -> str:
    """A tag as words; tags without words, such as >_<, stay unchanged."""
    return tag.strip().replace("_", " ") if re.search(r"[^\W\d_]{2}", tag) else tag.strip()


SPEC = CaptionerSpec(files, load, is_tags=True)
