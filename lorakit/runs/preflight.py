"""Before anything is written or loaded: the base, the photos and the plan of a run, or what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from lorakit import families
from lorakit.config import Config
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.data import checks
from lorakit.formats import compatibility
from lorakit.runs import plan


@dataclass(frozen=True)
class Preflight:
    """What a run is made from.

    Attributes:
        config: as it was asked for, a hub id pinned to its commit.
        info: the base, `families.BaseInfo`.
        photos: what `data.check.check` reported.
        plan: what the run would do.
        warnings: what the formats asked for do not carry to some programs, a line each.
    """

    config: Config
    info: Any
    photos: Any
    plan: plan.Plan
    warnings: list[str]

    def lines(self) -> list[str]:
        """All of it, for the person."""
        return [*self.warnings, *self.photos.notes, *self.photos.warnings, *self.plan.lines()]


def look(config: Config, say: Callable[[str], object]) -> Preflight:
    """Check all that can be checked before a model is loaded, or the libraries that models take, and say what was seen.

    Raises:
        LorakitError: base or photos do not allow the run, or a format cannot carry what is trained; all problems of the
            photos at once.
    """
    if config.output.tensorboard and find_spec("tensorboard") is None:
        raise LorakitError(
            "output.tensorboard = true needs tensorboard; install it with: pip install 'lorakit[tensorboard]'"
        )
    config = replace(config, model=families.pin(config.model))
    info = families.describe(config.model)
    if problems := families.unsuited(info, config):
        raise LorakitError("\n".join(problems))
    warnings = []
    for name in config.output.formats:
        refusal = registry.load(registry.EXPORTS, name).check(config.adapter.method, info.family)
        if refusal:
            raise LorakitError(refusal)
        warning = compatibility.warning(config.adapter.method, name)
        if warning:
            warnings.append(warning)
    photos = checks.check(config.data, info)
    if photos.errors:
        raise LorakitError("\n".join(photos.errors))
    seen = Preflight(config, info, photos, plan.make(config, info, photos), warnings)
    for line in seen.lines():
        say(line)
    return seen
