"""Differences in the plan of a run that trains the base's weights, and reasons why it cannot begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorakit.config import Config
from lorakit.config.full import NO_BF16
from lorakit.core.messages import Message
from lorakit.families import single_file, weight_files
from lorakit.runs import nvidia

if TYPE_CHECKING:
    from lorakit.families import BaseInfo


def count(config: Config, info: BaseInfo, layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Component -> (layers, weights): where all are trained, those too that are in no layer: biases, norms, words."""
    if not config.adapter.whole_model or info.components:  # which `problems` refuses
        return dict(layers)
    return {part: (number, weight_files.count_weights(info.weights(part))) for part, (number, _) in layers.items()}


def note(config: Config) -> list[str]:
    """The line that describes how the run differs from training an adapter."""
    if not config.adapter.whole_model:
        return []
    outputs = ", ".join(getattr(config.adapter, "outputs", ()))
    norm = config.train.max_grad_norm
    clip = Message("; each weight's gradient is clipped to the norm {norm:g} by itself", norm) if norm else ""
    rate = config.optimizer.learning_rate
    return [
        Message(
            "model: the base's own weights are trained at the rate {rate:g}{clip}; written: {outputs}",
            rate,
            clip,
            outputs,
        )
    ]


def problems(config: Config, info: BaseInfo) -> list[str]:
    """The reasons why the base's own weights cannot be trained or written as requested, one message each."""
    if not config.adapter.whole_model:
        return []
    outputs, method = getattr(config.adapter, "outputs", ()), config.adapter.method
    untold = single_file.untold(info) if "file" in outputs and not info.components else ""
    checks = {
        Message(
            "adapter.method = {method!r} changes the base's own weights, and a pipeline in memory stays as it "
            "is: give the base as a folder or a file",
            method,
        ): bool(info.components),
        Message(
            "adapter.outputs: one file does not tell {what} of base {name}, so that no program would read it "
            "right: choose 'folder'",
            untold,
            info.title,
        ): bool(untold),
        Message(NO_BF16, method): config.memory.mixed_precision == "auto"
        and nvidia.has_driver()
        and not config.memory.device.startswith(("cpu", "mps"))
        and nvidia.lacks_bf16(),
    }
    return [problem for problem, applies in checks.items() if applies]
