"""Read a checkpoint of a run as an adapter, so that any step can be exported or drawn, not only the last."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import config as configuration, families
from lorakit.adapters import targets
from lorakit.adapters.average import averaged
from lorakit.adapters.weights import AdapterWeights, from_factors
from lorakit.core import foreign_json
from lorakit.core.errors import LorakitError
from lorakit.core.registry import FORMATS
from lorakit.formats import adapter_math, inspect as inspection, metadata, save
from lorakit.runs.run_folder import RunFolder
from lorakit.training import checkpoint

if TYPE_CHECKING:
    import torch

    from lorakit.formats.inspect import Report


def is_checkpoint(path: Path) -> bool:
    """Whether the path is a complete checkpoint inside a run folder."""
    return (path / checkpoint.MARKER).is_file() and RunFolder(path.parent.parent).config_file.is_file()


def inspect(path: Path) -> Report:
    """Inspect a checkpoint as if it were exported in the first format that can hold the adapter.

    Raises:
        LorakitError: the folder is not a checkpoint inside a run folder, or `read` refuses it.
    """
    if not is_checkpoint(path):
        raise LorakitError("{path}: not a checkpoint inside a run folder", path)
    weights = read(path)
    kinds = adapter_math.kinds(weights)
    carriers = (n for n, spec in FORMATS.items() if not any(spec.check(kind, weights.family) for kind in kinds))
    with tempfile.TemporaryDirectory() as folder:
        paths = save(weights, Path(folder), path.name, [next(carriers)], "fp32", {}, say=lambda line: None)
        report = inspection.inspect(next(iter(paths.values())))
    return replace(report, name=path.name, description="a checkpoint of a run, as it would be exported", hashes={})


def read(path: Path) -> AdapterWeights:
    """Read the adapter of a checkpoint, with the metadata that the run's own exports have.

    Raises:
        LorakitError: the checkpoint is damaged or holds a whole model, or the run's config, plan or base is missing.
    """
    run = RunFolder(path.parent.parent)
    config, state = configuration.load(run.config_file), checkpoint.load(path)
    if config.adapter.whole_model:
        raise LorakitError(
            "{path}: a checkpoint of a whole model is no adapter: set train.export_every, and a run writes "
            "models as it goes on",
            path,
        )
    info = families.describe(config.model)
    try:
        plan = foreign_json.loads(run.plan_file.read_text(encoding="utf-8"))
        photo_count, batches = int(plan["photos"]), int(plan["batches"])
    except (OSError, ValueError, KeyError, TypeError):
        raise LorakitError(
            "{plan_file} is not there or damaged; the checkpoints beside it are not", run.plan_file
        ) from None
    changed = path.stat().st_mtime
    facts = metadata.build(
        config,
        info,
        name=f"{run.adapter_name}-{path.name}",
        images=photo_count,
        steps=state.step,
        epochs=state.step * config.train.gradient_accumulation_steps // max(1, batches),
        times=(changed, changed),
    )
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in averaged(state.adapter).items():
        layer, _, factor = name.rpartition(".")
        layers.setdefault(layer, {})[factor] = tensor
    words = {part: factors.pop("token") for part, factors in layers.items() if "token" in factors}
    embeddings = {config.data.trigger: words} if words else {}
    adapter_layers = {
        name: from_factors(factors, targets.layer_config(config.adapter, name).scale)
        for name, factors in layers.items()
        if factors
    }
    return AdapterWeights(info.family, config.adapter.method, adapter_layers, facts, embeddings)
