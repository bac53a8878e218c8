"""How each program handles the methods and tensors of adapter files, as data. No torch.

The rules come from each program's loader or from running it. Versions: diffusers 0.42, AUTOMATIC1111 1.10.1, Forge
2025-06, ComfyUI 2025-10, InvokeAI 6.14, sd-scripts 2026-02, stable-diffusion.cpp (python 0.4.7), PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BIAS = "bias"  # kind of a module that only changes a bias
DORA_ROWS = "dora rows"  # DoRA with a magnitude per output row, as in PEFT
_LYCORIS = ("loha", "lokr", "LoCon (tucker)", "full difference", "norm", "IA3")
_COMPUTED = ("OFT", "older OFT", "GLoRA", "older GLoRA")
# OFT on inputs, as in PEFT and OneTrainer.
_INPUTS = ("OFTv2", "PEFT's older OFT", "PEFT's BOFT")
_NO_BIAS = "ignores its change of the bias"
# DoRA on the output axis, LyCORIS' default.
_ROWS = {DORA_ROWS: "its dora_scale is per output row, which it misreads"}
_IGNORES_DORA = "ignores dora_scale and applies it as plain LoRA"
_VECTOR = {"dora vector": "ignores its magnitude and applies it as plain LoRA"}
_MIDDLE = {"GLoRA with bm": "ignores its bm"}
_DEFAULT_FACTORS = r"lora_(?:down|up|mid)\.weight"
# The names of factors that ComfyUI and Forge share.
_FACTORS = rf"{_DEFAULT_FACTORS}|lora_[AB]\.weight|lora(?:_linear_layer)?\.(?:down|up)\.weight"


@dataclass(frozen=True)
class Consumer:
    """One program. The module names that it reads depend on the family (`ModelVersion.readers`). Its rules refer to
    traits of a module, see `compatibility.traits`.

    Attributes:
        title: its usual name.
        misread: trait -> what it does with such a module instead of applying it correctly.
        refused: trait -> why it refuses a file with such a module.
        unread: methods whose tensors it does not read.
        factors: pattern of the factor names that it reads with kohya's module names.
        parts: tensors unknown to lorakit that it reads.
        unknown_limit: number of unmatched tensors above which it refuses the file; None: no limit.
        lone_alpha: whether it refuses a file because of a module without factors.
        flat_conv: whether it reads a 1x1 convolution with factors stored as matrices.
        reads_folders: whether it reads a PEFT folder.
        converts_kohya: whether it converts kohya names to its own and refuses a file if that fails.
        reads_norms: whether it reads changes of norms.
        common_alpha: whether it may apply a component's most common alpha to a module with another one.
        reads_config: whether it reads the alpha in `lora_adapter_metadata`.
    """

    title: str
    misread: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    factors: str = _DEFAULT_FACTORS
    parts: tuple[str, ...] = ()
    unknown_limit: int | None = None
    lone_alpha: bool = False
    flat_conv: bool = True
    reads_folders: bool = False
    converts_kohya: bool = False
    common_alpha: bool = False
    reads_norms: bool = False
    reads_config: bool = False


CONSUMERS: dict[str, Consumer] = {
    "a1111": Consumer(
        title="AUTOMATIC1111",
        misread={
            "bias beside": _NO_BIAS,
            "IA3 on convolutions": "applies it wrongly on convolutions",
            "GLoRA": "does not apply it, as it knows an older form of it",
            "older GLoRA on convolutions": "fails on convolutions",
            **_ROWS,
        },
        refused={BIAS: "it has no reader for a bias alone"},
        unread=_INPUTS,
        factors=rf"{_DEFAULT_FACTORS}|lora_[AB]\.weight",
        parts=("scale",),
        lone_alpha=True,
        reads_norms=True,
    ),
    "forge": Consumer(
        title="Forge",
        misread=_ROWS | _VECTOR | _MIDDLE,
        unread=("IA3", "OFT", *_INPUTS),
        factors=_FACTORS,
        reads_norms=True,
        unknown_limit=12,
    ),
    "comfyui": Consumer(
        title="ComfyUI",
        misread={
            "PEFT's bias": _NO_BIAS,
            "older OFT": "does not know this older form of OFT",
            "OFT rescaled": "ignores its rescale",
            "OFT with a constraint": "limits its rotation more than it should",
            **_ROWS,
            **_VECTOR,
            **_MIDDLE,
        },
        unread=("IA3", *_INPUTS),
        factors=rf"{_FACTORS}|lora_[AB]|lora_[AB]\.default\.weight",
        parts=("set_weight", "reshape_weight"),
        reads_norms=True,
    ),
    "invokeai": Consumer(
        title="InvokeAI",
        unread=_INPUTS,
        misread={"bias beside": _NO_BIAS, "IA3 on convolutions": "fails on convolutions", **_ROWS},
        refused=dict.fromkeys((*_COMPUTED, BIAS, "DoRA over LyCORIS"), "it has no reader for it"),
        reads_norms=True,
        lone_alpha=True,
    ),
    "sd-scripts": Consumer(
        title="kohya sd-scripts",
        unread=_INPUTS,
        misread={
            **dict.fromkeys(("dora", DORA_ROWS), _IGNORES_DORA),
            **dict.fromkeys((BIAS, "bias beside"), _NO_BIAS),
            "alpha 0": "takes an alpha of 0 for the rank",
            **dict.fromkeys((*_LYCORIS, *_COMPUTED), "does not apply it (networks.lora reads plain LoRA only)"),
        },
        flat_conv=False,
    ),
    "sd.cpp": Consumer(
        title="stable-diffusion.cpp",
        unread=_INPUTS,
        misread={
            **dict.fromkeys(("dora", DORA_ROWS), _IGNORES_DORA),
            **_VECTOR,
            "PEFT's bias": _NO_BIAS,
            "LoCon (tucker)": "applies it wrongly",
            "lokr on convolutions": "applies it wrongly on convolutions",
            "Tucker": "applies Tucker's form wrongly",
            "rank 1": "takes in_features for the rank, so it is far too weak",
            **dict.fromkeys(("norm", "IA3", *_COMPUTED), "does not apply it"),
        },
        factors=rf"{_FACTORS}|lora_[AB]|lora_[AB]\.default\.weight",
        parts=("scale",),
    ),
    "diffusers": Consumer(
        title="diffusers",
        unread=_INPUTS,
        misread={
            **dict.fromkeys(("dora", DORA_ROWS), _IGNORES_DORA),
            "names of an adapter": "does not apply factors with an adapter's name in theirs",
        },
        refused={
            **dict.fromkeys((*_LYCORIS, *_COMPUTED, BIAS, "bias beside"), "it reads plain LoRA only"),
            "rank 0": "it takes none of that",
        },
        unknown_limit=0,
        lone_alpha=True,
        flat_conv=False,
        converts_kohya=True,
        common_alpha=True,
        reads_config=True,
    ),
    "peft": Consumer(
        title="PEFT",
        misread={"PEFT's older OFT": "does not read OFT of PEFT 0.15 or older"},
        reads_folders=True,
        reads_config=True,
    ),
}
