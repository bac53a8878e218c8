"""The default format, with kohya's names. A1111, Forge, ComfyUI, InvokeAI, sd-scripts, sd.cpp and diffusers read it.

Each layer is `<name>.lora_down.weight`, `<name>.lora_up.weight` and `<name>.alpha` (one float32), for DoRA also
`<name>.dora_scale` `[1, in]`. The parts of LoHa and LoKr have LyCORIS' names (`hada_w1_a`, `lokr_w1`, ...). Layer names
come from `lorakit.formats.keys`; `adapter_math` gives each component one rank and one alpha.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.weights import AdapterWeights, ForeignLayer
from lorakit.core import registry
from lorakit.formats import keys
from lorakit.formats.metadata import complete, sidecar
from lorakit.formats.spec import FormatSpec, merge_only

if TYPE_CHECKING:
    import torch

# Names of a LoRA layer's factors in these files; LoHa's and LoKr's already have theirs.
PARTS = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}


def check(method: str, family: str) -> str | None:
    """The reason why this format cannot hold `method` for `family`, or None."""
    return merge_only(method) or registry.family_of(family).format_refusals.get(("kohya", method))


def tensors(weights: AdapterWeights, dtype: str) -> dict[str, torch.Tensor]:
    """The tensors of the file, by name.

    Raises:
        LorakitError: a layer has no name in the format, or is not finite.
    """
    import torch

    from lorakit.formats import adapter_math

    adapter_math.require_writable(weights, check)
    layers, weights = adapter_math.fuse(adapter_math.complete(weights), weights)
    result: dict[str, torch.Tensor] = {}
    for name, stem in keys.to_kohya_name(dict.fromkeys((*layers, *weights.biases)), weights.family).items():
        if name in weights.biases:
            part = "b_norm" if name in layers and "w_norm" in layers[name].factors() else "diff_b"
            result |= adapter_math.cast({f"{stem}.{part}": weights.biases[name]}, dtype)
        if name not in layers:
            continue
        layer = layers[name]
        for part, tensor in layer.factors().items():
            # alpha and magnitude stay float32: rounding alpha rescales the layer, and magnitudes scale the full weight.
            precision = "fp32" if part == "magnitude" else dtype
            result |= adapter_math.cast({f"{stem}.{PARTS.get(part, part)}": tensor}, precision)
        if not isinstance(layer, ForeignLayer) or layer.alpha:
            result[f"{stem}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return result


def write(weights: AdapterWeights, path: Path, *, dtype: str, metadata: Mapping[str, str]) -> list[Path]:
    """Write one `.safetensors` file atomically. Return `[path]`.

    Raises:
        LorakitError: see `tensors`; or the disk is full.
    """
    from lorakit.formats import files

    files.write_safetensors(path, tensors(weights, dtype), complete(weights, metadata))
    return [path]


def write_side_files(
    weights: AdapterWeights, path: Path, *, dtype: str, metadata: Mapping[str, str], preview: bytes | None
) -> None:
    """Write `<name>.json`, the source of trigger words in A1111 and InvokeAI, and the preview as `<name>.png`."""
    from lorakit.formats import files

    text = json.dumps(sidecar(complete(weights, metadata)), indent=2, ensure_ascii=False)
    files.write_bytes(path.with_suffix(".json"), text.encode())
    if preview is not None:
        files.write_bytes(path.with_suffix(".png"), preview)


# The suffix is the plain one, because this is the file that people share.
SPEC = FormatSpec(
    ending=".safetensors",
    check=check,
    tensors=tensors,
    write=write,
    recognizes=lambda names: any(name.startswith("lora_") for name in names),
    consumers=("a1111", "forge", "comfyui", "invokeai", "sd-scripts", "sd.cpp", "diffusers"),
    bundles_embeddings=True,
    write_side_files=write_side_files,
)
