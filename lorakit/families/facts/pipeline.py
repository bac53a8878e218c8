"""Describe a diffusers pipeline in memory: the same facts as of a folder, from its modules.

No file of the base is read. Its tokenizers are written to a temporary folder, because tokens are counted from files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from lorakit.config import Config, ModelConfig
from lorakit.core.errors import LorakitError
from lorakit.families import hub, weight_files
from lorakit.families.describe import IN_MEMORY, BaseInfo, base_info, family_of_index
from lorakit.families.facts import fit

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

# Options of the section `model` that name parts of a base.
_PARTS = ("vae", "text_encoders", "tokenizer")


@dataclass(frozen=True)
class PipelineInfo(BaseInfo):
    """As `BaseInfo`, with a hash of the modules instead of files."""

    @functools.cached_property
    def hash(self) -> str:
        """A hash of all configurations and weights. It depends on the precision."""
        import torch

        digest = hashlib.sha256()
        for name in (*self.components, "scheduler"):
            config = {key: value for key, value in self.configs[name].items() if not key.startswith("_")}
            digest.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        for module in self.components.values():
            for key, tensor in sorted(module.state_dict().items()):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def describe(pipeline: DiffusionPipeline, model: ModelConfig | None = None) -> BaseInfo:
    """As `families.describe`, for a pipeline; `families.load` then uses its modules and weights.

    Args:
        model: the section of the config; the options that name parts of a base must be empty.

    Raises:
        LorakitError: it belongs to no family, or its weights are not plain tensors.
    """
    model = replace(model or ModelConfig(), base=IN_MEMORY)
    if named := [name for name in _PARTS if getattr(model, name)]:
        raise LorakitError("model.{named} is for bases on the disk: put the part into the pipeline instead", named[0])
    if not model.t5:
        raise LorakitError("model.t5 is for bases on the disk: set the pipeline's text_encoder_3 to None instead")
    parts = getattr(pipeline, "components", None)
    if not isinstance(parts, dict):
        raise LorakitError("{name} is no pipeline of diffusers: give one, as pipeline=pipe", type(pipeline).__name__)
    title, source = _names(pipeline)
    index: dict[str, object] = {**pipeline.config, "_class_name": type(pipeline).__name__}
    index |= {name: [None, None] if part is None else ["", type(part).__name__] for name, part in parts.items()}
    spec = family_of_index(title, index)
    names = {spec.denoiser: "unet", "vae": "vae", **{encoder.name: encoder.name for encoder in spec.text_encoders}}
    modules = {ours: _module(title, name, parts[name]) for name, ours in names.items() if parts.get(name) is not None}
    encoders = [encoder for encoder in spec.text_encoders if encoder.name in modules]
    needed = (spec.denoiser, "vae", *(encoder.tokenizer for encoder in encoders))
    if lacking := [name for name in needed if parts.get(name) is None]:
        raise LorakitError("base {title}: the pipeline has no {lacking}", title, lacking[0])
    folder = tempfile.mkdtemp(prefix="lorakit-tokenizers-")
    weakref.finalize(modules["unet"], shutil.rmtree, folder, ignore_errors=True)
    tokenizers = {}
    for encoder in encoders:
        tokenizers[encoder.tokenizer] = Path(folder) / encoder.tokenizer
        parts[encoder.tokenizer].save_pretrained(tokenizers[encoder.tokenizer])
    configs = {name: _config(module) for name, module in modules.items()}
    configs |= {"model_index": index, "scheduler": _config(parts["scheduler"])}
    layers: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        layers |= weight_files.layers(name, shapes) if name != "vae" else {}
    facts = base_info(
        model,
        {},
        path=Path(title),
        family=spec.version(fit.cross_dim(configs["unet"])).name,
        loader=spec.name,
        layers=layers,
        bytes={name: sum(weight.nbytes for weight in module.parameters()) for name, module in modules.items()},
        variants={
            name: "fp16" if next(module.parameters()).itemsize == 2 else None for name, module in modules.items()
        },
        configs=configs,
        tokenizers=tokenizers,
        slots=None,
        content=(),
        title=title,
        source=source,
        notes=("from a pipeline in memory, which stays as it is",),
        components=modules,
    )
    return PipelineInfo(**vars(facts))


def with_pipeline(config: Config, pipeline: DiffusionPipeline) -> Config:
    """The config of a run that trains the pipeline; on CUDA in the pipeline's precision, unless the config sets one.

    Raises:
        LorakitError: the config names a base of its own.
    """
    import torch

    if config.model.base not in (ModelConfig().base, IN_MEMORY):
        raise LorakitError("model.base = {base!r} and a pipeline in memory: give one of them", config.model.base)
    config = replace(config, model=replace(config.model, base=IN_MEMORY))
    on_card = config.memory.device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available()
    if not on_card or config.memory.mixed_precision != "auto":
        return config
    dtype = getattr(pipeline, "dtype", None)
    precision: Literal["auto", "bf16", "fp16"] = "fp16" if dtype is torch.float16 else "auto"
    if dtype is torch.bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False):
        precision = "bf16"
    return replace(config, memory=replace(config.memory, mixed_precision=precision))


def _names(pipeline: DiffusionPipeline) -> tuple[str, str]:
    """Its title, and the hub id that it was loaded from or ""."""
    origin = str(pipeline.config.get("_name_or_path") or "")
    title = Path(origin).name or type(pipeline).__name__
    return title, "" if not origin or Path(origin).exists() or hub.parse(origin) is None else origin


def _config(part: object) -> dict[str, object]:
    """Its configuration, as in config.json."""
    config = getattr(part, "config")  # noqa: B009
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {"_class_name": type(part).__name__, **values}


def _module(title: str, name: str, part: object) -> nn.Module:
    """The module itself.

    Raises:
        LorakitError: it has hooks that move or cast it, an adapter, or weights that are quantized or on "meta".
    """
    module = cast("nn.Module", getattr(part, "_orig_mod", part))
    if getattr(module, "peft_config", None):
        raise LorakitError(
            "base {title}: {name} carries an adapter: take it out first (unload_lora_weights)", title, name
        )
    if any(hasattr(each, "_hf_hook") or hasattr(each, "_diffusers_hook") for each in module.modules()):
        raise LorakitError(
            "base {title}: hooks move or cast {name}: load it without offloading and layerwise casting", title, name
        )
    for weight in module.parameters():
        if weight.is_meta or not weight.is_floating_point() or weight.itemsize < 2:
            raise LorakitError(
                "base {title}: {name} has no weights in full or half precision: load it without quantization",
                title,
                name,
            )
    return module
