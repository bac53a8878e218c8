"""PEFT's config of an adapter: `adapter_config.json` of a folder, or an entry in the header of diffusers' files. No
torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.core import foreign_json, registry
from lorakit.core.errors import LorakitError
from lorakit.core.names import printable, shorten
from lorakit.formats import identify, keys

Scaling = Mapping[str, Any]
COMPUTED = ("ia3", "oft", "boft")  # methods whose change depends on the base's weight
# Limits for patterns, so that their run time is bounded: no repeated groups, few repetitions (PEFT runs any pattern).
_MAX_REPEATS = 3
_MAX_TERMS = 100  # terms of OFT's series


def of_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Scaling]:
    """Component -> its config, from `lora_adapter_metadata`.

    Raises:
        LorakitError: it is not a JSON object.
    """
    try:
        config = foreign_json.loads_table(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        raise LorakitError("{path}: its lora_adapter_metadata is no JSON object", path) from None
    scalings: dict[str, dict[str, Any]] = {part: {} for part in registry.components()}
    for key, value in config.items():
        part, _, name = key.partition(".")
        scalings.setdefault(keys.canonical_part(part), {})[name] = value
    return dict(scalings)


def of_folder(folder: Path) -> Scaling:
    """The config of one component's folder.

    Raises:
        LorakitError: it is not a JSON object, or lorakit does not read the method.
    """
    path = folder / identify.PEFT_CONFIG
    try:
        config = foreign_json.loads_table(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise LorakitError("{path}: cannot be read as a JSON object", path) from None
    method = str(config.get("peft_type", "")).lower()
    if method and method not in {*COMPUTED, *(spec.layers for spec in registry.METHODS.values())}:
        name = shorten(printable(method.upper()), 40)
        raise LorakitError(
            "{folder}: this is an adapter of PEFT's {name}, which lorakit does not read: merge it into its "
            "base with PEFT (merge_and_unload), save that model, and make a LoRA of it with lorakit extract",
            folder,
            name,
        )
    return config


def is_feedforward(name: str, scaling: Scaling) -> bool:
    """Whether (IA)^3 scales the inputs of the layer with this canonical name."""
    targets = scaling.get("feedforward_modules") or []
    if isinstance(targets, str):
        return _matches_end(targets, name)
    return any(name.endswith(str(target)) for target in targets)


def require_numbers(path: Path, scaling: Scaling) -> None:
    """Raise LorakitError if a number in an adapter config is not finite, or a rank is below 1."""
    patterns = scaling.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise LorakitError("{path}: the alpha_pattern in its config is no table", path)
    is_computed = str(scaling.get("peft_type", "")).lower() in COMPUTED
    names = ("eps", "num_cayley_neumann_terms") if is_computed else ("r", "lora_alpha", "alpha")
    numbers = {key: scaling[key] for key in names if scaling.get(key) is not None}
    for key, value in [*numbers.items(), *patterns.items()]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
        if not is_number or (key == "r" and value < 1) or (key == "num_cayley_neumann_terms" and value > _MAX_TERMS):
            raise LorakitError(
                "{path}: {key} in its config is {value!r:.80}, no usable number",
                path,
                shorten(printable(key), 80),
                value,
            )


def alpha(name: str, rank: int, scaling: Scaling) -> float:
    """The alpha of a layer in a config; its rank if there is none.

    As in PEFT, patterns match the end of the module's name, and rank-stabilized adapters divide by sqrt(rank).
    """
    value: Any = _of_layer(name, scaling, "alpha_pattern", scaling.get("lora_alpha", scaling.get("alpha", rank)))
    try:
        return float(value) * (math.sqrt(rank) if scaling.get("use_rslora") else 1.0)
    except (TypeError, ValueError):
        raise LorakitError("{name}: the alpha in its config is not a number: {value!r}", name, value) from None


def rank(name: str, scaling: Scaling) -> int:
    """The rank of a layer in a config; 1 if there is none.

    Raises:
        LorakitError: it is not an integer above 0.
    """
    value = _of_layer(name, scaling, "rank_pattern", scaling.get("r", 1))
    if not isinstance(value, int) or value < 1:
        raise LorakitError("{name}: the rank in its config is not a number above 0: {value!r:.80}", name, value)
    return value


def _of_layer(name: str, scaling: Scaling, table: str, default: object) -> object:
    """The value of the first matching pattern of a table."""
    path, patterns = name.partition(".")[2], scaling.get(table) or {}
    if not isinstance(patterns, Mapping):
        raise LorakitError("{name}: the {table} in its config is no table", name, table)
    return next((own for pattern, own in patterns.items() if _matches_end(pattern, path)), default)


def _matches_end(pattern: str, name: str) -> bool:
    """PEFT's rule, `(.*\\.)?(pattern)$`, by plain comparison in the usual case, a name.

    Raises:
        LorakitError: a regular expression that is wrong, or one that could take for ever.
    """
    if not re.search(r"[^\w.]", pattern):
        return name == pattern or name.endswith(f".{pattern}")
    repeats = len(re.findall(r"[*+{]", pattern))
    if repeats > _MAX_REPEATS or re.search(r"\)[*+?{]|\(\?", pattern) or len(pattern) > 500:
        raise LorakitError(
            "the alpha_pattern {pattern!r} is not evaluated, as that could take forever", shorten(pattern, 80)
        )
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise LorakitError(
            "the alpha_pattern {pattern!r} is no regular expression: {problem}", shorten(pattern, 80), error
        ) from None
