"""Training a base's own weights, as DreamBooth does (Ruiz et al. 2022, arXiv 2208.12242), instead of an adapter's.

`WholeModel` is what the run asks of it: weights to train, a step that applies gradients one by one, files of a whole
model, and their check.
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
    """What differs from a run that trains an adapter.

    Attributes:
        attach: (base, config) -> what is trained in it, a `core.protocols.Trainable`.
        step: as `optimizer_step.OptimizerStep`.
        save: writes the files: (run, what is trained, name, metadata) -> what -> path.
        examine: checks them, as `selfcheck.examine`.
    """

    attach: Callable[..., weights.ModelWeights]
    step: Callable[..., step.LayerwiseStep]
    save: Callable[..., dict[str, Path]]
    examine: Callable[..., Iterator[tuple[str, list[Finding], Family | None]]]


WHOLE_MODEL = WholeModel(weights.ModelWeights, step.LayerwiseStep, export.save, export.examine)
