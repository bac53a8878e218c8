"""An adapter inside a base: PEFT's layers under canonical names, with float32 weights of its own."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lorakit import randomness, registry
from lorakit.adapters import targets
from lorakit.config import AdapterConfig, DoraConfig, LoraConfig
from lorakit.errors import LorakitError
from lorakit.weights import AdapterWeights, Layer, canonical

# PEFT's name for the adapter. One at a time: what is trained or drawn is then exactly what was attached.
NAME = "default"


def attach(target: Any, config: AdapterConfig, *, seed: int = 0) -> Adapter:
    """See `lorakit.adapters.attach`."""
    modules = _modules(target)
    paths = _layer_paths(modules)
    chosen = targets.select(paths, config.target_modules, config.train_text_encoder)
    if not chosen:
        raise LorakitError(f"adapter.target_modules = {config.target_modules!r} selects no layer of this base")
    layers = _inject(modules, {name: paths[name] for name in chosen}, config)
    adapter = Adapter(modules, layers, _family(target, modules), config.method, config.dropout)
    adapter.reset(seed)
    scale = getattr(target, "gradient_scale", 1.0)
    if scale != 1:
        for parameter in adapter.parameters().values():
            parameter.register_hook(lambda gradient: gradient / scale)
    return adapter


def apply(target: Any, weights: AdapterWeights, strength: float = 1.0) -> Adapter:
    """See `lorakit.adapters.apply`."""
    modules = _modules(target)
    family = _family(target, modules)
    if weights.family != family:
        raise LorakitError(f"the adapter is for {weights.family}, the base is {family}")
    paths = _layer_paths(modules)
    missing = [name for name in weights.layers if name not in paths]
    if missing:
        raise LorakitError(f"the base has no layer {missing[0]}, which the adapter adapts ({len(missing)} such)")
    for name, layer in weights.layers.items():
        component, path = paths[name]
        expected = tuple(modules[component].get_submodule(path).weight.shape)
        found = (len(layer.up), *layer.down.shape[1:])
        if expected != found:
            raise LorakitError(f"{name} is {expected} in the base, {found} in the adapter: it is for another base")
    # Most layers share one rank; PEFT makes those, and `load` puts the others' factors in their place.
    rank = Counter(layer.rank for layer in weights.layers.values()).most_common(1)[0][0]
    config = (DoraConfig if weights.method == "dora" else LoraConfig)(rank=rank)
    layers = _inject(modules, {name: paths[name] for name in weights.layers}, config)
    adapter = Adapter(modules, layers, family, "dora" if weights.method == "dora" else "lora", 0.0)
    adapter.fill(weights)
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(False)
    adapter.set_strength(strength)
    return adapter


class Adapter:
    """The adapter of one base.

    Attributes:
        layers: canonical names, in a fixed order.
        family: "sd1", "sd2" or "sdxl".
        method: "lora", "rslora" or "dora".
        dropout: on the adapters' input while `train(True)`.
    """

    def __init__(self, modules: dict[str, Any], layers: dict[str, Any], family: str, method: str, dropout: float):
        self._modules, self._layers = modules, layers
        self.layers = list(layers)
        self.family, self.method, self.dropout = family, method, dropout
        self._scales = {name: float(layer.scaling[NAME]) for name, layer in layers.items()}
        self._off = False
        for layer in layers.values():
            layer.eval()

    def reset(self, seed: int) -> None:
        """First weights: A uniform as `nn.Linear` has it (Kaiming, a = sqrt 5), from a generator seeded by the seed and
        the layer's name; B zero. The global generators are not touched."""
        for name, layer in self._layers.items():
            down, up = layer.lora_A[NAME], layer.lora_B[NAME]
            draw = randomness.generator(seed, 0, f"adapter {name}")
            bound = 1 / math.sqrt(math.prod(down.weight.shape[1:]))
            weight = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=draw)
            _set(down, weight, layer)
            _set(up, torch.zeros(up.weight.shape), layer)

    def parameters(self) -> dict[str, nn.Parameter]:
        """`<canonical>.down`, `.up` and, for DoRA, `.magnitude` -> float32 parameter, in the order of `layers`."""
        found = {}
        for name, layer in self._layers.items():
            found[f"{name}.down"] = layer.lora_A[NAME].weight
            found[f"{name}.up"] = layer.lora_B[NAME].weight
            if NAME in layer.lora_magnitude_vector:
                found[f"{name}.magnitude"] = layer.lora_magnitude_vector[NAME].weight
        return found

    def groups(self) -> list[tuple[str, list[nn.Parameter]]]:
        """Parameters by component, for the optimizer: [("unet", [...]), ("text_encoder", [...]), ...]."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.parameters().items():
            found.setdefault(name.partition(".")[0], []).append(parameter)
        return list(found.items())

    def describe(self) -> dict[str, tuple[int, int]]:
        """Component -> (adapted modules, parameters)."""
        modules = Counter(name.partition(".")[0] for name in self.layers)
        return {name: (modules[name], sum(p.numel() for p in group)) for name, group in self.groups()}

    def train(self, mode: bool = True) -> None:
        """Turn the adapter's dropout on or off. The base stays in eval mode always."""
        for layer in self._layers.values() if self.dropout else ():
            layer.lora_dropout[NAME].train(mode)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone while inside."""
        before = self._off
        self._switch(True)
        try:
            yield
        finally:
            self._switch(before)

    def set_strength(self, strength: float) -> None:
        """Weigh the whole change by `strength`; 0 is the base, 1 the adapter as trained."""
        for name, layer in self._layers.items():
            layer.scaling[NAME] = self._scales[name] * strength
        self._switch(strength == 0)

    def weights(self) -> AdapterWeights:
        """A copy of the weights, float32 on the CPU, at strength 1."""

        def copy(parameter: torch.Tensor) -> torch.Tensor:
            return parameter.detach().to("cpu", torch.float32, copy=True)

        layers = {}
        for name, layer in self._layers.items():
            down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            vector = layer.lora_magnitude_vector
            magnitude = copy(vector[NAME].weight) if NAME in vector else None
            layers[name] = Layer(copy(down), copy(up), self._scales[name] * len(down), magnitude)
        return AdapterWeights(self.family, self.method, layers)

    def load(self, weights: AdapterWeights) -> None:
        """Begin from another adapter's weights. A difference of scale is folded into `up`.

        Raises:
            LorakitError: family, method, layers, ranks or shapes differ.
        """
        kinds = {name: "dora" if name == "dora" else "lora" for name in (weights.method, self.method)}
        if weights.family != self.family:
            raise LorakitError(f"the adapter to start from is for {weights.family}, this base is {self.family}")
        if kinds[weights.method] != kinds[self.method]:
            raise LorakitError(
                f"the adapter to start from is {weights.method}: set adapter.method = {weights.method!r}"
            )
        missing = [name for name in self.layers if name not in weights.layers]
        extra = [name for name in weights.layers if name not in self._layers]
        if missing or extra:
            raise LorakitError(
                f"the adapter to start from has other layers: {len(missing)} lacking, {len(extra)} too many, "
                f"e.g. {(missing or extra)[0]}; set adapter.target_modules and train_text_encoder as it was made"
            )
        for name, layer in weights.layers.items():
            own = self._layers[name].lora_A[NAME].weight
            if layer.rank != len(own):
                raise LorakitError(
                    f"the adapter to start from has rank {layer.rank} in {name}: set adapter.rank = {layer.rank}"
                )
            if layer.down.shape != own.shape or layer.up.shape != self._layers[name].lora_B[NAME].weight.shape:
                raise LorakitError(f"the adapter to start from has another shape in {name}: it is of another base")
        for name, layer in weights.layers.items():
            target = self._layers[name]
            with torch.no_grad():
                target.lora_A[NAME].weight.copy_(layer.down)
                target.lora_B[NAME].weight.copy_(layer.up * (layer.scale / self._scales[name]))
                if layer.magnitude is not None:
                    target.lora_magnitude_vector[NAME].weight.copy_(layer.magnitude)

    def fill(self, weights: AdapterWeights) -> None:
        """Take factors of any rank and scale as they are; the layers must be these."""
        for name, layer in weights.layers.items():
            target = self._layers[name]
            _set(target.lora_A[NAME], layer.down, target)
            _set(target.lora_B[NAME], layer.up, target)
            target.r[NAME], target.lora_alpha[NAME] = layer.rank, layer.alpha
            target.scaling[NAME] = self._scales[name] = layer.scale
            if layer.magnitude is not None:
                _set(target.lora_magnitude_vector[NAME], layer.magnitude, target)
                target.full_scaling[NAME] = layer.scale
            elif NAME in target.lora_magnitude_vector:
                del target.lora_magnitude_vector[NAME]

    def state(self) -> dict[str, torch.Tensor]:
        """Exact copies of the parameters on the CPU, for a checkpoint."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters().items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put a checkpoint's parameters back, in place: the optimizer keeps its hold on them.

        Raises:
            LorakitError: a tensor is missing, too many or of another shape.
        """
        own = self.parameters()
        wrong = sorted(own.keys() ^ state.keys()) or [n for n, p in own.items() if p.shape != state[n].shape]
        if wrong:
            raise LorakitError(f"the checkpoint does not fit this adapter: {wrong[0]} ({len(wrong)} such)")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def detach(self) -> None:
        """Take the adapter out; the base is as it was before `attach`."""
        own = set(self._layers.values())
        for module in self._modules.values():
            found = [(path, layer) for path, layer in module.named_modules() if layer in own]
            for path, layer in found:
                module.set_submodule(path, layer.base_layer)
            if found:
                del module.peft_config
                module._hf_peft_config_loaded = False

    def _switch(self, off: bool) -> None:
        # PEFT's own `enable_adapters` also walks over every parameter, and `nn.Module` looks closely at each attribute
        # that is set: both are too slow for something done twice a step in a thousand layers.
        self._off = off
        for layer in self._layers.values():
            layer.__dict__["_disable_adapters"] = off


def _modules(target: Any) -> dict[str, Any]:
    """Component -> module that may be adapted, of a Family or a diffusers pipeline."""
    if hasattr(target, "components"):
        parts = {name: target.components.get(name) for name in ("unet", "text_encoder", "text_encoder_2")}
        modules = {name: part for name, part in parts.items() if part is not None}
    else:
        modules = target.modules() if hasattr(target, "info") else {}
    if "unet" not in modules:
        raise LorakitError(f"{type(target).__name__} has no UNet: give a Stable Diffusion 1.x, 2.x or XL pipeline")
    for component, module in modules.items():
        if getattr(module, "peft_config", None):
            raise LorakitError(f"{component} already carries an adapter: take it out first (unload_lora_weights)")
    return modules


def _family(target: Any, modules: dict[str, Any]) -> str:
    """A Family says what it is; of a pipeline it is told as `families.describe` tells it."""
    if hasattr(target, "info"):
        return str(target.info.family)
    if "text_encoder_2" in modules:
        return "sdxl"
    return "sd2" if modules["unet"].config.cross_attention_dim == 1024 else "sd1"


def _layer_paths(modules: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Canonical name -> (component, module path as the installed libraries call it)."""
    return {
        canonical(component, path): (component, path)
        for component, module in modules.items()
        for path, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def _inject(modules: dict[str, Any], chosen: dict[str, tuple[str, str]], config: AdapterConfig) -> dict[str, Any]:
    """Let PEFT put its layers in; canonical name -> layer."""
    make = registry.load(registry.ADAPTERS, config.method)
    # PEFT's layers draw first weights that `reset` replaces; that must not move the global generator.
    with torch.random.fork_rng(devices=[]):
        for component, module in modules.items():
            paths = [path for part, path in chosen.values() if part == component]
            if paths:
                module.add_adapter(make(config, paths), adapter_name=NAME)
    return {name: modules[component].get_submodule(path) for name, (component, path) in chosen.items()}


def _set(module: Any, weight: torch.Tensor, layer: Any) -> None:
    """Give `module` a float32 weight on the base layer's device; PEFT makes it in the base's precision."""
    device = layer.base_layer.weight.device
    module.weight = nn.Parameter(weight.detach().to(device, torch.float32, copy=True))
