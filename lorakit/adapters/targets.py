"""The layers of a base that get an adapter. Only names are used, so a plan needs no model.

The sets are those of sd-scripts, which every program reads: attention blocks, resnets and samplers of the UNet, and
attention and MLP of the text encoders. `conv_in`, `conv_out`, time and size embeddings and norms are left out, because
half of the programs ignore them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

from lorakit.adapters.weights import factorization
from lorakit.config import AdapterConfig, Config
from lorakit.core import registry
from lorakit.core.messages import Message, join
from lorakit.core.registry import METHODS, resolve

Value = TypeVar("Value")
# Always all four projections of an attention: A1111 reads none of them if one is missing.
_TEXT_ATTENTION = r"\.self_attn\.(q|k|v|out)_proj$"
_TEXT_LINEAR = _TEXT_ATTENTION + r"|\.mlp\.fc[12]$"
TEXT = {"attention": _TEXT_ATTENTION, "linear": _TEXT_LINEAR, "linear+conv": _TEXT_LINEAR}


def adapted(family: str, layers: Iterable[str], adapter: AdapterConfig) -> list[str]:
    """Canonical names of the layers that get an adapter: those of `select`, except layers of rank 0. If the base's
    weights are trained, all layers of the trained parts."""
    if METHODS[adapter.method].words_only:
        return []
    if METHODS[adapter.method].whole_model:
        parts = registry.family_of(family).trainable_encoders() if adapter.train_text_encoder else ()
        return [name for name in layers if name.partition(".")[0] in ("unet", *parts)]
    names = select(family, layers, adapter.target_modules, adapter.train_text_encoder)
    return [name for name in names if last_match(adapter.ranks, name, adapter.rank)]


def no_layer(adapter: AdapterConfig) -> str:
    """The message for an adapter that has no layer."""
    if adapter.ranks:
        return "adapter.ranks leaves out every layer: give one a rank above 0"
    return Message(
        "adapter.target_modules = {which!r} selects no layer of this base: choose another value", adapter.target_modules
    )


def last_match(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the last pattern (with `*`, `?` and `[...]`) that matches the full canonical name."""
    return next((patterns[pattern] for pattern in list(patterns)[::-1] if fnmatchcase(name, pattern)), default)


def layer_config(adapter: AdapterConfig, name: str) -> AdapterConfig:
    """The config of one layer, with rank and alpha from the last matching patterns."""
    if not adapter.ranks and not adapter.alphas:
        return adapter
    rank, alpha = last_match(adapter.ranks, name, adapter.rank), last_match(adapter.alphas, name, adapter.alpha)
    return replace(adapter, rank=rank, alpha=alpha, ranks={}, alphas={})


def pattern_problems(config: Config, family: str, layers: Iterable[str]) -> list[str]:
    """Problems of the patterns of ranks, alphas and rates, one message each: no layer matches, or later patterns
    override them."""
    adapter = config.adapter
    if METHODS[adapter.method].whole_model:
        return _unmatched("optimizer.rates", config.optimizer.rates, adapted(family, layers, adapter))
    selected = select(family, layers, adapter.target_modules, adapter.train_text_encoder)
    left = [name for name in selected if last_match(adapter.ranks, name, adapter.rank)]
    problems = adapter_pattern_problems(adapter, selected, left)
    return problems + _unmatched("optimizer.rates", config.optimizer.rates, left)


def adapter_pattern_problems(adapter: AdapterConfig, selected: Sequence[str], left: Sequence[str]) -> list[str]:
    """The same for an adapter's own patterns. `selected` is the result of `target_modules`, `left` the rest after rank
    0."""
    problems = _unmatched("adapter.ranks", adapter.ranks, selected) + _unmatched("adapter.alphas", adapter.alphas, left)
    if adapter.train_text_encoder and left and not any(not name.startswith("unet.") for name in left):
        problems.append("adapter.ranks leaves out the text encoders: leave out adapter.train_text_encoder")
    return problems


def _unmatched(option: str, patterns: Mapping[str, float], layers: Sequence[str]) -> list[str]:
    problems, left = list[str](), set(layers)
    for pattern in list(patterns)[::-1]:
        matches = {name for name in layers if fnmatchcase(name, pattern)}
        if matches and not matches & left:
            problems.append(
                Message(
                    "{option}: {pattern!r} has no effect, as later patterns match all of its layers ({count})",
                    option,
                    pattern,
                    len(matches),
                )
            )
        elif not matches:
            problems.append(
                Message(
                    "{option}: {pattern!r} matches none of the adapted layers ({count}); {hint}",
                    *(option, pattern, len(layers), near(pattern, layers)),
                )
            )
        left -= matches
    return problems[::-1]


def near(pattern: str, layers: Sequence[str]) -> str:
    """A hint for a pattern that matches nothing: the pattern with stars around it, or similar names."""
    word = pattern.strip("*.")
    inside = sum(word in name for name in layers)
    if word and inside:
        return Message("{pattern} matches {count}", f"'*{word}*'", inside)
    parts = {part: name for name in layers for part in name.lower().split(".")}
    for word in re.findall("[a-z0-9_]{3,}", pattern.lower()):
        if word not in parts and (close := difflib.get_close_matches(word, parts, n=1)):
            return Message("layers are such as {names}", parts[close[0]])
    by_letters = {re.sub("[^a-z0-9]", "", name.lower()): name for name in layers}
    letters = re.sub("[^a-z0-9]", "", pattern.lower().removeprefix("lora_"))
    names = [by_letters[match] for match in difflib.get_close_matches(letters, by_letters, n=2, cutoff=0)]
    return Message("layers are such as {names}", join(" and ", names)) if names else "there are none"


def select(family: str, layers: Iterable[str], target_modules: str, train_text_encoder: bool) -> list[str]:
    """Canonical names of the layers of a set, in the order of `layers`.

    Args:
        family: version of the base's family, such as "sd1".
        layers: canonical names of a base's linear and convolutional layers.
        target_modules: "attention" (q, k, v, out), "linear" (also the other linear layers of the attention blocks,
            `proj_in`, `proj_out` and feed-forward) or "linear+conv" (also resnets, down- and upsamplers).
        train_text_encoder: also select the layers of the text encoders.
    """
    spec = registry.family_of(family)
    rules = {"unet": spec.target_patterns[target_modules]}
    if train_text_encoder:
        rules |= dict.fromkeys(spec.trainable_encoders(), TEXT[target_modules])
    parts = [(name, *name.split(".", 1)) for name in layers]
    return [name for name, component, module in parts if component in rules and re.search(rules[component], module)]


def trained(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """Number of trained weights in one layer, whose weight is `[out, in]` or `[out, in, kh, kw]`."""
    return int(resolve(METHODS[adapter.method].trained_weights)(adapter, shape))


def lora_weights(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """The number of weights in A and B."""
    return adapter.rank * (shape[0] + math.prod(shape[1:]))


def all_weights(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """The number of weights in the layer itself."""
    return math.prod(shape)


def dora_weights(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """Those of LoRA, and a magnitude for each input."""
    return lora_weights(adapter, shape) + shape[1]


def loha_weights(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """Those of two LoRA products."""
    return 2 * lora_weights(adapter, shape)


def lokr_weights(adapter: AdapterConfig, shape: Sequence[int]) -> int:
    """Those of w1, and of w2 or its two factors."""
    (a, b), (c, d) = factorization(shape[0]), factorization(shape[1])
    is_full = adapter.rank >= max(b, d) / 2
    d *= math.prod(shape[2:])
    return a * c + (b * d if is_full else adapter.rank * (b + d))
