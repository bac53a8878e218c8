"""Convert a config of another trainer: each of its settings that has a counterpart among the options."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lorakit.config.foreign import MARKS, flatten, program_of
from lorakit.config.loading import from_tables, to_toml
from lorakit.core.errors import ConfigError

Convert = Callable[[Any], Any]
_OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "paged_adamw8bit", "lion": "lion"}
_OPTIMIZERS |= {"adafactor": "adafactor", "prodigy": "prodigy"}
_PRECISION = {"no": "fp32", "float": "fp32", "fp16": "fp16", "bf16": "bf16"}
_PRECISION |= {"float_32": "fp32", "float_16": "fp16", "bfloat_16": "bf16"}
_SCHEDULES = {name: name for name in ("constant", "cosine", "linear", "cosine_with_restarts", "polynomial", "rex")}
_SCHEDULES |= {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd"}
_METHODS = {"standard": "lora", "networks.lora": "lora", "lora": "lora", "kohya locon": "lora"}
_METHODS |= {"lycoris/loha": "loha", "lycoris/lokr": "lokr", "lycoris/locon": "lora", "loha": "loha", "lokr": "lokr"}


def _side(value: object) -> int | list[int]:
    """The side of the square of the area of "768,512", "768x512", 512 or [512, 512]; a multiple of 8. A tuple has
    several sides."""
    if isinstance(value, tuple):
        return [round(int(side) / 8) * 8 for side in value]
    parts = value if isinstance(value, list) else str(value).replace("x", ",").split(",")
    return round(math.sqrt(int(parts[0]) * int(parts[-1])) / 8) * 8


def _integer(value: object) -> int:
    """A count of steps; a share of the run, below 1, is none."""
    if float(str(value)) % 1:
        raise ValueError
    return int(float(str(value)))


def _named(names: Mapping[str, str]) -> Convert:
    return lambda value: names[str(value.get("optimizer") if isinstance(value, Mapping) else value).lower()]


_SAME: Convert = lambda value: value  # noqa: E731
# A key of another program -> option, and how its value is read. Of two keys for one option the later row counts.
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
    "block_dims": ("adapter.ranks", lambda text: {pattern: int(rank) for pattern, rank in _blocks(text).items()}),
    "block_alphas": ("adapter.alphas", lambda text: _blocks(text)),
    "rank_dropout": ("adapter.rank_dropout", float),
    "module_dropout": ("adapter.module_dropout", float),
    "scale_weight_norms": ("train.max_weight_norm", float),
    **{key: ("optimizer.name", _named(_OPTIMIZERS)) for key in ("optimizer_type", "optimizer")},
    **dict.fromkeys(("learning_rate", "unet_lr"), ("optimizer.learning_rate", float)),
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
# Read together with others, by `_settle`.
_READ_ELSEWHERE = {"text_encoder", "unet", "network_train_unet_only", "conv_dim"}
# The values that mean "not used" in another program.
_UNSET: tuple[object, ...] = (None, "", 0, False, [], {})


def convert(tables: Mapping[str, object]) -> tuple[str, list[str]]:
    """A lorakit config as TOML, and the keys that have no twin or whose value has none, each with its value.

    Raises:
        ConfigError: it is a config of no program that is known here.
    """
    if not (program := program_of(tables)):
        raise ConfigError([f"neither a config of {' nor of '.join(MARKS)}"])
    values, options, rest = flatten(tables), dict[str, Any](), list[str]()
    values |= _network_args(values)
    if program == "OneTrainer" and "," in str(values.get("resolution")):  # several, each photo at each
        values["resolution"] = tuple(str(values["resolution"]).split(","))
    if program != "OneTrainer":
        values = {"network_dim": 4, "network_alpha": 1.0} | values  # sd-scripts' own defaults
    for key in sorted(values, key=_place):
        value = values[key]
        if value in _UNSET or key in _READ_ELSEWHERE:
            continue
        option, read_value = _TWINS.get(key, ("", _SAME))
        try:
            candidate = {option: read_value(value)} if option else {}
            _check(candidate)
        except (ConfigError, ValueError, TypeError, KeyError, IndexError, OverflowError):
            candidate = {}
        options |= candidate
        if not candidate:
            rest.append(f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}")
    _settle(options, values)
    while True:
        try:
            return to_toml(from_tables({}, options)), rest
        except ConfigError as error:
            problem = error.problems[0]
            named = sorted((key for key in options if key in problem), key=problem.index)
            if not named:
                raise
            rest.append(f"{named[0]} = {options.pop(named[0])} ({problem})")


def _network_args(values: Mapping[str, object]) -> dict[str, object]:
    """The arguments "key=value" of sd-scripts' networks as keys of their own; what has no twin stays in the list."""
    items = values.get("network_args")
    pairs = [str(item).partition("=") for item in items] if isinstance(items, list) else []
    twins = {key.strip(): text.strip() for key, _, text in pairs if key.strip() in {*_TWINS, *_READ_ELSEWHERE}}
    rest = ["".join(pair) for pair in pairs if pair[0].strip() not in twins]
    return {**twins, "network_args": rest} if pairs else {}


def _blocks(text: object) -> dict[str, float]:
    """sd-scripts' value of each block, 25 of Stable Diffusion 1 and 2 or 23 of SDXL, as patterns of layers."""
    numbers = [float(item) for item in (text if isinstance(text, list) else str(text).split(","))]
    if len(numbers) not in (23, 25):
        raise ValueError
    is_sdxl, patterns = len(numbers) == 23, dict[str, float]()
    last, offset, attentions = (
        (2, 2, {"down": (1, 2), "up": (0, 1)}) if is_sdxl else (3, 1, {"down": (0, 1, 2), "up": (1, 2, 3)})
    )
    for side, first, count in (("down", offset, 2), ("up", 13, 3)):
        for block in range(last + 1):
            kinds = ["resnets"] + ["attentions"] * (block in attentions[side])
            places = {f"{kind}.{place}": place for kind in kinds for place in range(count)}
            places |= {f"{side}samplers.0": 2} if block < last else {}
            for layer, place in places.items():
                patterns[f"unet.{side}_blocks.{block}.{layer}.*"] = numbers[first + 3 * block + place]
    middle = {"resnets.0.*": 10, "attentions.0.*": 11, "resnets.1.*": 12} if is_sdxl else {"*": 12}
    return patterns | {f"unet.mid_block.{name}": numbers[place] for name, place in middle.items()}


def _place(key: str) -> int:
    return list(_TWINS).index(key) if key in _TWINS else len(_TWINS)


def _check(options: Mapping[str, object]) -> None:
    """Raise a ConfigError for a value out of range; what belongs together is settled later."""
    for key in options:
        try:
            from_tables({}, {"train.steps": 1, **options})
        except ConfigError as error:
            if any(problem.startswith(f"{key} =") for problem in error.problems):
                raise


def _settle(options: dict[str, object], values: Mapping[str, object]) -> None:
    """Make what belongs together agree, as the other program reads it."""
    if "train.epochs" in options and "train.steps" in options:
        del options["train.steps" if values.get("max_train_epochs") else "train.epochs"]
    if not {"train.epochs", "train.steps"} & set(options):
        options["train.steps"] = 1600  # sd-scripts' own default
    text = values.get("text_encoder")
    trains_text = text.get("train", False) if isinstance(text, Mapping) else not values.get("network_train_unet_only")
    trains_text = trains_text and values.get("text_encoder_lr") != 0
    options["adapter.train_text_encoder"] = bool(trains_text)
    if not trains_text:
        options.pop("optimizer.text_encoder_learning_rate", None)
    warmup = float(values.get("lr_warmup_steps") or 0)  # type: ignore[arg-type]
    if 0 < warmup < 1:
        options["optimizer.warmup_ratio"] = warmup
    if str(values.get("ema", "OFF")).upper() == "OFF":  # OneTrainer keeps the decay of what is off
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
        return
    for key in {"adapter.ranks", "adapter.alphas"} & set(options):  # only attention blocks have adapters
        patterns: Any = options[key]
        outside = re.compile(r"resnets|samplers")
        options[key] = {pattern: value for pattern, value in patterns.items() if not outside.search(pattern)}
