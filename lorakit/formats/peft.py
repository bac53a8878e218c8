"""A folder for PEFT's `PeftModel.from_pretrained`: one subfolder per component, `unet/`, `text_encoder/`, ...

Each contains `adapter_config.json` and `adapter_model.safetensors`. PEFT matches tensors to module paths by name, and
transformers 5.6 removed `text_model.` from the first text encoder's paths. So this encoder's tensors, which are small,
are written under both names: PEFT uses the one that matches and ignores the other. `target_modules` match both.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.weights import AdapterWeights, AnyLayer, LohaLayer, LokrLayer, LoraLayer, factorization
from lorakit.core import atomic
from lorakit.core.errors import LorakitError
from lorakit.formats import keys
from lorakit.formats.identify import PEFT_CONFIG, PEFT_MODEL, PEFT_PREFIX
from lorakit.formats.metadata import complete
from lorakit.formats.spec import FormatSpec, kohya_only

if TYPE_CHECKING:
    import torch

_TEXT_MODEL = "text_model."
# LoRA's factors are modules in PEFT; those of LoHa and LoKr are parameters with LyCORIS' names.
_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# A CLIPTextModel. text_encoder_2 is a CLIPTextModelWithProjection, whose paths did not change.
_BOTH_NAMES = ("text_encoder",)


# Kind of layers -> why the format cannot hold them.
REFUSALS = {
    "dora": (
        "the PEFT format cannot carry this DoRA: PEFT's magnitude is one number per output row, "
        "this one has one per input column, which is what web UIs read; export it as kohya"
    )
}


def check(method: str, family: str) -> str | None:
    """The reason why this format cannot hold `method` for `family`, or None."""
    return REFUSALS.get(method) or kohya_only(method, "PEFT")


def tensors(weights: AdapterWeights, dtype: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each component's file: component -> tensor name -> tensor.

    Raises:
        LorakitError: the format cannot hold the method, or a layer has no canonical name or is not finite.
    """
    return {part: _tensors(layers, dtype) for part, layers in _components(weights).items()}


def write(weights: AdapterWeights, path: Path, *, dtype: str, metadata: Mapping[str, str]) -> list[Path]:
    """Write the folder `path` atomically and return its files. An older PEFT folder there is replaced.

    Raises:
        LorakitError: see `tensors`; or `path` exists and is not a PEFT folder, or the disk is full.
    """
    from lorakit.formats import files

    if path.exists() and not _is_ours(path):
        raise LorakitError("{path}: exists and is not a PEFT folder; choose another name", path)
    temporary = atomic.temporary_path(path)
    paths = []
    try:
        for part, layers in _components(weights).items():
            folder = temporary / part
            files.write_safetensors(folder / PEFT_MODEL, _tensors(layers, dtype), complete(weights, metadata))
            text = json.dumps(_config(part, layers, weights.family), indent=2, sort_keys=True)
            files.write_bytes(folder / PEFT_CONFIG, text.encode())
            paths += [path / part / PEFT_CONFIG, path / part / PEFT_MODEL]
        atomic.replace_folder(temporary, path)
    except OSError as error:
        raise files.Unwritable(
            "{path}: cannot be written ({reason}); nothing there was changed", path, error.strerror or error
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return paths


def magnitude_vector(rows: torch.Tensor) -> torch.Tensor:
    """DoRA's magnitude per output row in PEFT's shape: `[out]`, for a convolution `[1, out, 1, 1]`."""
    return rows.flatten() if rows.ndim == 2 else rows.reshape(1, -1, 1, 1)


def _is_ours(path: Path) -> bool:
    """Whether `path` contains only component folders with an adapter_config.json, or is an empty folder."""
    return path.is_dir() and all((entry / PEFT_CONFIG).is_file() for entry in path.iterdir())


def _components(weights: AdapterWeights) -> dict[str, dict[str, AnyLayer]]:
    from lorakit.formats import adapter_math

    adapter_math.require_writable(weights, check)
    parts: dict[str, dict[str, AnyLayer]] = {}
    for name, layer in adapter_math.with_own_ranks(weights).items():
        parts.setdefault(keys.to_diffusers_name(keys.component(name), weights.family), {})[name] = layer
    for layers in parts.values():
        if len({layer.method for layer in layers.values()}) > 1:
            raise LorakitError("the PEFT format has one method in each part of a model; this adapter mixes several")
    # LoRA keeps its ranks and alphas; for other methods the scale is folded into the factors.
    return {part: {name: _scaled(layer) for name, layer in layers.items()} for part, layers in parts.items()}


def _scaled(layer: AnyLayer) -> AnyLayer:
    return layer if isinstance(layer, LoraLayer) else layer.rescaled(1)


def _tensors(layers: Mapping[str, AnyLayer], dtype: str) -> dict[str, torch.Tensor]:
    from lorakit.formats import adapter_math

    result = {}
    for name, layer in layers.items():
        part, _, module = name.partition(".")
        shorter = [module.removeprefix(_TEXT_MODEL)] if part in _BOTH_NAMES else []
        for path in (module, *shorter):
            for part, tensor in layer.factors().items():
                if part == "magnitude":
                    tensor = magnitude_vector(tensor)
                result[f"{PEFT_PREFIX}{path}.{_NAMES.get(part, part)}"] = tensor
    return adapter_math.cast(result, dtype)


def _config(part: str, layers: Mapping[str, AnyLayer], family: str) -> dict[str, Any]:
    """PEFT's config for one component, without the user's paths."""
    one = next(iter(layers.values()))
    paths = {name: name.partition(".")[2].removeprefix(_TEXT_MODEL) for name in layers}
    common: dict[str, Any] = {"target_modules": sorted(paths.values()), "base_model_name_or_path": None}
    common |= {"task_type": None, "inference_mode": True}
    ranks = {paths[name]: rank for name, rank in _ranks(layers, family).items()}
    alphas = {paths[name]: layer.alpha for name, layer in layers.items()} if isinstance(one, LoraLayer) else ranks
    (common["r"], common["rank_pattern"]), (alpha, common["alpha_pattern"]) = _usual(ranks), _usual(alphas)
    if isinstance(one, LoraLayer):
        flags = {"bias": "none", "use_rslora": False, "use_dora": not one.is_lora, "fan_in_fan_out": False}
        lora = {"peft_type": "LORA", "lora_alpha": alpha, "lora_dropout": 0.0, "init_lora_weights": True}
        return common | flags | lora
    lycoris = common | {"peft_type": one.method.upper(), "alpha": alpha, "init_weights": True}
    return lycoris | ({} if isinstance(one, LohaLayer) else {"decompose_both": False, "decompose_factor": -1})


def _usual(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and the values of the layers that differ."""
    numbers = {path: int(value) if float(value).is_integer() else value for path, value in values.items()}
    usual = Counter(numbers.values()).most_common(1)[0][0]
    return usual, {path: value for path, value in numbers.items() if value != usual}


def _ranks(layers: Mapping[str, AnyLayer], family: str) -> dict[str, int]:
    """Each layer's rank in PEFT. PEFT decides from a LoKr's rank and width which of its matrices are factorized.

    Raises:
        LorakitError: PEFT would factorize one differently; LyCORIS allows that with `factor` and `decompose_both`.
    """
    ranks = {name: layer.rank for name, layer in layers.items()}
    pairs = {name: layer for name, layer in layers.items() if isinstance(layer, LokrLayer)}
    factorized = Counter(layer.rank for layer in pairs.values() if not layer.is_full)
    usual = factorized.most_common(1)[0][0] if factorized else max(map(_longest_side, pairs.values()), default=0)
    for name, layer in pairs.items():
        kernel = math.prod(layer.kernel or keys.kernel(name, family))
        (a, b), (c, d) = factorization(layer.size[0]), factorization(layer.size[1] // kernel)
        if layer.is_full:
            ranks[name] = usual if usual >= max(b, d) / 2 else max(b, d)
        must_be_full = ranks[name] >= max(b, d) / 2
        shapes = (len(layer.w1[0]), layer.w1[-1].shape[1], len(layer.w2[0]), layer.w2[-1].shape[1] // kernel)
        if shapes != (a, c, b, d) or layer.is_full is not must_be_full or len(layer.w1) > 1:
            raise LorakitError(
                "the PEFT format cannot carry {name}: PEFT cuts a LoKr in another way; export it as kohya", name
            )
    return ranks


def _longest_side(layer: LokrLayer) -> int:
    """The longest side of a w2 that is not factorized."""
    return max(len(layer.w2[0]), layer.w2[-1].shape[1] // math.prod(layer.kernel))


SPEC = FormatSpec(
    ending="-peft",
    check=check,
    tensors=tensors,
    write=write,
    recognizes=lambda names: False,
    is_folder=True,
    consumers=("peft",),
)
