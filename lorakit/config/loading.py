"""Read a preset, apply overrides, check the result, and write it as TOML."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lorakit.config import contradictions, foreign, sample_prompts
from lorakit.config.option import Option, check_value, label, suggest, to_text, unquote
from lorakit.config.schema import (
    ADAPTER_SECTIONS,
    LENGTHS,
    SECTIONS,
    Config,
    options,
    section_type,
)
from lorakit.core.errors import ConfigError, LorakitError, MissingFile
from lorakit.core.messages import Message
from lorakit.core.names import expand
from lorakit.core.registry import METHODS, own_learning_rate

DEFAULT_PRESET = "subject-pocket"
BUNDLED = "pocket"  # a base that is not a path
RATES = ("optimizer.learning_rate", "optimizer.text_encoder_learning_rate")
# Options that need a trained text encoder.
OF_TEXT_ENCODERS = ("optimizer.unet_start", "train.text_prior_weight")
SINGLE_QUOTES = r"write a path of Windows in single quotes, as in folder = 'C:\Users\me\photos'"


def preset_folder() -> Path:
    """The folder of presets: in the installed package, or next to it in a checkout."""
    inside = Path(__file__).parent.parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "presets"


def preset_names() -> list[str]:
    """Names of lorakit's presets."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def load(preset: str | Path | None = DEFAULT_PRESET, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a preset, apply `overrides` and check the result.

    Args:
        preset: a name, the path of a TOML file, or None for the defaults.
        overrides: option -> value, `{"train.steps": 100}`. A length (steps, epochs, steps_per_image), a method or a
            prior replaces that of the preset together with its options.

    Raises:
        ConfigError: all problems, one line each.
    """
    if preset is None:
        return from_tables({}, overrides or {})
    file = _preset_path(preset)
    tables = _read_toml(file)
    foreign.refuse(file, tables)
    _find_paths(tables, file.absolute().parent)
    return from_tables(tables, overrides or {})


def _find_paths(tables: dict[str, dict[str, object]], place: Path) -> None:
    """Resolve relative paths that do not exist in the current folder: relative to the config's folder, and to the two
    folders above it, which contain the runs/ of a run."""
    for opt in options():
        table = tables.get(opt.section)
        if not isinstance(table, dict) or not opt.path:
            continue
        value = table.get(opt.name)
        if isinstance(value, dict):
            table[opt.name] = {name: _find(text, place) for name, text in value.items()}
        if not isinstance(value, str) or not value:
            continue
        if re.search(r"[\x00-\x1f]", value) and ("\0" in value or not Path(value).exists()):
            raise ConfigError(
                "{key} = {value}: {single_quotes}", opt.key, to_text(value), SINGLE_QUOTES
            )  # "C:\train" has a tab in it
        if opt.key != "output.folder":
            table[opt.name] = _find(value, place)


def _find(value: object, place: Path) -> object:
    """The resolved path, see `_find_paths`; other values are returned unchanged."""
    if not isinstance(value, str) or not value or "\0" in value or expand(value).exists():
        return value
    candidates = (folder / value for folder in (place, *place.parents[:2]))
    return next((str(path) for path in candidates if path.exists()), value)


def with_absolute_paths(config: Config) -> Config:
    """The same config with absolute paths; names of bases stay."""
    changes: dict[str, dict[str, object]] = {}
    for opt in options(config.adapter.method):
        value = getattr(getattr(config, opt.section), opt.name)
        if opt.path and isinstance(value, dict):
            changes.setdefault(opt.section, {})[opt.name] = {name: _absolute(text) for name, text in value.items()}
        elif opt.path and value and value != BUNDLED:
            changes.setdefault(opt.section, {})[opt.name] = _absolute(value)
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def clean_path(key: str, text: object) -> object:
    """Normalize an option's path: expand `~`, and remove surrounding quotes and spaces."""
    if not isinstance(text, str) or not text or "\0" in text or os.path.exists(text):  # noqa: PTH110, it never raises
        return text
    if key == "model.base" and unquote(text).lower() == BUNDLED:
        return BUNDLED
    return str(expand(unquote(text))) if text.lstrip("\"' ").startswith("~") else unquote(text)


def _absolute(text: str) -> str:
    """The absolute path if it exists, else the text unchanged."""
    path = expand(text)
    return str(path.absolute()) if path.exists() else text


def _keys_to_drop(preset: Mapping[str, object], overrides: Mapping[str, Any]) -> set[str]:
    """Options of a preset that the overrides replace indirectly."""
    of_prior = {f"train.{name}" for name in ("class_images", "prior_loss_weight", "prior_target", "prior_prompts")}
    overridden_keys = of_prior if "train.prior" in overrides else set()
    if any(f"train.{name}" in overrides for name in LENGTHS):
        overridden_keys |= {f"train.{name}" for name in (*LENGTHS, "min_steps")}
    warmups = ("optimizer.warmup_steps", "optimizer.warmup_ratio")
    if any(overrides.get(key) for key in warmups):
        overridden_keys |= set(warmups)
    trains_text = preset.get("adapter.train_text_encoder") is True
    if trains_text and overrides.get("adapter.train_text_encoder") is False:
        overridden_keys |= {"optimizer.text_encoder_learning_rate", *OF_TEXT_ENCODERS}
    return overridden_keys


def from_tables(tables: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """As `load`, for the tables of a TOML file."""
    problems: list[str] = []
    flat: dict[str, Any] = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            problems.append(Message("unknown section [{section}]{hint}", label(section), suggest(section, SECTIONS)))
        elif not isinstance(table, Mapping):
            problems.append(Message("[{name}] must be a table, not {value}", section, to_text(table)))
        else:
            flat.update({f"{section}.{name}": value for name, value in table.items()})
    overrides = dict(overrides or {})
    own_rate = own_learning_rate(overrides.get("optimizer.name", flat.get("optimizer.name")))
    overridden_keys = _keys_to_drop(flat, overrides)
    if own_rate != own_learning_rate(flat.get("optimizer.name")):  # a rate and a factor are not comparable
        overridden_keys |= {*RATES, "optimizer.unet_start"}
    overridden_keys |= _other_method(flat, overrides)
    flat = {key: value for key, value in flat.items() if key not in overridden_keys}
    flat.update(overrides)
    if isinstance(rows := flat.get("sample.prompts"), list):
        flat["sample.prompts"] = [sample_prompts.from_table(row) if isinstance(row, Mapping) else row for row in rows]
    if isinstance(sides := flat.get("data.resolution"), list) and sides and all(type(side) is int for side in sides):
        flat["data.resolution"], *flat["data.lower_resolutions"] = sorted(sides, reverse=True)
    if "output.tensorboard" in flat:  # the old name, from before there were other trackers
        board = flat.pop("output.tensorboard") is True and "output.trackers" not in flat
        flat |= {"output.trackers": ["tensorboard"]} if board else {}
    method = flat.get("adapter.method", "lora")
    if method not in tuple(ADAPTER_SECTIONS):  # a tuple, as the value may be of any type
        names = ", ".join(ADAPTER_SECTIONS)
        problems.append(
            Message(
                "adapter.method = {method}: choose one of {names}{hint}",
                to_text(method),
                names,
                suggest(method, ADAPTER_SECTIONS),
            )
        )
        method = "lora"
    if (rate := own_rate or METHODS[method].learning_rate) is not None:
        flat.setdefault("optimizer.learning_rate", rate)
    by_key = {opt.key: opt for opt in options(method)}
    flat = _join_tables(flat, by_key)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in flat.items():
        if key == "adapter.method":
            continue
        if key not in by_key:
            problems.append(_unknown_option(key, method, by_key))
            continue
        problem, value = check_value(by_key[key], clean_path(key, value) if by_key[key].path else value)
        if problem:
            problems.append(problem)
        else:
            values[by_key[key].section][by_key[key].name] = value
    values["adapter"]["method"] = method
    config = Config(**{section: section_type(section, method)(**values[section]) for section in SECTIONS})
    problems += [] if problems else contradictions.problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def every_option() -> list[Option]:
    """The options of all methods, each once."""
    by_key: dict[str, Option] = {}
    for method in METHODS:
        for opt in options(method):
            by_key.setdefault(opt.key, opt)
    return sorted(by_key.values(), key=lambda opt: SECTIONS.index(opt.section))


def _unknown_option(key: str, method: str, by_key: Mapping[str, Option]) -> str:
    """The message for an option that does not exist, or that only other methods have."""
    if key.startswith("adapter.") and key in {opt.key for opt in every_option()}:
        return Message("unknown option {key} with adapter.method = {method!r}: leave it out", key, method)
    return Message("unknown option {key}{hint}", label(key), suggest(key, by_key))


def _other_method(preset: Mapping[str, object], overrides: Mapping[str, object]) -> set[str]:
    """The preset's options that do not apply to the method that replaces its own."""
    method, before = overrides.get("adapter.method"), preset.get("adapter.method", "lora")
    if method == before or not (isinstance(method, str) and isinstance(before, str)):
        return set()
    if method not in ADAPTER_SECTIONS or before not in ADAPTER_SECTIONS:
        return set()
    keys = {opt.key for opt in options(before)} - {opt.key for opt in options(method)}
    if METHODS[method].learning_rate != METHODS[before].learning_rate:
        keys |= set(RATES)
    if METHODS[method].whole_model:  # options that store an adapter's frozen base in less memory
        keys |= {"memory.base_storage", "memory.stream_base", "adapter.train_text_encoder", *OF_TEXT_ENCODERS}
    if METHODS[method].words_only:
        keys |= {key for key in preset if key.startswith(("train.prior", "train.class_", "output."))}
        keys |= {"optimizer.text_encoder_2_learning_rate", "optimizer.text_encoder_stop", *OF_TEXT_ENCODERS}
    return keys


def _join_tables(flat: Mapping[str, object], by_key: Mapping[str, Option]) -> dict[str, object]:
    """Put keys such as `optimizer.args.betas` into the table `optimizer.args`; the rest of a key may contain dots."""
    tables: dict[str, object] = {}
    for key, value in flat.items():
        section, _, rest = key.partition(".")
        option, _, name = rest.partition(".")
        table = f"{section}.{option}"
        if name and table in by_key and isinstance(by_key[table].default, dict):
            table_values = tables.get(table)
            tables[table] = {**(table_values if isinstance(table_values, Mapping) else {}), name: value}
        else:
            tables[key] = value
    return tables


def split_strength(text: str) -> tuple[Path, float]:
    """Split `ADAPTER=STRENGTH` into path and strength. The strength is 1 if `text` is an existing path.

    Raises:
        LorakitError: the strength is no number.
    """
    path, equals, strength = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(strength)
    except ValueError:
        raise LorakitError("{text}: write ADAPTER=STRENGTH, e.g. toy.safetensors=0.7", text) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Parse `section.key=value` from the command line. The value is read with the option's type.

    Raises:
        ConfigError: no `=`, or no key. `load` reports an unknown key.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ConfigError("{text!r}: write it as section.key=value, e.g. train.steps=200", text)
    by_key = {opt.key: opt for opt in options()}
    kind = by_key[key].type if key in by_key else None
    if kind is str or (typing.get_origin(kind) is Literal):
        return key, value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    if typing.get_origin(kind) is tuple and not value.startswith("["):
        # A prompt may contain commas; the name of a format has none.
        return key, tuple(part.strip() for part in value.split(",")) if by_key[key].choices else value
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):  # ValueError: also a number with too many digits
        return key, value


def without_paths(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved config as tables, without paths and names of the user's machine."""
    path_keys = {opt.key for opt in options(config.adapter.method) if opt.path or opt.private}
    tables = as_tables(config)
    return {s: {n: v for n, v in t.items() if f"{s}.{n}" not in path_keys} for s, t in tables.items()}


def as_tables(config: Config) -> dict[str, dict[str, Any]]:
    """The config as plain tables, without unset values and empty tables, because TOML has no null."""
    return {
        section: {
            name: value
            for name, value in dataclasses.asdict(getattr(config, section)).items()
            if value is not None and value != {}
        }
        for section in SECTIONS
    }


def to_toml(config: Config) -> str:
    """The resolved config as TOML. `load` reads it back to an equal `Config`."""
    lines = []
    for section, table in as_tables(config).items():
        lines += [f"[{section}]", *(f"{name} = {toml_value(value)}" for name, value in table.items()), ""]
    return "\n".join(lines)


def toml_value(value: object) -> str:
    """One value as TOML text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON has the same escapes as TOML, but does not escape the delete character.
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
            raise MissingFile("config file {path} does not exist", path)
        return path
    if path.is_file():
        foreign.refuse(path, foreign.read(path) if path.suffix.lower() == ".json" else {})
        raise ConfigError("{path} is no preset: presets of lorakit are TOML files (.toml)", path)
    file = preset_folder() / f"{preset}.toml"
    if not file.is_file():
        names = preset_names()
        raise ConfigError(
            "unknown preset {preset!r}{hint}; presets: {names}",
            label(str(preset)),
            suggest(str(preset), names),
            ", ".join(names),
        )
    return file


def _read_toml(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        number = re.search(r"at line (\d+)", str(error))
        line = text.splitlines()[int(number[1]) - 1] if number else ""
        hint = f"; {SINGLE_QUOTES}" if re.search(r'"[^"]*\\', line) else ""
        raise ConfigError("{path}: not valid TOML: {problem}{hint}", path, error, hint) from None
