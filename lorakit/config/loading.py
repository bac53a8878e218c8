"""Read a preset, apply overrides, check the result, and write it as TOML."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lorakit.config import foreign, full, sample_prompts
from lorakit.config.option import Option, check_value, label, suggest, to_text, unquote
from lorakit.config.schema import (
    ADAPTER_SECTIONS,
    LENGTHS,
    SECTIONS,
    AdapterConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    options,
    section_type,
)
from lorakit.core.errors import ConfigError, MissingFile
from lorakit.core.registry import METHODS, own_learning_rate

DEFAULT_PRESET = "subject-pocket"
BUNDLED = "pocket"  # the base that is no path
SINGLE_QUOTES = r"write a path of Windows in single quotes, as in folder = 'C:\Users\me\photos'"


def preset_folder() -> Path:
    """The folder of the presets: inside an installed package, or next to it in a checkout."""
    inside = Path(__file__).parent.parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "presets"


def preset_names() -> list[str]:
    """Names of the presets of lorakit."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def load(preset: str | Path | None = DEFAULT_PRESET, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a preset, apply `overrides` and check the result.

    Args:
        preset: a name, the path of a TOML file, or None for the defaults.
        overrides: dotted keys, `{"train.steps": 100}`. A length (steps, epochs, steps_per_image), a method or a prior
            replaces that of the preset, with the options that belong to it.

    Raises:
        ConfigError: with every problem, one line each.
    """
    if preset is None:
        return from_tables({}, overrides or {})
    file = _preset_path(preset)
    tables = _read_toml(file)
    foreign.refuse(file, tables)
    _find_paths(tables, file.absolute().parent)
    return from_tables(tables, overrides or {})


def _find_paths(tables: dict[str, dict[str, object]], place: Path) -> None:
    """Complete relative paths that are not there from where one stands: look for them from the config's place, and from
    the two folders above it, where the runs/ of a run are."""
    for opt in options():
        table = tables.get(opt.section)
        if not isinstance(table, dict) or not opt.path:
            continue
        value = table.get(opt.name)
        if not isinstance(value, str) or not value:
            continue
        if re.search(r"[\x00-\x1f]", value) and ("\0" in value or not Path(value).exists()):
            raise ConfigError([f"{opt.key} = {to_text(value)}: {SINGLE_QUOTES}"])  # "C:\train" has a tab in it
        if opt.key != "output.folder" and not Path(value).expanduser().exists():
            candidates = (folder / value for folder in (place, *place.parents[:2]))
            table[opt.name] = next((str(path) for path in candidates if path.exists()), value)


def with_absolute_paths(config: Config) -> Config:
    """The same config, with paths that do not depend on where one stands; names of bases stay."""
    changes: dict[str, dict[str, str]] = {}
    for opt in options(config.adapter.method):
        value = getattr(getattr(config, opt.section), opt.name)
        if opt.path and value and value != BUNDLED and Path(value).expanduser().exists():
            changes.setdefault(opt.section, {})[opt.name] = str(Path(value).expanduser().absolute())
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def _keys_to_drop(overrides: Mapping[str, Any]) -> set[str]:
    """Options of a preset that belong to what is replaced."""
    of_prior = {f"train.{name}" for name in ("class_images", "prior_loss_weight", "prior_target", "prior_prompts")}
    overridden_keys = of_prior if "train.prior" in overrides else set()
    if any(f"train.{name}" in overrides for name in LENGTHS):
        overridden_keys |= {f"train.{name}" for name in (*LENGTHS, "min_steps")}
    warmups = ("optimizer.warmup_steps", "optimizer.warmup_ratio")
    if any(overrides.get(key) for key in warmups):
        overridden_keys |= set(warmups)
    if overrides.get("adapter.train_text_encoder") is False:
        overridden_keys.add("optimizer.text_encoder_learning_rate")
    return overridden_keys


def from_tables(tables: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """As `load`, from the tables of a TOML file."""
    problems: list[str] = []
    flat: dict[str, Any] = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            problems.append(f"unknown section [{label(section)}]{suggest(section, SECTIONS)}")
        elif not isinstance(table, Mapping):
            problems.append(f"[{section}] must be a table, not {to_text(table)}")
        else:
            flat.update({f"{section}.{name}": value for name, value in table.items()})
    overrides = dict(overrides or {})
    own_rate = own_learning_rate(overrides.get("optimizer.name", flat.get("optimizer.name")))
    overridden_keys = _keys_to_drop(overrides)
    if own_rate != own_learning_rate(flat.get("optimizer.name")):  # a rate and a factor are not comparable
        overridden_keys |= {"optimizer.learning_rate", "optimizer.text_encoder_learning_rate"}
    overridden_keys |= _other_method(flat, overrides)
    flat = {key: value for key, value in flat.items() if key not in overridden_keys}
    flat.update(overrides)
    if isinstance(rows := flat.get("sample.prompts"), list):
        flat["sample.prompts"] = [sample_prompts.from_table(row) if isinstance(row, Mapping) else row for row in rows]
    if isinstance(sides := flat.get("data.resolution"), list) and sides and all(type(side) is int for side in sides):
        flat["data.resolution"], *flat["data.lower_resolutions"] = sorted(sides, reverse=True)
    if "output.tensorboard" in flat:  # as it was called before there were others
        board = flat.pop("output.tensorboard") is True and "output.trackers" not in flat
        flat |= {"output.trackers": ["tensorboard"]} if board else {}
    method = flat.get("adapter.method", "lora")
    if method not in tuple(ADAPTER_SECTIONS):  # a tuple, as the value may be of any type
        names = ", ".join(ADAPTER_SECTIONS)
        problems.append(f"adapter.method = {to_text(method)}: choose one of {names}{suggest(method, ADAPTER_SECTIONS)}")
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
        problem, value = check_value(by_key[key], value)
        if problem:
            problems.append(problem)
        else:
            values[by_key[key].section][by_key[key].name] = value
    values["adapter"]["method"] = method
    config = Config(**{section: section_type(section, method)(**values[section]) for section in SECTIONS})
    problems += [] if problems else _contradictions(config)
    if problems:
        raise ConfigError(problems)
    return config


def every_option() -> list[Option]:
    """`options` of every method, each option once."""
    by_key: dict[str, Option] = {}
    for method in METHODS:
        for opt in options(method):
            by_key.setdefault(opt.key, opt)
    return sorted(by_key.values(), key=lambda opt: SECTIONS.index(opt.section))


def _unknown_option(key: str, method: str, by_key: Mapping[str, Option]) -> str:
    """What is said of an option that there is not, or that another method has."""
    if key.startswith("adapter.") and key in {opt.key for opt in every_option()}:
        return f"unknown option {key} with adapter.method = {method!r}: leave it out"
    return f"unknown option {label(key)}{suggest(key, by_key)}"


def _other_method(preset: Mapping[str, object], overrides: Mapping[str, object]) -> set[str]:
    """The preset's options that do not belong to the method that replaces its own."""
    method, before = overrides.get("adapter.method"), preset.get("adapter.method", "lora")
    if method == before or not (isinstance(method, str) and isinstance(before, str)):
        return set()
    if method not in ADAPTER_SECTIONS or before not in ADAPTER_SECTIONS:
        return set()
    keys = {opt.key for opt in options(before)} - {opt.key for opt in options(method)}
    if METHODS[method].learning_rate != METHODS[before].learning_rate:
        keys |= {f"optimizer.{name}" for name in ("learning_rate", "text_encoder_learning_rate")}
    if METHODS[method].whole_model:  # what makes an adapter's frozen base small
        keys |= {"memory.base_storage", "memory.stream_base", "adapter.train_text_encoder"}
    return keys


def _join_tables(flat: Mapping[str, object], by_key: Mapping[str, Option]) -> dict[str, object]:
    """Put `optimizer.args.betas` and the like into the table `optimizer.args`; the rest of a key may have dots."""
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


def parse_override(text: str) -> tuple[str, Any]:
    """Read `section.key=value` of the command line. The value is read as the option's type.

    Raises:
        ConfigError: no `=`, or no key. `load` reports an unknown key.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ConfigError([f"{text!r}: write it as section.key=value, e.g. train.steps=200"])
    by_key = {opt.key: opt for opt in options()}
    kind = by_key[key].type if key in by_key else None
    if kind is str or (typing.get_origin(kind) is Literal):
        return key, value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    if typing.get_origin(kind) is tuple and not value.startswith("["):
        # A prompt may contain commas; the name of a format has none.
        return key, tuple(part.strip() for part in value.split(",")) if by_key[key].choices else value
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):  # ValueError: a number of more digits than Python reads, too
        return key, value


def without_paths(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved config as tables, without options that are paths or names of the user's machine."""
    path_keys = {opt.key for opt in options(config.adapter.method) if opt.path or opt.private}
    tables = as_tables(config)
    return {s: {n: v for n, v in t.items() if f"{s}.{n}" not in path_keys} for s, t in tables.items()}


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
            raise MissingFile([f"config file {path} does not exist"])
        return path
    if path.is_file():
        foreign.refuse(path, foreign.read(path) if path.suffix.lower() == ".json" else {})
        raise ConfigError([f"{path} is no preset: presets of lorakit are TOML files (.toml)"])
    file = preset_folder() / f"{preset}.toml"
    if not file.is_file():
        names = preset_names()
        raise ConfigError(
            [f"unknown preset {label(str(preset))!r}{suggest(str(preset), names)}; presets: {', '.join(names)}"]
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
        raise ConfigError([f"{path.name}: not valid TOML: {error}{hint}"]) from None


def _contradictions(config: Config) -> list[str]:
    """Problems of options that are valid alone but not together."""
    data, adapter, optimizer, train = config.data, config.adapter, config.optimizer, config.train
    problems = []
    lengths = [f"train.{name}" for name in LENGTHS if getattr(train, name) is not None]
    if len(lengths) != 1:
        detail = f"{' and '.join(lengths)} are set" if lengths else "none is set"
        problems.append(f"set exactly one of {', '.join('train.' + n for n in LENGTHS)}: {detail}")
    if train.min_steps and train.steps_per_image is None:
        problems.append("train.min_steps has no effect without train.steps_per_image: leave it out")
    if optimizer.learning_rate == 0:
        problems.append("optimizer.learning_rate = 0 trains nothing: give a rate above 0")
    problems += _text_encoder_problems(optimizer, adapter) + _factor_problems(config)
    if adapter.new_tokens and not re.fullmatch(r"[\w-]+", unquote(data.name).partition(" ")[0]):
        problems.append("adapter.new_tokens needs a trigger of letters and digits: begin data.name with one, 'sks dog'")
    problems += _schedule_problems(optimizer) + _noise_problems(train)
    if data.keep_tags and not (data.shuffle_tags or data.tag_dropout):
        problems.append("data.keep_tags has no effect without data.shuffle_tags or data.tag_dropout")
    if train.init_from and METHODS[adapter.method].begins_from_base:
        problems.append(
            f"train.init_from makes no sense with adapter.method = {adapter.method!r}, which begins from the base"
        )
    problems += _prior_problems(train, data)
    if adapter.new_tokens and data.concepts == "folders":
        problems.append("adapter.new_tokens learns one trigger: data.concepts = 'folders' has one for each folder")
    augments = data.flip or data.crop_jitter > 0 or data.color_jitter > 0
    if data.variants > 1 and not augments:
        problems.append("data.variants > 1 needs data.flip, data.crop_jitter or data.color_jitter")
    if data.variants == 1 and augments:
        problems.append("data.flip, data.crop_jitter and data.color_jitter need data.variants of 2 or more")
    if config.memory.gradient_checkpointing and config.memory.limit_gib is not None:
        problems.append("memory.limit_gib chooses the blocks to recompute: leave out memory.gradient_checkpointing")
    if data.max_tokens is not None and data.max_tokens % 75:
        problems.append(f"data.max_tokens = {data.max_tokens}: texts are read in chunks of 75: set 75, 150 or 225")
    problems += sample_prompts.problems(config.sample)
    problems += full.problems(config)
    problems += _resolution_problems(data)
    if config.memory.compile and (config.memory.base_storage != "full" or config.memory.stream_base):
        problems.append("memory.compile needs the weights whole: no memory.stream_base, memory.base_storage = 'full'")
    if config.memory.channels_last and (config.memory.base_storage != "full" or config.memory.stream_base):
        problems.append(
            "memory.channels_last needs the weights whole: no memory.stream_base, memory.base_storage = 'full'"
        )
    if config.memory.channels_last and (config.memory.compile or config.engine_is_off):
        problems.append("memory.channels_last needs memory.engine = 'fused' and no memory.compile")
    if config.memory.engine == "plain" and config.memory.compile:
        problems.append("memory.compile compiles fused blocks: set memory.engine = 'fused'")
    if config.memory.engine == "plain" and (config.memory.base_storage != "full" or config.memory.stream_base):
        problems.append("memory.base_storage and memory.stream_base need memory.engine = 'fused'")
    if config.memory.compile and (config.memory.gradient_checkpointing or config.memory.limit_gib is not None):
        problems.append("memory.compile goes neither with memory.gradient_checkpointing nor with memory.limit_gib")
    if config.memory.compile and adapter.largest_dropout > 0:
        problems.append("memory.compile needs adapter.dropout = 0: compiled code would draw other numbers")
    return problems


def _resolution_problems(data: DataConfig) -> list[str]:
    """Sides that no base has, or that are no lower ones."""
    names = ["data.resolution", *["data.lower_resolutions"] * len(data.lower_resolutions)]
    sides = list(zip(names, data.resolutions, strict=True))
    problems = [f"{name} = {side}: must be a multiple of 8" for name, side in sides if side % 8]
    problems += [
        f"data.folder_resolutions.{label(name)} = {side}: must be a multiple of 8, and not above data.resolution = "
        f"{data.resolution}"
        for name, side in data.folder_resolutions.items()
        if side % 8 or side > data.resolution
    ]
    lower = data.lower_resolutions
    if lower and data.folder_resolutions:
        problems.append("data.folder_resolutions and data.lower_resolutions are both set: leave one out")
    if any(side >= data.resolution for side in lower) or len({*lower}) < len(lower):
        problems.append(
            f"data.lower_resolutions = {to_text(lower)}: each must be below data.resolution = {data.resolution}, and "
            "stand there once"
        )
    return problems


def _schedule_problems(optimizer: OptimizerConfig) -> list[str]:
    """Options of the learning rate's schedule that have no effect, or contradict each other."""
    problems = []
    if "lr" in optimizer.args:
        problems.append("optimizer.args.lr has no effect: set optimizer.learning_rate")
    if optimizer.warmup_steps and optimizer.warmup_ratio:
        problems.append("optimizer.warmup_steps and optimizer.warmup_ratio are both set: leave one out")
    needs = {"lr_cycles": "cosine_with_restarts", "lr_power": "polynomial", "lr_decay_ratio": "wsd"}
    for name, schedule in needs.items():
        if getattr(optimizer, name) != getattr(OptimizerConfig, name) and optimizer.lr_scheduler != schedule:
            problems.append(f"optimizer.{name} has no effect without optimizer.lr_scheduler = {schedule!r}")
    if optimizer.min_lr_ratio and optimizer.lr_scheduler == "constant":
        problems.append("optimizer.min_lr_ratio has no effect with a constant rate: choose an optimizer.lr_scheduler")
    return problems


def _factor_problems(config: Config) -> list[str]:
    """Options of LoRA's two factors with a method that has others."""
    problems, spec, method = [], METHODS[config.adapter.method], config.adapter.method
    if config.optimizer.loraplus_lr_ratio != 1 and not spec.has_ab_factors:
        why = "both of them begin from the base" if spec.begins_from_base else f"{method} has others"
        problems.append(
            f"optimizer.loraplus_lr_ratio is for a factor A that begins at random and a B that begins at 0: {why}; "
            "leave it out"
        )
    options = {"train.max_weight_norm": config.train.max_weight_norm}
    options |= {f"adapter.{name}": getattr(config.adapter, name, 0.0) for name in ("rank_dropout", "module_dropout")}
    if not spec.has_product_factors:
        problems += [
            f"{option} is for a change that is the product of its factors alone, which that of {method} is not; "
            "leave it out"
            for option, value in options.items()
            if value
        ]
    return problems


def _text_encoder_problems(optimizer: OptimizerConfig, adapter: AdapterConfig) -> list[str]:
    """Options of the text encoders' learning rates where none is trained."""
    problems = []
    if optimizer.text_encoder_learning_rate == 0:
        problems.append(
            "optimizer.text_encoder_learning_rate = 0 trains no text encoder: leave it out, with "
            "adapter.train_text_encoder and adapter.new_tokens"
        )
    elif optimizer.text_encoder_learning_rate is not None and not adapter.trains_text:
        problems.append("optimizer.text_encoder_learning_rate needs adapter.train_text_encoder = true or new_tokens")
    if not adapter.trains_text:
        names = ("text_encoder_2_learning_rate", "text_encoder_stop")
        unused = [name for name in names if getattr(optimizer, name) != getattr(OptimizerConfig, name)]
        problems += [f"optimizer.{name} needs adapter.train_text_encoder = true or new_tokens" for name in unused]
    return problems


def _prior_problems(train: TrainConfig, data: DataConfig) -> list[str]:
    """Options of a prior that the run does not have."""
    problems = [
        f"train.{name} has no effect with train.prior = 'none': choose 'images' or 'teacher'"
        for name in ("prior_loss_weight", "prior_prompts")
        if train.prior == "none" and getattr(train, name) != getattr(TrainConfig, name)
    ]
    triggered = [text for text in train.prior_prompts if data.trigger and data.trigger in text.split()]
    if triggered:
        problems.append(f"train.prior_prompts: {triggered[0]!r} has the trigger {data.trigger}, which is to be learned")
    problems += [
        f"train.{name} has no effect with train.prior = {train.prior!r}: choose 'images'"
        for name in ("class_images", "prior_target")
        if train.prior != "images" and getattr(train, name) != getattr(TrainConfig, name)
    ]
    if train.prior != "images" and data.class_folder:
        problems.append(f"data.class_folder has no effect with train.prior = {train.prior!r}: choose 'images'")
    return problems


def _noise_problems(train: TrainConfig) -> list[str]:
    """Options of noise levels and loss weights that contradict each other."""
    problems = []
    if train.timestep_low >= train.timestep_high:
        problems.append("train.timestep_low must be below train.timestep_high")
    if train.snr_weighting == "soft_min" and train.min_snr_gamma is None:
        problems.append("train.snr_weighting = 'soft_min' needs train.min_snr_gamma; 5 is usual")
    if train.snr_weighting == "debiased" and train.min_snr_gamma is not None:
        problems.append("train.min_snr_gamma has no effect with train.snr_weighting = 'debiased': leave one out")
    return problems
