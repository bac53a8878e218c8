"""Describe a base model from its configuration and the headers of its files. It loads no torch and asks no
questions."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.config import Config, ModelConfig
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join, some
from lorakit.core.names import expand
from lorakit.families import clip_tokenizer, hub, ldm, pocket, single_file, text_encoders, vae_source, weight_files
from lorakit.families.facts import distilled, fit, noise_schedule, other_models
from lorakit.families.spec import EPSILON, FLOW, VELOCITY, FamilySpec
from lorakit.families.vae_source import Source

if TYPE_CHECKING:
    from torch import nn

PREDICTIONS = (EPSILON, VELOCITY)
# Pipelines that have the parts of another one.
PIPELINES = {"LatentConsistencyModelPipeline": "StableDiffusionPipeline"}
BUNDLED = "pocket"
# `model.base` of a run that trains a pipeline in memory.
IN_MEMORY = "<pipeline>"
INPAINTING = "inpainting model: trained and drawn with the whole picture masked, that is from text alone"
NO_FLOW = "train.{name} = {value!r} is not defined for base {base}, which predicts the flow: leave it at {usual!r}"
OWN_PARTS = "base {path} has its own {kind}: model.{option} is for bases in a single file"
NO_ENCODER = "base {base} is a {name} without {encoder}, as SDXL's refiner is: give the base model instead"
NO_VAE = "base {path} lacks {parts}: get the base again, or give a VAE by model.vae (--vae)"
NO_INDEX = "base {path} is not a folder in diffusers layout: no model_index.json; {content}"
NO_SNR = "train.min_snr_gamma is not defined for base {name}, which predicts the flow: leave it unset"
NO_WORDS = "adapter.new_tokens: base {name} reads texts by {encoder} too, which learns no words; use an adapter"
GUESS = "prediction type: {kind}, {why}; if that is wrong, set model.prediction_type (`lorakit probe` measures it)"


@dataclass(frozen=True)
class BaseInfo:
    """The facts of a base before it is loaded.

    Attributes:
        path: its folder in diffusers layout, or its single file.
        family: name of its family's version, such as "sd1"; its adapters have the same.
        loader: name of its family in `registry.FAMILIES`.
        prediction_type: "epsilon", "v_prediction" or "flow_prediction".
        latent_channels: channels of the latents.
        downscale: pixels per latent, along one side.
        max_tokens: tokens of a text for CLIP, including start and end.
        text_tokens: number of tokens that the denoiser attends to.
        cross_dim: width of the text embeddings that the denoiser attends to.
        layers: canonical name -> weight shape of every linear and convolutional layer of UNet and text encoders.
        untrained_layers: layers that never get a gradient (SDXL's first text encoder, SD3's last block).
        bytes: component -> bytes of its weights on disk.
        variants: component -> variant in its file names ("fp16", "bf16" or None).
        configs: component -> its configuration; "scheduler" and "model_index" too.
        tokenizers: "tokenizer" and, for SDXL, "tokenizer_2" -> folder; without those that only the hub has.
        slots: for a single file, component -> the slot of each tensor in it; None for a folder.
        content: the files that determine the base: configurations and weights.
        clip_skip: the layer that texts are read at, from the end: 1 is the last; 0 if the family has no choice.
        prediction_override: `model.prediction_type` if it differs from the base's own.
        without_t5: whether `model.t5` leaves out the base's T5.
        title: its name for messages.
        source: hub id with the commit, as `owner/name@commit`; empty for a local base.
        notes: messages about facts that the base does not state.
        warnings: messages about possible problems of the base.
        sources: component -> its weights, for components that are not the base's own.
        distilled: the method of distillation and its sampling, or None.
        components: for a pipeline in memory, component -> module; else empty.
    """

    path: Path
    family: str
    loader: str
    prediction_type: str
    latent_channels: int
    downscale: int
    max_tokens: int
    text_tokens: int
    cross_dim: int
    layers: dict[str, tuple[int, ...]] = field(repr=False)
    untrained_layers: frozenset[str] = field(repr=False)
    bytes: dict[str, int]
    variants: dict[str, str | None]
    configs: dict[str, dict[str, Any]] = field(repr=False)
    tokenizers: dict[str, Path] = field(repr=False)
    slots: dict[str, dict[str, ldm.Slot]] | None = field(repr=False)
    content: tuple[Path, ...] = field(repr=False)
    title: str
    clip_skip: int = 0
    prediction_override: str = ""
    without_t5: bool = False
    source: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict, repr=False)
    distilled: distilled.Distilled | None = None
    components: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def hash(self) -> str:
        """Identity of weights and configuration. It reads all files, unless their hashes are cached."""
        content = weight_files.identity(self.content)
        changes = [*filter(None, [self.prediction_override]), *(["without T5"] if self.without_t5 else [])]
        return hashlib.sha256("/".join([content, *changes]).encode()).hexdigest() if changes else content

    @property
    def spec(self) -> FamilySpec:
        """Its family."""
        return registry.FAMILIES[self.loader]

    @property
    def bucket_multiple(self) -> int:
        """The sides of a bucket must be multiples of this, in pixels."""
        return self.spec.bucket_multiple(self.layers, self.downscale)

    @property
    def chunked_texts(self) -> bool:
        """Whether long texts are encoded in chunks."""
        return self.spec.chunked_texts

    def weights(self, component: str) -> Source:
        """The location of a component's weights."""
        if component in self.sources:
            return self.sources[component]
        if self.slots is not None:
            return Source(self.path, self.slots[component])
        folder = self.path / (self.spec.denoiser if component == "unet" else component)
        return Source(folder, None, self.variants[component])

    def tokenizer(self, name: str = "tokenizer") -> Path:
        """Folder of a tokenizer. It is downloaded if a base in a single file has none on this machine.

        Raises:
            LorakitError: the download failed or is not allowed.
        """
        if name not in self.tokenizers:
            return text_encoders.fetch_tokenizer(self.path.name, self._unread[name])
        return self.tokenizers[name]

    def tokenizer_problem(self) -> str | None:
        """The reason why a tokenizer that is not on this machine cannot be downloaded, or None."""
        problems = (text_encoders.tokenizer_problem(self.path.name, config) for config in self._unread.values())
        return next(filter(None, problems), None)

    def fetch_tokenizers(self) -> bool:
        """Download the tokenizers that are not on this machine. Return whether there were any.

        Raises:
            LorakitError: as `tokenizer`.
        """
        return bool([self.tokenizer(name) for name in self._unread])

    @property
    def _unread(self) -> dict[str, dict[str, Any]]:
        """Each tokenizer that is not on this machine -> the configuration of its text encoder."""
        parts = {e.tokenizer: self.configs[e.name] for e in self.spec.text_encoders if e.name in self.configs}
        return {name: config for name, config in parts.items() if name not in self.tokenizers}


def describe(base: str | Path | ModelConfig) -> BaseInfo:
    """Describe a base: "pocket", a folder in diffusers layout, a single file, or a hub id (which may be downloaded).

    Args:
        base: the section `model` of the config, or `model.base` alone.

    Raises:
        LorakitError: it does not exist, is something else (which is named), or lacks parts (which are listed).
    """
    model = base if isinstance(base, ModelConfig) else ModelConfig(base=str(base))
    if model.base == BUNDLED:
        return _of_folder(pocket.path(), model, title=BUNDLED)
    if model.base == IN_MEMORY:
        raise LorakitError("base {name} is a pipeline in memory: give it to train or resume, by pipeline=", IN_MEMORY)
    path = expand(model.base)
    if path.is_file():
        return _of_file(path, model)
    hub_id = None if path.is_dir() else hub.parse(model.base)
    if hub_id is None:
        hub.refuse_name(model.base)
        return _of_folder(path, model, title=Path(os.path.realpath(path)).name)
    place, commit = hub.find(hub_id, _CHECKS, _unused(model))
    source = hub_id.at(commit)
    if hub_id.file:
        return _of_file(place, model, source)
    return _of_folder(place, model, title=hub_id.name.partition("/")[2], source=source)


def unsuited(info: BaseInfo, config: Config) -> list[str]:
    """Options of a config that a base of this kind does not support, one message each."""
    problems = [problem] if (problem := info.tokenizer_problem()) else []
    usual_values = {"snr_weighting": "min", "timestep_sampling": "base", "timestep_shift": 1.0}
    is_uniform = config.train.timestep_sampling == "uniform"  # then only the shift moves the timesteps
    for name, usual in {} if not info.spec.predicts_flow else usual_values.items():
        if getattr(config.train, name) != usual and not (is_uniform and name.startswith("timestep")):
            problems.append(Message(NO_FLOW, name, getattr(config.train, name), info.title, usual))
    if info.spec.predicts_flow and config.train.min_snr_gamma is not None:
        problems.append(Message(NO_SNR, info.title))
    frozen = [e.kind for e in info.spec.text_encoders if not e.trainable and e.name in info.configs]
    if frozen and config.adapter.new_tokens:
        problems.append(Message(NO_WORDS, info.title, frozen[0]))
    return problems


def pin(model: ModelConfig) -> ModelConfig:
    """Replace hub ids by ids with their current commit, so that a run resumes with the same base.

    Raises:
        LorakitError: as `describe`, if a hub id cannot be found.
    """
    hub_id = hub.parse(model.base) if model.base != BUNDLED and not expand(model.base).exists() else None
    if hub_id is not None:
        model = replace(model, base=hub_id.at(hub.find(hub_id, _CHECKS, _unused(model))[1]))
    return replace(model, vae=vae_source.pin(model.vae))


def _of_folder(path: Path, model: ModelConfig, *, title: str, source: str = "") -> BaseInfo:
    index = _index(path)
    spec = family_of_index(path, index)
    optional = [encoder.name for encoder in spec.text_encoders if encoder.optional]
    absent = [name for name in optional if index.get(name, [None, None])[1] is None]
    left_out = [] if model.t5 else [e for e in spec.text_encoders if e.kind == "T5" and e.name not in absent]
    index |= {name: [None, None] for encoder in left_out for name in (encoder.name, encoder.tokenizer)}
    absent += [encoder.name for encoder in left_out]
    encoders = [encoder.name for encoder in spec.text_encoders if encoder.name not in absent]
    tokenizers = [encoder.tokenizer for encoder in spec.text_encoders if encoder.name not in absent]
    own_vae = ["vae"] if not model.vae or (path / "vae" / "config.json").is_file() else []
    folders = {"unet": path / spec.denoiser, **{name: path / name for name in (*own_vae, *encoders)}}
    subfolders = (spec.denoiser, *own_vae, "scheduler", *encoders, *tokenizers)
    missing = [name for name in subfolders if not (path / name).is_dir()]
    if missing:
        template = NO_VAE if "vae" in missing else "base {path} lacks {parts}: get the base again"
        raise LorakitError(template, path, ", ".join(f"{name}/" for name in missing))
    for option in ("tokenizer", "text_encoders"):
        if getattr(model, option):
            kind = option.replace("_", " ")
            raise LorakitError(OWN_PARTS, path, kind, option)
    configs = {name: weight_files.read_json(folder / "config.json") for name, folder in folders.items()}
    if model.vae:
        folders.pop("vae", None)
    configs["scheduler"] = weight_files.read_json(path / "scheduler" / "scheduler_config.json")
    stems = spec.weight_stems()
    weights = {name: weight_files.weight_files(folder, stems[folder.name]) for name, folder in folders.items()}
    layers: dict[str, tuple[int, ...]] = {}
    tensors = {component: weight_files.shapes(files) for component, (files, _) in weights.items()}
    for component in ("unet", *encoders):
        layers |= weight_files.layers(component, tensors[component])
    # Another prediction type or schedule makes another base of the same weights.
    config_files = [folders[name] / "config.json" for name in ("unet", "vae") if name in folders]
    config_files.append(path / "scheduler" / "scheduler_config.json")
    notes = _notes(source, model, absent)
    return base_info(
        model,
        tensors,
        path=path,
        family=spec.version(fit.cross_dim(configs["unet"])).name,
        loader=spec.name,
        layers=layers,
        bytes={name: sum(file.stat().st_size for file in files) for name, (files, _) in weights.items()},
        variants={name: variant for name, (_, variant) in weights.items()},
        configs=configs | {"model_index": index},
        tokenizers={name: path / name for name in tokenizers},
        slots=None,
        content=(*config_files, *(file for files, _ in weights.values() for file in files)),
        title=title,
        source=source,
        notes=tuple(notes),
        without_t5=bool(left_out),
    )


def _unused(model: ModelConfig) -> list[str]:
    """Folders of a base that are not needed without T5 (`model.t5`)."""
    encoders = [e for spec in registry.FAMILIES.values() for e in spec.text_encoders if e.kind == "T5"]
    return [] if model.t5 else [name for encoder in encoders for name in (encoder.name, encoder.tokenizer)]


def _of_file(path: Path, model: ModelConfig, source: str = "") -> BaseInfo:
    header = ldm.check_header(ldm.read_header(path))
    checkpoint = ldm.read(header, vae_needed=not model.vae)
    spec = registry.family_of(checkpoint.family)
    others = text_encoders.find(model.text_encoders, path, checkpoint, _CHECKS, t5=model.t5)
    left_out = [] if model.t5 else [e.name for e in spec.text_encoders if e.kind == "T5" and e.name in checkpoint.parts]
    parts = {name: slots for name, slots in checkpoint.parts.items() if name not in left_out}
    shapes = {name: {ours: slot.shape for ours, slot in slots.items()} for name, slots in parts.items()}
    shapes |= {name: encoder.shapes for name, encoder in others.items()}
    try:
        configs = single_file.configs(checkpoint, shapes) | text_encoders.configs(others)
    except LorakitError as error:
        raise LorakitError("base {path}: {problem}", path.name, error) from error
    layers: dict[str, tuple[int, ...]] = {}
    for component in [name for name in shapes if name != "vae"]:
        layers |= weight_files.layers(component, shapes[component])
    sizes = {name: sum(file.stat().st_size for file in encoder.files) for name, encoder in others.items()}
    for component, slots in parts.items():
        lengths = {slot.key: header.tensors[slot.key] for slot in slots.values() if slot.key}
        sizes[component] = sum(info.end - info.start for info in lengths.values())
    prediction = checkpoint.prediction
    is_guess = not prediction.certain and model.prediction_type == "auto"
    kind = noise_schedule.name(prediction.type, prediction.zero_snr)
    notes = _notes(source, model, [])
    notes += [Message(GUESS if is_guess else "prediction type: {kind}, {why}", kind, prediction.evidence)]
    if checkpoint.ignored:
        notes.append(Message("keys that are not of such a model, ignored: {keys}", _summary(checkpoint.ignored)))
    notes += [Message("{name}: {path}", name, encoder.source.path) for name, encoder in others.items()]
    absent = [encoder.name for encoder in spec.text_encoders if encoder.name not in configs]
    notes += _notes("", model, absent)
    tokenizers, tokenizer_notes = text_encoders.tokenizers(path, model, others, configs)
    notes += tokenizer_notes
    return base_info(
        model,
        shapes,
        path=path,
        family=checkpoint.family,
        loader=spec.name,
        layers=layers,
        bytes=sizes,
        variants={name: others[name].source.variant if name in others else None for name in sizes},
        configs=configs,
        tokenizers=tokenizers,
        slots=parts,
        sources={name: encoder.source for name, encoder in others.items()},
        content=(path, *(file for encoder in others.values() for file in encoder.files)),
        title=path.stem,
        source=source,
        notes=tuple(notes),
        metadata=header.metadata | ({"ztsnr": "v_pred"} if "ztsnr" in header.tensors else {}),
        without_t5=bool(left_out),
    )


def _notes(source: str, model: ModelConfig, absent: Iterable[str]) -> list[str]:
    """Messages for the plan: the origin of a base, and its text encoders that are left out."""
    notes: list[str] = [Message("from the hub: {source}", source)] if source else []
    without = "without {name}" if model.t5 else "without {name}, as model.t5 says"
    return notes + [Message(without, name) for name in absent]


def _summary(keys: Collection[str]) -> str:
    """The prefixes of keys, with the number of keys for each."""
    places = Counter(".".join(key.split(".")[:-1][:2]) or key for key in keys)
    words = [f"{place}.* ({count})" if place not in keys else place for place, count in sorted(places.items())]
    return some(words, 4)


def base_info(
    model: ModelConfig, tensors: Mapping[str, fit.Shapes], *, metadata: Mapping[str, str] | None = None, **facts: Any
) -> BaseInfo:
    """Complete the facts from configurations and tensors, for both layouts, with the user's `prediction_type`."""
    metadata, names = metadata or {}, (facts["title"], facts["source"])
    if model.vae:
        facts |= vae_source.replacement(model.vae, facts)
    path, configs, spec = facts["path"], facts["configs"], registry.FAMILIES[facts["loader"]]
    vae, channels = configs["vae"], configs["vae"].get("latent_channels", 4)
    fit.require_channels(path, configs["unet"].get("in_channels", 4), channels)
    _check_fit(model, facts, tensors)
    if configs["unet"].get("in_channels", 4) != channels:
        facts["notes"] = (*facts["notes"], INPAINTING)
    if not model.t5 and not any(encoder.kind == "T5" for encoder in spec.text_encoders):
        raise LorakitError("base {path} has no T5: leave model.t5 out", path)
    if spec.predicts_flow and model.prediction_type != "auto":
        raise LorakitError("base {path} predicts the flow: leave model.prediction_type out", path)
    configs["scheduler"], note = noise_schedule.override(configs["scheduler"], model.prediction_type)
    if note:
        facts["notes"] = (*facts["notes"], note)
        # Another prediction type or schedule makes another base of the same weights.
        facts["prediction_override"] = model.prediction_type
    noise_schedule.check(path, configs["scheduler"], flow=spec.predicts_flow)
    prediction = spec.prediction or configs["scheduler"].get("prediction_type", EPSILON)
    if prediction not in (*PREDICTIONS, FLOW):
        kinds = join(" and ", PREDICTIONS)
        raise LorakitError("base {path} predicts {kind!r}: only {kinds} can be trained", path, prediction, kinds)
    clip = min(
        _max_tokens(facts["tokenizers"].get(name.replace("text_encoder", "tokenizer")), config)
        for name, config in configs.items()
        if name.startswith("text_encoder")
    )
    encoders = [configs[part.name] for part in spec.text_encoders if part.name in configs and part.kind == "CLIP"]
    depth = min(config.get("num_hidden_layers", 12) for config in encoders)
    facts["clip_skip"] = spec.text_layer(facts["title"], model.clip_skip, depth)
    if model.clip_skip:
        template, layer = "clip skip {skip}: texts are read at layer {layer} of {layers}", depth - model.clip_skip + 1
        facts["notes"] = (*facts["notes"], Message(template, model.clip_skip, layer, depth))
    if prediction == EPSILON and model.prediction_type == "auto":
        facts["warnings"] = (*facts.get("warnings", ()), *noise_schedule.velocity_warning(model.base, names, metadata))
    kind = distilled.find(names, metadata, configs["unet"], configs["scheduler"])
    if kind is not None:
        distilled.require_noise(facts["title"], names, kind, model.prediction_type)
        facts["notes"] = (*facts["notes"], *kind.notes())
    return BaseInfo(
        **facts,
        distilled=kind,
        prediction_type=prediction,
        latent_channels=channels,
        downscale=2 ** (len(vae["block_out_channels"]) - 1),
        max_tokens=clip,
        text_tokens=clip + sum(encoder.extra_tokens for encoder in spec.text_encoders),
        cross_dim=fit.cross_dim(configs["unet"]),
        untrained_layers=frozenset(_dead_layers(spec, facts["layers"], facts["clip_skip"])),
    )


def _dead_layers(spec: FamilySpec, layers: Iterable[str], clip_skip: int) -> Iterator[str]:
    """Layers that get no gradient."""
    yield from weight_files.of_last(layers, r"text_encoder\..*\.layers", clip_skip - 1)
    for name in weight_files.of_last(layers, r"unet\.transformer_blocks"):
        if name.endswith(spec.dead_end_layers):
            yield name


def _index(path: Path) -> dict[str, Any]:
    """Read the folder's model_index.json. Refuse a folder without one, by its kind or its files."""
    if not path.is_dir():
        raise LorakitError(hub.absence(str(path)))
    if not (path / "model_index.json").is_file():
        if what := other_models.what_folder(path):
            raise LorakitError("base {path} {what}", path, what)
        inside = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
        names = ", ".join(inside[:5]) + (" ..." if len(inside) > 5 else "")
        content = Message("it holds {names}", names) if inside else "it is empty"
        raise LorakitError(NO_INDEX, path, content)
    return weight_files.read_json(path / "model_index.json")


def of_pipeline(name: str) -> FamilySpec | None:
    """The family of a pipeline class, or None."""
    name = PIPELINES.get(name, name)
    fitting = [spec for spec in registry.FAMILIES.values() if name.startswith(spec.pipeline)]
    return (
        None if other_models.pipeline_title(name) else max(fitting, key=lambda spec: len(spec.pipeline), default=None)
    )


def _check_configs(title: str, folder: Path) -> None:
    """Refuse a model that lorakit does not train, from those configs that exist."""
    if not (folder / "model_index.json").is_file():
        if what := other_models.what_folder(folder):
            raise LorakitError("base {path} {what}", title, what)
        return
    spec = family_of_index(title, _index(folder))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        noise_schedule.check(title, weight_files.read_json(scheduler), flow=spec.predicts_flow)


def family_of_index(base: Path | str, index: dict[str, Any]) -> FamilySpec:
    name = str(index.get("_class_name", "unknown"))
    spec = of_pipeline(name)
    if spec is None:
        raise LorakitError("base {path} {what}", base, other_models.what_pipeline(name))
    for encoder in spec.text_encoders:
        if other := other_models.what_encoder(index, encoder.name, encoder.kind):
            raise LorakitError("base {path} {what}", base, other)
        if not encoder.optional and index.get(encoder.name, [None, "there"]) == [None, None]:
            raise LorakitError(NO_ENCODER, base, name, encoder.name)
    return spec


def _check_fit(model: ModelConfig, facts: dict[str, Any], tensors: Mapping[str, fit.Shapes]) -> None:
    """Refuse tensors, tokenizers and text encoders that do not fit together."""
    path, configs, spec = facts["path"], facts["configs"], registry.FAMILIES[facts["loader"]]
    for component in (name for name in tensors if name != "vae" or not model.vae):
        whole = "the rest of the file" if path.is_file() else f"its {component}/config.json"
        names = {vae_source.current_name(name): shape for name, shape in tensors[component].items()}
        other = facts.get("sources", {}).get(component)
        title = f"text encoder {other.path}" if other else f"base {facts['title']}"
        fit.require(title, component, configs[component], names, whole)
    for name, folder in facts["tokenizers"].items():
        _check_tokenizer(path, folder, configs[name.replace("tokenizer", "text_encoder")])
    if spec.denoiser == "unet":
        fit.require_widths(f"base {facts['title']}", fit.cross_dim(configs["unet"]), configs)


def _check_tokenizer(base: Path, folder: Path, encoder: fit.Config) -> None:
    for name in clip_tokenizer.FILES if not (folder / "tokenizer.json").is_file() else ():
        if not (folder / name).is_file():
            file = f"{folder.name}/{name}"
            raise LorakitError("{file} is missing in {folder}: get the base again", file, folder.parent)
    if base.is_dir() and encoder.get("model_type") == "clip_text_model":
        clip_tokenizer.require_fit(base, folder, int(encoder["vocab_size"]))


def _max_tokens(tokenizer: Path | None, text: dict[str, Any]) -> int:
    # A tokenizer without a configuration has the limit 1e30; the text encoder's positions are the real limit.
    positions = int(text.get("max_position_embeddings", 77))
    if tokenizer is None:
        return positions
    config = tokenizer / "tokenizer_config.json"
    limit = weight_files.read_json(config).get("model_max_length", positions) if config.is_file() else positions
    return int(min(limit, positions))


_CHECKS = hub.Checks(_check_configs, ldm.check_header)
