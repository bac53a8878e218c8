"""An adapter in a base: PEFT's layers, under canonical names, with float32 weights."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.adapters import average, dropout, targets, weights_fit
from lorakit.adapters.method import NAME, Method
from lorakit.adapters.textual_inversion import LearnedToken
from lorakit.adapters.weights import AdapterWeights, delta_norm, from_factors
from lorakit.config import ADAPTER_SECTIONS, AdapterConfig
from lorakit.core import registry, rng
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.core.messages import join

if TYPE_CHECKING:
    from peft import PeftConfig

    from lorakit.families.spec import FamilySpec


def attach(target: Any, config: AdapterConfig, *, seed: int = 0, trigger: str = "", init_word: str = "") -> Adapter:
    """See `lorakit.adapters.attach`."""
    if config.new_tokens and not trigger:
        raise LorakitError("adapter.new_tokens needs a word to learn: give a trigger")
    modules = _modules(target)
    paths = _layer_paths(modules)
    family = _family(target, modules)
    layer_names = targets.adapted(family, paths, config)
    selected = targets.select(family, paths, config.target_modules, config.train_text_encoder)
    if problems := targets.adapter_pattern_problems(config, selected, layer_names):
        raise LorakitError(join("\n", problems))
    if not layer_names and not config.words_only:
        raise LorakitError(targets.no_layer(config))
    layers = _inject(
        modules, {name: paths[name] for name in layer_names}, config, plain=getattr(target, "plain", False)
    )
    dropout.install(layers.values(), config)
    adapter = Adapter(modules, layers, family, config)
    adapter._reserve = getattr(target, "reserve", adapter._reserve)
    adapter.reset(seed)
    if config.new_tokens:
        adapter.learn_word(trigger, _tokenizers(target), config.new_tokens, init_word=init_word)
    if getattr(target, "gradient_scale", 1.0) != 1:
        adapter.divide_gradients(lambda: target.gradient_scale)
    return adapter


def apply(target: Any, weights: AdapterWeights, strength: float = 1.0) -> Adapter:
    """See `lorakit.adapters.apply`."""
    modules = _modules(target)
    family = _family(target, modules)
    if weights.family != family:
        raise LorakitError("the adapter is for {family}, the base is {other}", weights.family, family)
    paths = _layer_paths(modules)
    method = weights_fit.method(weights)
    missing = [name for name in weights.layers if name not in paths]
    if missing:
        raise LorakitError(
            "the base has no layer {missing}, which the adapter adapts ({count} such)", missing[0], len(missing)
        )
    for name, layer in weights.layers.items():
        component, path = paths[name]
        expected = tuple(modules[component].get_submodule(path).weight.shape)
        if not weights_fit.fits(layer, expected):
            actual = weights_fit.size_text(layer)
            raise LorakitError(
                "{name} is {expected} in the base, {actual} in the adapter: it is for another base",
                name,
                expected,
                actual,
            )
    # PEFT creates all layers with the most common rank; `fill` then replaces the factors of layers with other ranks.
    ranks = Counter(layer.rank for layer in weights.layers.values()).most_common(1)
    section = ADAPTER_SECTIONS[method]
    config = section(method=method, rank=ranks[0][0]) if ranks else section(method=method)
    layer_paths = {name: paths[name] for name in weights.layers}
    layers = _inject(modules, layer_paths, config, plain=getattr(target, "plain", False))
    adapter = Adapter(modules, layers, family, config)
    adapter._reserve = getattr(target, "reserve", adapter._reserve)
    adapter.fill(weights)
    try:
        for word, vectors in weights.embeddings.items():
            adapter.learn_word(word, _tokenizers(target), vectors=vectors)
    except LorakitError:
        adapter.detach()
        raise
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(False)
    adapter.set_strength(strength)
    return adapter


class Adapter:
    """The adapter of one base.

    Attributes:
        layers: canonical names of the adapted layers, in a fixed order.
        family: "sd1", "sd2", "sdxl" or "sd3".
        config: the section `adapter` of the config.
        method: a name of `registry.METHODS`.
        dropout: the largest dropout probability; dropout is on after `train(True)`.
        average: moving average of the weights, or None.
        scaled_gradients: if True, gradients keep the factor `Family.gradient_scale`, and whoever sets this divides by
            it.
    """

    average: average.WeightAverage | None = None
    scaled_gradients = False

    def __init__(self, modules: dict[str, Any], layers: dict[str, Any], family: str, config: AdapterConfig):
        self._modules, self._layers = modules, layers
        self.layers = list(layers)
        self.family, self.config, self.method = family, config, config.method
        self.dropout = config.largest_dropout
        self._method: Method = registry.resolve(registry.METHODS[config.method].functions)
        scale = (lambda layer: 1.0) if registry.METHODS[config.method].factors else self._method.scale
        self._scales = {name: scale(layer) for name, layer in layers.items()}
        self._off = False
        self._word, self._learned_tokens = "", dict[str, LearnedToken]()
        # Tells the base how many tokens the word takes in a text.
        self._reserve: Callable[[str, int], None] = lambda word, places: None
        for layer in layers.values():
            layer.eval()
        self.set_strength(1)

    def reset(self, seed: int) -> None:
        """Initialize the weights as the method does, with a generator seeded by `seed` and the layer's name. The global
        generators do not change."""
        for name, layer in self._layers.items():
            self._method.begin(layer, rng.generator(seed, 0, f"adapter {name}"))

    def divide_gradients(self, scale: Callable[[], float | torch.Tensor]) -> None:
        """Divide every gradient by `scale()`, except while `scaled_gradients`."""

        def divided(gradient: torch.Tensor | None) -> torch.Tensor | None:
            # None: the layer has added its gradient to a buffer itself (`FlatParameters`).
            return None if gradient is None or self.scaled_gradients else gradient / scale()

        for parameter in self.parameters().values():
            parameter.register_hook(divided)

    def learn_word(
        self,
        word: str,
        tokenizers: dict[str, Any],
        count: int = 0,
        vectors: dict[str, torch.Tensor] | None = None,
        init_word: str = "",
    ) -> None:
        """Give every text encoder vectors for a word: `vectors`, or `count` copies of an embedding.

        The embedding is that of `init_word`, by default of the word itself.

        Raises:
            LorakitError: there are vectors for another word already, or `vectors` have another width than the encoder.
        """
        if self._learned_tokens:
            raise LorakitError(
                "the adapter has vectors for {word!r} and {other!r}: only one word can be applied", self._word, word
            )
        for part, tokenizer in tokenizers.items():
            initial = None if vectors is None else vectors.get(part)
            width = self._modules[part].get_input_embeddings().weight.shape[1]
            if vectors is not None and (initial is None or initial.shape[1] != width):
                raise LorakitError("the embedding of {word!r} does not fit {part}: it is for another base", word, part)
            self._learned_tokens[part] = LearnedToken(self._modules[part], tokenizer, word, count, initial, init_word)
        self._word = word
        self._reserve(word, max((len(token.vectors) for token in self._learned_tokens.values()), default=0))

    @property
    def init_tokens(self) -> int:
        """Tokens of the text that the vectors of the word begin as; 0 where they were given."""
        return max((token.init_tokens for token in self._learned_tokens.values()), default=0)

    def parameters(self) -> dict[str, nn.Parameter]:
        """`<canonical>.<factor>` -> float32 parameter, in the order of `layers`, then `<component>.token`, the vectors
        of a word.

        Factors have the names of `weights`: `down`, `up`, `magnitude`; `hada_w1_a`, ...; `lokr_w1`, ...
        """
        factors = {
            f"{name}.{factor}": parameter
            for name, layer in self._layers.items()
            for factor, parameter in self._method.factors(layer).items()
        }
        return factors | {f"{part}.token": token.vectors for part, token in self._learned_tokens.items()}

    def groups(self) -> list[tuple[str, list[nn.Parameter]]]:
        """Parameters by component, for the optimizer: [("unet", [...]), ("text_encoder", [...]), ...]."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.parameters().items():
            groups.setdefault(name.partition(".")[0], []).append(parameter)
        return list(groups.items())

    def describe(self) -> dict[str, tuple[int, int]]:
        """Component -> (adapted modules, parameters)."""
        modules = Counter(name.partition(".")[0] for name in self.layers)
        return {name: (modules[name], sum(p.numel() for p in group)) for name, group in self.groups()}

    def train(self, mode: bool = True) -> None:
        """Turn the adapter's dropout on or off. The base always stays in eval mode."""
        for layer in self._layers.values() if self.dropout else ():
            layer.lora_dropout[NAME].train(mode)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the adapter is disabled."""
        before = self._off
        self._switch(True)
        try:
            yield
        finally:
            self._switch(before)

    def set_strength(self, strength: float) -> None:
        """Scale the adapter's effect by `strength`: 0 is the base, 1 the adapter as trained."""
        for name, layer in self._layers.items():
            layer.scaling[NAME] = self._scales[name] * strength
        self._switch(strength == 0)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the weights are replaced by their moving average, if there is one."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    @torch.no_grad()
    def limit_norms(self, maximum: float) -> torch.Tensor:
        """Scale down the factors of each layer whose delta W has a norm above `maximum`. Return the number of such
        layers.

        This is sd-scripts' `scale_weight_norms`.
        """
        count = torch.zeros((), device=next(iter(self.parameters().values())).device)
        for name, layer in self._layers.items():
            factors = self._method.factors(layer)
            share = (maximum / delta_norm(factors, self._scales[name]).clamp(min=1e-30)).clamp(max=1.0)
            torch._foreach_mul_([factor.data for factor in factors.values()], share ** (1 / len(factors)))
            count += share < 1
        return count

    def weights(self) -> AdapterWeights:
        """A copy of the weights, or of their average if there is one: float32, on the CPU, at strength 1."""
        with self.averaged():
            return self._weights()

    def _weights(self) -> AdapterWeights:

        def copy(parameter: torch.Tensor) -> torch.Tensor:
            return parameter.detach().to("cpu", torch.float32, copy=True)

        layers = {}
        for name, layer in self._layers.items():
            own = self._method.factors(layer) | self._method.constants(layer)
            layers[name] = from_factors({key: copy(tensor) for key, tensor in own.items()}, self._scales[name])
        embeddings = {self._word: {part: copy(token.vectors) for part, token in self._learned_tokens.items()}}
        return AdapterWeights(self.family, self.method, layers, embeddings=embeddings if self._learned_tokens else {})

    def load(self, weights: AdapterWeights) -> None:
        """Start from another adapter's weights. One of the factors absorbs a difference of scale.

        Raises:
            LorakitError: as `weights_fit.require`.
        """
        shapes = {name: tuple(layer.base_layer.weight.shape) for name, layer in self._layers.items()}
        weights_fit.require(weights, self.config, self.family, shapes, self._word)
        with torch.no_grad():
            for name, layer in weights.layers.items():
                factors = layer.rescaled(self._scales[name]).factors()
                for key, parameter in self._method.factors(self._layers[name]).items():
                    parameter.copy_(factors[key])
            for part, vectors in weights.embeddings.get(self._word, {}).items():
                self._learned_tokens[part].vectors.copy_(vectors)

    def fill(self, weights: AdapterWeights) -> None:
        """Set factors of any rank and scale. The layers must have the names of this adapter's layers."""
        assert self._method.fill is not None, "weights are applied by a method that reads them"
        for name, layer in weights.layers.items():
            self._method.fill(self._layers[name], layer)
            self._scales[name] = layer.scale

    def state(self) -> dict[str, torch.Tensor]:
        """Exact copies of the parameters on the CPU, for a checkpoint."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._state().items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Load a checkpoint's parameters in place, so that the optimizer still refers to them.

        Raises:
            LorakitError: a tensor is missing, unknown or of another shape.
        """
        own = self._state()
        weights_fit.require_checkpoint(own, state, "adapter")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def detach(self) -> None:
        """Remove the adapter; the base is then as before `attach`."""
        for token in self._learned_tokens.values():
            token.remove()
        self._reserve("", 0)
        own = set(self._layers.values())
        for module in self._modules.values():
            layers = [(path, layer) for path, layer in module.named_modules() if layer in own]
            for path, layer in layers:
                module.set_submodule(path, layer.base_layer)
            if layers:
                del module.peft_config
                module._hf_peft_config_loaded = False

    def _state(self) -> dict[str, torch.Tensor]:
        """Parameters, constants of the method, and the moving average."""
        constants = {
            f"{name}.{factor}": tensor
            for name, layer in self._layers.items()
            for factor, tensor in self._method.constants(layer).items()
        }
        tensors = self.average.tensors if self.average else {}
        return {**self.parameters(), **constants} | {average.PREFIX + name: each for name, each in tensors.items()}

    def _switch(self, off: bool) -> None:
        # PEFT's `enable_adapters` visits every parameter, and `nn.Module.__setattr__` is slow: both take too long for
        # two calls per step in a thousand layers.
        self._off = off
        for layer in self._layers.values():
            layer.__dict__["_disable_adapters"] = off
        for token in self._learned_tokens.values():
            token.off = off


def _modules(target: Any) -> dict[str, Any]:
    """Component -> module that can be adapted, of a Family or a diffusers pipeline."""
    if hasattr(target, "components"):
        spec, components = _pipeline_family(target), target.components
        encoders = {name: components.get(name) for name in (() if spec is None else spec.trainable_encoders())}
        parts = {"unet": None if spec is None else components[spec.denoiser], **encoders}
        modules = {name: part for name, part in parts.items() if part is not None}
    else:
        modules = target.modules() if hasattr(target, "info") else {}
    if "unet" not in modules:
        raise LorakitError(
            "{name} has no UNet: give a pipeline of {families}", type(target).__name__, registry.version_titles()
        )
    for component, module in modules.items():
        if getattr(module, "peft_config", None):
            raise LorakitError(
                "{component} already carries an adapter: take it out first (unload_lora_weights)", component
            )
    return modules


def _pipeline_family(pipeline: Any) -> FamilySpec | None:
    """The family of a pipeline: it has this denoiser, the most of its encoders, and the fewest encoders that the
    pipeline lacks."""
    parts = {name for name, part in pipeline.components.items() if part is not None}

    def fit(spec: FamilySpec) -> tuple[int, int]:
        encoders = {encoder.name for encoder in spec.text_encoders}
        return len(encoders & parts), -len(encoders - parts)

    return max((spec for spec in registry.FAMILIES.values() if spec.denoiser in parts), key=fit, default=None)


def _tokenizers(target: Any) -> dict[str, Any]:
    """Text encoder -> its tokenizer."""
    pipeline = target if hasattr(target, "components") else target.pipeline()
    spec = target.info.spec if hasattr(target, "info") else _pipeline_family(target)
    encoders = () if spec is None else spec.text_encoders
    tokenizers = {part.name: pipeline.components.get(part.tokenizer) for part in encoders if part.trainable}
    return {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}


def _family(target: Any, modules: dict[str, Any]) -> str:
    """The name of the family's version: that of a Family, or the one that a pipeline's text width indicates."""
    if hasattr(target, "info"):
        return str(target.info.family)
    spec = _pipeline_family(target)
    assert spec is not None, "_modules found its denoiser"
    config = getattr(modules["unet"], "config", None)
    return spec.version(getattr(config, "cross_attention_dim", None)).name


def _layer_paths(modules: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Canonical name -> (component, module path in the installed libraries)."""
    return {
        canonical(component, path): (component, path)
        for component, module in modules.items()
        for path, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def _inject(
    modules: dict[str, Any], layer_paths: dict[str, tuple[str, str]], config: AdapterConfig, *, plain: bool
) -> dict[str, Any]:
    """Let PEFT insert its layers. Return canonical name -> layer. With `plain` they are PEFT's, not those of
    `engine.fused_lora`."""
    method: Method = registry.resolve(registry.METHODS[config.method].functions)
    # PEFT's layers draw initial weights, which `reset` replaces; this must not advance the global generator.
    with torch.random.fork_rng(devices=[]):
        for component, module in modules.items():
            paths = {path: name for name, (part, path) in layer_paths.items() if part == component}
            if paths:
                peft = method.peft(config, list(paths))
                _set_patterns(peft, config, paths)
                module.add_adapter(peft if plain else method.fuse(peft), adapter_name=NAME)
    return {name: modules[component].get_submodule(path) for name, (component, path) in layer_paths.items()}


def _set_patterns(peft: PeftConfig, config: AdapterConfig, names: dict[str, str]) -> None:
    """Set PEFT's patterns for layers (path -> canonical name) whose rank or alpha differs from the config's.

    Layers of the same rank and alpha share one pattern, because PEFT compares every layer with every pattern.
    """
    paths: dict[tuple[int, float], list[str]] = {}
    for path, name in names.items():
        layer = targets.layer_config(config, name)
        if (layer.rank, layer.effective_alpha) != (config.rank, config.effective_alpha):
            paths.setdefault((layer.rank, layer.effective_alpha), []).append(re.escape(path))
    peft.rank_pattern = {"|".join(group): rank for (rank, _), group in paths.items()}
    peft.alpha_pattern = {"|".join(group): alpha for (_, alpha), group in paths.items()}
