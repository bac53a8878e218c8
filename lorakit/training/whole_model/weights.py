"""The weights of the base as a `Trainable`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.adapters import average, weights_fit
from lorakit.adapters.weights import ForeignLayer
from lorakit.config.full import NO_BF16
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.families import loading
from lorakit.training.whole_model.export import TrainedModel

if TYPE_CHECKING:
    from lorakit.config.full import FullConfig
    from lorakit.families import Family

KIND = "full"


class ModelWeights:
    """All weights of the denoiser and, if asked for, of the text encoders that are trained; see `Trainable`.

    Args:
        family: the base; its weights are changed until `detach`.
        config: the section of the config.

    Attributes:
        family: "sd1", "sd2", "sdxl" or "sd3".
        dropout: 0: there is no dropout.
        average: moving average of the weights, or None.

    Raises:
        LorakitError: the weights are in float16, which is too coarse to train.
    """

    dropout = 0.0
    average: average.WeightAverage | None = None

    def __init__(self, family: Family, config: FullConfig):
        if family.dtype is torch.float16:
            raise LorakitError(NO_BF16, config.method)
        self._base, self.family = family, family.info.family
        self._rank = config.extract_rank
        parts = ("unet", *(family.info.spec.trainable_encoders() if config.train_text_encoder else ()))
        self._modules = {name: module for name, module in family.modules().items() if name in parts}
        self._parameters: dict[str, nn.Parameter] = {}
        for component, module in self._modules.items():
            for path, parameter in module.requires_grad_(True).named_parameters():
                stem, _, kind = path.rpartition(".")
                self._parameters[f"{canonical(component, stem)}.{kind}"] = parameter

    def parameters(self) -> dict[str, nn.Parameter]:
        """`<canonical>.weight` and `<canonical>.bias` -> parameter, in the base's dtype."""
        return dict(self._parameters)

    def groups(self) -> list[tuple[str, list[nn.Parameter]]]:
        """See `Trainable`."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            groups.setdefault(name.partition(".")[0], []).append(parameter)
        return list(groups.items())

    def describe(self) -> dict[str, tuple[int, int]]:
        """See `Trainable`; the modules are the linear and convolutional layers."""
        layers = Counter(
            name
            for name, module in self._modules.items()
            for layer in module.modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
        )
        return {name: (layers[name], sum(p.numel() for p in group)) for name, group in self.groups()}

    def train(self, mode: bool = True) -> None:
        """Do nothing: there is no dropout, and the base stays in eval mode, as with an adapter."""

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the base has its original weights, which are loaded again; the trained ones wait on the CPU."""
        trained = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}
        self._fill(self.base_weights())
        try:
            yield
        finally:
            self._fill(trained.items())

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """See `Trainable`."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Load the base's original weights, component by component, on the CPU."""
        for component, module in self._modules.items():
            with loading.quiet():
                base = loading.load_module(self._base.info, component, type(module), self._base.dtype)
            for path, parameter in base.named_parameters():
                stem, _, kind = path.rpartition(".")
                yield f"{canonical(component, stem)}.{kind}", parameter.detach()

    def weights(self) -> TrainedModel:
        """A copy of all weights (or of their average) on the CPU, as layers that replace those of the base."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        with self.averaged():
            for name, parameter in self._parameters.items():
                layer, _, kind = name.rpartition(".")
                parts.setdefault(layer, {})[kind] = parameter.detach().to("cpu", copy=True)
        layers = {
            name: ForeignLayer(KIND, tensors, 0.0, replacement, with_bias="bias" in tensors)
            for name, tensors in parts.items()
        }
        return TrainedModel(self.family, KIND, dict(layers), base=self._base.info, rank=self._rank)

    def state(self) -> dict[str, torch.Tensor]:
        """The weights and their average for a checkpoint. They are not copied."""
        tensors = self.average.tensors if self.average else {}
        own = {name: parameter.detach() for name, parameter in self._parameters.items()}
        return own | {average.PREFIX + name: each for name, each in tensors.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Load a checkpoint's weights in place.

        Raises:
            LorakitError: a tensor is missing, too many or of another shape.
        """
        own = self.state()
        weights_fit.require_checkpoint(own, state, "model")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def detach(self) -> None:
        """Restore the base's original weights."""
        self._fill(self.base_weights())
        for module in self._modules.values():
            module.requires_grad_(False)

    @torch.no_grad()
    def _fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            self._parameters[name].copy_(weight)


def replacement(weight: torch.Tensor, layer: ForeignLayer, strength: float) -> torch.Tensor:
    """The difference between the trained weight and the base's, in float64, so that their sum is the trained weight to
    the bit. A bias comes as a matrix of one column."""
    own = layer.parts["weight"]
    trained = own if own.shape == weight.shape else layer.parts["bias"][:, None]
    return strength * (trained.double() - weight.double())
