"""Prepare a base for training: adapter, loss, optimizer and validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorakit import adapters, formats
from lorakit.adapters.average import OptimizerAverage, WeightAverage
from lorakit.config import optimizer_builder
from lorakit.core.messages import Message
from lorakit.core.registry import METHODS, resolve
from lorakit.core.units import count
from lorakit.engine import device as devices, device_memory, fused_blocks
from lorakit.engine.cuda_graphs import SLOWER
from lorakit.runs import memory_estimate
from lorakit.training.loss_step import LossStep
from lorakit.training.optimizer_step import OptimizerStep
from lorakit.training.parallel import SINGLE, Processes
from lorakit.training.validation import Validation

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter
    from lorakit.config import Config
    from lorakit.core.protocols import Trainable
    from lorakit.families import Family
    from lorakit.runs.preflight import Ready
    from lorakit.training.precompute import Precomputed


@dataclass(frozen=True)
class Model:
    """The parts that the loop needs: trained weights, loss, optimizer and validation.

    Attributes:
        family: the base, with the adapter in it.
        adapter: the trained weights: an adapter, or those of the base.
        loss_step: computes the loss of a batch.
        optimizer_step: does an optimizer step.
        validation: validates the current weights, on held-out photos where there are some.
        photo_validation: the same on training photos.
    """

    family: Family
    adapter: Trainable
    loss_step: LossStep
    optimizer_step: OptimizerStep
    validation: Validation
    photo_validation: Validation


TRAINED = "training {component}: {modules}, {parameters:,} parameters"
UNKNOWN_BLOCK = "the UNet has a block that lorakit cannot fuse ({block}): memory.engine = 'plain' is used. {slower}"
RECOMPUTED = "memory: blocks of the UNet that are computed again in the backward pass, for what is free: {count}"
INIT_WORD = (
    "the trigger's vectors begin as {vectors} of the {count} tokens of {word!r}: adapter.new_tokens = {count} takes all"
)
AVERAGE = "{name} keeps an average of the weights: it is exported, drawn and validated"


def trainable(
    family: Family,
    inputs: Precomputed,
    ready: Ready,
    say: Callable[[str], object],
    processes: Processes = SINGLE,
) -> Model:
    """Attach a new adapter to the base and build loss, optimizer and validation. All processes get the weights of the
    first.

    Raises:
        LorakitError: the base already carries an adapter, or `train.init_from` does not fit.
    """
    config = ready.config
    family.acquire(*(family.modules() if inputs.tokens else ["unet"]))
    path = METHODS[config.adapter.method].whole_model
    whole = resolve(path) if path else None
    adapter = (
        whole.attach(family, config.adapter)
        if whole
        else adapters.attach(
            family, config.adapter, seed=config.train.seed, trigger=config.data.trigger, init_word=_init_word(config)
        )
    )
    for component, (modules, parameters) in adapter.describe().items():
        say(Message(TRAINED, component, count(modules, "module"), parameters))
    if line := _lost_tokens(config, adapter):
        say(line)
    if config.train.init_from:
        adapter.load(processes.first(lambda: formats.read(Path(config.train.init_from))))
        say(Message("starting from the weights of {init_from}", Path(config.train.init_from).name))
    if config.train.ema_decay:
        adapter.average = WeightAverage(adapter.parameters(), config.train.ema_decay)
    processes.copy_weights(adapter)
    if not family.plain:
        save_less = memory_estimate.use_save_less(config, family.device.type)
        channels_last = whole is None and devices.channels_last(config.memory, family.device, family.dtype)
        adapters.optimize_blocks(family, save_less=save_less, channels_last=channels_last)
    elif not config.engine_is_off:
        block = fused_blocks.unknown_block(family.denoiser)
        say(Message(UNKNOWN_BLOCK, block, SLOWER))
    config = memory_estimate.limit_to(
        device_memory.available(family.device), config, ready.info, ready.plan.modules, family.device.type
    )
    blocks = memory_estimate.recomputed_blocks(config, ready.info, ready.plan.modules, family.device.type)
    if len(blocks) != ready.plan.recomputed:
        say(Message(RECOMPUTED, len(blocks)))
    devices.gradient_checkpointing(family, blocks, random=adapter.dropout > 0)
    loss_step = LossStep(family, adapter, inputs, config.train)
    optimizer_step = (whole.step if whole else OptimizerStep)(config, loss_step, ready.plan.steps, say, processes)
    if optimizer_builder.has_average(optimizer_step.optimizer):
        adapter.average = OptimizerAverage(adapter.parameters(), optimizer_step.optimizer)
        say(Message(AVERAGE, config.optimizer.name))
    class_condition = inputs.class_conditions.index(torch.zeros(1, dtype=torch.int64, device=family.device))
    parts = inputs.conditions, class_condition, config.train.seed
    photo_validation = Validation(family, inputs.dataset.unaugmented(), *parts)
    validation = Validation(family, inputs.holdout, *parts, from_holdout=True) if inputs.holdout else photo_validation
    return Model(family, adapter, loss_step, optimizer_step, validation, photo_validation)


def _lost_tokens(config: Config, adapter: Adapter) -> str:
    """What to say where the word that the trigger starts from has more tokens than the trigger has vectors."""
    word, count = _init_word(config), config.adapter.new_tokens
    return Message(INIT_WORD, count, adapter.init_tokens, word) if word and adapter.init_tokens > count else ""


def _init_word(config: Config) -> str:
    """The word whose vectors the trigger starts from. For textual inversion alone, the default is the last word of the
    noun."""
    return getattr(config.adapter, "init_word", None) or (
        config.data.noun.rpartition(" ")[2] if config.adapter.words_only else ""
    )
