"""The learning-rate schedule: pure functions of the optimizer step and the length of the run."""

from __future__ import annotations

import math

from lorakit.config.schema import OptimizerConfig
from lorakit.core.messages import Message, join
from lorakit.core.units import count


def warmup_of(config: OptimizerConfig, total_steps: int) -> int:
    """Number of optimizer steps of the warm-up."""
    return config.warmup_steps or round(config.warmup_ratio * total_steps)


def factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The factor of the peak learning rate at `step`, counted from 0.

    The warm-up rises linearly: (step + 1) / warmup_steps, so the first step is not 0. Then the schedule follows. With
    `min_lr_ratio` it falls to that share of the peak instead of 0.
    """
    warmup = warmup_of(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    rest = max(total_steps - warmup, 1)
    shape = _shape(config, min((step - warmup) / rest, 1.0), total_steps / rest)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape if config.min_lr_ratio else shape


def text_rates(config: OptimizerConfig) -> str:
    """A message about the text encoders' learning rates, or "" if they are the same as the denoiser's."""
    rates = {
        "text encoder {rate:g}": config.text_encoder_learning_rate,
        "text encoder 2 {rate:g}": config.text_encoder_2_learning_rate,
    }
    own = [Message(text, rate) for text, rate in rates.items() if rate not in (None, config.learning_rate)]
    return Message("learning rate: {rate:g}, {rates}", config.learning_rate, join(", ", own)) if own else ""


def problem(config: OptimizerConfig, steps: int) -> str | None:
    """A message about a warm-up that leaves too little of the run, or None."""
    warmup = warmup_of(config, steps)
    if 0 < steps <= warmup:
        return Message(
            "optimizer.warmup_steps = {warmup}: the run has {steps}, so the learning rate rises to the end and comes "
            "to {share:.0%} of optimizer.learning_rate",
            *(warmup, count(steps, "step"), steps / warmup),
        )
    if config.lr_scheduler == "wsd" and warmup and warmup + config.lr_decay_ratio * steps > steps + 0.5:
        return Message(
            "optimizer.lr_decay_ratio = {share:g}: the warm-up takes {warmup} of {steps} steps, so wsd falls "
            "over the rest and is never constant",
            *(config.lr_decay_ratio, warmup, steps),
        )
    return None


def _shape(config: OptimizerConfig, progress: float, run: float = 1.0) -> float:
    """The schedule after warm-up, from 1 to 0.

    Args:
        progress: share of the steps after warm-up that are done.
        run: length of the run relative to the steps after warm-up.
    """
    if config.lr_scheduler == "linear":
        return max(0.0, 1 - progress)
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_scheduler == "cosine_with_restarts":  # Loshchilov and Hutter 2016, arXiv 1608.03983
        return 0.5 * (1 + math.cos(math.pi * (config.lr_cycles * progress % 1))) if progress < 1 else 0.0
    if config.lr_scheduler == "polynomial":
        return float((1 - progress) ** config.lr_power)
    if config.lr_scheduler == "rex":  # Chen et al. 2021, arXiv 2107.04197
        return (1 - progress) / (1 - progress / 2)
    if config.lr_scheduler == "wsd":  # warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395
        return min(1.0, (1 - progress) / min(config.lr_decay_ratio * run, 1.0))
    return 1.0
