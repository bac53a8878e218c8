"""Which options may change when a run goes on, and why the others may not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorakit.config.loading import as_tables, load
from lorakit.config.option import to_text
from lorakit.config.schema import LENGTHS, Config
from lorakit.core.errors import ConfigError

# They do not reach the weights of a step: how long, what is drawn, examined, saved and written. Paths may change with
# the place of a thing, whose content is compared. Where it computes changes the last bits alone.
FREE = {f"train.{name}" for name in LENGTHS}
FREE |= {
    "train.validate_every",
    "train.validate_at_end",
    "train.save_every",
    "train.keep_checkpoints",
    "train.on_nan",
}
FREE |= {
    "train.export_every",
    "model.base",
    "data.folder",
    "data.class_folder",
    "output.formats",
    "output.dtype",
    "output.trackers",
}
FREE |= {f"memory.{name}" for name in ("device", "gradient_checkpointing", "limit_gib", "compile", "engine")}
FREE |= {"memory.cuda_graphs", "memory.attention", "memory.stream_base"}


def may_change(key: str) -> bool:
    """Whether a run may go on with another value of an option."""
    return key in FREE or key.startswith("sample.")


def load_changed(file: Path, overrides: Mapping[str, object]) -> Config:
    """The config of a run with changes over it.

    Raises:
        ConfigError: with each option that may not change, or that is wrong.
    """
    before = load(file)
    old = _flat(before)
    _refuse({key: (old[key], value) for key, value in overrides.items() if key in old and value != old[key]})
    after = load(file, overrides)
    new = _flat(after)
    _refuse({key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)})
    return after


def _refuse(changes: Mapping[str, tuple[object, object]]) -> None:
    """Raise a ConfigError with those of the changes (key -> the value before and after) that may not be."""
    problems = [
        f"{key} cannot change from {to_text(old)} to {to_text(new)} in a run that goes on: it would be another run; "
        "start one from its weights with: lorakit train --init-from"
        for key, (old, new) in changes.items()
        if not may_change(key)
    ]
    if problems:
        raise ConfigError(problems)


def _flat(config: Config) -> dict[str, object]:
    return {f"{section}.{name}": value for section, table in as_tables(config).items() for name, value in table.items()}
