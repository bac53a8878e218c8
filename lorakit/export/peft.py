"""A folder that PEFT's `PeftModel.from_pretrained` opens: one subfolder per component, `unet/`, `text_encoder/`, ...

Each holds `adapter_config.json` and `adapter_model.safetensors`. PEFT matches tensors to module paths by name, and
transformers 5.6 took `text_model.` out of the first text encoder's paths, so that encoder's tensors (small, beside the
UNet's) are there under both names: PEFT takes the one that it knows and passes over the other. `target_modules` match
with and without.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit import atomic
from lorakit.errors import LorakitError
from lorakit.export import factors, files, keys
from lorakit.export.identify import PEFT_CONFIG, PEFT_MODEL, PEFT_PREFIX
from lorakit.export.metadata import complete
from lorakit.weights import AdapterWeights, Layer

_TEXT_MODEL = "text_model."
# A CLIPTextModel. text_encoder_2 is a CLIPTextModelWithProjection, whose paths are what they were.
_BOTH_NAMES = ("text_encoder",)


def check(method: str, family: str) -> str | None:
    """Why this format cannot carry `method` for `family`, or None."""
    if method == "dora":
        return (
            "the PEFT format cannot carry this DoRA: PEFT's magnitude is one number per output row, "
            "lorakit's is one per input column, which is what web UIs read; export it as kohya"
        )
    return None


def tensors(weights: AdapterWeights, dtype: str) -> dict[str, dict[str, torch.Tensor]]:
    """What each component's file holds: component -> tensor name -> tensor.

    Raises:
        LorakitError: a method that the format cannot carry, a layer that is not portable or not finite.
    """
    return {part: _tensors(layers, dtype) for part, layers in _components(weights).items()}


def write(weights: AdapterWeights, path: Path, *, dtype: str, metadata: Mapping[str, str]) -> list[Path]:
    """Write the folder `path`, whole or not at all; returns the files in it. An older PEFT folder there is replaced.

    Raises:
        LorakitError: see `tensors`; `path` is something else than a PEFT folder; too little space.
    """
    if path.exists() and not _is_ours(path):
        raise LorakitError(f"{path}: exists and is not a PEFT folder; choose another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    written = []
    try:
        for part, layers in _components(weights).items():
            folder = temporary / part
            files.write_safetensors(folder / PEFT_MODEL, _tensors(layers, dtype), complete(weights, metadata))
            text = json.dumps(_config(part, layers), indent=2, sort_keys=True)
            files.write_bytes(folder / PEFT_CONFIG, text.encode())
            written += [path / part / PEFT_CONFIG, path / part / PEFT_MODEL]
        _swap(temporary, path, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return written


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put the folder `new` at `path`, what was there at `old`; where that fails, what was there is there again."""
    try:
        if path.exists():
            path.rename(old)
        new.rename(path)
        atomic.sync_folder(path.parent)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise LorakitError(
            f"{path}: cannot be written ({error.strerror or error}); nothing there was changed"
        ) from None


def _is_ours(path: Path) -> bool:
    """Whether everything at `path` is component folders with an adapter_config.json, or it is an empty folder."""
    return path.is_dir() and all((entry / PEFT_CONFIG).is_file() for entry in path.iterdir())


def _components(weights: AdapterWeights) -> dict[str, dict[str, Layer]]:
    factors.require_writable(weights, check(factors.method(weights), weights.family))
    parts: dict[str, dict[str, Layer]] = {}
    for name, layer in factors.complete(weights).items():
        parts.setdefault(keys.component(name), {})[name] = layer
    return parts


def _tensors(layers: Mapping[str, Layer], dtype: str) -> dict[str, torch.Tensor]:
    result = {}
    for name, layer in layers.items():
        part, _, module = name.partition(".")
        shorter = [module.removeprefix(_TEXT_MODEL)] if part in _BOTH_NAMES else []
        for path in (module, *shorter):
            result[f"{PEFT_PREFIX}{path}.lora_A.weight"] = layer.down
            result[f"{PEFT_PREFIX}{path}.lora_B.weight"] = layer.up
    return factors.cast(result, dtype)


def _config(part: str, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """PEFT's LoraConfig for one component, with no path of the user's in it."""
    one = next(iter(layers.values()))
    targets = [name.partition(".")[2].removeprefix(_TEXT_MODEL) for name in layers]
    return {
        "peft_type": "LORA",
        "r": one.rank,
        "lora_alpha": int(one.alpha) if one.alpha.is_integer() else one.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
