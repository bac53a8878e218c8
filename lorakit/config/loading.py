"""Read a preset, lay overrides over it, check it all, and write it back as TOML."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lorakit.config.option import Option, checked, near, shown
from lorakit.config.schema import ADAPTER_SECTIONS, LENGTHS, SECTIONS, Config, TrainConfig, options, section_type
from lorakit.core.errors import ConfigError

DEFAULT_PRESET = "subject-pocket"


def preset_folder() -> Path:
    """Where the presets lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "presets"


def preset_names() -> list[str]:
    """Names of the presets that come with lorakit."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def load(preset: str | Path | None = DEFAULT_PRESET, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a preset (a name, or a path to a TOML file; None: defaults alone), lay `overrides` over it and check it all.

    Args:
        overrides: dotted keys, `{"train.steps": 100}`. A length (steps, epochs, steps_per_image), a method or a prior
            given here replaces the preset's, with what belongs to it.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    tables = {} if preset is None else _read_toml(_preset_path(preset))
    return from_tables(tables, overrides or {})


def from_tables(tables: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """As `load`, from tables already read."""
    problems: list[str] = []
    flat: dict[str, Any] = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            problems.append(f"unknown section [{section}]{near(section, SECTIONS)}")
        elif not isinstance(table, Mapping):
            problems.append(f"[{section}] must be a table, not {shown(table)}")
        else:
            flat.update({f"{section}.{name}": value for name, value in table.items()})
    overrides = dict(overrides or {})
    replaced = {"train.class_images", "train.prior_loss_weight"} if "train.prior" in overrides else set()
    if any(f"train.{name}" in overrides for name in LENGTHS):
        replaced |= {f"train.{name}" for name in LENGTHS}
    flat = {key: value for key, value in flat.items() if key not in replaced}
    flat.update(overrides)

    method = flat.get("adapter.method", "lora")
    if method not in tuple(ADAPTER_SECTIONS):  # a tuple, as a method of any type may be asked for
        names = ", ".join(ADAPTER_SECTIONS)
        problems.append(f"adapter.method = {shown(method)}: choose one of {names}{near(method, ADAPTER_SECTIONS)}")
        method = "lora"
    known = {k.key: k for k in options(method)}
    flat = _tables_joined(flat, known)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in flat.items():
        if key == "adapter.method":
            continue
        if key not in known:
            problems.append(f"unknown option {key}{near(key, known)}")
            continue
        problem, value = checked(known[key], value)
        if problem:
            problems.append(problem)
        else:
            values[known[key].section][known[key].name] = value
    config = Config(**{section: section_type(section, method)(**values[section]) for section in SECTIONS})
    problems += [] if problems else _contradictions(config)
    if problems:
        raise ConfigError(problems)
    return config


def _tables_joined(flat: Mapping[str, object], known: Mapping[str, Option]) -> dict[str, object]:
    """Put `optimizer.args.betas` and the like into the table `optimizer.args`."""
    joined: dict[str, object] = {}
    for key, value in flat.items():
        table, _, name = key.rpartition(".")
        if table in known and isinstance(known[table].default, dict):
            before = joined.get(table)
            joined[table] = {**(before if isinstance(before, Mapping) else {}), name: value}
        else:
            joined[key] = value
    return joined


def parse_override(text: str) -> tuple[str, Any]:
    """Read `section.key=value` of the command line; the value is read as the option's type.

    Raises:
        ConfigError: no `=`, or no value where one is needed. An unknown key is left for `load` to report.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ConfigError([f"{text!r}: write it as section.key=value, e.g. train.steps=200"])
    known = {k.key: k for k in options()}
    kind = known[key].type if key in known else None
    if kind is str or (typing.get_origin(kind) is Literal):
        return key, value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    if typing.get_origin(kind) is tuple and not value.startswith("["):
        return key, tuple(part.strip() for part in value.split(","))
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def with_paths_removed(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved config as tables, without anything that names a place on the user's machine."""
    hidden = {k.key for k in options(config.adapter.method) if k.path}
    tables = as_tables(config)
    return {s: {n: v for n, v in t.items() if f"{s}.{n}" not in hidden} for s, t in tables.items()}


def as_tables(config: Config) -> dict[str, dict[str, Any]]:
    """The config as plain tables; unset values and empty tables are left out, as TOML has no null."""
    return {
        section: {
            name: value
            for name, value in dataclasses.asdict(getattr(config, section)).items()
            if value is not None and value != {}
        }
        for section in SECTIONS
    }


def to_toml(config: Config) -> str:
    """The resolved config as TOML text that `load` reads back to an equal `Config`."""
    lines = []
    for section, table in as_tables(config).items():
        lines += [f"[{section}]", *(f"{name} = {toml_value(value)}" for name, value in table.items()), ""]
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """One value as TOML text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes as TOML does, but lets the delete character through.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml_value(item)}" for name, item in value.items()) + "}"
    return repr(value)


def _preset_path(preset: str | Path) -> Path:
    path = Path(preset)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError([f"config file {path} does not exist"])
        return path
    named = preset_folder() / f"{preset}.toml"
    if not named.is_file():
        names = preset_names()
        raise ConfigError([f"unknown preset {str(preset)!r}{near(str(preset), names)}; presets: {', '.join(names)}"])
    return named


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path.name}: not valid TOML: {error}"]) from None


def _contradictions(config: Config) -> list[str]:
    """Options that are each well formed but make no sense together."""
    data, adapter, optimizer, train = config.data, config.adapter, config.optimizer, config.train
    problems = []
    given = [f"train.{name}" for name in LENGTHS if getattr(train, name) is not None]
    if len(given) != 1:
        told = f"{' and '.join(given)} are set" if given else "none is set"
        problems.append(f"set exactly one of {', '.join('train.' + n for n in LENGTHS)}: {told}")
    if optimizer.text_encoder_learning_rate is not None and not adapter.trains_text:
        problems.append("optimizer.text_encoder_learning_rate needs adapter.train_text_encoder = true or new_tokens")
    if adapter.new_tokens and not re.fullmatch(r"[\w-]+", data.trigger):
        problems.append("adapter.new_tokens needs a trigger of letters and digits: begin data.name with one, 'sks dog'")
    if train.init_from and adapter.method == "pissa":
        problems.append("train.init_from makes no sense with adapter.method = 'pissa', which begins from the base")
    if train.prior == "none" and train.prior_loss_weight != TrainConfig.prior_loss_weight:
        problems.append("train.prior_loss_weight has no effect with train.prior = 'none': choose 'images' or 'teacher'")
    if train.prior != "images" and train.class_images != TrainConfig.class_images:
        problems.append(f"train.class_images has no effect with train.prior = {train.prior!r}: choose 'images'")
    changes = data.flip or data.crop_jitter > 0 or data.color_jitter > 0
    if data.variants > 1 and not changes:
        problems.append("data.variants > 1 needs data.flip, data.crop_jitter or data.color_jitter")
    if data.variants == 1 and changes:
        problems.append("data.flip, data.crop_jitter and data.color_jitter need data.variants of 2 or more")
    if config.memory.gradient_checkpointing and config.memory.limit_gib is not None:
        problems.append("memory.limit_gib chooses the blocks to recompute: leave out memory.gradient_checkpointing")
    if data.resolution % 8:
        problems.append(f"data.resolution = {data.resolution}: must be a multiple of 8")
    if config.memory.compile and (config.memory.base_storage != "full" or config.memory.stream_base):
        problems.append("memory.compile needs the weights whole: no memory.stream_base, memory.base_storage = 'full'")
    if config.memory.compile and (config.memory.gradient_checkpointing or config.memory.limit_gib is not None):
        problems.append("memory.compile goes neither with memory.gradient_checkpointing nor with memory.limit_gib")
    if config.memory.compile and getattr(adapter, "dropout", 0.0) > 0:
        problems.append("memory.compile needs adapter.dropout = 0: compiled code would draw other numbers")
    return problems
