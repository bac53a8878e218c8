"""The files of a trained model: the whole model, as one file or a folder, and a LoRA extracted from it; their check."""

from __future__ import annotations

import functools
import gc
import shutil
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

# Output -> what follows the name of its file or folder.
ENDINGS = {"file": "-model.safetensors", "folder": "-model"}
# In a LoRA's metadata, how much of the model it holds.
SHARE = "lorakit.extracted"
# How far a weight in a file may be from the one in memory, relative to its size: half a unit in the last place. And
# what is half the smallest step of float16.
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
    """A trained model, as layers that take the place of the base's.

    Attributes:
        base: what it was trained from.
        rank: of the LoRA that is extracted.
    """

    base: BaseInfo | None = None
    rank: int = 64

    @functools.cached_property
    def lora(self) -> AdapterWeights:
        """The LoRA nearest to the change by training, in the layers that every program reads.

        Raises:
            LorakitError: nothing has changed there.
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
    """Canonical name and weight of all that may be trained in a base."""
    for component, module in family.modules().items():
        for path, parameter in module.named_parameters():
            stem, _, kind = path.rpartition(".")
            yield f"{canonical(component, stem)}.{kind}", parameter.detach().cpu()


def save(run: Run, weights: TrainedModel, name: str, metadata: Mapping[str, str]) -> dict[str, Path]:
    """Write the files of `adapter.outputs`. Earlier files of the same name are replaced.

    Raises:
        LorakitError: a number is not finite, or there is no room.
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
    """Write a model to a temporary place, then replace the old one: a complete model is there at every moment."""
    temporary = atomic.temporary_path(path)
    temporary = temporary.with_name(temporary.name + path.suffix)
    assert weights.base is not None, "a run gives it"
    merge.merge(weights, weights.base, temporary)
    if path.is_dir():
        shutil.rmtree(path)
    temporary.replace(path)


def examine(
    run: Run,
    exports: Mapping[str, Path],
    weights: TrainedModel,
    base_probe: Probe,
    memory_probe: Probe,
    **options: Unpack[Check],
) -> Iterator[tuple[str, list[Finding], Family | None]]:
    """As `selfcheck.examine`; a model is read again by the loader of bases, each of its weights is compared, and it
    computes what the trained one computed."""
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
    """Whether every trained weight is in a model that was read again, as it was trained."""
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
    right = Message("{count} of {count} weights read again, each as trained", len(expected))
    return Finding(f"{name} weights", not wrong, some(wrong, 3, "; ") if wrong else right)


def _file_dtypes(info: BaseInfo) -> set[torch.dtype]:
    """What the weights of a base are written in."""
    files = [path for path in info.content if path.suffix == ".safetensors"]
    names = {entry.dtype for path in files for entry in safetensors_header.read(path).tensors.values()}
    return {getattr(torch, safetensors_header.DTYPES[name]) for name in names}
