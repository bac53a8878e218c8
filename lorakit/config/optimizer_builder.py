"""Build the configured optimizer: a function or a class, called with `optimizer.args`.

`check` builds it in the same way as training. torch is imported only if there is something to build.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorakit.config.schema import OptimizerConfig
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message

if TYPE_CHECKING:
    import torch

Groups = list[dict[str, Any]]


def problem(config: OptimizerConfig, *, has_cuda: bool, has_ema: bool = False) -> str | None:
    """The reason why the optimizer cannot be built, or None. A class or arguments of the user are tried on a small
    matrix.

    Args:
        has_ema: whether `train.ema_decay` is set.
        has_cuda: whether training may run on CUDA. Then no step is tried, because it would run on the CPU, where some
            CUDA optimizers fail.
    """
    if not config.args and not registry.optimizer(config.name).is_guess:
        return None
    import torch

    matrix = torch.nn.Parameter(torch.ones(2, 2))
    matrix.grad = torch.ones(2, 2)
    try:
        optimizer = build(config, [{"params": [matrix], "name": "unet", "lr": config.learning_rate}])
    except LorakitError as error:
        return str(error)
    if has_ema and has_average(optimizer):
        return Message("train.ema_decay: {name} keeps an average itself: leave it out", config.name)
    try:
        if not has_cuda:
            optimizer.step()
    except Exception as error:  # third-party class
        return Message("optimizer.name = {name!r}: a step failed: {why}", config.name, _reason(error))
    return None


def build(config: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    """Build the configured optimizer over groups of parameters.

    Raises:
        LorakitError: its package is missing, the class does not exist or is not an optimizer, or it refuses the
            arguments.
    """
    builder = _builder(config)
    if isinstance(builder, type):
        optimizer = construct(builder, groups, config)
        if has_average(optimizer):
            optimizer.train()  # type: ignore[attr-defined]
        return optimizer
    try:
        return builder(groups, config)
    except LorakitError:
        raise
    except Exception as error:
        if not config.args:
            raise
        raise LorakitError("optimizer.args: {name} does not take them: {why}", config.name, _reason(error)) from None


def has_average(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer keeps an average of the weights and puts it in place in its eval mode (schedule-free
    ones)."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def construct(cls: type[torch.optim.Optimizer], groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build an optimizer of any class, with `optimizer.args`, and with weight decay if the class supports it.

    Raises:
        LorakitError: the class refuses a value, or has no weight decay although one is set.
    """
    kwargs = dict(config.args)
    if "weight_decay" in (accepted := _parameters(cls) or ()):
        kwargs.setdefault("weight_decay", config.weight_decay)
    elif config.weight_decay != OptimizerConfig.weight_decay and "weight_decay" not in kwargs:
        raise LorakitError("optimizer.weight_decay: {name} has no weight decay: leave it out", cls.__name__)
    if "lr" in accepted:
        kwargs.setdefault("lr", config.learning_rate)
    try:
        return cls(groups, **kwargs)
    except Exception as error:  # third-party class
        raise LorakitError("optimizer.args: {name} refuses them: {why}", cls.__name__, _reason(error)) from None


def _builder(config: OptimizerConfig) -> Callable[..., torch.optim.Optimizer]:
    """The function or class that builds the optimizer."""
    if missing := registry.missing_package(config.name):
        raise LorakitError(missing)
    spec = registry.optimizer(config.name)
    where = f"optimizer.name = {config.name!r}"
    module, _, attribute = spec.build.partition(":")
    try:
        loaded = import_module(module)
    except Exception as error:  # third-party module
        raise LorakitError("{where}: {module} cannot be imported: {reason}", where, module, _reason(error)) from None
    if not hasattr(loaded, attribute):
        raise LorakitError("{where}: {module} has no {attribute}", where, module, attribute)
    builder: Callable[..., torch.optim.Optimizer] = getattr(loaded, attribute)
    if not isinstance(builder, type) and not spec.is_guess:
        return builder
    from torch.optim import Optimizer

    if not isinstance(builder, type) or not issubclass(builder, Optimizer):
        raise LorakitError("{where}: {attribute} is not a torch.optim.Optimizer", where, attribute)
    step = inspect.signature(builder.step).parameters.get("closure")
    if step is not None and step.default is step.empty:
        raise LorakitError(
            "{where}: {attribute} computes the loss several times a step: choose another", where, attribute
        )
    accepted = _parameters(builder)
    for name in config.args:
        if accepted is not None and name not in accepted:
            raise LorakitError(
                "optimizer.args.{argument}: {name} has no such argument; it has {names}",
                name,
                attribute,
                ", ".join(accepted),
            )
    return builder


def _parameters(cls: type) -> list[str] | None:
    """The names of a class's arguments after the parameters; None if it accepts any name."""
    _, *parameters = inspect.signature(cls).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def _reason(error: Exception) -> str:
    """The message of an exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
