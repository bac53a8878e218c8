"""Find options that contradict each other, or have no effect together."""

from __future__ import annotations

import re
from pathlib import PurePath

from lorakit.config import embedding, full, photo_edits, sample_prompts
from lorakit.config.option import label, to_text, unquote
from lorakit.config.schema import LENGTHS, Config, DataConfig, OptimizerConfig, TrainConfig
from lorakit.core import names
from lorakit.core.messages import Message, join
from lorakit.core.names import DETERMINERS, slug
from lorakit.core.registry import METHODS


def problems(config: Config) -> list[str]:
    """Problems of options that are valid alone but not together."""
    data, adapter, optimizer, train = config.data, config.adapter, config.optimizer, config.train
    problems = list[str]()
    lengths = [f"train.{name}" for name in LENGTHS if getattr(train, name) is not None]
    if len(lengths) != 1:
        detail = Message("{names} are set", join(" and ", lengths)) if lengths else "none is set"
        problems.append(
            Message("set exactly one of {options}: {detail}", ", ".join(f"train.{n}" for n in LENGTHS), detail)
        )
    if train.min_steps and train.steps_per_image is None:
        problems.append("train.min_steps has no effect without train.steps_per_image: leave it out")
    if optimizer.learning_rate == 0:
        problems.append("optimizer.learning_rate = 0 trains nothing: give a rate above 0")
    problems += _text_encoder_problems(config) + _factor_problems(config)
    is_named = bool(data.name) or not adapter.words_only
    if adapter.new_tokens and is_named and not re.fullmatch(r"[\w-]+", unquote(data.name).partition(" ")[0]):
        problems.append("adapter.new_tokens needs a trigger of letters and digits: begin data.name with one, 'sks dog'")
    problems += _name_problems(config) + _schedule_problems(optimizer) + _noise_problems(train)
    if data.keep_tags and not (data.shuffle_tags or data.tag_dropout):
        problems.append("data.keep_tags has no effect without data.shuffle_tags or data.tag_dropout")
    if train.init_from and METHODS[adapter.method].begins_from_base:
        problems.append(
            Message(
                "train.init_from makes no sense with adapter.method = {method!r}, which begins from the base",
                adapter.method,
            )
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
        problems.append(
            Message("data.max_tokens = {tokens}: texts are read in chunks of 75: set 75, 150 or 225", data.max_tokens)
        )
    problems += sample_prompts.problems(config.sample)
    problems += full.problems(config) + embedding.problems(config)
    return problems + _resolution_problems(data) + photo_edits.problems(data) + _engine_problems(config)


def _name_problems(config: Config) -> list[str]:
    """Names of files that Windows does not have: a run is to be copied to any machine."""
    data, folder = config.data, PurePath(config.output.folder).name
    has_letters = re.search(r"[^\W_]", data.name) is not None
    is_device = (has_letters and not slug(data.name)) or (config.adapter.new_tokens and names.is_device(data.trigger))
    problems = list[str]()
    if is_device:
        problems.append(Message(names.DEVICE, "data.name", data.name))
    if names.is_device(folder):
        problems.append(Message(names.DEVICE, "output.folder", folder))
    return problems


def _engine_problems(config: Config) -> list[str]:
    """Problems of engine and storage options that exclude each other."""
    memory, problems = config.memory, list[str]()
    if memory.compile and (memory.base_storage != "full" or memory.stream_base):
        problems.append(
            "memory.compile needs unquantized weights on the card: set memory.stream_base = false and "
            "memory.base_storage = 'full'"
        )
    if memory.channels_last == "on" and (memory.base_storage != "full" or memory.stream_base):
        problems.append(
            "memory.channels_last = 'on' needs unquantized weights on the card: set "
            "memory.stream_base = false and memory.base_storage = 'full'"
        )
    if memory.channels_last == "on" and (memory.compile or config.engine_is_off):
        problems.append("memory.channels_last = 'on' needs memory.engine = 'fused' and memory.compile = false")
    if memory.engine == "plain" and memory.compile:
        problems.append("memory.compile compiles fused blocks: set memory.engine = 'fused'")
    if memory.engine == "plain" and (memory.base_storage != "full" or memory.stream_base):
        problems.append("memory.base_storage and memory.stream_base need memory.engine = 'fused'")
    if memory.compile and (memory.gradient_checkpointing or memory.limit_gib is not None):
        problems.append(
            "memory.compile cannot be combined with memory.gradient_checkpointing or memory.limit_gib: leave them out"
        )
    if memory.compile and config.adapter.largest_dropout > 0:
        problems.append("memory.compile needs adapter.dropout = 0: compiled code would draw other numbers")
    return problems


def _resolution_problems(data: DataConfig) -> list[str]:
    """Problems of resolutions that no base supports, or of lower resolutions that are not lower."""
    names = ["data.resolution", *["data.lower_resolutions"] * len(data.lower_resolutions)]
    sides = list(zip(names, data.resolutions, strict=True))
    problems: list[str] = [
        Message("{name} = {side}: must be a multiple of 8", name, side) for name, side in sides if side % 8
    ]
    problems += [
        Message(
            "data.folder_resolutions.{name} = {side}: must be a multiple of 8, and not above data.resolution = {top}",
            label(name),
            side,
            data.resolution,
        )
        for name, side in data.folder_resolutions.items()
        if side % 8 or side > data.resolution
    ]
    lower = data.lower_resolutions
    if lower and data.folder_resolutions:
        problems.append("data.folder_resolutions and data.lower_resolutions are both set: leave one out")
    if any(side >= data.resolution for side in lower) or len({*lower}) < len(lower):
        problems.append(
            Message(
                "data.lower_resolutions = {sides}: each must be below data.resolution = {side}, and stand there once",
                to_text(lower),
                data.resolution,
            )
        )
    return problems


def _schedule_problems(optimizer: OptimizerConfig) -> list[str]:
    """Problems of learning-rate schedule options that have no effect or contradict each other."""
    problems = []
    if "lr" in optimizer.args:
        problems.append("optimizer.args.lr has no effect: set optimizer.learning_rate")
    if optimizer.warmup_steps and optimizer.warmup_ratio:
        problems.append("optimizer.warmup_steps and optimizer.warmup_ratio are both set: leave one out")
    needs = {"lr_cycles": "cosine_with_restarts", "lr_power": "polynomial", "lr_decay_ratio": "wsd"}
    for name, schedule in needs.items():
        if getattr(optimizer, name) != getattr(OptimizerConfig, name) and optimizer.lr_scheduler != schedule:
            problems.append(
                Message("optimizer.{name} has no effect without optimizer.lr_scheduler = {schedule!r}", name, schedule)
            )
    if optimizer.min_lr_ratio and optimizer.lr_scheduler == "constant":
        problems.append("optimizer.min_lr_ratio has no effect with a constant rate: choose an optimizer.lr_scheduler")
    return problems


def _factor_problems(config: Config) -> list[str]:
    """Problems of options for LoRA's factors with a method that has other factors."""
    problems, spec, method = list[str](), METHODS[config.adapter.method], config.adapter.method
    if config.optimizer.loraplus_lr_ratio != 1 and not spec.has_ab_factors:
        why = "both of them begin from the base" if spec.begins_from_base else Message("{method} has others", method)
        problems.append(
            Message(
                "optimizer.loraplus_lr_ratio is for a factor A that begins at random and a B that begins at 0: "
                "{why}; leave it out",
                why,
            )
        )
    options = {"train.max_weight_norm": config.train.max_weight_norm}
    options |= {f"adapter.{name}": getattr(config.adapter, name, 0.0) for name in ("rank_dropout", "module_dropout")}
    if not spec.has_product_factors:
        problems += [
            Message(
                "{option} needs a method whose change is the product of its factors alone, and that "
                "of {method} is not; leave it out",
                option,
                method,
            )
            for option, value in options.items()
            if value
        ]
    return problems


def _text_encoder_problems(config: Config) -> list[str]:
    """Problems of options for a trained text encoder that the run does not have, and of when each part is trained."""
    optimizer, adapter = config.optimizer, config.adapter
    problems: list[str] = []
    if optimizer.text_encoder_learning_rate == 0:
        problems.append(
            "optimizer.text_encoder_learning_rate = 0 trains no text encoder: leave it out, with "
            "adapter.train_text_encoder and adapter.new_tokens"
        )
    elif optimizer.text_encoder_learning_rate is not None and not adapter.trains_text:
        problems.append(
            "optimizer.text_encoder_learning_rate needs adapter.train_text_encoder = true or adapter.new_tokens"
        )
    if not adapter.trains_text:
        names = ("text_encoder_2_learning_rate", "text_encoder_stop", "unet_start")
        unused = [name for name in names if getattr(optimizer, name) != getattr(OptimizerConfig, name)]
        problems += [
            Message("optimizer.{name} needs adapter.train_text_encoder = true or adapter.new_tokens", name)
            for name in unused
        ]
    if config.train.text_prior_weight and not adapter.train_text_encoder:
        problems.append("train.text_prior_weight needs adapter.train_text_encoder = true")
    if optimizer.unet_start and optimizer.unet_start >= optimizer.text_encoder_stop:
        problems.append(
            Message(
                "optimizer.unet_start = {start:g}: nothing is trained between optimizer.text_encoder_stop = {stop:g} "
                "and it; choose a lower value",
                *(optimizer.unet_start, optimizer.text_encoder_stop),
            )
        )
    return problems


def _prior_problems(train: TrainConfig, data: DataConfig) -> list[str]:
    """Problems of options for a prior that the run does not use."""
    problems: list[str] = [
        Message("train.{name} has no effect with train.prior = 'none': choose 'images' or 'teacher'", name)
        for name in ("prior_loss_weight", "prior_prompts")
        if train.prior == "none" and getattr(train, name) != getattr(TrainConfig, name)
    ]
    trigger = "" if data.trigger.lower() in DETERMINERS else data.trigger  # the preflight refuses these
    triggered = [text for text in train.prior_prompts if trigger and trigger in text.split()]
    if triggered:
        problems.append(
            Message(
                "train.prior_prompts: {prompt!r} has the trigger {trigger}, which is to be learned",
                triggered[0],
                data.trigger,
            )
        )
    problems += [
        Message("train.{name} has no effect with train.prior = {prior!r}: choose 'images'", name, train.prior)
        for name in ("class_images", "prior_target")
        if train.prior != "images" and getattr(train, name) != getattr(TrainConfig, name)
    ]
    if train.prior != "images" and data.class_folder:
        problems.append(
            Message("data.class_folder has no effect with train.prior = {prior!r}: choose 'images'", train.prior)
        )
    return problems


def _noise_problems(train: TrainConfig) -> list[str]:
    """Problems of noise levels and loss weights that contradict each other."""
    problems = []
    if train.timestep_low >= train.timestep_high:
        problems.append("train.timestep_low must be below train.timestep_high")
    if train.snr_weighting == "soft_min" and train.min_snr_gamma is None:
        problems.append("train.snr_weighting = 'soft_min' needs train.min_snr_gamma; 5 is usual")
    if train.snr_weighting == "debiased" and train.min_snr_gamma is not None:
        problems.append("train.min_snr_gamma has no effect with train.snr_weighting = 'debiased': leave one out")
    return problems
