"""The few questions for someone who has never trained a model, and the config that follows from the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from lorakit import config as configuration, families
from lorakit.config import LENGTHS, Config, ModelConfig
from lorakit.core import registry
from lorakit.core.messages import Message
from lorakit.core.names import expand
from lorakit.families import BaseInfo, hub

# The options that everybody has to answer for; all others have a preset's value.
PHOTOS, KIND, NAME, BASE = BASIC_OPTIONS = ("data.folder", "data.kind", "data.name", "model.base")
# What the page of photos changes beside them.
EXCLUDE, EDITS, MORE_FOLDERS, CONCEPTS = OF_PHOTOS = (
    "data.exclude",
    "data.edits",
    "data.more_folders",
    "data.concepts",
)
# With a mask that is painted there.
MASKED_LOSS = "train.masked_loss"
VAE = "model.vae"
# The person who starts a run sets these; the page does not ask for them.
SET_BY_CALLER = ("output.folder",)
# Exactly one of these is set.
LENGTH_KEYS = tuple(f"train.{name}" for name in LENGTHS)
# How much longer or shorter than its preset a run is.
LENGTH_FACTORS = {"quick": 0.5, "balanced": 1.0, "best": 2.0}


def config_for_answers(
    answers: Mapping[str, Any], quality: str, preset: str | None = None, changed: Mapping[str, Any] | None = None
) -> Config:
    """The config for some answers (option's key -> value). Other options have the preset's values.

    Args:
        changed: other options that were set by hand. What belongs to them gives way as it does in `config.load`.

    Raises:
        LorakitError: the base, which decides the preset where none is named, cannot be read.
        ConfigError: an answer is no value of its option.
    """
    values = {key: answers[key] for key in BASIC_OPTIONS if key in answers}
    if preset is None:
        preset, _ = default_preset(model_of({**(changed or {}), **values}), values.get(KIND, "subject"))
    changed = changed or {}
    if not any(key in changed for key in LENGTH_KEYS):
        config = configuration.load(preset)
        for key in (*LENGTH_KEYS, "train.min_steps"):
            length = getattr(config.train, key.partition(".")[2])
            if length:
                values[key] = max(1, round(length * LENGTH_FACTORS[quality]))
    return configuration.load(preset, values | dict(changed))


def model_of(options: Mapping[str, object]) -> ModelConfig:
    """The section `model` as far as some options (key -> value) say it. Values are not checked."""
    values = {field.name: options[key] for field in fields(ModelConfig) if (key := f"model.{field.name}") in options}
    values |= {name: configuration.clean_path(f"model.{name}", value) for name, value in values.items()}
    return ModelConfig(**cast("dict[str, Any]", values))


def default_preset(model: ModelConfig, kind: str) -> tuple[str, str]:
    """The preset for a base and a kind of photos where the user named none, and why."""
    if model.base == "pocket":
        return f"{kind}-pocket", "for the bundled base"
    family = describe(model).family
    return (
        f"{kind}-{registry.version_of(family).preset}",
        Message("for a base of the family {family}; --preset chooses another", family),
    )


def describe(base: str | ModelConfig) -> BaseInfo:
    """Describe a base model without loading it."""
    return families.describe(base)


def is_hub_id(base: str) -> bool:
    """Whether a base is `owner/name[@revision]` on the hub and nothing on this machine."""
    return not expand(base).exists() and hub.parse(base) is not None


def must_be_fetched(name: str, *, vae: bool = False) -> bool:
    """Whether a base or an autoencoder must be downloaded: it is a hub id that is not in the cache. The network is not
    used."""
    hub_id = hub.parse(name) if is_hub_id(name) else None
    return hub_id is not None and (hub.cached_vae(hub_id) if vae else hub.cached(hub_id)) is None


def fetch(name: str, *, vae: bool = False) -> None:
    """Fetch a base, or an autoencoder, that is on the hub into the cache.

    Raises:
        LorakitError: why it cannot be had.
    """
    if not vae:
        describe(name)
    elif hub_id := hub.parse(name):
        hub.find_vae(hub_id)


def base_of(config_file: Path) -> str:
    """The base model that a run adapts."""
    return configuration.load(config_file).model.base


def photo_folder(config: Config) -> Path:
    """Where the photos are."""
    return Path(config.data.folder)
