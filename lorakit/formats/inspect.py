"""Inspect a file: adapter or base, its model, how it was made, and which modules each program reads. No torch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit import families
from lorakit.adapters.weights import LoraLayer
from lorakit.core import foreign_json, registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join
from lorakit.core.names import is_file_name, printable, shorten
from lorakit.families import ldm
from lorakit.families.facts import noise_schedule, other_models
from lorakit.formats import compatibility, embeddings, identify, keys, metadata as meta
from lorakit.formats.compatibility import Reading
from lorakit.formats.facts import health, peft_config
from lorakit.formats.facts.strength import Places, Strength, measure

_MAX_VALUE_LENGTH = 100  # characters of a metadata value


@dataclasses.dataclass(frozen=True)
class Component:
    """One adapted component: the number of modules; ranks and alphas, the most common first, with the number of modules
    for each."""

    modules: int
    ranks: list[int]
    alphas: list[float]
    rank_counts: list[int] = dataclasses.field(default_factory=list)
    alpha_counts: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `inspect`. For files that are not adapters, at least `name`, `kind`, `description` and `bytes` are
    set."""

    name: str
    kind: str
    description: str
    bytes: int
    family: str | None = None
    family_evidence: str = ""
    only: str = ""
    format: str = ""
    method: str = ""
    dtype: str = ""
    trigger: str = ""
    components: dict[str, Component] = dataclasses.field(default_factory=dict)
    readers: dict[str, Reading] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    model: str = ""
    damage: str = ""
    defects: str = ""
    words: list[str] = dataclasses.field(default_factory=list)
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    strength: Strength = dataclasses.field(default_factory=Strength)
    notes: list[str] = dataclasses.field(default_factory=list)

    def failures(self, targets: Iterable[str]) -> list[str]:
        """One line for each named program that does not read the complete file correctly.

        Raises:
            LorakitError: an unknown target, or the file is not an adapter.
        """
        consumers = compatibility.names(targets)
        if consumers and self.damage:
            return [Message("{key}: the file is damaged: {damage}", key, self.damage) for key in consumers]
        if consumers and self.model:
            raise LorakitError(
                "{name} is {description}: lorakit does not know which programs read such", self.name, self.description
            )
        if consumers and not self.readers:
            raise LorakitError(
                "{name} is {description}: no program reads it as an adapter", self.name, self.description
            )
        return [
            Message("{key}: {why}", key, self.readers[key].line())
            for key in consumers
            if not self.readers[key].complete
        ]

    def to_json(self) -> dict[str, Any]:
        """All facts, as plain tables."""
        table = dataclasses.asdict(self)
        for key, reading in self.readers.items():
            table["readers"][key] |= {"complete": reading.complete, "summary": reading.line()}
        return table

    def to_text(self) -> str:
        """All facts, as text."""
        trigger, noun = health.trigger_and_class(self.trigger, self.metadata)
        title = self.model or (registry.version_of(self.family).title if self.family else "")
        rows = [f"{self.name}: {self.description}, {self.bytes / 2**20:.1f} MiB"]
        facts = {
            "for": self._fitting_base(title),
            "in prompts": self._typed(),
            "healthy": self._health(),
            "note": join("; ", self.notes),
            "trained": health.history(self.metadata) if self.kind == "adapter" else "",
            "format": f"{self.format}, {self.dtype}" if self.format else "",
            "method": self.method,
            "trigger": trigger,
            "class": noun,
            "hashes": ", ".join(f"{name} {value}" for name, value in self.hashes.items()),
        }
        for part, component in self.components.items():
            ranks = _counted(component.ranks, component.rank_counts)
            alphas = _counted(component.alphas, component.alpha_counts) or ("= rank" if ranks else "")
            values = [f"rank {ranks}" if ranks else "", f"alpha {alphas}" if alphas else ""]
            facts[part] = "; ".join(filter(None, (f"{component.modules} modules", *values)))
        rows += [f"  {name:<15} {text}" for name, text in facts.items() if text]
        if self.strength.modules:
            rows += ["size of the change of each block (norm of delta W):", *self.strength.lines()]
        if self.damage:
            rows.append("no program can use it")
        elif self.readers:
            rows.append(f"who reads it{', on that base only' if self.only else ''}, and how many modules:")
            for reading in self.readers.values():
                rows.append(f"  {'yes' if reading.complete else 'NO ':<4}{reading.title:<21} {reading.line()}")
        if self.metadata:
            rows.append("metadata:")
            rows += [f"  {key} = {_shortened(value)}" for key, value in sorted(self.metadata.items())]
        return "\n".join(rows)

    def _fitting_base(self, title: str) -> str:
        """The bases that it fits."""
        evidence = Message("evidence: {evidence}", self.family_evidence)
        if self.only:
            return Message("{only}; its names are those of {title} ({evidence})", self.only, title, evidence)
        return Message("{title} ({evidence})", title, evidence) if title else ""

    def _typed(self) -> str:
        """The text to type into a program to use an adapter."""
        if self.kind != "adapter":
            return ""
        words = self.trigger or ", ".join(self.words) or "nothing, as far as the file tells"
        titles = {"a1111": "A1111", "forge": "Forge"}
        readers = {} if self.damage or self.only else self.readers
        programs = [title for key, title in titles.items() if key in readers and readers[key].is_used]
        return words + (f"  (<lora:{Path(self.name).stem}:1> in {' and '.join(programs)})" if programs else "")

    def _health(self) -> str:
        """A message about an adapter's values."""
        if self.kind != "adapter":
            return ""
        if self.damage or self.defects:
            return f"NO: {self.damage or self.defects}"
        odd = self.strength.health()
        return f"LOOK: {odd}" if odd else "every number is finite, none stands out"


def inspect(path: Path) -> Report:
    """Identify a `.safetensors` file, a PEFT folder or a base folder in diffusers layout.

    Raises:
        LorakitError: nothing exists there, it is another kind of file (the message names it), or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    head = safetensors_header.read(path)
    shapes = head.shapes()
    kind = identify.kind(shapes)
    size = path.stat().st_size
    if kind == "adapter" and all(name.startswith(identify.PEFT_PREFIX) for name in shapes):
        if path.name == identify.PEFT_MODEL and (path.parent / identify.PEFT_CONFIG).is_file():
            return _folder(path.parent)
        identify.require_whole(path)
    if kind != "adapter":
        return _other_file(head, kind, size)
    places = {name: (head, name) for name in shapes}
    report = _adapter(path.name, size, places, shapes, peft_config.of_header(path, head.metadata), head.metadata)
    notes = [*report.notes, *_word_notes(path, head)]
    trigger = report.trigger or str(meta.read_sidecar(path).get("activation text") or "")
    return dataclasses.replace(report, hashes=health.hashes(head), notes=notes, trigger=trigger)


def _other_file(head: safetensors_header.Header, kind: str, size: int) -> Report:
    """The report on a file that is not an adapter: a base, a part of one, or another model."""
    common: dict[str, Any] = {"dtype": _dtype([head]), "metadata": head.metadata}
    if title := other_models.model_title(head.tensors):
        text = Message("{title} model, not an adapter", other_models.with_article(title))
        return Report(head.path.name, kind, text, size, None, "names of its tensors", model=title, **common)
    description = identify.DESCRIPTIONS[kind]
    what = other_models.what_file(head)
    if kind == "unknown" and what != other_models.KINDS[kind]:
        description = _no_adapter(what)
    if kind == "embedding":
        return _embedding(head, size)
    family, by = identify.base_family(head.shapes()), "the width of the text it attends to"
    if kind == "checkpoint":
        try:
            checkpoint = ldm.read(head)
            family, by = checkpoint.family, "its keys"
            prediction = noise_schedule.name(checkpoint.prediction.type, checkpoint.prediction.zero_snr)
            line = "{description}; it predicts {kind}, {why}"
            description = Message(line, description, prediction, checkpoint.prediction.evidence)
        except LorakitError as error:  # another architecture, or an incomplete model
            common["notes"] = [Message("it cannot be trained as it is: {problem}", error)]
            if all(name.startswith(ldm.UNET) for name in head.tensors):
                description = identify.DESCRIPTIONS["unet"]
    return Report(head.path.name, kind, description, size, family, by if family else "", **common)


def _embedding(head: safetensors_header.Header, size: int) -> Report:
    """The report on a textual-inversion embedding: a word and its vectors, without layers."""
    count = next((shape[0] for shape in head.shapes().values() if len(shape) == 2), 1)
    word, description = shorten(printable(embeddings.word_of(head)), 60), identify.DESCRIPTIONS["embedding"]
    report = Report(
        head.path.name, "embedding", description, size, dtype=_dtype([head]), trigger=word, metadata=head.metadata
    )
    try:
        family = embeddings.family(head)
    except LorakitError as error:
        return dataclasses.replace(report, notes=[str(error)])
    by = "metadata" if meta.family(head.metadata) else "its width"
    notes: list[str] = [Message(WORD_FOLDER, count, head.path.stem)]
    return dataclasses.replace(report, family=family, family_evidence=by, notes=notes)


WORD_FOLDER = (
    "vectors: {count}; it goes into a program's folder of embeddings, and the word to type there is the name of the "
    "file, {word}"
)
EMBEDDING = "needs its embedding {file}, {there}"
UNKNOWN_NAMES = "{name}: an adapter for no model known here: its names are of no program known here, such as {tensor}"


def _no_adapter(what: str) -> str:
    """The message of `other_models` about a part of a model, as a description."""
    if isinstance(what, Message) and "kind" in what.values:
        return Message("{title} model, not an adapter", what.values["kind"])
    return Message("{what}, not an adapter", re.sub(r"^is |(, not a base model|: .*)$", "", what))


def _word_notes(path: Path, head: safetensors_header.Header) -> list[str]:
    """Messages about words in the file, and about words whose embeddings are separate files."""
    carried = sorted({match[1] for name in head.tensors if (match := re.match(r"bundle_emb\.(.+?)\.", name))})
    notes: list[str] = [
        Message("carries the word {word!r}, which A1111 learns from it", shorten(printable(word), 60))
        for word in carried
    ]
    for word in head.metadata.get(meta.WORDS, "").split():
        label = shorten(printable(Path(word).name), 60)
        file = embeddings.folder(path) / f"{label}.safetensors"
        there = "which is beside it" if is_file_name(word) and file.is_file() else "which is not there"
        notes += [] if word in carried else [Message(EMBEDDING, f"{file.parent.name}/{file.name}", there)]
    return notes


def _folder(path: Path) -> Report:
    """The report on a PEFT folder, a base in diffusers layout, or a folder with one adapter file."""
    parts = identify.peft_parts(path)
    if parts:
        return _peft_folder(path, parts)
    if (path / identify.PEFT_CONFIG).is_file():
        shapes = safetensors_header.read(identify.peft_weights(path)).shapes()
        return _peft_folder(path, {identify.peft_component(shapes): path})
    if (path / "model_index.json").is_file():
        return _base_folder(path)
    if (file := identify.adapter_file(path)) != path:
        return inspect(file)
    if what := other_models.what_folder(path):
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return Report(path.name, "unknown", _no_adapter(what), size)
    count = len(list(path.glob("*.safetensors")))
    holds = Message("it holds {count} .safetensors files{pickles}", count, identify.pickles(path))
    raise LorakitError("{path}: neither a PEFT folder nor a base model (no model_index.json); {holds}", path, holds)


def _peft_folder(path: Path, parts: dict[str, Path]) -> Report:
    places: dict[str, tuple[safetensors_header.Header, str]] = {}
    metadata: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    scalings: dict[str, peft_config.Scaling] = {}
    for part, folder in parts.items():
        head = safetensors_header.read(identify.peft_weights(folder))
        scalings[part] = peft_config.of_folder(folder)
        metadata |= head.metadata
        for name, full_name in identify.peft_names(part, head.tensors).items():
            shapes[full_name] = head.tensors[name].shape
            places[full_name] = head, name
    size = sum((folder / identify.PEFT_MODEL).stat().st_size for folder in parts.values())
    return _adapter(path.name, size, places, shapes, scalings, metadata, folder=True)


def _base_folder(path: Path) -> Report:
    index = _json(path / "model_index.json")
    weights = list(path.glob("*/*.safetensors"))
    unet = path / "unet" / "config.json"
    width = _json(unet).get("cross_attention_dim", 0) if unet.is_file() else 0
    spec = families.of_pipeline(str(index.get("_class_name", "")))
    version = None if spec is None else spec.version(width)
    by: str = Message("its parts; the UNet attends to text of width {width}", width)
    if spec is not None and spec.denoiser != "unet":
        by = Message("its parts: it has a {denoiser}", spec.denoiser)
    title = other_models.pipeline_title(str(index.get("_class_name", "")))
    if title:
        by = "its pipeline"
    return Report(
        path.name,
        "base",
        Message("a base model in diffusers layout ({name})", str(index.get("_class_name", "no class named"))),
        sum(file.stat().st_size for file in weights),
        None if version is None else version.name,
        "" if version is None and not title else by,
        model=title,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return foreign_json.loads_table(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise LorakitError("{path}: cannot be read as a JSON object", path) from None


def _adapter(
    name: str,
    size: int,
    places: Places,
    shapes: identify.Shapes,
    scalings: Mapping[str, peft_config.Scaling],
    metadata: dict[str, str],
    folder: bool = False,
) -> Report:
    modules = identify.modules(shapes, identify.layers_per_block(metadata))
    identify.require_shapes(modules, shapes)
    other = identify.other_model(shapes, metadata)
    names = {name for module in modules.values() if module.canonical for name in module.parts.values()}
    heads = list({head.path: head for head, _ in places.values()}.values())
    common: dict[str, Any] = {"dtype": _dtype(heads), "metadata": metadata, "damage": health.damage(heads)}
    common |= {"trigger": metadata.get("modelspec.trigger_phrase", ""), "words": health.words(metadata)}
    methods = " and ".join(_ordered(Counter(module.method for module in modules.values())))
    if other and (other[0].family is None or names != set(shapes)):
        model, by = other
        text = Message("an adapter for {title}", model.title)
        return Report(name, "adapter", text, size, model.family, by, method=methods, model=model.title, **common)
    if not modules:
        raise LorakitError(UNKNOWN_NAMES, name, next(iter(shapes)))
    family, source = identify.adapter_family(modules, shapes, metadata)
    alphas = {name: value for head in heads for name, value in safetensors_header.scalars(head, ".alpha").items()}
    for part, scaling in scalings.items():
        peft_config.require_numbers(Path(name), scaling)
        value = scaling.get("lora_alpha", scaling.get("alpha"))
        alphas |= {} if value is None else {part: float(value)}
    components, scales = _components(modules, shapes, alphas, scalings)
    defects = compatibility.module_defects(modules, shapes)
    first = next((join(": ", item) for item in defects.items()), "")
    broken = Message("broken modules: {count} of {all}, {first}", len(defects), len(modules), first)
    common |= {"defects": broken if first else ""}
    ranks = {rank for component in components.values() for rank in component.ranks}
    readers = compatibility.read_report(shapes, family, alphas=alphas, metadata=metadata, folder=folder)
    notes = health.contradictions(metadata, ranks, scales.values() or [1.0])
    notes += [*filter(None, [compatibility.import_note(readers["invokeai"], modules)]), *_part_notes(modules, shapes)]
    return Report(
        name,
        "adapter",
        identify.DESCRIPTIONS["adapter"],
        size,
        family,
        source,
        identify.only_base(modules, shapes, metadata, family),
        "PEFT folder" if folder else Counter(m.spelling for m in modules.values()).most_common(1)[0][0],
        metadata.get("lorakit.method", LoraLayer.METHOD) if methods == LoraLayer.METHOD else methods,
        components=components,
        readers=readers,
        strength=Strength() if common["damage"] else measure(modules, places, scales),
        notes=notes,
        **common,
    )


def _part_notes(modules: Mapping[str, identify.Module], shapes: identify.Shapes) -> list[str]:
    """Messages about tensors that other programs, or lorakit, do not read."""
    notes = list[str]()
    if scalars := sum("scalar" in module.parts for module in modules.values()):
        notes.append(
            Message(
                "modules with a scalar, which other programs ignore: {scalars}; lorakit export "
                "multiplies it into the factors",
                scalars,
            )
        )
    read = {name for module in modules.values() if module.canonical for name in module.parts.values()}
    read -= {name for module in modules.values() for name in module.strange_parts}
    if strange := [name for name in shapes if name not in read and not name.startswith("bundle_emb.")]:
        notes.append(
            Message(
                "lorakit does not read {count} of its tensors, e.g. {strange}",
                len(strange),
                shorten(printable(strange[0]), 120),
            )
        )
    return notes


def _components(
    modules: Mapping[str, identify.Module],
    shapes: identify.Shapes,
    alphas: Mapping[str, float],
    scalings: Mapping[str, peft_config.Scaling],
) -> tuple[dict[str, Component], dict[str, float]]:
    """Component -> its ranks and alphas; and module name -> alpha / rank."""
    components, scales = dict[str, Component](), dict[str, float]()
    for part in registry.components():
        inside = [module for module in modules.values() if _part(module) == part]
        ranks, values = Counter[float](), Counter[float]()
        for module in inside:
            rank, alpha = identify.rank(module, shapes), alphas.get(module.parts.get("alpha", ""))
            own, divisor = scalings.get(part, {}), rank
            if alpha is None and part in alphas:
                divisor = rank or int(own.get("r") or 1)  # PEFT divides a LoKr of two whole matrices too
                scale = peft_config.alpha(str(module.canonical), divisor, own) / divisor
                alpha = scale * divisor / (math.sqrt(divisor) if own.get("use_rslora") else 1.0)
                scales[module.stem] = scale
            ranks.update([] if rank is None else [rank])
            values.update([] if alpha is None else [alpha])
            scales.setdefault(module.stem, alpha / rank if alpha is not None and rank else 1.0)
        if inside:
            counts = [[n for _, n in counter.most_common()] for counter in (ranks, values)]
            components[part] = Component(len(inside), _ordered(ranks), _ordered(values), *counts)
    return components, scales


def _part(module: identify.Module) -> str:
    if module.canonical:
        return keys.component(module.canonical)
    first = module.stem.partition(".")[0]
    return (
        "unet"
        if "unet" in module.stem or first in registry.denoisers()
        else "text_encoder_2"
        if "te2" in module.stem
        else "text_encoder"
    )


def _ordered(counts: Counter[Any]) -> list[Any]:
    return [value for value, _ in counts.most_common()]


def _dtype(heads: list[safetensors_header.Header]) -> str:
    """The dtype of most of the data."""
    sizes: Counter[str] = Counter()
    for head in heads:
        for info in head.tensors.values():
            sizes[info.dtype] += info.end - info.start
    return sizes.most_common(1)[0][0] if sizes else ""


def _counted(values: Iterable[float], counts: Sequence[int]) -> str:
    """The values, with the number of modules for each if there are several."""
    pairs = zip(values, counts, strict=True)
    return ", ".join(f"{value:g} in {count}" if len(counts) > 1 else f"{value:g}" for value, count in pairs)


def _shortened(value: str) -> str:
    text = " ".join(str(value).split())
    short = shorten(text, _MAX_VALUE_LENGTH)
    return short if short == text else f"{short} ({len(text)} characters)"
