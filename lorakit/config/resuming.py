"""Which options may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from lorakit.config.loading import as_tables, load, toml_value
from lorakit.config.option import to_text
from lorakit.config.schema import LENGTHS, Config
from lorakit.core.errors import ConfigError
from lorakit.core.messages import Message
from lorakit.core.names import quote, unique_path
from lorakit.core.registry import FORMATS

# These options do not affect the weights of a step: length, samples, validation, checkpoints and files. Paths may
# change; the content is compared. The device only changes the last bits.
FREE = {f"train.{name}" for name in LENGTHS}
FREE |= {
    "train.min_steps",
    "train.validate_every",
    "train.validate_at_end",
    "train.save_every",
    "train.keep_checkpoints",
    "train.on_nan",
    "train.deterministic",
}
FREE |= {
    "train.export_every",
    "model.base",
    "data.folder",
    "data.class_folder",
    "adapter.outputs",
    "adapter.extract_rank",
    "output.formats",
    "output.dtype",
    "output.trackers",
    "output.notify",
}
FREE |= {f"memory.{name}" for name in ("device", "gradient_checkpointing", "limit_gib", "compile", "engine")}
FREE |= {"memory.cuda_graphs", "memory.attention", "memory.stream_base", "memory.triton", "memory.channels_last"}


def may_change(key: str) -> bool:
    """Whether a run can be resumed with another value of an option."""
    return key in FREE or key.startswith("sample.")


def load_changed(file: Path, overrides: Mapping[str, object]) -> Config:
    """The config of a run with changes applied.

    Raises:
        ConfigError: an option is invalid or may not change; all of them are listed.
    """
    old = _flat(load(file))
    _refuse(file, {key: (old[key], value) for key, value in overrides.items() if key in old and value != old[key]})
    after = load(file, overrides)
    new = _flat(after)
    _refuse(file, {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)})
    return after


def new_run(checkpoint: Path, changes: Mapping[str, object] = MappingProxyType({})) -> str:
    """The commands that start a new run from the weights of a checkpoint, with changed options."""
    run = checkpoint.parent.parent
    if (run / "config.toml").is_file() and load(run / "config.toml").adapter.whole_model:
        model = next(run.glob("*-model*"), run / "MODEL")
        return f"lorakit train --preset {quote(run / 'config.toml')} --base {quote(model)}"
    new, output_format = unique_path(run), next(iter(FORMATS))
    weights = new.with_name(f"{new.name}-start")
    adapter = weights / f"{checkpoint.name}{FORMATS[output_format].ending}"
    options = "".join(f" --set {quote(f'{key}={toml_value(value)}')}" for key, value in changes.items())
    return (
        f"lorakit export {quote(checkpoint)} --to {output_format} --output {quote(weights)} && "
        f"lorakit train --preset {quote(run / 'config.toml')}{options} --init-from {quote(adapter)} "
        f"--output {quote(new)}"
    )


def _refuse(file: Path, changes: Mapping[str, tuple[object, object]]) -> None:
    """Raise a ConfigError that lists the changes (key -> value before and after) that are not allowed."""
    fixed = {key: values for key, values in changes.items() if not may_change(key)}
    if not fixed:
        return
    values = {key: new for key, (_, new) in changes.items() if new is not None}
    steps = sorted((file.parent / "checkpoints").glob("step-*"))
    lines = [
        Message(
            "{key} cannot change from {old} to {new} in a run that goes on: it would be another run",
            key,
            to_text(old),
            to_text(new),
        )
        for key, (old, new) in fixed.items()
    ]
    if steps:
        command = new_run(steps[-1], values)
        lines[-1] = Message("{problem}; start one from its weights with: {command}", lines[-1], command)
    raise ConfigError(lines)


def _flat(config: Config) -> dict[str, object]:
    return {f"{section}.{name}": value for section, table in as_tables(config).items() for name, value in table.items()}
