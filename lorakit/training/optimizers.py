"""Optimizers, one function each, and the learning rate as a pure function of the step."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from lorakit.adapters import targets
from lorakit.config import OptimizerConfig, lr_schedule, optimizer_builder
from lorakit.config.optimizer_builder import Groups, construct
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join


def rate_groups(
    config: OptimizerConfig, parameters: Mapping[str, torch.nn.Parameter]
) -> tuple[list[tuple[str, list[torch.nn.Parameter]]], list[float]]:
    """Group an adapter's parameters by component and by the factor of the component's learning rate.

    Returns:
        ([(component, parameters), ...], [factor of each group's rate, ...])
    """
    groups: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((name.partition(".")[0], rate_multiple(config, name)), []).append(parameter)
    ordered = sorted(groups, key=lambda key: [component for component, _ in groups].index(key[0]))
    return [(key[0], groups[key]) for key in ordered], [multiple for _, multiple in ordered]


def rate_multiple(config: OptimizerConfig, name: str) -> float:
    """The factor of the component's learning rate for the parameter `<layer>.<factor>`.

    With LoRA+ (Hayou et al. 2024, arXiv 2402.12354) B has a higher rate than A; `optimizer.rates` sets factors by
    layer.
    """
    layer, _, factor = name.rpartition(".")
    if factor == "token":
        return 1.0
    own = float(targets.last_match(config.rates, layer, 1.0))
    return own * config.loraplus_lr_ratio if factor == "up" else own


def build(
    config: OptimizerConfig,
    groups: Sequence[tuple[str, list[torch.nn.Parameter]]],
    multiples: Sequence[float] | None = None,
) -> torch.optim.Optimizer:
    """Build the configured optimizer over named groups ("unet", "text_encoder", ...), each with its own peak learning
    rate.

    Args:
        multiples: factor of each group's learning rate, from `rate_groups`; by default all are 1.

    Raises:
        LorakitError: as `optimizer_builder.build`, or the optimizer lacks what the config needs.
    """
    named = [
        {"params": params, "name": name, "lr": multiple * peak(config, name), "rate_multiple": multiple}
        for (name, params), multiple in zip(groups, multiples or [1.0] * len(groups), strict=True)
    ]
    one_rate = len({group["lr"] for group in named}) == 1
    if lines := registry.unmet_needs(config.name, has_cuda=groups[0][1][0].is_cuda, one_rate=one_rate):
        raise LorakitError(join("\n", lines))
    return optimizer_builder.build(config, named)


def peak(config: OptimizerConfig, group: str) -> float:
    """Learning rate of a group before the schedule."""
    if group.startswith("text_encoder_") and config.text_encoder_2_learning_rate is not None:
        return config.text_encoder_2_learning_rate
    if group.startswith("text_encoder") and config.text_encoder_learning_rate is not None:
        return config.text_encoder_learning_rate
    return config.learning_rate


def learning_rate(config: OptimizerConfig, step: int, total_steps: int, group: str = "unet") -> float:
    """The learning rate of a group at `step`. It is 0, at which no optimizer moves, for text encoders after
    `text_encoder_stop` and for the denoiser before `unet_start`."""
    if group.startswith("text_encoder"):
        if step >= config.text_encoder_stop * total_steps:
            return 0.0
    elif step < config.unet_start * total_steps:
        return 0.0
    return peak(config, group) * lr_schedule.factor(config, step, total_steps)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, total_steps: int, *, on_device: bool = False
) -> None:
    """Set the learning rate of every group for `step`, rounded to float32.

    Args:
        on_device: keep the rate in a float32 tensor on the device. Its address does not change, so a CUDA graph can
            read it. The rounding makes both ways compute with the same rate.
    """
    for group in optimizer.param_groups:
        multiple = group.get("rate_multiple", 1.0)  # older checkpoints have no multiple
        rate = torch.tensor(multiple * learning_rate(config, step, total_steps, group["name"]), dtype=torch.float32)
        if not on_device:
            group["lr"] = rate.item()
        elif isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate.item())
        else:
            group["lr"] = rate.to(group["params"][0].device)


def step(optimizer: torch.optim.Optimizer) -> None:
    """Call `optimizer.step()`, also while a CUDA graph is captured.

    torch refuses that unless the groups are marked `capturable`; the fused kernel needs nothing else for it.
    """
    groups = optimizer.param_groups
    captured_groups = groups if groups[0]["params"][0].is_cuda and torch.cuda.is_current_stream_capturing() else []
    for group in captured_groups:
        group["capturable"] = True
    try:
        optimizer.step()
    finally:
        for group in captured_groups:
            group["capturable"] = False


def adamw(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), all parameters of a group in one kernel."""
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, **{"fused": True, **config.args})


def paged_adamw8bit(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with 8-bit state (Dettmers et al. 2021, arXiv 2110.02861), in memory that CUDA pages to the host when the
    GPU is full."""
    return construct(import_module("bitsandbytes.optim").PagedAdamW8bit, groups, config)


def lion(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Lion. Its learning rate should be three to ten times lower than AdamW's."""
    return construct(Lion, groups, config)


def adafactor(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) at the configured learning rate.

    Its own schedule and its scaling by parameter size are off: with that scaling B, which starts at 0, would hardly
    change.
    """
    from transformers.optimization import Adafactor

    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    optimizer: torch.optim.Optimizer = Adafactor(groups, weight_decay=config.weight_decay, **{**fixed, **config.args})
    return optimizer


def prodigy(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101) estimates the learning rate; `learning_rate` is a factor
    of it."""
    from prodigyopt import Prodigy

    defaults = {"use_bias_correction": True, "safeguard_warmup": True}
    # Prodigy prints a line about decoupled weight decay.
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer: torch.optim.Optimizer = Prodigy(
            groups, weight_decay=config.weight_decay, **{**defaults, **config.args}
        )
    return optimizer


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): each weight moves by lr in the direction of the sign of
    an interpolated momentum."""

    def __init__(
        self, groups: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0
    ):
        if len(betas) != 2 or not all(0 <= beta <= 1 for beta in betas):
            raise ValueError(Message("betas must be two numbers from 0 to 1, not {betas}", betas))
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step over all parameters that have a gradient."""
        value = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            fast, slow = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            signs = torch._foreach_sign(torch._foreach_lerp(momenta, grads, 1 - fast))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, signs, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, grads, 1 - slow)
        return value
