"""Optimizers, one function each, and the learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from lorakit.config import OptimizerConfig
from lorakit.core import registry
from lorakit.core.errors import LorakitError

Groups = list[dict[str, Any]]
# These change each number by itself: a group may as well be one long tensor. Adafactor knows rows and columns, and
# 8-bit state its blocks, which should not reach from one matrix into the next.
BY_NUMBER = ("adamw", "lion")
# These read the learning rate and their count of steps where they lie on the card, so a CUDA graph can hold their step.
# The others put both, or an estimate, into what they issue.
CAPTURED = ("adamw",)


def build(config: OptimizerConfig, groups: list[tuple[str, list[torch.nn.Parameter]]]) -> torch.optim.Optimizer:
    """The chosen optimizer over named groups ("unet", "text_encoder", ...), each at its own peak learning rate.

    Raises:
        LorakitError: a package that it needs is missing, or it cannot do what is asked.
    """
    made = [{"params": params, "name": name, "lr": peak(config, name)} for name, params in groups]
    optimizer: torch.optim.Optimizer = registry.load(registry.OPTIMIZERS, config.name)(made, config)
    return optimizer


def peak(config: OptimizerConfig, group: str) -> float:
    """Learning rate of a group before the schedule."""
    if group.startswith("text_encoder") and config.text_encoder_learning_rate is not None:
        return config.text_encoder_learning_rate
    return config.learning_rate


def factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """What the peak rate is multiplied by at `step`, counted from 0 in optimizer steps.

    Warm-up rises linearly from 0: (step + 1) / warmup_steps, so that the first step already moves. Then `constant`
    stays at 1, and with p the share of the rest that is done, `linear` is 1 - p and `cosine` (1 + cos pi p) / 2: both
    would be 0 at step `total_steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    if config.lr_scheduler == "linear":
        return max(0.0, 1 - done)
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return 1.0


def learning_rate(config: OptimizerConfig, step: int, total_steps: int, group: str = "unet") -> float:
    """Learning rate of a group at `step`."""
    return peak(config, group) * factor(config, step, total_steps)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, total_steps: int, *, on_device: bool = False
) -> None:
    """Give every group its rate for `step`, rounded to float32: so the same one, where it is a tensor on the device
    that stays where it is."""
    for group in optimizer.param_groups:
        rate = torch.tensor(learning_rate(config, step, total_steps, group["name"]), dtype=torch.float32)
        if not on_device:
            group["lr"] = rate.item()
        elif isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate.item())
        else:
            group["lr"] = rate.to(group["params"][0].device)


def step(optimizer: torch.optim.Optimizer) -> None:
    """Let it step, while a CUDA graph is captured too: torch asks whether that is meant, and the fused kernel no more
    than that."""
    groups = optimizer.param_groups
    meant = groups if groups[0]["params"][0].is_cuda and torch.cuda.is_current_stream_capturing() else []
    for group in meant:
        group["capturable"] = True
    try:
        optimizer.step()
    finally:
        for group in meant:
            group["capturable"] = False


def adamw(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), all parameters of a group in one kernel."""
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def adamw8bit(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with 8-bit state (Dettmers et al. 2021, arXiv 2110.02861); small tensors keep theirs in float32."""
    return _bitsandbytes().optim.AdamW8bit(groups, weight_decay=config.weight_decay)  # type: ignore[no-any-return]


def paged_adamw8bit(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The same, its state in memory that CUDA moves to the host when the card is full.

    Raises:
        LorakitError: the parameters are not on a CUDA device.
    """
    if groups[0]["params"][0].device.type != "cuda":
        raise LorakitError("optimizer.name = 'paged_adamw8bit' needs a CUDA device: choose 'adamw8bit' or 'adamw'")
    return _bitsandbytes().optim.PagedAdamW8bit(groups, weight_decay=config.weight_decay)  # type: ignore[no-any-return]


def lion(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Lion; it wants a learning rate three to ten times below AdamW's."""
    return Lion(groups, weight_decay=config.weight_decay)


def adafactor(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) at the given rate. Its own schedule and its scaling by the
    size of a parameter are off: by the latter, B, which begins at 0, would hardly move."""
    from transformers.optimization import Adafactor

    return Adafactor(
        groups,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


def prodigy(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101) finds the rate itself; `learning_rate` is a factor on it.

    Raises:
        LorakitError: the package is missing, or two groups have different rates.
    """
    if len({group["lr"] for group in groups}) > 1:
        raise LorakitError("optimizer.name = 'prodigy' has one rate: leave optimizer.text_encoder_learning_rate unset")
    package = _optional("prodigyopt", "prodigy")
    # It prints that its weight decay is decoupled.
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer: torch.optim.Optimizer = package.Prodigy(
            groups, weight_decay=config.weight_decay, use_bias_correction=True, safeguard_warmup=True
        )
    return optimizer


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): a step of +-lr by the sign of a mixed momentum."""

    def __init__(
        self, groups: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0
    ):
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


def _bitsandbytes() -> Any:
    return _optional("bitsandbytes", "bnb")


def _optional(package: str, extra: str) -> ModuleType:
    """A package that only one optimizer needs.

    Raises:
        LorakitError: it is not installed; the line says how to.
    """
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError:
        raise LorakitError(f"this optimizer needs {package}: pip install 'lorakit[{extra}]'") from None
