"""Merge an adapter into a base. `merge` is the entry point; single files in LDM layout are read and written here.

The arithmetic is `merge_folder.merged`, in float32; tensors keep their dtype, except that fp8 becomes fp16. Merging
from folder to folder is in `merge_folder`.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save

from lorakit.adapters.weights import AdapterWeights
from lorakit.core import atomic, foreign_json, registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.families import ldm, vae_source, weight_files
from lorakit.families.spec import MODELSPEC_PREDICTIONS, VELOCITY
from lorakit.formats import files, keys, metadata as meta
from lorakit.formats.edit.merge_folder import Merger, merge_folder, size_of_merged
from lorakit.formats.edit.precision import Precision

# Metadata of a base that is not true for the merged one.
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_T5 = re.compile(r"shared\.|encoder\.(block|final_layer_norm|embed_tokens)\.")
_RESBLOCK = re.compile(r"\.resblocks\.(\d+)\.")


class Base(Protocol):
    """The facts that are needed of the base; `families.BaseInfo` has them."""

    @property
    def path(self) -> Path: ...
    @property
    def family(self) -> str: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]: ...
    def tokenizer(self, name: str) -> Path: ...
    @property
    def slots(self) -> Mapping[str, Mapping[str, ldm.Slot]] | None: ...
    @property
    def sources(self) -> Mapping[str, vae_source.Source]: ...


def merge(
    weights: AdapterWeights, base: Base, output: Path, strength: float = 1.0, *, precision: Precision | None = None
) -> Path:
    """Write `base` with the adapter merged in to `output`: a single file if the name ends in .safetensors, else a
    folder in diffusers layout.

    Args:
        precision: the dtype of the weights; it also measures the loss from rounding.

    Raises:
        LorakitError: `output` exists, rounding would remove the adapter completely, a layer of the adapter is missing
            in the base or has another shape, or a tensor of the base has no name in a single file.
    """
    output = Path(output)
    if output.exists():
        raise LorakitError("{output}: exists already; name a new one with --output", output)
    single = output.suffix.lower() == ".safetensors"
    vae = _other_vae(base)
    if base.slots is None and not single:
        absent = [name for name, kind in base.configs["model_index"].items() if kind == [None, None]]
        write_vae = functools.partial(_write_vae, base=base, vae=vae)
        return merge_folder(weights, base.path, output, strength, write_vae, absent, precision)
    room = next(parent for parent in output.absolute().parents if parent.is_dir())
    merger = Merger(weights, strength, precision=precision)
    places = {base.path, *(source.path for source in base.sources.values())}
    own = [file for path in places for file in ([path] if path.is_file() else path.rglob("*.safetensors"))]
    files.require_space(room, size_of_merged(own, merger.precision))
    if base.slots is None:
        return _folder_to_file(base, output, merger, vae)
    others = {name: source for name, source in base.sources.items() if name != "vae"}
    outside = sorted({keys.component(name) for name in (*weights.layers, *weights.biases)} & others.keys())
    if single and outside:
        raise LorakitError(
            "{base} has no {outside} in it, which the adapter changes: --output must be a new folder",
            base.path.name,
            outside[0],
        )
    merger.require({**base.slots, **{name: _names(name, source) for name, source in others.items()}})
    header = safetensors_header.read(base.path)
    if single:
        return _file_to_file(header, base, output, merger, vae)
    _file_to_folder(header, base, output, merger, vae)
    return output


def _other_vae(base: Base) -> dict[str, torch.Tensor]:
    """The tensors of the autoencoder that replaces the base's own, with diffusers' names; {} if there is none."""
    source = base.sources.get("vae")
    if source is None:
        return {}
    if source.slots is not None:
        tensors = ldm.tensors(safetensors_header.read(source.path), source.slots)
    else:
        paths, _ = weight_files.weight_files(source.path, vae_source.WEIGHTS)
        tensors = _loaded("vae", map(safetensors_header.read, paths), lambda part, name, weight: weight)
    return {name: (tensor.half() if tensor.itemsize == 1 else tensor).contiguous() for name, tensor in tensors}


def _write_vae(folder: Path, base: Base, vae: dict[str, torch.Tensor]) -> None:
    """Replace the autoencoder in a folder."""
    if not vae:
        return
    shutil.rmtree(folder / "vae", ignore_errors=True)
    files.write_bytes(folder / "vae" / f"{vae_source.WEIGHTS}.safetensors", save(vae, {"format": "pt"}))
    _write_json(folder / "vae" / "config.json", base.configs["vae"])
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    _write_json(folder / "model_index.json", index | {"vae": base.configs["model_index"]["vae"]})


def _file_to_file(
    header: safetensors_header.Header, base: Base, output: Path, merger: Merger, vae: dict[str, torch.Tensor]
) -> Path:
    """Copy tensor by tensor, in the file's order, so that only one tensor is in memory."""
    parts = base.slots or {}
    inside: dict[str, list[tuple[str, str, ldm.Slot]]] = {}
    for part, slots in parts.items():
        for name, slot in slots.items():
            if merger.name(part, name):
                inside.setdefault(slot.key, []).append((part, name, slot))
    scales = {slot.key: slot.scale for slots in parts.values() for slot in slots.values() if slot.scale}
    factors = dict(safetensors_header.tensors(header, set(scales.values())))
    gone = re.compile(rf"^{re.escape(ldm.AVERAGE)}|{weight_files.MARKS.pattern}|{weight_files.SCALE.pattern}")
    own = {slot.key for slot in parts.get("vae", {}).values()} if vae else set()
    # Parts that `model.t5` leaves out.
    layout = ldm.layout_of(base.family).parts
    left_out = tuple(prefix for part in layout.keys() - parts.keys() for prefix in layout[part].prefixes)
    own |= {key for key in header.tensors if key.startswith(left_out)} if left_out else set()
    entries = {key: info for key, info in header.tensors.items() if not (key in own or gone.search(key))}
    order = sorted(entries, key=lambda key: entries[key].start)
    base_metadata = {key: text for key, text in header.metadata.items() if key not in STALE}
    header_metadata = meta.of_merge(base_metadata, merger.metadata)
    # In eight bits, rounding would remove most of an adapter.
    dtypes = {key: _output_dtype(info.dtype, key in scales, merger.precision) for key, info in entries.items()}

    def tensors() -> Iterator[torch.Tensor]:
        for key, tensor in safetensors_header.tensors(header, order):
            if key in scales:
                tensor = weight_files.dequantize(tensor, factors[scales[key]])
            elif dtypes[key] != entries[key].dtype:
                tensor = tensor.float()
            dtype = getattr(torch, safetensors_header.DTYPES[dtypes[key]])
            for part, name, slot in inside.get(key, []):
                ldm.fill(tensor, slot, merger(part, name, ldm.view(tensor, slot), dtype))
            yield tensor.to(dtype)
        merger.precision.require()

    slots = ldm.place(base.family, {"vae": _shapes(vae)})["vae"] if vae else {}
    rows = [(key, dtypes[key], entries[key].shape) for key in order]
    rows += [(s.key, safetensors_header.dtype_name(vae[n]), ldm.file_shape(s)) for n, s in slots.items()]
    ends = (ldm.assemble([vae[name]], [slot]) for name, slot in slots.items())
    files.stream(output, rows, header_metadata, _chained(tensors(), ends))
    return output


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _output_dtype(dtype: str, scaled: bool, precision: Precision) -> str:
    """The dtype of a tensor in the output: that of `precision`, but float16 for weights with a scale."""
    if scaled and precision.keep_fp8:
        raise LorakitError("weights with a scale are written in float16: leave out --keep-fp8")
    return "F16" if scaled or (dtype.startswith("F8") and not precision.keep_fp8) else dtype


def _folder_to_file(base: Base, output: Path, merger: Merger, vae: dict[str, torch.Tensor]) -> Path:
    layout = registry.version_of(base.family).layout
    if layout is None:
        raise LorakitError("{base} cannot be written as one file: --output must be a new folder", base.path.name)
    parts = [part for part in layout.parts if part in base.configs and not (part == "vae" and vae)]
    folders = {part: base.path / keys.to_diffusers_name(part, base.family) for part in parts}
    sources = {part: list(_headers(folder)) for part, folder in folders.items()}
    shapes = {
        part: {_portable(part, name): head.tensors[name].shape for head in heads for name in head.tensors}
        for part, heads in sources.items()
    }
    shapes |= {"vae": _shapes(vae)} if vae else {}
    merger.require(shapes)
    placed = ldm.place(base.family, shapes)
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    plans: list[tuple[str, list[str]]] = []
    dtypes = {
        (part, _portable(part, name)): _output_dtype(head.tensors[name].dtype, False, merger.precision)
        for part, heads in sources.items()
        for head in heads
        for name in head.tensors
    } | {("vae", name): safetensors_header.dtype_name(tensor) for name, tensor in vae.items()}
    for part, slots in placed.items():
        by_key: dict[str, list[str]] = {}
        for name, slot in sorted(slots.items(), key=lambda item: (item[1].key, item[1].third or 0)):
            by_key.setdefault(slot.key, []).append(name)
        if layout.parts[part].used_layers:
            # Readers drop the last layer. It is written as a copy of the layer before, as in sd-scripts.
            last = 1 + max(int(match[1]) for key in by_key if (match := _RESBLOCK.search(key)))
            by_key |= {
                _RESBLOCK.sub(f".resblocks.{last}.", key): names
                for key, names in by_key.items()
                if f".resblocks.{last - 1}." in key
            }
        for key, names in by_key.items():
            entries.append((key, dtypes[part, names[0]], ldm.file_shape(slots[names[0]])))
            plans.append((part, names))

    def tensors() -> Iterator[torch.Tensor]:
        loaded: dict[str, torch.Tensor] = {}
        current = ""
        for part, names in plans:
            if part != current:
                loaded, current = vae if part not in sources else dict(_loaded(part, sources[part], merger)), part
            yield ldm.assemble([loaded[name] for name in names], [placed[part][name] for name in names])
        merger.precision.require()

    marks = _marks(base)
    entries += [(key, "F32", (0,)) for key in marks]
    metadata = meta.of_merge({}, merger.metadata) | _metadata(base, output.stem)
    files.stream(output, entries, metadata, _chained(tensors(), [torch.zeros(0)] * len(marks)))
    return output


def _file_to_folder(
    header: safetensors_header.Header, base: Base, output: Path, merger: Merger, vae: dict[str, torch.Tensor]
) -> None:
    parts = [*(base.slots or {}), *(name for name in base.sources if name != "vae")]
    names = [part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder")]
    tokenizers = {name: base.tokenizer(name) for name in names}
    temporary = atomic.temporary_path(output)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for part in parts:
            if part == "vae" and vae:
                continue
            tensors = dict(_merged(header, base, part, merger))
            stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            order = [
                (name, safetensors_header.dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()
            ]
            place = temporary / keys.to_diffusers_name(part, base.family)
            files.stream(place / f"{stem}.safetensors", order, {"format": "pt"}, tensors.values())
            config = dict(base.configs[part])
            if part.startswith("text_encoder"):
                # transformers uses this dtype by default.
                config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
            _write_json(place / "config.json", config)
        for name, folder in tokenizers.items():
            encoder = name.replace("tokenizer", "text_encoder")
            own = encoder in (base.slots or {}) or base.sources[encoder].slots is not None
            _copy_tokenizer(folder, temporary / name, base.configs[encoder] if own else None)
        _write_json(temporary / "scheduler" / "scheduler_config.json", base.configs["scheduler"])
        _write_json(temporary / "model_index.json", base.configs["model_index"])
        merger.precision.require()
        _write_vae(temporary, base, vae)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _merged(
    header: safetensors_header.Header, base: Base, part: str, merger: Merger
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a part of a single file, with diffusers' names and the adapter merged in."""
    source = base.sources.get(part) or vae_source.Source(base.path, (base.slots or {}).get(part))
    if source.slots is None:
        yield from _loaded(part, _headers(source.path), merger)
        return
    if source.path != base.path:
        header = safetensors_header.read(source.path)
    dtypes = {
        name: _output_dtype(header.tensors[slot.key].dtype, bool(slot.scale), merger.precision)
        for name, slot in source.slots.items()
        if slot.key
    }
    # An identity matrix is not in the file.
    usual = "F16" if set(dtypes.values()) == {"F16"} else "F32"
    for name, tensor in ldm.tensors(header, source.slots):
        dtype = getattr(torch, safetensors_header.DTYPES[dtypes.get(name, usual)])
        yield name, merger(part, name, tensor, dtype).contiguous()


def _names(part: str, source: vae_source.Source) -> list[str]:
    """diffusers' names of the tensors of a part that is not in the base's file."""
    if source.slots is not None:
        return list(source.slots)
    return [_portable(part, name) for head in _headers(source.path) for name in head.tensors]


def _headers(folder: Path) -> Iterator[safetensors_header.Header]:
    """The headers of a part's files, as selected by `weight_files`."""
    for path in weight_files.weight_files(folder, registry.weight_stems()[folder.name])[0]:
        yield safetensors_header.read(path)


def _loaded(
    part: str, heads: Iterable[safetensors_header.Header], merger: Callable[[str, str, torch.Tensor], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for head in heads:
        for name, tensor in safetensors_header.tensors(head, head.tensors):
            ours = _portable(part, name)
            yield ours, merger(part, ours, tensor)


def _portable(part: str, name: str) -> str:
    """A tensor's name in today's diffusers: with CLIP's `text_model.`, and without old names of the VAE."""
    if part == "vae":
        return vae_source.current_name(name)
    if _T5.match(name):
        return name
    return canonical(part, name).removeprefix(f"{part}.")


def _marks(base: Base) -> list[str]:
    """Empty tensors whose keys show the prediction type (see `ldm.prediction`)."""
    scheduler = base.configs["scheduler"]
    if scheduler.get("prediction_type") != VELOCITY:
        return []
    return ["v_pred", "ztsnr"] if scheduler.get("rescale_betas_zero_snr") else ["v_pred"]


def _metadata(base: Base, title: str) -> dict[str, str]:
    tags = registry.version_of(base.family).tags
    _, architecture = tags.of(base.prediction_type)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture.removesuffix("/lora"),
        "modelspec.implementation": tags.implementation,
        "modelspec.prediction_type": MODELSPEC_PREDICTIONS[base.prediction_type],
        "modelspec.title": title,
    }


def _copy_tokenizer(source: Path, target: Path, encoder: Mapping[str, Any] | None) -> None:
    """Copy the tokenizer's files, with the padding token of the encoder in a single file."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".model") and not path.name.startswith("."):
            shutil.copy2(path, target)
    vocabulary = target / "vocab.json"
    if encoder is None or not vocabulary.is_file():
        return
    words = {number: word for word, number in foreign_json.loads(vocabulary.read_text(encoding="utf-8")).items()}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (target / name).is_file():
            table = foreign_json.loads((target / name).read_text(encoding="utf-8"))
            _write_json(target / name, table | {"pad_token": words[encoder["pad_token_id"]]})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _chained(first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield from first
    yield from second
