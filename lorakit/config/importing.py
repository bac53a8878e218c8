"""Convert a config of another trainer: each setting that has an equivalent option."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lorakit.config import sample_prompts, sd_scripts
from lorakit.config.foreign import MARKS, flatten, program_of
from lorakit.config.loading import from_tables, to_toml
from lorakit.config.option import to_text
from lorakit.config.sd_scripts import LR_WEIGHTS, block_patterns, square_side
from lorakit.core.errors import ConfigError
from lorakit.core.messages import Message, join

Convert = Callable[[Any], Any]
Options = dict[str, Any]
_OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "paged_adamw8bit", "lion": "lion"}
_OPTIMIZERS |= {"adafactor": "adafactor", "prodigy": "prodigy"}
_PRECISION = {"no": "fp32", "float": "fp32", "fp16": "fp16", "bf16": "bf16"}
_PRECISION |= {"float_32": "fp32", "float_16": "fp16", "bfloat_16": "bf16"}
_SCHEDULES = {name: name for name in ("constant", "cosine", "linear", "cosine_with_restarts", "polynomial", "rex")}
_SCHEDULES |= {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd"}
_METHODS = {"standard": "lora", "networks.lora": "lora", "lora": "lora", "kohya locon": "lora"}
_METHODS |= {"lycoris/loha": "loha", "lycoris/lokr": "lokr", "lycoris/locon": "lora", "loha": "loha", "lokr": "lokr"}


def _side(value: object) -> int | list[int]:
    """As `square_side`; a tuple has several sides."""
    return [square_side(side) for side in value] if isinstance(value, tuple) else square_side(value)


def _integer(value: object) -> int:
    """A number of steps. A fraction (a share of the run) raises ValueError."""
    if float(str(value)) % 1:
        raise ValueError
    return int(float(str(value)))


def _named(names: Mapping[str, str]) -> Convert:
    return lambda value: names[str(value.get("optimizer") if isinstance(value, Mapping) else value).lower()]


_SAME: Convert = lambda value: value  # noqa: E731
# Key of another program -> option, and the function that converts its value. If two keys have one option, the later row
# counts.
_TWINS: dict[str, tuple[str, Convert]] = {
    **dict.fromkeys(("pretrained_model_name_or_path", "base_model_name"), ("model.base", str)),
    "v_parameterization": ("model.prediction_type", lambda on: "v_prediction" if on else "auto"),
    **dict.fromkeys(("train_data_dir", "image_dir"), ("data.folder", str)),
    "class_tokens": ("data.name", str),
    "reg_data_dir": ("data.class_folder", str),
    **dict.fromkeys(("resolution", "max_resolution"), ("data.resolution", _side)),
    "caption_dropout_rate": ("data.caption_dropout", float),
    "shuffle_caption": ("data.shuffle_tags", bool),
    "keep_tokens": ("data.keep_tags", int),
    "caption_tag_dropout_rate": ("data.tag_dropout", float),
    "caption_prefix": ("data.caption_prefix", str),
    "caption_suffix": ("data.caption_suffix", str),
    "enable_wildcard": ("data.wildcards", bool),
    "flip_aug": ("data.flip", bool),
    **{key: ("adapter.method", _named(_METHODS)) for key in ("network_module", "LoRA_type", "peft_type")},
    **dict.fromkeys(("network_dim", "lora_rank"), ("adapter.rank", int)),
    **dict.fromkeys(("network_alpha", "lora_alpha"), ("adapter.alpha", float)),
    "network_dropout": ("adapter.dropout", float),
    "block_dims": ("adapter.ranks", lambda text: {name: int(rank) for name, rank in block_patterns(text).items()}),
    "block_alphas": ("adapter.alphas", block_patterns),
    "rank_dropout": ("adapter.rank_dropout", float),
    "module_dropout": ("adapter.module_dropout", float),
    "scale_weight_norms": ("train.max_weight_norm", float),
    **{key: ("optimizer.name", _named(_OPTIMIZERS)) for key in ("optimizer_type", "optimizer")},
    **dict.fromkeys(("learning_rate", "unet_lr"), ("optimizer.learning_rate", float)),
    "optimizer_args": ("optimizer.args", sd_scripts.optimizer_arguments),
    "loraplus_lr_ratio": ("optimizer.loraplus_lr_ratio", float),
    "stop_text_encoder_training": ("optimizer.text_encoder_stop", lambda percent: float(percent) / 100),
    "text_encoder_lr": ("optimizer.text_encoder_learning_rate", float),
    **{key: ("optimizer.lr_scheduler", _named(_SCHEDULES)) for key in ("lr_scheduler", "learning_rate_scheduler")},
    **dict.fromkeys(("lr_warmup_steps", "learning_rate_warmup_steps"), ("optimizer.warmup_steps", _integer)),
    "lr_warmup": ("optimizer.warmup_ratio", lambda percent: float(percent) / 100),
    "lr_scheduler_num_cycles": ("optimizer.lr_cycles", int),
    "lr_scheduler_power": ("optimizer.lr_power", float),
    **dict.fromkeys(("lr_scheduler_min_lr_ratio", "learning_rate_min_factor"), ("optimizer.min_lr_ratio", float)),
    "max_train_steps": ("train.steps", int),
    **dict.fromkeys(("epoch", "epochs", "max_train_epochs"), ("train.epochs", int)),
    **dict.fromkeys(("train_batch_size", "batch_size"), ("train.batch_size", int)),
    "gradient_accumulation_steps": ("train.gradient_accumulation_steps", int),
    **dict.fromkeys(("max_grad_norm", "clip_grad_norm"), ("train.max_grad_norm", float)),
    "seed": ("train.seed", int),
    "sample_prompts": ("sample.prompts", sample_prompts.read_file),
    "sample_at_first": ("sample.at_start", bool),
    "vae": ("model.vae", str),
    "clip_skip": ("model.clip_skip", int),
    "max_token_length": ("data.max_tokens", int),
    "cache_latents_to_disk": ("data.cache", lambda on: "disk" if on else "memory"),
    "xformers": ("memory.attention", lambda on: "xformers" if on else "sdpa"),
    "alpha_mask": ("train.masked_loss", bool),
    "prior_loss_weight": ("train.prior_loss_weight", float),
    "loss_type": ("train.loss", _named({"l2": "mse", "huber": "huber"})),
    "debiased_estimation_loss": ("train.snr_weighting", lambda on: "debiased" if on else "min"),
    "min_timestep": ("train.timestep_low", lambda step: float(step) / 1000),
    "max_timestep": ("train.timestep_high", lambda step: float(step) / 1000),
    "multires_noise_discount": ("train.pyramid_noise", float),
    "ema_decay": ("train.ema_decay", float),
    "min_snr_gamma": ("train.min_snr_gamma", float),
    **dict.fromkeys(("noise_offset", "offset_noise_weight"), ("train.noise_offset", float)),
    **dict.fromkeys(("masked_loss", "masked_training"), ("train.masked_loss", bool)),
    "save_every_n_steps": ("train.save_every", int),
    "network_weights": ("train.init_from", str),
    **{key: ("memory.mixed_precision", _named(_PRECISION)) for key in ("mixed_precision", "train_dtype")},
    "gradient_checkpointing": ("memory.gradient_checkpointing", lambda on: on is True or str(on).upper() == "ON"),
    "sample_every_n_steps": ("sample.every", int),
    "output_dir": ("output.folder", str),
    "save_precision": ("output.dtype", _named(_PRECISION)),
}
# Keys that `_settle` handles together with others.
_READ_ELSEWHERE = {"text_encoder", "unet", "network_train_unet_only", "conv_dim", "zero_terminal_snr"}
_READ_ELSEWHERE |= {*LR_WEIGHTS, "block_lr_zero_threshold", "data.concepts", "folder_resolutions"}
# Length of a short key: in "epoc", one letter is a large part.
MAX_SHORT_KEY = 6
# Defaults of sd-scripts.
DEFAULTS = {"network_dim": 4, "network_alpha": 1.0}
# Values that mean "not used" in another program.
_UNSET: tuple[object, ...] = (None, "", 0, False, [], {})


class Imported(NamedTuple):
    """The converted config: its TOML; keys and values without an equivalent; notes on inserted defaults and joined
    keys."""

    text: str
    rest: list[str]
    notes: list[str]


def convert(tables: Mapping[str, object]) -> Imported:
    """Convert a config of another program.

    Raises:
        ConfigError: the program is unknown.
    """
    if not (program := program_of(tables)):
        raise ConfigError("this is neither a config of {programs}", join(" nor of ", MARKS))
    options, rest, notes = Options(), list[str](), list[str]()
    has_data_sets = isinstance(tables.get("datasets"), list)
    values = flatten({key: table for key, table in tables.items() if not has_data_sets or key != "datasets"})
    if has_data_sets:
        try:
            shared, rest, notes = sd_scripts.data_sets(dict(tables))
        except (ValueError, TypeError, KeyError, IndexError, OverflowError):  # not sd-scripts' types
            shared, rest = {}, [f"datasets = {to_text(tables['datasets'])}"]
        values |= shared
    values |= _network_args(values)
    if program == "OneTrainer" and "," in str(values.get("resolution")):  # each photo is trained at each of them
        values["resolution"] = tuple(str(values["resolution"]).split(","))
    if program != "OneTrainer":
        absent = {key: value for key, value in DEFAULTS.items() if values.get(key) in _UNSET}
        notes += [
            Message("{key} = {value}: not set, so sd-scripts' own default", key, value) for key, value in absent.items()
        ]
        values |= absent
    for key in sorted(values, key=_place):
        value = values[key]
        if value in _UNSET or key in _READ_ELSEWHERE or (key, str(value)) == ("clip_skip", "1"):
            continue
        option, read_value = _TWINS.get(key, ("", _SAME))
        try:
            candidate = {option: read_value(value)} if option else {}
            _check(candidate)
        except (ConfigError, ValueError, TypeError, KeyError, IndexError, OverflowError, SyntaxError):
            candidate = {}
        options |= candidate
        if not candidate:
            rest.append(
                Message("{key} = {value}{hint}", key, json.dumps(value, ensure_ascii=False, default=str), _hint(key))
            )
    _set_block_rates(options, values, rest)
    notes += _settle(options, values, is_kohya=program != "OneTrainer")
    while True:
        try:
            return Imported(to_toml(from_tables({}, options)), rest, notes)
        except ConfigError as error:
            problem = error.problems[0]
            named = sorted((key for key in options if key in problem), key=problem.index)
            if not named:
                raise
            rest.append(Message("{key} = {value} ({problem})", named[0], options.pop(named[0]), problem))


def _set_block_rates(options: Options, values: Mapping[str, object], rest: list[str]) -> None:
    """Convert rates of blocks to patterns; a block with rate 0 has no adapter."""
    weights = {name: values[name] for name in LR_WEIGHTS if values.get(name) not in _UNSET}
    if not weights:
        return
    try:
        rates = sd_scripts.block_rates(values)
    except (ValueError, ZeroDivisionError):
        rest += [
            Message("{name} = {value} (12 values each, or 9 of SDXL)", name, value) for name, value in weights.items()
        ]
        return
    zero = {pattern: 0 for pattern, rate in rates.items() if rate == 0}
    if zero:
        options["adapter.ranks"] = options.get("adapter.ranks", {}) | zero
    ranks = options.get("adapter.ranks", {})
    options["optimizer.rates"] = {
        pattern: rate for pattern, rate in rates.items() if rate > 0 and ranks.get(pattern, 1)
    }


def _network_args(values: Mapping[str, object]) -> dict[str, object]:
    """Convert the arguments "key=value" of sd-scripts' networks to keys; those without an equivalent stay in the
    list."""
    pairs = sd_scripts.arguments(values.get("network_args"))
    twins = {key: text for key, text in pairs.items() if key in {*_TWINS, *_READ_ELSEWHERE}}
    rest = [f"{key}={text}" for key, text in pairs.items() if key not in twins]
    return {**twins, "network_args": rest} if pairs else {}


def _hint(key: str) -> str:
    """A hint with the nearest convertible key, if it was probably meant."""
    names = {*_TWINS, *_READ_ELSEWHERE}
    cutoff = 0.9 if len(key) > MAX_SHORT_KEY else 0.74
    matches = difflib.get_close_matches(key, names, n=1, cutoff=cutoff) if key not in names else []
    return Message(" (did you mean {name}?)", matches[0]) if matches else ""


def _place(key: str) -> int:
    return list(_TWINS).index(key) if key in _TWINS else len(_TWINS)


def _check(options: Mapping[str, object]) -> None:
    """Raise a ConfigError for a value out of range; contradictions are resolved later."""
    for key in options:
        try:
            from_tables({}, {"train.steps": 1, **options})
        except ConfigError as error:
            if any(problem.startswith(f"{key} =") for problem in error.problems):
                raise


def _settle(options: Options, values: Mapping[str, object], *, is_kohya: bool) -> list[str]:
    """Make related options consistent, as the other program reads them. Return messages about inserted values."""
    notes = []
    if "train.epochs" in options and "train.steps" in options:
        del options["train.steps" if values.get("max_train_epochs") else "train.epochs"]
    if not {"train.epochs", "train.steps"} & set(options):
        options["train.steps"] = 1600
        notes.append("max_train_steps = 1600: not set, so sd-scripts' own default")
    text = values.get("text_encoder")
    trains_text = text.get("train", False) if isinstance(text, Mapping) else not values.get("network_train_unet_only")
    trains_text = trains_text and values.get("text_encoder_lr") != 0
    options["adapter.train_text_encoder"] = bool(trains_text)
    if is_kohya and trains_text and "text_encoder_lr" not in values and "network_train_unet_only" not in values:
        notes.append("network_train_unet_only = false: not set, so sd-scripts' own default")
    if values.get("zero_terminal_snr") and values.get("v_parameterization"):
        options["model.prediction_type"] = "v_prediction_zero_snr"
    arguments = options.get("optimizer.args", {})
    if "weight_decay" in arguments:
        options["optimizer.weight_decay"] = float(arguments.pop("weight_decay"))
    if isinstance(sides := values.get("folder_resolutions"), Mapping):
        own = {name: square_side(side) for name, side in sides.items()}
        options["data.folder_resolutions"] = {
            name: side for name, side in own.items() if side != options.get("data.resolution")
        }
    options |= {"data.concepts": values["data.concepts"]} if "data.concepts" in values else {}
    if not trains_text:
        options.pop("optimizer.text_encoder_learning_rate", None)
    warmup = float(values.get("lr_warmup_steps") or 0)  # type: ignore[arg-type]
    if 0 < warmup < 1:
        options["optimizer.warmup_ratio"] = warmup
    if str(values.get("ema", "OFF")).upper() == "OFF":  # OneTrainer keeps the decay of a disabled EMA
        options.pop("train.ema_decay", None)
    if options.get("data.flip"):
        options["data.variants"] = 2
    if "data.class_folder" in options:
        options["train.prior"] = "images"
    else:
        options.pop("train.prior_loss_weight", None)
    options["adapter.target_modules"] = "linear"
    if values.get("LoRA_type") in ("Kohya LoCon", "LyCORIS/LoCon") or values.get("conv_dim"):
        options["adapter.target_modules"] = "linear+conv"
        return notes
    for key in {"adapter.ranks", "adapter.alphas", "optimizer.rates"} & set(options):  # only attention blocks
        patterns: Any = options[key]
        outside = re.compile(r"resnets|samplers")
        options[key] = {pattern: value for pattern, value in patterns.items() if not outside.search(pattern)}
    return notes
