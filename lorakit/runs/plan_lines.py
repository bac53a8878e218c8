"""Lines of a plan that are put together from several facts: length, layers, prior, load."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.adapters import targets
from lorakit.config import lr_schedule
from lorakit.core.messages import Message, some
from lorakit.core.names import shorten
from lorakit.core.units import count
from lorakit.data import captions, concepts

if TYPE_CHECKING:
    from lorakit.config import Config
    from lorakit.data.checks import Report

# Subjects that a line of the plan names.
MAX_CONCEPTS = 5
LAYERS = "layers: {count} of rank {rank}, alpha {alpha:g}, effective scale {scale:g}"
BUSY = "busy: this machine has a load of {load:.1f} on {cores} cores now; the run takes longer while that lasts"


def busy() -> str:
    """A line if more threads want to run than the machine has cores, in the mean of the last minute; else ""."""
    try:
        load, processors = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):  # Windows and some others do not tell it
        return ""
    return Message(BUSY, load, processors) if load > processors else ""


def averaging(decay: float, steps: int) -> str:
    """The line that describes `train.ema_decay`."""
    reach = round(1 / (1 - min(decay, steps / (9 + steps))))
    return Message(
        "average: exported, drawn and validated is the average of about the last {count} steps' weights", reach
    )


def layers(config: Config, selected: Sequence[str]) -> tuple[str, ...]:
    """The text encoders' own learning rates; how many layers have which rank, alpha and multiple of the rate, where
    patterns choose them."""
    own = [targets.layer_config(config.adapter, name) for name in selected]
    sizes = Counter((layer.rank, layer.effective_alpha, layer.scale) for layer in own)
    multiples = Counter(float(targets.last_match(config.optimizer.rates, name, 1.0)) for name in selected)
    lines = [*filter(None, [lr_schedule.text_rates(config.optimizer)])]
    if start := config.optimizer.unet_start:
        lines.append(Message("UNet: left as it is for the first {share:.0%} of the steps", start))
    if config.adapter.ranks or config.adapter.alphas:
        lines += [Message(LAYERS, number, rank, alpha, scale) for (rank, alpha, scale), number in sorted(sizes.items())]
    if config.optimizer.rates:
        lines += [
            Message("rates: {multiple:g} of the learning rate for {layers}", each, count(number, "layer"))
            for each, number in sorted(multiples.items())
        ]
    return tuple(lines)


def run_length(config: Config, repeats: Sequence[int], batches: int) -> tuple[int, str]:
    """Optimizer steps, and the arithmetic in words.

    Args:
        repeats: how often each photo is shown in a pass, at each resolution.
        batches: the batches of a pass.
    """
    train, resolutions = config.train, len(config.data.resolutions)
    parts = train.gradient_accumulation_steps
    # A batch has no more photos than there are of its size.
    photos_per_step = sum(repeats) * resolutions / batches * parts
    size = Message(" of {count:.3g} photos", photos_per_step) if photos_per_step > 1 else ""
    photos = count(len(repeats), "photo")
    at = Message(" at {count} resolutions", resolutions) if resolutions > 1 else ""
    if train.steps_per_image is not None:
        own = train.steps_per_image * len(repeats)
        steps = max(own, train.min_steps)
        floor = Message(", raised to train.min_steps = {steps}", steps) if steps > own else ""
        each = count(train.steps_per_image, "step")
        line = Message(
            "{photos} x {each} each = {steps}{size}{at}{floor}", photos, each, count(own, "step"), size, at, floor
        )
        return steps, line
    if train.epochs is not None:
        steps = math.ceil(train.epochs * batches / parts)
        accumulated = Message(" / {count} accumulated", parts) if parts > 1 else ""
        epochs, rest = steps * parts / batches, train.epochs * batches % parts
        trained = Message(" (epochs: {epochs:.4g})", epochs) if rest else ""
        return steps, Message(
            "{epochs} x {batches} of {photos}{at}{accumulated} = {steps}{trained}",
            *(
                count(train.epochs, "epoch"),
                count(batches, "batch"),
                photos,
                at,
                accumulated,
                count(steps, "step"),
                trained,
            ),
        )
    assert train.steps is not None, "the config has exactly one length"
    at = Message(" at each of {count} resolutions", resolutions) if resolutions > 1 else ""
    low, high = (train.steps * parts / batches * number for number in (min(repeats), max(repeats)))
    lower, upper = (str(round(number)) if number >= 100 else f"{number:.3g}" for number in (low, high))
    number = Message("{low} to {high}", lower, upper) if low < high else lower
    times = "once" if number == "1" else Message("{count} times", number)
    template = "{steps}{size}, each of {photos} seen {times}{at}"
    return train.steps, Message(template, count(train.steps, "step"), size, photos, times, at)


def triggers(config: Config, report: Report) -> str:
    """How each concept is named in a prompt, and which word of it is the trigger."""
    own = concepts.of_photos(report.photos, config.data)
    named = [Message('"{name}" (trigger {word})', each.name, each.trigger) for each in own if each.name]
    return Message("in prompts: {names}", some(named, MAX_CONCEPTS)) if named else ""


def prior(config: Config, report: Report) -> str:
    """The prior preservation of a run and its cost; "" without one."""
    if config.train.prior == "images" and report.class_photos:
        return Message("your own class images ({count}), none is drawn", len(report.class_photos))
    if config.train.prior == "images":
        texts = [captions.class_prompt(each) for each in concepts.of_photos(report.photos, config.data)]
        text = '", "'.join(shorten(each, 60) for each in list(dict.fromkeys(texts))[:MAX_CONCEPTS])
        number, others = config.train.class_images, len(config.train.prior_prompts)
        images = Message('class images ({count}), which the base draws of "{text}"', number, text)
        more = Message(" and of other prompts ({count})", others) if others else ""
        return Message("{images}{more}; later runs use them again", images, more)
    is_teacher = config.train.prior == "teacher"
    return "the base as teacher, which makes a step about twice as long" if is_teacher else ""
