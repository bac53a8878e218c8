"""The metadata of an adapter file: an allow-list of values that programs read, without private data.

It never contains paths, names of the photos' files and folders, captions or prompts. It contains the trigger, without
which the adapter cannot be used. `ss_*` keys are sd-scripts' (train_network.py), `modelspec.*` is SAI ModelSpec 1.0.1.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorakit import __version__
from lorakit.adapters.weights import ForeignLayer, LoraLayer
from lorakit.config import Config, without_paths
from lorakit.core import foreign_json, registry
from lorakit.families.spec import MODELSPEC_PREDICTIONS
from lorakit.formats import keys

if TYPE_CHECKING:
    from lorakit.adapters.weights import AdapterWeights

# The words of an adapter; their embeddings are separate files.
WORDS = "lorakit.words"
ALLOWED = frozenset(
    {
        *("ss_base_model_version", "ss_v2", "ss_network_module", "ss_network_dim", "ss_network_alpha"),
        *("ss_network_args", "ss_output_name", "ss_sd_model_name", "ss_resolution", "ss_clip_skip"),
        *("ss_num_train_images", "ss_num_epochs", "ss_steps", "ss_seed", "ss_learning_rate", "ss_optimizer"),
        *("ss_training_started_at", "ss_training_finished_at", "ss_tag_frequency"),
        *("modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.title"),
        *("modelspec.date", "modelspec.resolution", "modelspec.prediction_type", "modelspec.trigger_phrase"),
        *("modelspec.encoder_layer", "modelspec.description", "modelspec.usage_hint"),
        *("lorakit.version", "lorakit.family", "lorakit.method", "lorakit.layers_per_block", "lorakit.words"),
        *("lorakit.base", "lorakit.base_source", "lorakit.config"),
    }
)
# Derived from the weights by every writer, so never copied from one file to another.
OF_WEIGHTS = frozenset(
    {
        *("ss_v2", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", WORDS),
        *(
            "modelspec.implementation",
            "lorakit.version",
            "lorakit.family",
            "lorakit.method",
            "lorakit.layers_per_block",
        ),
    }
)
# Other programs' metadata that is copied, except keys with names of photo folders or facts of one file or run.
_FOREIGN = re.compile(
    r"(?:ss_|ssmd_|modelspec\.).+|license|author|tags|description|trigger_words|trained_words|website"
)
_LEFT = re.compile(r"ss_(?:datasets|(?:reg_)?dataset_dirs|session_id|network_.+)|modelspec\.hash_sha256|lorakit\..+")
_PATH = re.compile(r"(?:^|[\s\"'=(\[])(?:~?/|[A-Za-z]:[\\/]|\\\\)[^\s\"']")
_NAMES = ("ss_sd_model_name", "ss_vae_name")  # of files; sd-scripts writes some as paths
# Combined from all adapters that are joined.
_JOINED = ("modelspec.author", "modelspec.license", "author", "license")
# Texts of the user that only the run needs.
_PRIVATE = {"data": ("instance_prompt", "class_prompt"), "sample": ("prompts", "negative_prompt")}


class Base(Protocol):
    """The facts that are needed of the base; `families.BaseInfo` has them."""

    @property
    def family(self) -> str: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def hash(self) -> str: ...
    @property
    def source(self) -> str: ...


def build(
    config: Config,
    base: Base,
    *,
    name: str,
    images: int,
    steps: int,
    epochs: int,
    times: tuple[float, float],
    subjects: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """The metadata for an adapter from a run.

    Args:
        config: the resolved config; it is stored without paths, prompts and captions.
        name: name of the file; A1111 uses it as the alias in `<lora:NAME:1>`.
        images: number of training photos.
        steps: number of optimizer steps.
        epochs: passes over the photos, rounded down.
        times: start and end of the run, in seconds since the epoch.
        subjects: subject -> number of photos of it; by default all photos show `data.name`.
    """
    tags, (started, finished) = registry.version_of(base.family).tags, times
    version, architecture = tags.of(base.prediction_type)
    side = config.data.resolution
    subjects = subjects or {config.data.name.strip(): images}
    result = {
        "ss_base_model_version": version,
        "ss_v2": tags.v2,
        "ss_output_name": name,
        "ss_sd_model_name": base.title,
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(images),
        "ss_num_epochs": str(epochs),
        "ss_steps": str(steps),
        "ss_seed": str(config.train.seed),
        "ss_learning_rate": str(config.optimizer.learning_rate),
        "ss_optimizer": config.optimizer.name,
        "ss_training_started_at": str(started),
        "ss_training_finished_at": str(finished),
        "modelspec.architecture": architecture,
        "modelspec.title": name,
        "modelspec.date": datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": MODELSPEC_PREDICTIONS[base.prediction_type],
        "lorakit.base": base.hash,
        "lorakit.config": json.dumps(public_options(config), ensure_ascii=False, sort_keys=True),
    }
    if base.source:
        result["lorakit.base_source"] = base.source
    if config.model.clip_skip:
        result["ss_clip_skip"] = result["modelspec.encoder_layer"] = str(config.model.clip_skip)
    if any(subjects):
        result["modelspec.trigger_phrase"] = ", ".join(subjects)
        # A1111 shows this as a tag cloud; it must be a JSON object of objects.
        result["ss_tag_frequency"] = json.dumps({"photos": subjects}, ensure_ascii=False)
    return result


def public_options(config: Config) -> dict[str, dict[str, Any]]:
    """The config as tables, without paths, prompts and captions."""
    tables = without_paths(config)
    return {s: {n: v for n, v in t.items() if n not in _PRIVATE.get(s, ())} for s, t in tables.items()}


def rank_stabilized(method: str) -> bool:
    """Whether the method's scale is alpha / sqrt(rank), which a file's alpha must include."""
    return method in registry.METHODS and registry.METHODS[method].rank_stabilized


def of_weights(weights: AdapterWeights) -> dict[str, str]:
    """The metadata that is derived from the weights."""
    from lorakit.formats import adapter_math  # needs torch; the rest of this page does not

    tags = registry.version_of(weights.family).tags
    if not weights.layers:
        return _of_words(weights)
    layers = adapter_math.uniform(weights)
    # In a file of several methods, use one with a rank.
    first = min(layers.values(), key=lambda layer: isinstance(layer, ForeignLayer))
    lycoris = not all(isinstance(layer, LoraLayer) for layer in layers.values())
    module = "lorakit" if first.method in registry.own_kinds() else "lycoris.kohya" if lycoris else "networks.lora"
    folded = any(not math.isclose(layer.scale, weights.layers[name].scale) for name, layer in layers.items())
    result = {
        "ss_base_model_version": tags.version,
        "ss_v2": tags.v2,
        "ss_network_module": module,
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": f"{first.alpha:g}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": tags.architecture,
        "modelspec.implementation": tags.implementation,
        "lorakit.version": __version__,
        "lorakit.family": weights.family,
        # With its scale in the factors, a rank-stabilised adapter is a plain one.
        "lorakit.method": "lora" if folded and rank_stabilized(weights.method) else weights.method,
    }
    if lycoris:
        result["ss_network_args"] = json.dumps({"algo": first.method})
    if weights.embeddings:
        result[WORDS] = " ".join(weights.embeddings)
    per_block = keys.layers_per_block(weights.layers)
    if registry.version_of(weights.family).kohya.sgm and per_block != keys.DEFAULT_LAYERS_PER_BLOCK:
        result["lorakit.layers_per_block"] = str(per_block)
    return result


def _of_words(weights: AdapterWeights) -> dict[str, str]:
    """`of_weights` for words without an adapter."""
    tags = registry.version_of(weights.family).tags
    return {
        "ss_base_model_version": tags.version,
        "ss_v2": tags.v2,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": tags.architecture,
        "modelspec.implementation": tags.implementation,
        "lorakit.version": __version__,
        "lorakit.family": weights.family,
        "lorakit.method": weights.method,
        WORDS: " ".join(weights.embeddings),
    }


def complete(weights: AdapterWeights, metadata: Mapping[str, str]) -> dict[str, str]:
    """The header of a file: metadata from the weights, and the entries of `metadata` that are `harmless` and match the
    weights."""
    extra, version = harmless(metadata), registry.version_of(weights.family)
    for key, begins in zip(("ss_base_model_version", "modelspec.architecture"), version.tag_prefixes, strict=True):
        if not extra.get(key, "").startswith(begins):
            extra.pop(key, None)
    return of_weights(weights) | extra


def harmless(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that a derived file may keep: training options, words, author, license.

    Hashes, folders of photos, paths and values derived from the weights are removed.
    """
    result = {}
    for key, value in metadata.items():
        if key in OF_WEIGHTS or not isinstance(value, str):
            continue
        if key in _NAMES:
            value = re.split(r"[\\/]", value)[-1]
        is_foreign = _FOREIGN.fullmatch(key) and not _LEFT.fullmatch(key) and not _PATH.search(value)
        if key in ALLOWED or is_foreign:
            result[key] = value
    return result


def shared(several: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Metadata for several adapters joined into one: their common values, and the authors, licenses and tags of all."""
    tables = [harmless(metadata) for metadata in several]
    result = {key: value for key, value in tables[0].items() if all(table.get(key) == value for table in tables)}
    for key in _JOINED:
        if values := dict.fromkeys(table[key] for table in tables if key in table):
            result[key] = ", ".join(values)
    counts: dict[str, Any] = {}
    for number, table in enumerate(tables, 1):
        with contextlib.suppress(ValueError, AttributeError):
            tags = foreign_json.loads(table.get("ss_tag_frequency", "{}"))
            counts |= {f"{name} ({number})" if name in counts else name: value for name, value in tags.items()}
    return result | ({"ss_tag_frequency": json.dumps(counts, ensure_ascii=False)} if counts else {})


def of_merge(base: Mapping[str, str], adapter: Mapping[str, str]) -> dict[str, str]:
    """Metadata for a base with an adapter merged in: the base's, with sources, authors, licenses and trigger of
    both."""
    own, trigger = harmless(adapter), "modelspec.trigger_phrase"
    names = [base.get("modelspec.merged_from") or base.get("modelspec.title", "")]
    names.append(own.get("modelspec.title") or own.get("ss_output_name", ""))
    values = {"modelspec.merged_from": names, trigger: [base.get(trigger) or own.get(trigger, "")]}
    values |= {key: [base.get(key, ""), own.get(key, "")] for key in _JOINED}
    joined = {key: ", ".join(dict.fromkeys(filter(None, texts))) for key, texts in values.items()}
    return {**base, **{key: text for key, text in joined.items() if text}}


def family(metadata: Mapping[str, str]) -> str | None:
    """The family in a file's metadata, or None."""
    if metadata.get("lorakit.family") in registry.versions():
        return metadata["lorakit.family"]
    version, architecture = (metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture"))
    second = metadata.get("ss_v2") == "True"
    for name, (_, candidate) in reversed(registry.versions().items()):
        begins = version.startswith(candidate.tag_prefixes[0]) or architecture.startswith(candidate.tag_prefixes[1])
        if begins or (second and candidate.tags.v2 == "True"):
            return name
    return None


# Suffixes of an adapter's preview picture in web UIs.
PREVIEWS = (".png", ".preview.png", ".jpg", ".jpeg", ".webp")


def read_sidecar(path: Path) -> dict[str, Any]:
    """The content of an adapter's `.json` file; {} if it cannot be read."""
    try:
        return foreign_json.loads_table(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def sidecar(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The content of an adapter's `<name>.json`. A1111 and InvokeAI read trigger words and weight from it."""
    label = registry.version_of(family(metadata) or next(iter(registry.versions()))).tags.label
    return {
        "activation text": metadata.get("modelspec.trigger_phrase", ""),
        "preferred weight": 1.0,
        "negative text": "",
        "description": metadata.get("modelspec.description", ""),
        "notes": f"{'trained' if 'lorakit.config' in metadata else 'written'} with lorakit {__version__}",
        "sd version": label,
    }
