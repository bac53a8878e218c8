"""Recognize and read configs of other trainers, and refuse them where a lorakit config is expected."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from lorakit.core.errors import ConfigError, MissingFile
from lorakit.core.names import quote

# Keys that only one program uses.
MARKS = {
    "kohya's sd-scripts": {"pretrained_model_name_or_path", "network_dim", "network_module", "LoRA_type", "datasets"},
    "OneTrainer": {"training_method", "base_model_name", "concept_file_name"},
}


def program_of(tables: object) -> str:
    """The program that a config belongs to: a key of `MARKS`, or ""."""
    keys = {*tables, *flatten(tables)} if isinstance(tables, Mapping) else set()
    return next((program for program, marks in MARKS.items() if keys & marks), "")


def read(file: Path) -> dict[str, object]:
    """The tables of a TOML or JSON file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        tables = json.loads(text) if file.suffix.lower() == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise MissingFile("{file} does not exist", file) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("{file} cannot be read: {problem}", file, error) from None
    return tables if isinstance(tables, dict) else {}


def refuse(file: Path, tables: object) -> None:
    """Raise a ConfigError with advice for a config of another program."""
    if program := program_of(tables):
        raise ConfigError(
            "{file} is a config of {program}: lorakit import-config {path} writes one for lorakit",
            file.name,
            program,
            quote(file),
        )


def flatten(tables: Mapping[str, object]) -> dict[str, object]:
    """One table of all keys: sd-scripts ignores sections, and a data set has subsets."""
    flat: dict[str, object] = {}
    for key, value in tables.items():
        parts = value if isinstance(value, list) and len(value) == 1 else [value]
        if isinstance(parts[0], Mapping) and key not in ("optimizer", "text_encoder", "unet"):
            flat |= flatten(parts[0])
        else:
            flat[key] = value
    return flat
