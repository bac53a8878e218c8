"""Names of layers: canonical names (see `lorakit.adapters.weights`) to and from names in kohya files.

The tables are explicit and the grammar is closed: names that are not in them are refused. No name comes from
`named_modules()`, which changes with the installed transformers. kohya files name the UNet of SD1 and SD2 after
diffusers' blocks and that of SDXL after sgm's: every program reads this combination. Sources: kohya-ss/sd-scripts
networks/lora.py (prefixes, classes) and library/sdxl_model_util.py (block map).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorakit.core import registry
from lorakit.core.errors import LorakitError

UNET_PREFIX, ONETRAINER_PREFIX = "lora_unet_", "lora_transformer_"
DEFAULT_LAYERS_PER_BLOCK = 2
POINTWISE = (1, 1)

# Leaves of each kind of block: diffusers' dotted name -> sgm's name in kohya files; `*` is a transformer's number.
_TRANSFORMER = [
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2"),
]
_ATTENTION = ["proj_in", "proj_out", *(f"transformer_blocks.*.{leaf}" for leaf in _TRANSFORMER)]
LEAVES: dict[str, dict[str, str]] = {
    "attentions": {leaf: leaf.replace(".", "_") for leaf in _ATTENTION},
    "resnets": {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
    "upsamplers": {"conv": "conv"},
}
# Norms, which LyCORIS and ComfyUI's nodes train; lorakit reads and writes them.
LEAVES["attentions"] |= {"norm": "norm"}
LEAVES["attentions"] |= {f"transformer_blocks.*.norm{n}": f"transformer_blocks_*_norm{n}" for n in (1, 2, 3)}
LEAVES["resnets"] |= {"norm1": "in_layers_0", "norm2": "out_layers_0"}
# Layers outside the blocks: half of the programs drop them. lorakit reads and writes them, but does not train them.
TOP: dict[str, str] = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "conv_norm_out": "out_0",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
TEXT_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
TEXT_LEAVES = (*TEXT_ATTENTION, "mlp.fc1", "mlp.fc2")
TEXT_NORMS = ("layer_norm1", "layer_norm2")
TEXT_TOP = ("text_projection", "text_model.final_layer_norm")

_KINDS = "|".join(LEAVES)
_DOTTED = re.compile(rf"(?:(down|up)_blocks\.(\d+)|mid_block)\.({_KINDS})\.(\d+)\.(.+)")
_UNDERSCORED = re.compile(rf"(?:(down|up)_blocks_(\d+)|mid_block)_({_KINDS})_(\d+)_(.+)")
_SGM = re.compile(r"(?:(input|output)_blocks_(\d+)|middle_block)_(\d+)_(.+)")
_TRANSFORMER_NUMBER = re.compile(r"(?<=^transformer_blocks[._])\d+")
_TEXT = re.compile(r"(text_encoder|text_encoder_2)\.text_model\.encoder\.layers\.(\d+)\.(.+)")
_TEXT_UNDERSCORED = re.compile(r"(lora_te[12]?_)(?:text_model_)?encoder_layers_(\d+)_(.+)")


_BLOCK_NUMBER = re.compile(r"(?<=blocks[._])\d+")
_TEXT_PREFIXES = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


@dataclass(frozen=True)
class Place:
    """The position of a UNet layer: `side` is down, mid or up; `block`, `kind`, `index` and `leaf` are diffusers'."""

    side: str
    block: int
    kind: str
    index: int
    leaf: str

    def dotted(self) -> str:
        """The canonical name, without the component."""
        block = "mid_block" if self.side == "mid" else f"{self.side}_blocks.{self.block}"
        return f"{block}.{self.kind}.{self.index}.{self.leaf}"

    def sgm(self, layers_per_block: int, attention_ups: set[int]) -> str:
        """sgm's name, for down blocks with `layers_per_block` resnets and up blocks with one more.

        `attention_ups` are the up blocks with attention (empty: unknown, so all). In these the upsampler is the third
        module, in others the second.
        """
        row = layers_per_block + 1
        leaf = _translated(self.leaf, LEAVES[self.kind])
        slot = int(self.kind == "attentions")
        if self.kind == "downsamplers":
            return f"input_blocks_{row * (self.block + 1)}_0_{leaf}"
        if self.kind == "upsamplers":
            slot = 2 if self.block in attention_ups or not attention_ups else 1
            return f"output_blocks_{row * self.block + layers_per_block}_{slot}_{leaf}"
        if self.side == "mid":
            return f"middle_block_{2 * self.index + slot}_{leaf}"
        if self.side == "down":
            return f"input_blocks_{1 + row * self.block + self.index}_{slot}_{leaf}"
        return f"output_blocks_{row * self.block + self.index}_{slot}_{leaf}"


def _translated(leaf: str, table: Mapping[str, str]) -> str:
    """The leaf in the table's other spelling, or "" if it is not in the table."""
    number = _TRANSFORMER_NUMBER.search(leaf)
    template = table.get(_TRANSFORMER_NUMBER.sub("*", leaf), "")
    return template.replace("*", number.group()) if number else template


def _place(side: str | None, block: str | None, kind: str, index: str, leaf: str) -> Place | None:
    """A Place from a match's groups, or None if UNets have no such leaf or block."""
    sampler_side = {"downsamplers": "down", "upsamplers": "up"}.get(kind)
    if not leaf or (sampler_side and (side != sampler_side or index != "0")):
        return None
    return Place(side or "mid", int(block or 0), kind, int(index), leaf)


def _from_dotted(path: str) -> Place | None:
    match = _DOTTED.fullmatch(path)
    if not match:
        return None
    side, block, kind, index, leaf = match.groups()
    return _place(side, block, kind, index, leaf if _translated(leaf, LEAVES[kind]) else "")


def _from_underscored(text: str) -> Place | None:
    match = _UNDERSCORED.fullmatch(text)
    if not match:
        return None
    side, block, kind, index, leaf = match.groups()
    back = {dotted.replace(".", "_"): dotted for dotted in LEAVES[kind]}
    return _place(side, block, kind, index, _translated(leaf, back))


def _from_sgm(text: str, layers_per_block: int) -> Place | None:
    match = _SGM.fullmatch(text)
    if not match:
        return None
    end, number, slot, leaf = match.groups()
    row = layers_per_block + 1
    if end is None:
        side, (index, attention) = "mid", divmod(int(slot), 2)
        block = 0
    elif end == "input":
        side = "down"
        block, index = divmod(int(number) - 1, row)
        if index == layers_per_block:
            return Place("down", block, "downsamplers", 0, "conv") if (slot, leaf) == ("0", "op") else None
        attention = int(slot)
    else:
        side = "up"
        block, index = divmod(int(number), row)
        if leaf == "conv" and index == layers_per_block and slot in "12":
            return Place("up", block, "upsamplers", 0, "conv")
        attention = int(slot)
    if attention > 1 or block < 0:
        return None
    kind = "attentions" if attention else "resnets"
    back = {sgm: dotted for dotted, sgm in LEAVES[kind].items()}
    dotted = _translated(leaf, back)
    return Place(side, block, kind, index, dotted) if dotted else None


def component(name: str) -> str:
    """The component of a canonical name: the text before its first dot."""
    return name.partition(".")[0]


def is_canonical(name: str) -> bool:
    """Whether `name` is a canonical name in these tables, whether or not every program reads it."""
    part, _, path = name.partition(".")
    if part == "unet":
        return is_read_everywhere(name) or path in TOP or _from_dotted(path) is not None
    match = _TEXT.fullmatch(name)
    is_leaf = match is not None and match[3] in TEXT_LEAVES + TEXT_NORMS
    return part in registry.components() and (path in TEXT_TOP or is_leaf)


def is_norm(name: str) -> bool:
    """Whether a canonical name is that of a norm."""
    return "norm" in name.rpartition(".")[2] or name.endswith("conv_norm_out")


def is_read_everywhere(name: str) -> bool:
    """Whether every program reads this layer: attention blocks, resnets, samplers, and CLIP's attention and MLP."""
    part, _, path = name.partition(".")
    if part == "unet":
        return (_from_dotted(path) is not None and not is_norm(name)) or family_of_layer(name) is not None
    match = _TEXT.fullmatch(name)
    return match is not None and match.group(3) in TEXT_LEAVES


def family_of_layer(name: str) -> str | None:
    """The version whose adapters have this layer, if the denoiser is not a UNet; else None."""
    part, _, path = name.partition(".")
    for spec in registry.FAMILIES.values() if part == "unet" else ():
        if spec.block_layers is not None and spec.block_layers.fullmatch(path):
            return spec.versions[0].name
    return None


def _numbered(text: str, table: Mapping[str, str]) -> str | None:
    """Look up a name in a table with `*` for the block's number; None if it is not there."""
    number = _BLOCK_NUMBER.search(text)
    name = table.get(_BLOCK_NUMBER.sub("*", text, count=1))
    return name.replace("*", number[0]) if name and number else name


def fused_parts(name: str, family: str) -> tuple[str, ...]:
    """The canonical names of the layers that files fuse into the layer `name`; () if it is not such a layer."""
    path, number = name.removeprefix("unet."), _BLOCK_NUMBER.search(name)
    parts = registry.version_of(family).kohya.fused.get(_BLOCK_NUMBER.sub("*", path, count=1), ())
    return tuple(f"unet.{part.replace('*', number[0])}" for part in parts) if number else ()


def fused_name(name: str, family: str) -> str | None:
    """The canonical name of the fused layer in files that contains this layer, or None."""
    fused = registry.version_of(family).kohya.fused
    whole = _numbered(name.removeprefix("unet."), {part: whole for whole, parts in fused.items() for part in parts})
    return f"unet.{whole}" if whole else None


def is_swapped(name: str, family: str) -> bool:
    """Whether files may have the halves of this layer's rows exchanged."""
    return name.endswith(registry.version_of(family).kohya.swapped or ("//",))


def _from_denoiser(text: str) -> str | None:
    """The canonical name, without "unet.", of a layer of a denoiser that is not a UNet.

    `text` is the file's name, or diffusers' name with underscores, as in OneTrainer and SimpleTuner.
    """
    for _, version in registry.versions().values():
        names = {theirs: ours for ours, theirs in version.kohya.denoiser.items()}
        ours = (*version.kohya.denoiser, *(part for parts in version.kohya.fused.values() for part in parts))
        names |= {name.replace(".", "_"): name for name in ours}
        if result := _numbered(text, names):
            return result
    return None


def to_diffusers_name(name: str, family: str) -> str:
    """The name of a layer, or of a component, in diffusers and PEFT."""
    part, dot, path = name.partition(".")
    return (registry.family_of(family).denoiser if part == "unet" else part) + dot + path


def canonical_part(name: str) -> str:
    """The canonical component of a diffusers name: "unet" for "transformer"."""
    return "unet" if name in registry.denoisers() else name


def group(name: str) -> str:
    """The kind of a layer: "attention", "conv", "text", "top", or "unknown"."""
    part, _, path = name.partition(".")
    if part != "unet":
        return "text" if is_read_everywhere(name) else "top" if is_canonical(name) else "unknown"
    if family_of_layer(name) is not None:
        return "attention"
    place = _from_dotted(path)
    if place is None:
        return "top" if path in TOP else "unknown"
    return "attention" if place.kind == "attentions" else "conv"


def kernel(name: str, family: str) -> tuple[int, ...]:
    """The kernel size of a convolution in released models; () for a linear layer."""
    place = _from_dotted(name.removeprefix("unet.")) if name.startswith("unet.") else None
    if place is None or place.leaf == "time_emb_proj" or is_norm(name):
        return ()
    if place.leaf in ("proj_in", "proj_out"):
        return POINTWISE if registry.version_of(family).kohya.conv_projections else ()
    if place.kind == "attentions":
        return ()
    return POINTWISE if place.leaf == "conv_shortcut" else (3, 3)


def require_canonical(names: Iterable[str]) -> None:
    """Raise LorakitError for the first layer that is not in the tables."""
    if strange := [name for name in names if not is_canonical(name)]:
        raise LorakitError("layer {strange} cannot be exported: no program has a name for it", strange[0])


def layers_per_block(names: Iterable[str]) -> int:
    """The number of resnets in a down block, from canonical names; 2, as in every released model, if unclear.

    Up blocks have one more resnet, so the highest indices in down blocks and up blocks must agree.
    """
    highest = {"down": -1, "up": -1}
    for name in names:
        place = _from_dotted(name.removeprefix("unet."))
        if place and place.kind in ("attentions", "resnets") and place.side in highest:
            highest[place.side] = max(highest[place.side], place.index)
    agreed = highest["down"] >= 0 and highest["down"] + 1 == highest["up"]
    return highest["up"] if agreed else DEFAULT_LAYERS_PER_BLOCK


def to_kohya_name(names: Iterable[str], family: str, layers: int | None = None) -> dict[str, str]:
    """Canonical name -> name in kohya files (the prefix of `.lora_down.weight`), in the given order.

    Args:
        family: version of the family, such as "sd1".
        layers: layers per block, for sgm names; None: derived from the names.

    Raises:
        LorakitError: a name is not in the tables, or the family lacks the component.
    """
    names = list(names)
    spelling = registry.version_of(family).kohya
    layers = layers_per_block(names) if layers is None else layers
    places = {name: _from_dotted(name.removeprefix("unet.")) for name in names if name.startswith("unet.")}
    attention_ups = {p.block for p in places.values() if p and p.side == "up" and p.kind == "attentions"}
    result = {}
    for name in names:
        part, _, path = name.partition(".")
        place = places.get(name)
        prefix = spelling.text.get(part)
        if place:
            blocks = place.sgm(layers, attention_ups) if spelling.sgm else path.replace(".", "_")
            result[name] = UNET_PREFIX + blocks
        elif part == "unet" and (theirs := _numbered(path, spelling.denoiser)):
            result[name] = UNET_PREFIX + theirs
        elif part == "unet" and path in TOP:
            result[name] = UNET_PREFIX + (TOP[path] if spelling.sgm else path.replace(".", "_"))
        elif prefix and is_canonical(name):
            result[name] = prefix + path.replace(".", "_")
        else:
            raise LorakitError("layer {name} is not one that a {family} adapter can have", name, family)
    return result


def from_kohya(stem: str, layers: int = DEFAULT_LAYERS_PER_BLOCK) -> str | None:
    """The canonical name of a kohya module name with diffusers' or sgm's block names, or None.

    Text-encoder names without `text_model_`, which converters with transformers 5.6 or later write, are accepted.
    """
    if stem.startswith((UNET_PREFIX, ONETRAINER_PREFIX)):
        text = stem.removeprefix(UNET_PREFIX).removeprefix(ONETRAINER_PREFIX)
        if denoiser := _from_denoiser(text):
            return f"unet.{denoiser}"
        place = _from_underscored(text) or _from_sgm(text, layers)
        if place:
            return f"unet.{place.dotted()}"
        tops = {dotted.replace(".", "_"): dotted for dotted in TOP} | {sgm: dotted for dotted, sgm in TOP.items()}
        return f"unet.{tops[text]}" if text in tops else None
    for prefix, part in _TEXT_PREFIXES.items():
        for path in TEXT_TOP:
            if stem == prefix + path.replace(".", "_"):
                return f"{part}.{path}"
    match = _TEXT_UNDERSCORED.fullmatch(stem)
    leaves = {leaf.replace(".", "_"): leaf for leaf in TEXT_LEAVES + TEXT_NORMS}
    if not match or match.group(3) not in leaves:
        return None
    prefix, number, leaf = match.groups()
    return f"{_TEXT_PREFIXES[prefix]}.text_model.encoder.layers.{number}.{leaves[leaf]}"


def text_attention_siblings(name: str) -> list[str]:
    """The q, k, v and out projections of a text-encoder attention layer; [] for any other layer."""
    match = _TEXT.fullmatch(name)
    if not match or match.group(3) not in TEXT_ATTENTION:
        return []
    stem = name.removesuffix(match.group(3))
    return [stem + leaf for leaf in TEXT_ATTENTION]
