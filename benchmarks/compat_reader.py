"""The second half of compat.py: read its files with the installed diffusers and PEFT, without lorakit."""

import copy
import json
import sys
from pathlib import Path

import diffusers
import peft
import torch
import transformers
from safetensors.torch import load_file

PARTS = ("unet", "text_encoder", "text_encoder_2")


def deltas(parts: dict) -> dict[str, torch.Tensor]:
    """Return canonical name -> delta W of each of PEFT's layers."""
    result = {}
    for part, model in parts.items():
        for path, layer in model.named_modules():
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                full_path = path if part == "unet" or path.startswith("text_model.") else f"text_model.{path}"
                (name,) = layer.active_adapters
                result[f"{part}.{full_path}"] = layer.get_delta_weight(name).detach().float().flatten(1)
    return result


def read(pipeline, folder: Path, fmt: str) -> dict[str, torch.Tensor]:
    """Load one adapter, return its deltas and remove it from the pipeline."""
    parts = {part: getattr(pipeline, part) for part in PARTS if getattr(pipeline, part, None) is not None}
    if fmt == "peft":
        loaded = {p: peft.PeftModel.from_pretrained(copy.deepcopy(m), folder / "a" / p) for p, m in parts.items()}
        return deltas({part: model.base_model.model for part, model in loaded.items()})
    pipeline.load_lora_weights(folder, weight_name="a.safetensors")
    result = deltas(parts)
    pipeline.unload_lora_weights()
    return result


def main(folder: Path) -> None:
    """Print the versions and, for each case, the largest error or the exception."""
    errors: dict[str, float | str] = {}
    pipelines = {}
    for case in json.loads((folder / "cases.json").read_text()):
        family, _, fmt, _ = case.split()
        if family not in pipelines:
            pipelines[family] = diffusers.DiffusionPipeline.from_pretrained(folder / family, safety_checker=None)
        place = folder / case.replace(" ", "-")
        truth = {name: tensor.flatten(1) for name, tensor in load_file(place / "truth.safetensors").items()}
        try:
            deltas_in_file = read(pipelines[family], place, fmt)
        except Exception as error:  # an exception is a result of the comparison
            errors[case] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        deltas_in_file = {name: delta for name, delta in deltas_in_file.items() if delta.any()}
        if deltas_in_file.keys() != truth.keys():
            errors[case] = f"{len(truth.keys() - deltas_in_file.keys())} of {len(truth)} layers not applied"
            continue
        errors[case] = max(float((deltas_in_file[n] - t).abs().max() / t.abs().max()) for n, t in truth.items())
    names = (diffusers, transformers, peft)
    versions = ", ".join(f"{name.__name__} {name.__version__}" for name in names)
    print(json.dumps({"versions": versions, "errors": errors}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
