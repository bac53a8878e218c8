"""Training the base's own weights, as DreamBooth does (Ruiz et al. 2022, arXiv 2208.12242), instead of an adapter's.

`WholeModel` is the interface to the run: the trained weights, an optimizer step that applies gradients one by one, the
files of a model, and their check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.training.whole_model import export, step, weights

if TYPE_CHECKING:
    from lorakit.families import Family
    from lorakit.training.selfcheck import Finding


@dataclass(frozen=True)
class WholeModel:
    """The parts in which training a whole model differs from training an adapter.

    Attributes:
        attach: (base, config) -> the trained weights, a `core.protocols.Trainable`.
        step: the class that takes the place of `optimizer_step.OptimizerStep`.
        save: writes the files: (run, weights, name, metadata) -> {output: path}.
        examine: checks the files, as `selfcheck.examine`.
    """

    attach: Callable[..., weights.ModelWeights]
    step: Callable[..., step.LayerwiseStep]
    save: Callable[..., dict[str, Path]]
    examine: Callable[..., Iterator[tuple[str, list[Finding], Family | None]]]


WHOLE_MODEL = WholeModel(weights.ModelWeights, step.LayerwiseStep, export.save, export.examine)
