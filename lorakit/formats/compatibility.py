"""Predict which modules of an adapter file each program reads, drops or misreads.

The rules are data. Rules about names are in the families' `Reads`: patterns that are not derived from lorakit's key
tables, so that they reveal mistakes in those. All other rules are in `facts.consumers`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.config import ADAPTER_SECTIONS
from lorakit.config.option import suggest
from lorakit.core import foreign_json, registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join
from lorakit.core.registry import FORMATS
from lorakit.families.spec import Reads
from lorakit.formats.facts.consumers import BIAS, CONSUMERS, DORA_ROWS, Consumer
from lorakit.formats.identify import GLORA, PARTS, UNKNOWN, Module, Shapes, is_older_glora, modules
from lorakit.formats.keys import canonical_part, is_norm, kernel
from lorakit.formats.metadata import rank_stabilized

_SGM_STARTS = ("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks")
_BLOCK_STARTS = ("lora_unet_down_blocks", "lora_unet_mid_block", "lora_unet_up_blocks")
# Modules that are 1x1 convolutions in every UNet, and in some UNets.
_POINTWISE, _PROJECTIONS = ("_conv_shortcut", "_skip_connection"), ("_proj_in", "_proj_out")
# One of q, k and v, which some programs fuse into one layer in this order: OpenCLIP's in_proj, Stable Diffusion 3's
# qkv.
_FUSED = re.compile(r"(.*[._](?:self_attn_|attn2?[._](?:to_|add_)))([qkv])((?:_proj)?)")
_NAMED_FACTOR = re.compile(r"\.lora_[AB]\.(?!weight$|bias$)[^.]+\.weight$")


@dataclass(frozen=True)
class Reading:
    """The result of one program that reads one file.

    Attributes:
        counts: component -> (modules read correctly, modules in the file).
        unmatched: names that no rule matches.
        wrong: module name -> how the program misreads it.
        refused: the reason why the program refuses the file, or "".
    """

    title: str
    counts: dict[str, tuple[int, int]]
    unmatched: tuple[str, ...]
    wrong: dict[str, str]
    refused: str = ""

    @property
    def complete(self) -> bool:
        """Whether every module is read correctly."""
        return not (self.refused or self.unmatched or self.wrong)

    @property
    def is_used(self) -> bool:
        """Whether at least one module is read correctly."""
        return not self.refused and any(read for read, _ in self.counts.values())

    def line(self) -> str:
        """A one-line message: counts, and the first problem."""
        counts = ", ".join(f"{part} {read}/{total}" for part, (read, total) in self.counts.items())
        if self.refused:
            return Message("refuses the file: {why}", self.refused)
        if self.unmatched and not any(read for read, _ in self.counts.values()):
            return Message("reads none of it, as it has no rule for names like {name}", self.unmatched[0])
        if self.unmatched:
            return Message("{counts}; no rule for {name}{more}", counts, self.unmatched[0], _more(self.unmatched))
        if self.wrong:
            stem, why = next(iter(self.wrong.items()))
            return Message("{counts}; {why}: {module}{more}", counts, why, stem, _more(self.wrong))
        return counts


def _more(things: Iterable[str]) -> str:
    count = len(list(things)) - 1
    return Message(" and {count} more", count) if count else ""


def has_rule(consumer: str, fmt: str, path: Path, family: str) -> bool:
    """Whether a program reads a format and has a rule for a module name of this file."""
    if consumer not in FORMATS[fmt].consumers:
        return False
    stems = modules(safetensors_header.read(path).tensors)
    return any(re.fullmatch(pattern, stem) for pattern in _reads(consumer, family).names for stem in stems)


def names(targets: Iterable[str]) -> list[str]:
    """The programs that a user named, in lower case; "all" means every one.

    Raises:
        LorakitError: a name that is not in CONSUMERS.
    """
    consumers = [target.strip().lower() for target in targets if target.strip()]
    for target in consumers:
        if target != "all" and target not in CONSUMERS:
            hint = suggest(target, [*CONSUMERS, "all"])
            raise LorakitError(
                "unknown target {target!r}: choose from {consumers}, all{hint}", target, ", ".join(CONSUMERS), hint
            )
    return list(CONSUMERS) if "all" in consumers else consumers


def read_report(
    shapes: Shapes,
    family: str,
    *,
    alphas: Mapping[str, float] | None = None,
    metadata: Mapping[str, str] | None = None,
    folder: bool = False,
) -> dict[str, Reading]:
    """The `Reading` of an adapter by each program.

    Args:
        shapes: tensor name -> shape, as in the file; for a PEFT folder, with the component as prefix.
        alphas: name of an alpha tensor -> its value, if known.
        metadata: metadata of the file.
        folder: whether it is a PEFT folder, which only PEFT reads.
    """
    by_stem = modules(shapes)
    names_of_parts = {name for module in by_stem.values() for name in module.parts.values()}
    loose = [name for name in shapes if name not in names_of_parts and not name.startswith("bundle_emb.")]
    defects = module_defects(by_stem, shapes, "lorakit.version" in (metadata or {})) | _unscaled(
        by_stem, shapes, alphas or {}, metadata or {}
    )
    module_traits = {stem: traits(module, shapes, family, alphas or {}) for stem, module in by_stem.items()}
    facts = by_stem, module_traits, loose, defects, shapes, family, alphas or {}, metadata or {}, folder
    return {key: _reading(key, *facts) for key in CONSUMERS}


def _reading(
    key: str,
    by_stem: Mapping[str, Module],
    module_traits: Mapping[str, list[str]],
    loose: list[str],
    defects: Mapping[str, str],
    shapes: Shapes,
    family: str,
    alphas: Mapping[str, float],
    metadata: Mapping[str, str],
    folder: bool,
) -> Reading:
    consumer, patterns = CONSUMERS[key], [re.compile(pattern) for pattern in _reads(key, family).names]
    matched = {
        stem for stem in by_stem if (consumer.reads_folders or not folder) and any(p.fullmatch(stem) for p in patterns)
    }
    if consumer.reads_norms and not folder:
        matched |= {
            stem for stem, m in by_stem.items() if stem.startswith("lora_") and m.canonical and is_norm(m.canonical)
        }
    own_kinds = registry.own_kinds()
    matched -= {stem for stem in matched if not _has_reader(consumer, by_stem[stem], own_kinds)}
    unmatched = [stem for stem in by_stem if stem not in matched]
    wrong = {stem: why for stem, why in defects.items() if stem in matched}
    for stem in sorted(matched - wrong.keys()):
        if whys := [consumer.misread[trait] for trait in module_traits[stem] if trait in consumer.misread]:
            wrong[stem] = whys[0]
    for stem, why in _special(key, consumer, by_stem, family, alphas, metadata).items():
        if stem in matched:
            wrong.setdefault(stem, why)
    strange = [
        name
        for stem in matched - wrong.keys()
        for name in by_stem[stem].strange_parts
        if name.removeprefix(f"{stem}.") not in consumer.parts
    ]
    unknown = [*unmatched, *loose, *strange]
    refused = _refused(key, consumer, by_stem, unknown, shapes, family, metadata) if not folder else ""
    for stem, module in by_stem.items() if not folder and not refused else ():
        if trait := next((trait for trait in module_traits[stem] if trait in consumer.refused), ""):
            what = {"bias beside": "changes a bias", "rank 0": "has rank 0"}.get(trait) or Message(
                "is {method}", module.method
            )
            refused = Message("{module} {what}; {why}", stem, what, consumer.refused[trait])
            break
    totals = Counter(_component(stem) for stem in by_stem)
    good = Counter(_component(stem) for stem in matched if stem not in wrong and not refused)
    counts = {part: (good[part], totals[part]) for part in registry.components() if part in totals}
    return Reading(consumer.title, counts, tuple(unknown), wrong, refused)


def _has_reader(consumer: Consumer, module: Module, own_kinds: Collection[str]) -> bool:
    """Whether a program has a rule for the factors of a module whose name it reads."""
    factors = [module.parts[part] for part in ("down", "up", "mid") if part in module.parts]
    if module.has_kohya_name and any(
        not re.fullmatch(consumer.factors, name.removeprefix(f"{module.stem}.")) for name in factors
    ):
        return False
    return bool(PARTS.get(module.method, "lora")) and module.method not in (*consumer.unread, *own_kinds)


def traits(module: Module, shapes: Shapes, family: str, alphas: Mapping[str, float]) -> list[str]:
    """Properties of a module that programs handle differently: its method, and unusual shapes or values."""
    parts = module.parts
    there = {part: shapes[name] for part, name in parts.items()}
    alpha = alphas.get(parts.get("alpha", ""), 0.0)
    scales, blocks = there.get("magnitude"), there.get("oft_blocks", ())
    down = there.get("down", ())
    is_older = "oft_diag" in parts or is_older_glora(*(there.get(f"{name}.weight", ()) for name in GLORA))
    method = f"older {module.method}" if is_older else module.method
    conditions = {
        method: module.is_lycoris or (scales is None and "row_magnitude" not in parts),
        DORA_ROWS: scales is not None and scales[1:2] in ((1,), ()),
        "dora": scales is not None,
        "dora vector": "row_magnitude" in parts,
        "DoRA over LyCORIS": scales is not None and module.is_lycoris,
        "bias beside": "diff_b" in parts and module.method not in ("bias", "full difference"),
        "PEFT's bias": "up_bias" in parts,
        "GLoRA with bm": "bm.weight" in parts,
        "OFT rescaled": len(blocks) == 3 and "rescale" in parts,
        "OFT with a constraint": bool(blocks) and alpha > 0,
        f"{method} on convolutions": bool(module.canonical and kernel(module.canonical, family)),
        "Tucker": not {"hada_t1", "lokr_t2"}.isdisjoint(parts),
        "rank 0": down[:1] == (0,),
        "rank 1": down[:1] == (1,),
        "alpha 0": bool(down) and alphas.get(parts.get("alpha", ""), 1.0) == 0,
        "names of an adapter": any(_NAMED_FACTOR.search(name) for name in parts.values()),
    }
    return [trait for trait, holds in conditions.items() if holds]


def _reads(key: str, family: str) -> Reads:
    return registry.version_of(family).readers.get(key, Reads(()))


def _component(stem: str) -> str:
    if stem.startswith(("lora_te2_", "text_encoder_2.", "text_encoders.clip_g")):
        return "text_encoder_2"
    return "text_encoder" if stem.startswith(("lora_te", "text_encoder")) else "unet"


def module_defects(by_stem: Mapping[str, Module], shapes: Shapes, is_own: bool = False) -> dict[str, str]:
    """Modules that no program can read correctly, and the reason."""
    result: dict[str, str] = {}
    # In lorakit's own files every module has an alpha; elsewhere a missing alpha means alpha = rank.
    some_alpha = is_own and any("alpha" in module.parts for module in by_stem.values())
    for stem, module in by_stem.items():
        if math.prod(shapes.get(module.parts.get("alpha", ""), ())) != 1:
            result[stem] = "its alpha is not one number"
            continue
        if module.method in _PAIRS:
            problem = _lycoris_defect(module, shapes)
            if problem:
                result[stem] = problem
            elif some_alpha and "alpha" not in module.parts:
                result[stem] = "its alpha is missing, so it is applied with alpha = rank"
            continue
        if (module.is_lycoris and "mid" not in module.parts) or module.method in ("bias", UNKNOWN):
            continue
        missing = [part for part in ("down", "up") if part not in module.parts]
        if missing:
            result[stem] = Message("its {missing} factor is missing", missing[0])
            continue
        down, up = shapes[module.parts["down"]], shapes[module.parts["up"]]
        if len(down) != len(up) or len(down) not in (2, 4) or down[0] != up[1] or up[2:] not in ((), (1, 1)):
            result[stem] = Message("its factors {down} and {up} do not fit together (one is transposed?)", down, up)
        elif some_alpha and "alpha" not in module.parts:
            result[stem] = "its alpha is missing, so it is applied with alpha = rank"
    return result


_PAIRS = {"loha": ("hada_w1", "hada_w2"), "lokr": ("lokr_w1", "lokr_w2")}
_SINGLE_MATRIX_SIDES = _PAIRS["lokr"]  # these may be one matrix instead of two factors


def _lycoris_defect(module: Module, shapes: Shapes) -> str:
    """The defect of a LoHa or LoKr module, or ""."""
    there = {part: shapes[name] for part, name in module.parts.items()}
    for side in _PAIRS[module.method]:
        a, b = there.get(f"{side}_a"), there.get(f"{side}_b")
        if side in _SINGLE_MATRIX_SIDES and side in there:
            continue
        if a is None or b is None:
            return (
                Message("its {side} is missing", side)
                if a is b
                else Message("its {missing} factor is missing", f"{side}_{'b' if a else 'a'}")
            )
        tucker = f"{side.replace('w', 't')}" in there
        if a[0 if tucker else 1] != b[0]:
            return Message("its factors {a} and {b} do not fit together (one is transposed?)", a, b)
    return ""


def _unscaled(
    by_stem: Mapping[str, Module], shapes: Shapes, alphas: Mapping[str, float], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Modules of a rank-stabilized adapter whose alpha / rank is not the alpha / sqrt(rank) of the run in the metadata.

    No program supports rank stabilization: without that scale in its alpha, the adapter is sqrt(rank) times too weak.
    """
    method = metadata.get("lorakit.method", "")
    if not rank_stabilized(method):
        return {}
    try:
        adapter = foreign_json.loads(metadata["lorakit.config"])["adapter"]
        scale = ADAPTER_SECTIONS[method](method=method, rank=adapter["rank"], alpha=adapter.get("alpha")).scale
    except (KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError):
        return {}
    result: dict[str, str] = {}
    for stem, module in by_stem.items():
        alpha = alphas.get(module.parts.get("alpha", _component(stem)))
        if alpha is None or "down" not in module.parts:
            continue
        applied = alpha / shapes[module.parts["down"]][0]
        if not math.isclose(applied, scale, rel_tol=1e-3):
            result[stem] = Message(
                "it is rank-stabilised and should be scaled by {scale:g}, its alpha says {applied:g}", scale, applied
            )
    return result


def _special(
    key: str,
    consumer: Consumer,
    by_stem: Mapping[str, Module],
    family: str,
    alphas: Mapping[str, float],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Modules that one program misreads because of other modules in the file, and the reason."""
    result: dict[str, str] = {}
    reads = _reads(key, family)
    for prefix in reads.complete_attention:
        layers = Counter(stem.rpartition("_self_attn_")[0] for stem in by_stem if stem.startswith(prefix))
        for stem in by_stem:
            layer, attention, _ = stem.rpartition("_self_attn_")
            if attention and stem.startswith(prefix) and layers[layer] < 4:
                result[stem] = "drops it, as not all of q, k, v and out are there"
    for stem in by_stem:
        match = _FUSED.fullmatch(stem) if stem.startswith(reads.ordered_attention) else None
        if match and any(f"{match[1]}{other}{match[3]}" not in by_stem for other in "qkv"[: "qkv".index(match[2])]):
            result[stem] = "drops it, as one of q and k before it is missing"
    scales = {} if consumer.reads_config else config_scales(metadata)
    for stem, module in by_stem.items():
        scale = scales.get(_component(stem), 1.0)
        if scale != 1 and "alpha" not in module.parts and not module.has_kohya_name:
            result[stem] = Message("ignores the alpha in its metadata, which is {scale:g} times the rank", scale)
    if consumer.common_alpha and alphas:
        result |= _minority_alphas(by_stem, alphas)
    return result


def config_scales(metadata: Mapping[str, str]) -> dict[str, float]:
    """Component -> scale in `lora_adapter_metadata`, where diffusers stores PEFT's config."""
    result: dict[str, float] = {}
    try:
        config = foreign_json.loads(metadata.get("lora_adapter_metadata", "{}"))
        for name, rank in config.items():
            part, _, option = name.partition(".")
            if option == "r":
                root = math.sqrt(rank) if config.get(f"{part}.use_rslora") else rank
                result[canonical_part(part)] = config.get(f"{part}.lora_alpha", rank) / root
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        return {}
    return result


def _minority_alphas(by_stem: Mapping[str, Module], alphas: Mapping[str, float]) -> dict[str, str]:
    """Attention and text-encoder modules whose alpha is not their component's most common one.

    diffusers looks up these exceptions under a rewritten name and applies the common alpha instead.
    """
    values = {stem: alphas.get(module.parts.get("alpha", "")) for stem, module in by_stem.items()}
    result = dict[str, str]()
    for part in {_component(stem) for stem in by_stem}:
        inside = {stem: value for stem, value in values.items() if _component(stem) == part and value is not None}
        common = Counter(inside.values()).most_common(1)
        for stem, value in inside.items():
            rewritten = part != "unet" or re.search(r"_attn[12]_to_", stem)
            if rewritten and value != common[0][0]:
                result[stem] = Message("applies alpha {common:g} instead of {value:g}", common[0][0], value)
        for stem in values if common else ():
            if _component(stem) == part and values[stem] is None and by_stem[stem].has_kohya_name:
                result[stem] = Message("applies alpha {common:g} where there is none", common[0][0])
    return result


def _refused(
    key: str,
    consumer: Consumer,
    by_stem: Mapping[str, Module],
    unknown: list[str],
    shapes: Shapes,
    family: str,
    metadata: Mapping[str, str],
) -> str:
    """The reason why a program refuses the file, or ""."""
    kohya, own_kinds = any(module.has_kohya_name for module in by_stem.values()), registry.own_kinds()
    for module in by_stem.values():
        if consumer.lone_alpha and set(module.parts) == {"alpha"}:
            return Message("{module} has an alpha and no factors", module.stem)
        if consumer.lone_alpha and module.has_kohya_name and not _has_reader(consumer, module, own_kinds):
            return Message("it does not know factors with names like {name}", module.parts.get("down", module.stem))
    if key == "invokeai":
        if not kohya:
            return "it reads kohya names only"
        if any(stem.startswith(_SGM_STARTS) for stem in by_stem) and any(s.startswith(_BLOCK_STARTS) for s in by_stem):
            return "it mixes sgm and diffusers names"
    if consumer.converts_kohya and kohya:
        if any(name.startswith("bundle_emb.") for name in shapes):
            return "embeddings are bundled in"
        if "lora_adapter_metadata" in metadata:
            return "it has kohya names and lora_adapter_metadata"
        text = [stem for stem in by_stem if stem.startswith("lora_te")]
        for prefix in {stem.partition("_text_")[0] for stem in text}:
            if not any(s.startswith(prefix) and s.endswith(("out_proj", "_mlp_fc1", "_mlp_fc2")) for s in text):
                return Message("the {prefix} part has neither out_proj nor mlp", prefix)
    if not consumer.flat_conv:
        projections = registry.version_of(family).kohya.conv_projections
        pointwise = (*_POINTWISE, *_PROJECTIONS) if projections else _POINTWISE
        for module in by_stem.values():
            down = shapes.get(module.parts.get("down", ""), ())
            if len(down) == 2 and module.has_kohya_name and module.stem.endswith(pointwise):
                return Message("{module} is a convolution whose factors are stored as matrices", module.stem)
    if consumer.converts_kohya and (without := [name for name in shapes if not re.search("lora", name)]):
        return Message("{without} has no 'lora' in its name", without[0])
    if consumer.converts_kohya and not kohya:
        magnitudes = {(_component(stem), "row_magnitude" in module.parts) for stem, module in by_stem.items()}
        several = len(magnitudes) > len({part for part, _ in magnitudes})
        return "some layers of a part have DoRA's magnitude and some have not" if several else ""
    if consumer.unknown_limit is not None:
        tensors = sum(len(by_stem[name].parts) if name in by_stem else 1 for name in unknown)
        if tensors > consumer.unknown_limit:
            return Message("tensors with names it has no rule for: {tensors}, e.g. {unknown}", tensors, unknown[0])
    return ""


# InvokeAI identifies an adapter's model on import by the widths of these modules.
_PROBED = re.compile(r"lora_unet_.*(?:_attn2_to_[kv]|time_emb_proj)$|lora_te_.*_self_attn_|.*transformer_blocks_[2-9]_")


def import_note(reading: Reading, stems: Iterable[str]) -> str:
    """A message that InvokeAI reads the layers but refuses to import the file, or ""."""
    stems = list(stems)
    both = all(
        any(stem.startswith(te) and "_self_attn_" in stem for stem in stems) for te in ("lora_te1_", "lora_te2_")
    )
    if reading.refused or not reading.is_used or both or any(_PROBED.match(stem) for stem in stems):
        return ""
    return "InvokeAI may refuse to import it, as it has no attn2 to_k or to_v that tells its model"


def predict_compatibility(method: str, fmt: str) -> dict[str, str]:
    """Before training: program -> its problem with a file of this method and format, or ""."""
    result = {}
    for key, consumer in CONSUMERS.items():
        problems = [consumer.refused.get(method), consumer.misread.get(method)]
        problems += ["does not apply it"] if method in (*consumer.unread, *registry.own_kinds()) else []
        problem = next(filter(None, problems), consumer.misread.get(f"{method} on convolutions", ""))
        result[key] = problem if key in FORMATS[fmt].consumers else Message("does not read the {fmt} format", fmt)
    return result


def warning(method: str, fmt: str) -> str | None:
    """A message, before training or an export, if a program that reads the format misreads the method, or None."""
    if len(FORMATS[fmt].consumers) == 1:
        return None  # the `check` of such a format refuses what its one program does not read
    titles: dict[str, list[str]] = {}
    for key, problem in predict_compatibility(method, fmt).items():
        if key in FORMATS[fmt].consumers:
            titles.setdefault(problem, []).append(CONSUMERS[key].title)
    good = ", ".join(titles.pop("", []))
    bad = join("; ", [Message("{name}: {problem}", ", ".join(names), problem) for problem, names in titles.items()])
    kind = {DORA_ROWS: "DoRA with a magnitude for each output row", BIAS: "a change of biases"}.get(method, method)
    line = "{method} in the {format} format is honoured by {programs}; not by {others}"
    return Message(line, kind, fmt, good or "no program", bad) if bad else None
