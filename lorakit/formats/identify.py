"""Identify an adapter file by its tensor names and shapes and its metadata. No torch.

`modules` parses an adapter's tensor names in every known spelling.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.core import registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical
from lorakit.core.messages import Message
from lorakit.core.names import printable, quote
from lorakit.core.registry import FORMATS
from lorakit.families.describe import BUNDLED
from lorakit.formats import keys, metadata as meta
from lorakit.formats.facts import models
from lorakit.formats.spec import Spelling

Shapes = Mapping[str, tuple[int, ...]]

# spelling -> (pattern of a tensor's name with groups for module and part; part in the file -> part of a LoraLayer).
# COMPONENT stands for the names of all families' components. _FACTORS are the factor names that ComfyUI accepts after
# any module name.
_FACTORS = {
    **dict.fromkeys(("lora_down.weight", "lora_A.weight", "lora_A", "lora_A.default.weight"), "down"),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight", "lora_B", "lora_B.default.weight"), "up"),
    **{f"{name}.{side}.weight": side for name in ("lora", "lora_linear_layer") for side in ("down", "up")},
    **{
        "oft_R.weight": "oft_R",
        "oft_R.scaled_oft": "scaled_oft",
        "lora_mid.weight": "mid",
        "alpha": "alpha",
        "dora_scale": "magnitude",
        "lora_B.bias": "up_bias",
    },
}
_SPELLINGS: dict[str, tuple[str, dict[str, str]]] = {
    "kohya": (r"((?:lora_(?:unet|transformer|te\d?)|oft_unet|lycoris)_[^.]+)\.(.+)", _FACTORS),
    "peft": (
        r"(COMPONENT\..+?)\.(lora_A|lora_B\.bias|lora_B|lora_magnitude_vector|hada_\w+|lokr_\w+"
        r"|b?oft_[Rrs]|ia3_l)"
        r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?",
        {"lora_A": "down", "lora_B": "up", "lora_B.bias": "up_bias", "lora_magnitude_vector": "row_magnitude"},
    ),
    "diffusers": (
        r"(COMPONENT\..+?)\.(?:lora|lora_linear_layer)\.(down|up)\.weight",
        {"down": "down", "up": "up"},
    ),
    "diffusers-old": (
        r"((?:COMPONENT)\..+?\.to_(?:q|k|v|out)_lora)\.(down|up)\.weight",
        {"down": "down", "up": "up"},
    ),
    "dotted": (
        r"((?:diffusion_model|text_encoders|COMPONENT)\..+?)\.(DOTTED)",
        _FACTORS,
    ),
}
# Suffixes of adapter tensors, for any model.
_ADAPTER_PART = re.compile(
    r"\.(?:lora_(?:down|up|mid|A|B)\b.*|lora_magnitude_vector\b.*|(?:hada|lokr|oft)_\w+|[wb]_norm|diff|diff_b|on_input"
    r"|ia3_l|boft_[Rs]|oft_R\.\w+"
    r"|dora_scale|[ab][12]\.weight|(?:lora|lora_linear_layer)\.(?:down|up)\.weight)$|_lora\d?\.(?:down|up)\.weight$"
)
# Part names of ComfyUI, OneTrainer and LyCORIS after dotted module names.
_DOTTED_PARTS = (
    r"scalar|lora_(?:down|up|mid)\.weight|lora_[AB](?:\.default)?(?:\.weight)?|lora_B\.bias|lora(?:_linear_layer)?\.(?:down|up)"
    r"\.weight|alpha|dora_scale|diff|diff_b|[wb]_norm|oft_(?:blocks|diag)|oft_R\.\w+|rescale"
    r"|(?:hada|lokr)_\w+|[ab][12m]\.weight"
)
_SEVERAL = re.compile(
    r"transformer_blocks[._][1-9]|up_blocks[._]0[._]attentions|^lora_unet_(?:input|middle|output)_block"
)
_SHALLOW = re.compile(r"input_blocks[._][12][._]1|down_blocks[._]0[._]attentions")  # attention that SDXL lacks
_BLOCKS = ("down_blocks", "mid_block", "up_blocks")  # start of a UNet's names without its prefix
# Prefixes of LyCORIS and of sd-scripts' OFT, instead of kohya's `lora_unet_`.
_UNET_STEM = re.compile(r"^(?:lycoris|oft_unet)_")
# Text encoder of a ComfyUI checkpoint -> ours.
_COMFY_TEXT = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
_OLD_UNET = re.compile(r"(unet\..+)\.processor\.to_(q|k|v|out)_lora")
_OLD_TEXT = re.compile(r"(text_encoder.*)\.self_attn\.to_(q|k|v|out)_lora")
# Part -> method of a module that has it; the first match counts. PARTS below has the allowed parts of each method: a
# file with other parts is refused, not read in part.
_MARKS = {"hada_w1_a": "loha", "hada_w1_b": "loha", "lokr_w1": "lokr", "lokr_w1_a": "lokr", "lokr_w2": "lokr"}
_MARKS |= {"lokr_w2_a": "lokr", "mid": "LoCon (tucker)", "diff": "full difference", "w_norm": "norm"}
_MARKS |= {"on_input": "IA3", "oft_blocks": "OFT", "a1.weight": "GLoRA", "ia3_l": "IA3"}
_MARKS |= {"lambda_layer": "T-LoRA"}  # LyCORIS'; its rank changes with the timestep, so it is no change of weights
_MARKS |= {"oft_diag": "OFT", "oft_R": "OFTv2", "oft_r": "PEFT's older OFT", "boft_R": "PEFT's BOFT"}
# Part -> minimum number of axes, if not 0.
_AXES = dict.fromkeys(("down", "up", "mid", "oft_blocks", *(f"{part}.weight" for part in ("a1", "a2", "b1", "b2"))), 2)
_AXES |= {"oft_R": 2, "oft_r": 3, "oft_diag": 3, "boft_R": 4}
_AXES |= dict.fromkeys(("ia3_l", "boft_s", "diff", "diff_b", "w_norm", "b_norm", "magnitude", "row_magnitude"), 1)
_COMMON = {"alpha", "magnitude", "row_magnitude", "diff_b", "b_norm", "up_bias"}
UNKNOWN = "unknown"  # method of unknown parts
# Method -> its parts; empty if lorakit does not read it.
PARTS: dict[str, set[str]] = {
    UNKNOWN: set(),
    "T-LoRA": set(),
    "lora": {"down", "up", "scalar"},
    "LoCon (tucker)": {"down", "up", "mid", "scalar"},
    "loha": {f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")} | {"scalar"},
    "lokr": {f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")} | {"scalar"},
    "full difference": {"diff"},
    "norm": {"w_norm"},
    "IA3": {"weight", "on_input", "ia3_l"},
    "OFT": {"oft_blocks", "oft_diag", "rescale"},
    "GLoRA": {f"{part}.weight" for part in ("a1", "a2", "b1", "b2", "bm")},
    "OFTv2": {"oft_R", "scaled_oft"},
    "PEFT's older OFT": {"oft_r", "oft_s"},
    "PEFT's BOFT": {"boft_R", "boft_s"},
}


def _marks() -> dict[str, str]:
    """`_MARKS`, and the parts of layers from methods of the registry."""
    return _MARKS | {part: kind for kind, spec in registry.own_kinds().items() for part in spec.factors}


GLORA = ("a1", "a2", "b1", "b2")
# The file names of a PEFT folder, and the prefix of every module path in it.
PEFT_CONFIG, PEFT_MODEL, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


@dataclass(frozen=True)
class Module:
    """One adapted module of a file.

    Attributes:
        stem: the module's name in the file.
        spelling: "kohya", "peft", "diffusers" or "diffusers-old".
        canonical: the canonical name, or None if no such layer exists.
        parts: "down", "up", "alpha", "magnitude", or the file's own name of another part -> tensor name.
    """

    stem: str
    spelling: str
    canonical: str | None
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def has_kohya_name(self) -> bool:
        """Whether the stem is a kohya name: underscores instead of dots."""
        return self.spelling == "kohya"

    @property
    def is_peft(self) -> bool:
        """Whether the parts have PEFT's names."""
        return self.spelling == "peft"

    @property
    def is_lycoris(self) -> bool:
        """Whether it is something other than a pair of factors (with or without a magnitude)."""
        return not _marks().keys().isdisjoint(self.parts)

    @functools.cached_property
    def method(self) -> str:
        """ "dora", "bias", one of `PARTS`, or a kind of layers that a method of the registry brings."""
        for part, name in _marks().items():
            if part in self.parts:
                return name
        if self.parts and self.parts.keys() <= {"diff_b", "b_norm"}:
            return "bias"
        if not self.parts.keys() <= _COMMON and {"down", "up"}.isdisjoint(self.parts):
            return UNKNOWN
        return "dora" if {"magnitude", "row_magnitude"} & set(self.parts) else "lora"

    @functools.cached_property
    def strange_parts(self) -> list[str]:
        """The names of tensors that modules of this method do not have."""
        own = registry.own_kinds().get(self.method)
        parts = (set(own.factors) if own else PARTS.get(self.method, PARTS["lora"])) | _COMMON
        return [name for part, name in self.parts.items() if part not in parts]


def kind(shapes: Shapes) -> str:
    """As `safetensors_header.kind`, but "adapter" if a format's own spelling matches, or if a third of the names end
    like adapter parts."""
    if safetensors_header.kind(dict(shapes)) == "ip-adapter":
        return "ip-adapter"
    own = tuple(f".{part}" for spec in registry.own_kinds().values() for part in spec.factors)
    parts = sum(_ADAPTER_PART.search(name) is not None or name.endswith(own) for name in shapes)
    if 3 * parts >= max(1, len(shapes)):
        return "adapter"
    file_kind = safetensors_header.kind(dict(shapes)).replace("lycoris", "adapter")
    patterns = [spelling.pattern for spelling in _other_spellings().values()]
    return "adapter" if any(pattern.fullmatch(name) for pattern in patterns for name in shapes) else file_kind


def _other_spellings() -> dict[str, Spelling]:
    """Format -> spelling, for spellings that are not in `_SPELLINGS`."""
    return {name: spec.spelling for name, spec in FORMATS.items() if spec.spelling is not None}


def modules(names: Iterable[str], layers_per_block: int = keys.DEFAULT_LAYERS_PER_BLOCK) -> dict[str, Module]:
    """The adapted modules in a file, by stem, in the file's order; other tensors are left out."""
    result: dict[str, Module] = {}
    others = _other_spellings()
    components = "|".join(sorted(registry.denoisers() | set(registry.components()) | set(_BLOCKS)))
    spellings = {
        name: (re.compile(pattern.replace("COMPONENT", f"(?:{components})").replace("DOTTED", _DOTTED_PARTS)), parts)
        for name, (pattern, parts) in _SPELLINGS.items()
    }
    spellings |= {name: (own.pattern, dict(own.parts)) for name, own in others.items()}
    for name in names:
        for spelling, (pattern, parts) in spellings.items():
            match = pattern.fullmatch(name)
            if not match:
                continue
            stem, part = match.groups()
            if stem not in result:
                own = others.get(spelling)
                layer = own.canonical(stem) if own else _canonical(stem, spelling, layers_per_block)
                result[stem] = Module(stem, spelling, layer)
            result[stem].parts[parts.get(part, part)] = name
            break
    return result


def _canonical(stem: str, spelling: str, layers_per_block: int) -> str | None:
    if spelling == "kohya":
        own = _UNET_STEM.sub(keys.UNET_PREFIX, stem)
        return keys.from_kohya(own, layers_per_block)
    part, _, path = stem.partition(".")
    if part == "diffusion_model":
        return keys.from_kohya(keys.UNET_PREFIX + path.replace(".", "_"), layers_per_block)
    if part == "text_encoders":
        encoder, _, path = path.partition(".transformer.")
        part = _COMFY_TEXT.get(encoder, encoder)
    elif part in _BLOCKS:
        part, path = "unet", stem
        stem = f"unet.{stem}"
    name = canonical(keys.canonical_part(part), path.removeprefix(PEFT_PREFIX))
    if spelling == "diffusers-old":
        name = _OLD_UNET.sub(lambda m: f"{m[1]}.to_{m[2]}{'.0' * (m[2] == 'out')}", name)
        name = _OLD_TEXT.sub(lambda m: f"{m[1]}.self_attn.{m[2]}_proj", name)
    return name if keys.is_canonical(name) else None


def is_older_glora(*factors: tuple[int, ...]) -> bool:
    """Whether GLoRA's a1, a2, b1 and b2 have the shapes of LyCORIS before version 2, in which each pair is exchanged:
    `W a2 a1 + b2 b1`."""
    if any(len(shape) < 2 for shape in factors):
        return False
    a1, a2, b1, b2 = factors
    return a1[0] == a2[1] == b1[0] == b2[1] < a1[1]


def peft_parts(path: Path) -> dict[str, Path]:
    """Component -> its folder, for a PEFT folder; else empty."""
    folders = {name: path / name for name in (*registry.components(), *sorted(registry.denoisers() - {"unet"}))}
    return {keys.canonical_part(name): folder for name, folder in folders.items() if (folder / PEFT_CONFIG).is_file()}


def adapter_file(path: Path) -> Path:
    """The only `.safetensors` file of a folder, such as a run folder. Else the path itself: a file, a PEFT folder, or a
    folder with no or several such files."""
    if not path.is_dir() or peft_parts(path) or (path / PEFT_CONFIG).is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else path


def pickles(folder: Path) -> str:
    """A message about pickled weights in a folder, or ""."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in (".bin", ".pt", ".ckpt"))
    return (
        Message(
            ", and {names}, a pickle (convert it once: lorakit convert {folder})", names[0], quote(folder / names[0])
        )
        if names
        else ""
    )


def peft_weights(folder: Path) -> Path:
    """The file with the tensors of one component's folder.

    Raises:
        LorakitError: it is missing, or is a pickle.
    """
    path = folder / PEFT_MODEL
    pickle = path.with_suffix(".bin")
    if not path.is_file() and pickle.is_file():
        raise LorakitError(
            "{path}: its weights are a pickle; convert it once: lorakit convert {file}", pickle, quote(pickle)
        )
    if not path.is_file():
        raise LorakitError(
            "{folder}: has {peft_config} and no {peft_model}: the weights are missing", folder, PEFT_CONFIG, PEFT_MODEL
        )
    return path


def require_whole(path: Path) -> None:
    """Raise LorakitError: a lone file with PEFT's names lacks the config, and so the alpha."""
    where = "in the folder of each part" if path.name == PEFT_MODEL else Message("and call it {name}", PEFT_MODEL)
    raise LorakitError(
        "{path}: its names are PEFT's, and {peft_config}, which has its alpha, is not beside it: put the two "
        "together, {where}",
        path,
        PEFT_CONFIG,
        where,
    )


def peft_component(shapes: Shapes) -> str:
    """The component of a lone PEFT adapter: CLIP has `encoder.layers`, and SDXL's second encoder has 1280 channels."""
    text = [shape for name, shape in shapes.items() if "encoder.layers." in name and name.endswith("lora_A.weight")]
    if not text and not any("encoder.layers." in name for name in shapes):
        return "unet"
    return "text_encoder_2" if text and min(shape[-1] for shape in text) == 1280 else "text_encoder"


def peft_names(part: str, names: Iterable[str]) -> dict[str, str]:
    """Tensor name in one component's file of a PEFT folder -> the name with the component as prefix.

    A tensor may exist with and without `text_model.`, for old and new transformers. Then the one with it is used.
    """
    modules = {name: name.removeprefix(PEFT_PREFIX) for name in names}
    twice = {f"text_model.{path}" for path in modules.values()} & set(modules.values())
    return {name: f"{part}.{path}" for name, path in modules.items() if f"text_model.{path}" not in twice}


def require_shapes(by_stem: Mapping[str, Module], shapes: Shapes) -> None:
    """Raise LorakitError for the first part with too few axes, or without values although the rank is not 0."""
    for module in by_stem.values():
        axes = {part: 2 if part.startswith(("hada_", "lokr_")) else _AXES.get(part, 0) for part in module.parts}
        bad = [name for part, name in module.parts.items() if len(shapes[name]) < axes[part]]
        if not bad and rank(module, shapes) != 0:
            bad = [name for name in module.parts.values() if 0 in shapes[name]]
        if bad:
            raise LorakitError("damaged: {bad} has the shape {shapes}", printable(bad[0]), list(shapes[bad[0]]))


def rank(module: Module, shapes: Shapes) -> int | None:
    """The rank of a module's factors, or None if it has none (a LoKr can be two matrices without factors)."""
    for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in module.parts:
            return shapes[module.parts[part]][0]
    return None


def inputs(module: Module, shapes: Shapes) -> int | None:
    """The number of inputs of a module, including the kernel if the file does; None if a factor is missing."""
    there = {part: shapes[name] for part, name in module.parts.items()}
    if "down" in there or "hada_w1_b" in there:
        return there.get("down", there.get("hada_w1_b", ()))[1]
    sides = [there.get(side, there.get(f"{side}_b")) for side in ("lokr_w1", "lokr_w2")]
    return sides[0][1] * sides[1][1] if sides[0] and sides[1] else None


def layers_per_block(metadata: Mapping[str, str]) -> int:
    """The number of resnets in a down block, for sgm names: from the metadata, else 2."""
    count = metadata.get("lorakit.layers_per_block", "")
    return int(count) if re.fullmatch(r"[1-9]\d?", count) else keys.DEFAULT_LAYERS_PER_BLOCK


def other_model(shapes: Shapes, metadata: Mapping[str, str]) -> tuple[models.Model, str] | None:
    """The model of an adapter and the evidence, if it is not for a Stable Diffusion UNet; else None."""
    if metadata.get("lorakit.family") in registry.versions():
        return None
    stems = {_ADAPTER_PART.sub("", name).removesuffix(".alpha") for name in shapes}
    widths = {
        size for name, shape in shapes.items() if len(shape) == 2 and _ADAPTER_PART.search(name) for size in shape
    }
    result = models.find(stems, widths, metadata)
    tagged = meta.family(metadata)
    if result is None or tagged is None or tagged == result[0].family:
        return result
    return result[0], Message(
        "{result}; its metadata says {tagged}, which is wrong", result[1], registry.version_of(tagged).title
    )


def adapter_family(by_stem: Mapping[str, Module], shapes: Shapes, metadata: Mapping[str, str]) -> tuple[str, str]:
    """An adapter's family and the evidence: metadata, names, or the text width.

    Metadata of other programs that contradicts names and widths is ignored. Without evidence, the first family is
    returned, and the second value says so.
    """
    tagged, evidence = meta.family(metadata), _evidence(by_stem, shapes)
    if tagged and (evidence is None or evidence[0] == tagged or metadata.get("lorakit.family") == tagged):
        return tagged, "metadata"
    if evidence:
        title = registry.version_of(tagged).title if tagged else ""
        return evidence[0], evidence[1] + (
            Message("; its metadata says {title}, which is wrong", title) if title else ""
        )
    return next(iter(registry.versions())), "a guess: nothing in the file tells"


def misfit(shapes: Shapes, metadata: Mapping[str, str], family: str, layers: str) -> str | None:
    """The reason why an adapter cannot initialize one of this family and kind of layers ("lora", "loha", ...), or
    None."""
    if (other := other_model(shapes, metadata)) and other[0].family != family:
        return Message("the adapter to start from is for {theirs}, this base is {family}", other[0].title, family)
    by_stem = modules(shapes, layers_per_block(metadata))
    own, _ = adapter_family(by_stem, shapes, metadata)
    if own != family:
        return Message("the adapter to start from is for {theirs}, this base is {family}", own, family)
    trained = {spec.layers for spec in registry.METHODS.values()}
    theirs = " ".join({module.method for module in by_stem.values()})
    if theirs in trained and theirs != layers:
        return Message("the adapter to start from is {theirs}: set adapter.method = {method!r}", theirs, theirs)
    return None


def _evidence(by_stem: Mapping[str, Module], shapes: Shapes) -> tuple[str, str] | None:
    """The family from names and widths, and the evidence; None if there is none."""
    for module in by_stem.values():
        if family := keys.family_of_layer(module.canonical or ""):
            return family, "names"
    for family, (_, version) in registry.versions().items():
        if version.key_prefixes and any(stem.startswith(version.key_prefixes) for stem in by_stem):
            return family, "names"
    for module in by_stem.values():
        name = module.canonical or ""
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            width = inputs(module, shapes)
            if width in (dims := cross_dims()):
                return dims[width], Message("attends to text of width {width}", width)
    # Among the UNets only SDXL's has several transformers in a row, and attention in its first up block. sd-scripts
    # uses sgm's names only for SDXL.
    deep = next((name for name, (_, version) in registry.versions().items() if version.kohya.sgm), None)
    if deep and any(_SEVERAL.search(stem) for stem in by_stem) and not any(_SHALLOW.search(stem) for stem in by_stem):
        return deep, "names"
    return None


def only_base(by_stem: Mapping[str, Module], shapes: Shapes, metadata: Mapping[str, str], family: str) -> str:
    """The only base that an adapter fits, as text, if its layers have other widths than its family's; else ""."""
    version, ends = registry.version_of(family), ("attn2.to_k", "attn2.to_v")
    read = (inputs(module, shapes) for module in by_stem.values() if (module.canonical or "").endswith(ends))
    widths = {width for width in read if width is not None}
    if widths and version.cross_dim in (None, *widths):
        return ""
    if "lorakit.version" in metadata and metadata.get("ss_sd_model_name") == BUNDLED:
        return "lorakit's bundled base"
    of_text = Message(
        "a base that attends to text of width {width}, not {usual}", max(widths, default=0), version.cross_dim
    )
    return of_text if widths else ""


def cross_dims() -> dict[int, str]:
    """Text width of a UNet -> version of its family."""
    return {version.cross_dim: name for name, (_, version) in registry.versions().items() if version.cross_dim}


def base_family(shapes: Shapes) -> str | None:
    """The family of a checkpoint or a UNet, from its text width; None if that is missing."""
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight"):
            return cross_dims().get(shape[1])
    return None


DESCRIPTIONS = {
    "adapter": "an adapter",
    "checkpoint": "a whole model (a checkpoint), not an adapter",
    "unet": "a UNet alone, not an adapter",
    "vae": "a VAE, not an adapter",
    "text encoder": "a text encoder, not an adapter",
    "embedding": "a textual-inversion embedding, not an adapter",
    "controlnet": "a ControlNet, not an adapter",
    "numbered": "an adapter of cloneofsimo's lora, whose layers have numbers and no names: merge it into its base with "
    "that program (lora_add), then make a LoRA of the two with lorakit extract",
    "ip-adapter": "an IP-Adapter (it takes a picture as prompt), not an adapter that lorakit reads",
    "unknown": "not an adapter for Stable Diffusion",
}
