"""One file for diffusers' `load_lora_weights` with PEFT's names: `unet.<path>.lora_A.weight` and `.lora_B.weight`.

The format has no alpha. The header could contain it, but older releases of diffusers ignore that, so the scale is
folded into `lora_B`, and alpha = rank holds for every reader. Text-encoder names keep `text_model.`, which all releases
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.weights import AdapterWeights
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.formats import keys
from lorakit.formats.metadata import complete
from lorakit.formats.peft import magnitude_vector
from lorakit.formats.spec import FormatSpec, kohya_only

if TYPE_CHECKING:
    import torch


# Kind of layers -> why the format cannot hold them.
_LYCORIS = (
    "the diffusers format cannot carry {kind}: diffusers reads plain LoRA only; export it as kohya or peft, "
    "or make plain LoRA of it with: lorakit resize FILE --energy 1 --to diffusers"
)
REFUSALS = {
    "dora": (
        "the diffusers format cannot carry this DoRA: PEFT's magnitude is one number per output row, "
        "this one has one per input column, which is what web UIs read; export it as kohya"
    ),
    **{kind: Message(_LYCORIS, kind) for kind in ("loha", "lokr")},
}


def check(method: str, family: str) -> str | None:
    """The reason why this format cannot hold `method` for `family`, or None."""
    return REFUSALS.get(method) or kohya_only(method, "diffusers")


def tensors(weights: AdapterWeights, dtype: str) -> dict[str, torch.Tensor]:
    """The tensors of the file, by name.

    Raises:
        LorakitError: the format cannot hold the method, or a layer has no canonical name or is not finite.
    """
    from lorakit.formats import adapter_math

    adapter_math.require_writable(weights, check)
    result: dict[str, torch.Tensor] = {}
    layers = adapter_math.complete(weights)
    if len({(keys.component(name), layer.is_lora) for name, layer in layers.items()}) > len(
        {keys.component(name) for name in layers}
    ):
        raise LorakitError("the diffusers format has DoRA in all layers of a part or in none: export it as kohya")
    for name, layer in layers.items():
        folded = layer.rescaled(1).factors()
        stem = keys.to_diffusers_name(name, weights.family)
        result[f"{stem}.lora_A.weight"] = folded["down"]
        result[f"{stem}.lora_B.weight"] = folded["up"]
        if "magnitude" in folded:
            result[f"{stem}.lora_magnitude_vector.weight"] = magnitude_vector(folded["magnitude"])
    return adapter_math.cast(result, dtype)


def write(weights: AdapterWeights, path: Path, *, dtype: str, metadata: Mapping[str, str]) -> list[Path]:
    """Write one `.safetensors` file atomically. Return `[path]`.

    Raises:
        LorakitError: see `tensors`; or the disk is full.
    """
    from lorakit.formats import files

    files.write_safetensors(path, tensors(weights, dtype), complete(weights, metadata))
    return [path]


SPEC = FormatSpec(
    ending="-diffusers.safetensors",
    check=check,
    tensors=tensors,
    write=write,
    recognizes=lambda names: any(".lora_A." in name for name in names),
    consumers=("diffusers",),
)
