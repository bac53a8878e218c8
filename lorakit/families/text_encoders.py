"""Text encoders for a base in a single file that lacks them: separate files, or those of a folder in diffusers layout.
No torch.

Stable Diffusion 3 is published without them, and programs keep them as files, such as `clip_l.safetensors`,
`clip_g.safetensors` and `t5xxl_fp16.safetensors` (Stability-AI/sd3.5, ComfyUI). A file's content shows which encoder it
is; the name decides if several fit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.config import ModelConfig
from lorakit.core import registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.core.messages import Message
from lorakit.core.names import expand
from lorakit.families import clip_tokenizer, hub, ldm, single_file, weight_files
from lorakit.families.spec import Configs, FilePart, TextEncoder
from lorakit.families.vae_source import Source

# Folders with such files, relative to the base's folder, and relative to a program in `LORAKIT_HOSTS`.
NEIGHBORS = ("text_encoders", ".", "../text_encoders", "../clip")
HOSTS = ("models/text_encoders", "models/clip", "text_encoders", "clip")
T5_TOKENIZERS = ("tokenizer_3", "comfy/text_encoders/t5_tokenizer", "ComfyUI/comfy/text_encoders/t5_tokenizer", ".")
# All versions of T5 have the same vocabulary; this repository is Google's and needs no login.
T5_REPOSITORY, T5_REVISION = "google-t5/t5-small", "fddaf69ffcbe0185b8c5fdbf2156048e52bb3ed0"
# Rows of every published T5; the tokenizer has 28 tokens less.
T5_ROWS = 32_128
_T5_SOURCE = f"{T5_REPOSITORY}@{T5_REVISION[:7]}"
T5_FROM_HUB = Message("tokenizer_3: T5's, {name} on the hub", _T5_SOURCE)
T5_TO_FETCH = Message(
    "tokenizer_3: T5's, {name} on the hub: it is not on this machine and is fetched once, 1.4 MB", _T5_SOURCE
)
T5_WAYS = (
    "set model.tokenizer to a folder with tokenizer_3/tokenizer.json in it, or to that of ComfyUI; or set model.t5 = "
    "false, which leaves T5 out"
)
# A tensor that identifies each kind.
_MARKS = {
    "CLIP": "text_model.encoder.layers.0.mlp.fc1.weight",
    "T5": "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
}
WAY = (
    "set model.text_encoders to a folder with clip_l.safetensors and clip_g.safetensors, or to a base that has them "
    "(a file, a folder in diffusers layout, or a hub id)"
)


class Encoder(NamedTuple):
    """A text encoder that is not in the base's file: its location, and diffusers' names with their shapes."""

    source: Source
    shapes: dict[str, tuple[int, ...]]

    @property
    def files(self) -> list[Path]:
        """Its files."""
        if self.source.slots is not None:
            return [self.source.path]
        return [self.source.path / "config.json", *weight_files.weight_files(self.source.path, "model")[0]]


def find(option: str, base: Path, checkpoint: ldm.Checkpoint, checks: hub.Checks, *, t5: bool) -> dict[str, Encoder]:
    """The text encoders that a base lacks, by component. T5 may be missing.

    Args:
        option: the value of `model.text_encoders`.
        base: the base's file.
        t5: whether T5 is used.

    Raises:
        LorakitError: a required one is nowhere, or the named one does not fit or is not needed.
    """
    encoders = {encoder.name: encoder for encoder in registry.family_of(checkpoint.family).text_encoders}
    missing = [encoder for name, encoder in encoders.items() if name not in checkpoint.parts]
    missing = [encoder for encoder in missing if t5 or encoder.kind != "T5"]
    needed = [encoder.name for encoder in missing if not encoder.optional]
    if not missing and option:
        raise LorakitError("base {file} has its own text encoders: leave model.text_encoders out", base.name)
    if not option and not needed:
        return {}
    for place in [option] if option else _places(base):
        if sources := _from_place(place, checkpoint, missing, checks):
            return sources
    if option:
        raise LorakitError(
            "model.text_encoders: {place} has no text encoders that fit base {file}: {way}", option, base.name, WAY
        )
    raise LorakitError("base {file} has no text encoders in it, and none are beside it: {way}", base.name, WAY)


def configs(encoders: Mapping[str, Encoder]) -> Configs:
    """The configurations of the encoders that are folders in diffusers layout."""
    folders = {name: encoder.source.path for name, encoder in encoders.items() if encoder.source.slots is None}
    return {name: weight_files.read_json(folder / "config.json") for name, folder in folders.items()}


def tokenizers(
    base: Path, model: ModelConfig, others: Mapping[str, Encoder], configs: Configs
) -> tuple[dict[str, Path], list[str]]:
    """The folders of the tokenizers of a base in one file, and messages about their origin."""
    # A folder in diffusers layout has them next to its text encoders.
    result = {_of(name): own.source.path.parent / _of(name) for name, own in others.items() if own.source.slots is None}
    kinds = {name: config.get("model_type") for name, config in configs.items() if name.startswith("text_encoder")}
    rest = {name: kind for name, kind in kinds.items() if _of(name) not in result}
    notes = []
    clips = [name for name, kind in rest.items() if kind != "t5"]
    if clips:
        words = min(configs[name]["vocab_size"] for name in clips)
        folder, note = clip_tokenizer.find(model.tokenizer, base, words)
        notes.append(note)
        result |= {_of(name): folder for name in clips if folder}
    for name in rest.keys() - {*clips}:
        t5_folder = _t5_tokenizer(model.tokenizer, base, others.get(name), configs[name]["vocab_size"])
        is_from_hub = t5_folder is not None and t5_folder.name == T5_REVISION
        local = Message("{name}: {path}", _of(name), t5_folder) if t5_folder else T5_TO_FETCH
        notes.append(T5_FROM_HUB if is_from_hub else local)
        result |= {_of(name): t5_folder} if t5_folder else {}
    return result, notes


def tokenizer_problem(base: str, config: Mapping[str, Any]) -> str | None:
    """The reason why a text encoder's tokenizer, which is not on this machine, cannot be downloaded, or None.

    Args:
        base: the name of the base's file.
        config: configuration of the text encoder.
    """
    from huggingface_hub import is_offline_mode

    rows = int(config["vocab_size"])
    if config["model_type"] != "t5":
        return clip_tokenizer.missing(base, rows)
    if rows != T5_ROWS:
        return Message(
            "base {file} has a T5 of {rows} words where the published have {count}: {ways}",
            base,
            rows,
            T5_ROWS,
            T5_WAYS,
        )
    line = "base {file} has T5 and no tokenizer for it on this machine, and HF_HUB_OFFLINE is set: {ways}"
    return Message(line, base, T5_WAYS) if is_offline_mode() else None


def fetch_tokenizer(base: str, config: Mapping[str, Any]) -> Path:
    """Download the tokenizer of a text encoder into Hugging Face's cache.

    Raises:
        LorakitError: the hub cannot be reached or is switched off, or the files do not fit.
    """
    if problem := tokenizer_problem(base, config):
        raise LorakitError(problem)
    if config["model_type"] != "t5":
        return clip_tokenizer.fetch(base, int(config["vocab_size"]))
    words = ("T5 and no tokenizer for it on this machine, and T5's", T5_WAYS)
    folder = clip_tokenizer.from_hub(base, T5_REPOSITORY, T5_REVISION, ["tokenizer.json"], words)
    if not _is_t5_tokenizer(folder, int(config["vocab_size"])):
        raise LorakitError("tokenizer {folder} is not T5's: {ways}", folder, T5_WAYS)
    return folder


def _of(text_encoder: str) -> str:
    """The name of a text encoder's tokenizer."""
    return text_encoder.replace("text_encoder", "tokenizer")


def _t5_tokenizer(place: str, base: Path, own: Encoder | None, rows: int) -> Path | None:
    """The folder of T5's tokenizer, or None: next to the text encoder, in `model.tokenizer`, in the base's folder, in a
    program of `LORAKIT_HOSTS`, or in Hugging Face's cache."""
    from huggingface_hub import constants

    above = own.source.path.parent if own is not None else base.parent
    roots = [*([expand(place)] if place else []), above, base.parent, *_hosts()]
    folders = [root / below for root in roots for below in T5_TOKENIZERS]
    revisions = sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*"))
    folders += [revision / below for below in (".", "tokenizer_3", "tokenizer_2") for revision in revisions]
    return next((folder for folder in folders if _is_t5_tokenizer(folder, rows)), None)


def _is_t5_tokenizer(folder: Path, rows: int) -> bool:
    """Whether a folder has a tokenizer.json of the Unigram type (CLIP's has another one), with no more tokens than the
    text encoder has rows."""
    try:
        model = weight_files.read_json(folder / "tokenizer.json")["model"]
        return str(model["type"]) == "Unigram" and len(model["vocab"]) <= rows
    except (LorakitError, KeyError, TypeError, OSError):
        return False


def _hosts() -> list[Path]:
    return [expand(host) for host in os.environ.get("LORAKIT_HOSTS", "").split(os.pathsep) if host]


def _places(base: Path) -> Iterator[str]:
    for folder in [
        *(base.parent / below for below in NEIGHBORS),
        *(host / below for host in _hosts() for below in HOSTS),
    ]:
        if folder.is_dir():
            yield str(folder)


def _from_place(
    place: str, checkpoint: ldm.Checkpoint, missing: Sequence[TextEncoder], checks: hub.Checks
) -> dict[str, Encoder]:
    """The encoders among `missing` from a folder of files, a folder in diffusers layout or a hub id; {} if a required
    one is missing there."""
    folder = expand(place)
    hub_id = None if folder.exists() else hub.parse(place)
    if hub_id is not None:
        folder, _ = hub.find(hub_id, checks, without=("unet", "transformer", "vae", "scheduler", *_unused(missing)))
    if (folder / "model_index.json").is_file():
        sources = {e.name: _of_folder(folder / e.name, e) for e in missing if (folder / e.name).is_dir()}
    else:
        files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
        sources = _of_files(files, checkpoint, missing)
    return sources if all(encoder.optional or encoder.name in sources for encoder in missing) else {}


def _unused(missing: Sequence[TextEncoder]) -> list[str]:
    names = {encoder.name for encoder in missing}
    others = [name for name in registry.weight_stems() if name.startswith("text_encoder") and name not in names]
    return [*others, *(_of(name) for name in others)]


def _of_folder(folder: Path, encoder: TextEncoder) -> Encoder:
    paths, variant = weight_files.weight_files(folder, "model")
    shapes = weight_files.shapes(paths)
    if encoder.kind != "T5":
        shapes = {canonical(encoder.name, n).removeprefix(f"{encoder.name}."): shape for n, shape in shapes.items()}
    return Encoder(Source(folder, None, variant), shapes)


def _of_files(files: list[Path], checkpoint: ldm.Checkpoint, missing: Sequence[TextEncoder]) -> dict[str, Encoder]:
    """The files that fit: the two CLIPs together have the width of the pooled text, and T5 has the denoiser's text
    width."""
    parts = ldm.layout_of(checkpoint.family).parts
    unet = single_file.NamedShapes("unet", {name: slot.shape for name, slot in checkpoint.parts["unet"].items()})
    pooled, wide = unet["time_text_embed.text_embedder.linear_1.weight"][1], unet["context_embedder.weight"][1]
    # Sorted so that files with half precision come before fp8.
    files = sorted(files, key=lambda file: ("fp8" in file.name.lower(), file.name))
    read = {e.name: [source for file in files for source in _of_file(file, parts[e.name], e)] for e in missing}
    result = {}
    pairs = [
        (first, second)
        for first in read.get("text_encoder", [])
        for second in read.get("text_encoder_2", [])
        if first.source != second.source and _pooled(first) + _pooled(second) == pooled
    ]
    if pairs:
        best = min(pairs, key=lambda pair: ["clip_l" not in _name(pair[0]), "clip_g" not in _name(pair[1])])
        result = dict(zip(("text_encoder", "text_encoder_2"), best, strict=True))
    for source in (source for source in read.get("text_encoder_3", []) if "shared.weight" not in source.shapes):
        raise LorakitError(
            "{source} lacks text_encoder_3.shared.weight: get the whole checkpoint", source.source.path.name
        )
    t5 = [source for source in read.get("text_encoder_3", []) if source.shapes["shared.weight"][-1] == wide]
    return result | ({"text_encoder_3": t5[0]} if t5 else {})


def _of_file(file: Path, part: FilePart, encoder: TextEncoder) -> Iterator[Encoder]:
    """The text encoders of one kind in a file, which may also hold a denoiser."""
    try:
        header = safetensors_header.read(file)
    except LorakitError:  # an unrelated file in that folder
        return
    shapes = header.shapes()
    mark = _MARKS[encoder.kind]
    for prefix in [name.removesuffix(mark) for name in shapes if name.endswith(mark)]:
        # The second CLIP has a projection; the layout of the first does not require it.
        if encoder.kind == "CLIP" and part.identity is None and f"{prefix}text_projection.weight" not in shapes:
            continue
        slots = ldm.component_slots(header, part, encoder.name, prefix)
        yield Encoder(Source(file, slots), {name: slot.shape for name, slot in slots.items()})


def _name(clip: Encoder) -> str:
    """A text that distinguishes the two CLIPs: the name of the file and of a tensor in it."""
    slots = clip.source.slots or {}
    return f"{clip.source.path.name} {slots['text_model.final_layer_norm.weight'].key}"


def _pooled(source: Encoder) -> int:
    return source.shapes["text_projection.weight"][0]
