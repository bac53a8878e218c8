"""The files of a trained model and their check: the model as one file or a folder, and a LoRA extracted from it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch

from lorakit import adapters, families, formats
from lorakit.adapters.weights import AdapterWeights
from lorakit.core import atomic, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.core.messages import Message, some
from lorakit.formats import keys
from lorakit.formats.edit import merge
from lorakit.formats.edit.resize_combine import full_rank, resize
from lorakit.training import selfcheck
from lorakit.training.selfcheck import Finding, Probe

if TYPE_CHECKING:
    from lorakit.families import BaseInfo, Family
    from lorakit.training.loop import Run

# Output -> suffix of its file or folder.
ENDINGS = {"file": "-model.safetensors", "folder": "-model"}
# Metadata key of a LoRA: how much of the model's change it holds.
SHARE = "lorakit.extracted"
# Largest relative difference between a weight in a file and in memory: half a unit in the last place; and half the
# smallest step of float16.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST = 2.0**-25


class Check(TypedDict):
    """Arguments of `selfcheck.examine`; see there."""

    load: Callable[..., Family]
    prompt: str
    size: tuple[int, int]
    dtype: str
    untrained_layers: Collection[str]


@dataclass(frozen=True)
class TrainedModel(AdapterWeights):
    """A trained model, as layers that replace those of the base.

    Attributes:
        base: the base that it was trained from.
        rank: rank of the extracted LoRA.
    """

    base: BaseInfo | None = None
    rank: int = 64

    @functools.cached_property
    def lora(self) -> AdapterWeights:
        """The LoRA that best approximates the change by training, in the layers that every program reads.

        Raises:
            LorakitError: none of these layers has changed.
        """
        dtype = next(iter(self.layers.values())).factors()["weight"].dtype
        assert self.base is not None, "a run gives it"
        base = families.load(self.base, "cpu", dtype, "full", False, True)
        layers, total, part = {}, 0.0, 0.0
        for name, weight in named_weights(base):
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and layer in self.layers and keys.is_read_everywhere(layer):
                change = self.layers[layer].factors()["weight"].float() - weight.float()
                if bool(change.any()):
                    whole = AdapterWeights(self.family, "lora", {layer: full_rank(change)})
                    layers[layer] = resize(whole, rank=self.rank).layers[layer]
                    total += float(change.square().sum())
                    part += float(layers[layer].delta().square().sum())
        if not layers:
            raise LorakitError("training changed no layer that a LoRA can hold: raise optimizer.learning_rate")
        share = Message("rank {rank} holds {part:.0%} of what training changed in its layers", self.rank, part / total)
        return AdapterWeights(self.family, "lora", layers, {SHARE: share})


def named_weights(family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical name and value of every weight of a base that can be trained."""
    for component, module in family.modules().items():
        for path, parameter in module.named_parameters():
            stem, _, kind = path.rpartition(".")
            yield f"{canonical(component, stem)}.{kind}", parameter.detach().cpu()


def save(run: Run, weights: TrainedModel, name: str, metadata: Mapping[str, str]) -> dict[str, Path]:
    """Write the files of `adapter.outputs`. Earlier files of the same name are replaced.

    Raises:
        LorakitError: a weight is not finite, or the disk is full.
    """
    config, paths = run.config, dict[str, Path]()
    for output in config.adapter.outputs:  # type: ignore[attr-defined]
        if output in ENDINGS:
            paths[output] = run.folder.path / f"{name}{ENDINGS[output]}"
            _replace(paths[output], replace(weights, metadata=dict(metadata)))
    if config.adapter_formats:
        own = config.output.formats, config.output.dtype, metadata
        paths |= formats.save(weights.lora, run.folder.path, name, *own, say=run.events.say)
    return paths


def _replace(path: Path, weights: TrainedModel) -> None:
    """Write a model to a temporary path, then replace the old one."""
    temporary = atomic.temporary_path(path)
    temporary = temporary.with_name(temporary.name + path.suffix)
    assert weights.base is not None, "a run gives it"
    merge.merge(weights, weights.base, temporary)
    (atomic.replace_folder if temporary.is_dir() else atomic.replace)(temporary, path)


def examine(
    run: Run,
    exports: Mapping[str, Path],
    weights: TrainedModel,
    base_probe: Probe,
    memory_probe: Probe,
    **options: Unpack[Check],
) -> Iterator[tuple[str, list[Finding], Family | None]]:
    """As `selfcheck.examine`. A model is loaded as a base, each of its weights is compared, and its outputs must equal
    those of the trained model."""
    load, prompt, size = options["load"], options["prompt"], options["size"]
    for name in exports.keys() & ENDINGS.keys():
        gc.collect()
        own = run.config.model
        in_file = exports[name].is_file()
        tokenizer = own.tokenizer or (str(run.ready.info.tokenizer()) if in_file else "")
        model = replace(own, base=str(exports[name]), vae="", tokenizer=tokenizer)
        family = load(families.describe(model))
        findings = [_weights_finding(name, family, weights)]
        coarse = torch.float16 if family.dtype is torch.float32 else family.dtype
        probe = selfcheck.probe(family, prompt, size)
        findings += selfcheck.compare(
            name,
            base_probe,
            memory_probe,
            probe,
            tolerance=selfcheck.TOLERANCE["fp16"],
            dtype=coarse,
            weights=weights,
        )
        yield name, findings, family
        del family
    loras = {name: path for name, path in exports.items() if name not in ENDINGS}
    if loras:
        gc.collect()
        family = load()
        adapters.apply(family, weights.lora)
        probe = selfcheck.probe(family, prompt, size)
        del family
        yield "lora", [Finding("lora", True, weights.lora.metadata[SHARE])], None
        yield from selfcheck.examine(loras, weights.lora, base_probe, probe, **options)


def _weights_finding(name: str, family: Family, weights: TrainedModel) -> Finding:
    """Compare every trained weight with the model that was read again."""
    rounding = max(ROUNDING.get(dtype, 0.0) for dtype in _file_dtypes(family.info))
    expected = {
        f"{layer}.{kind}": tensor for layer, parts in weights.layers.items() for kind, tensor in parts.factors().items()
    }
    there = dict(named_weights(family))
    wrong: list[str] = [Message("{weight}: missing", weight) for weight in expected.keys() - there.keys()]
    for weight in expected.keys() & there.keys():
        trained, copy = expected[weight].float(), there[weight].float()
        if trained.shape != copy.shape or not torch.allclose(copy, trained, rtol=rounding, atol=SMALLEST):
            wrong.append(Message("{weight}: not as trained", weight))
    right = Message("weights read again, each as trained: {count} of {count}", len(expected))
    return Finding(Message("{format} weights", name), not wrong, some(wrong, 3, "; ") if wrong else right)


def _file_dtypes(info: BaseInfo) -> set[torch.dtype]:
    """The dtypes of the weights in a base's files."""
    files = [path for path in info.content if path.suffix == ".safetensors"]
    names = {entry.dtype for path in files for entry in safetensors_header.read(path).tensors.values()}
    return {getattr(torch, safetensors_header.DTYPES[name]) for name in names}
