"""Models in one file, in the layout of LDM, SGM and their successors: the names of each tensor there and in diffusers.

A version's `FileLayout` has the names; this module reads and writes files with them. The same names serve both
directions. Blocks are counted, so any width and depth works. No torch, except where tensors are read. The keys that
state a file's prediction type are those that ComfyUI reads (comfy/supported_models.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core import registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.families import weight_files
from lorakit.families.facts import other_models
from lorakit.families.spec import FLOW, FileLayout, FilePart

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
# Name of a module or tensor in the file -> its name in diffusers. Several names are equal shares of the file's rows, in
# order.
Names = Mapping[str, str | tuple[str, ...]]
UNET = "model.diffusion_model."
# Tensors that diffusers' modules lack: buffers, and weights that only CLIP's own training uses.
NOT_WEIGHTS = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask)$")
# Keys that are not reported because they are common: the noise schedule, markers, projections that nothing uses.
USUAL = re.compile(
    rf"(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_\w+|posterior_\w+|logvar|scale_factor|v_pred|ztsnr"
    rf"|denoiser\..*)|.*({NOT_WEIGHTS.pattern}|(^|\.)text_projection(\.weight)?$|{weight_files.MARKS.pattern})"
)
# Prefix of the weights' moving average, which only training uses.
AVERAGE = "model_ema."
NOTHING_SAYS = "as nothing in the file says otherwise"

# One of several similar modules.
_ONE_OF_MANY = re.compile(r"((?:.*\.)?(?:resnets|attentions|transformer_blocks|block|layers)\.)\d+\.(.+)")


class Transposed(str):
    """A tensor of diffusers that is transposed in the file."""


class Pointwise(str):
    """A linear module of diffusers that is a 1x1 convolution in the file."""


class Swapped(str):
    """A module of diffusers whose rows have their halves exchanged in the file."""


@dataclass(frozen=True)
class Slot:
    """The place of one of diffusers' tensors in a file.

    Attributes:
        key: the tensor in the file; empty for an identity matrix, which is not in the file.
        shape: its shape in diffusers; the file's may have more axes of length 1.
        third: 0, 1 or 2 if it is that third of the file's rows (q, k and v in one tensor), else None.
        form: `Transposed`, `Pointwise` or `Swapped`, else str.
        scale: the tensor in the file that it is multiplied by, or None (see `weight_files`).
    """

    key: str
    shape: tuple[int, ...]
    third: int | None = None
    form: type[str] = str
    scale: str | None = None


@dataclass(frozen=True)
class Prediction:
    """A model's prediction type, the evidence for it as a message, and whether it is certain."""

    type: str
    zero_snr: bool
    evidence: str
    certain: bool


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file in this layout: component -> diffusers' tensor name -> Slot.

    Attributes:
        ignored: keys that are not part of such a model and that every program ignores.
    """

    family: str
    parts: dict[str, dict[str, Slot]]
    prediction: Prediction
    ignored: tuple[str, ...] = ()


def is_checkpoint(shapes: Shapes) -> bool:
    """Whether a file holds a model in this layout (or at least its UNet)."""
    return any(name.startswith(UNET) for name in shapes)


def layouts() -> dict[str, FileLayout]:
    """Version -> layout, for versions that have one."""
    return {name: version.layout for name, (_, version) in registry.versions().items() if version.layout is not None}


def titles() -> str:
    """The titles of bases that can be read from one file."""
    return ", ".join(version.title for _, version in registry.versions().values() if version.layout is not None)


def layout_of(family: str) -> FileLayout:
    """The layout of a version that has one."""
    layout = registry.version_of(family).layout
    assert layout is not None, family
    return layout


def read(header: safetensors_header.Header, *, vae_needed: bool = True) -> Checkpoint:
    """Assign the tensors of a file to components.

    Args:
        vae_needed: whether to refuse a file without an autoencoder.

    Raises:
        LorakitError: the model cannot be read from one file (the message names it if known), lacks a part, or has an
            unknown tensor.
    """
    shapes, name = header.shapes(), header.path.name
    family = detect_family(shapes, name)
    parts: dict[str, dict[str, Slot]] = {}
    rest = set(shapes)
    for component, part in layout_of(family).parts.items():
        optional = part.optional or (component == "vae" and not vae_needed)
        if optional and not any(key.startswith(part.prefixes) for key in shapes):
            continue
        parts[component] = slots = read_part(header, component, part)
        rest -= {key for slot in slots.values() for key in (slot.key, slot.scale) if key}
    lost = sorted(key for key in rest if weight_files.SCALE.search(key) and not key.startswith(AVERAGE))
    if lost:
        raise LorakitError("{file} has {key}, a scale that belongs to no weight: get the file in fp16", name, lost[0])
    # Not reported: a layer that a published model has but does not use, and common keys.
    unused = any(part.used_layers for part in layout_of(family).parts.values())
    ignored = (key for key in sorted(rest) if not USUAL.fullmatch(key) and not (unused and ".resblocks." in key))
    return Checkpoint(family, parts, prediction(header, family), tuple(ignored))


def read_part(header: safetensors_header.Header, component: str, part: FilePart) -> dict[str, Slot]:
    """The slots of one component's tensors in a file.

    Raises:
        LorakitError: the component or one of its tensors is missing, or it has an unsupported quantization.
    """
    shapes, name = header.shapes(), header.path.name
    prefix = next((p for p in part.prefixes if any(key.startswith(p) for key in shapes)), part.prefixes[0])
    if not any(key.startswith(prefix) for key in shapes):
        hint = ", or give one by model.vae (--vae)" if component == "vae" else ""
        raise LorakitError(
            "{name} lacks its {component} ({prefixes}*): get the whole checkpoint{hint}",
            *(name, component, part.prefixes[0], hint),
        )
    return component_slots(header, part, component, prefix)


def component_slots(header: safetensors_header.Header, part: FilePart, component: str, prefix: str) -> dict[str, Slot]:
    """The slots of a component's tensors in a file that has them under `prefix`.

    Raises:
        LorakitError: a tensor is missing or cannot be read.
    """
    name = header.path.name
    inside = {key.removeprefix(prefix): info for key, info in header.tensors.items() if key.startswith(prefix)}
    for key, info in inside.items():
        has_numbers = info.dtype != "I8" or weight_files.scale_of(key, inside) is not None
        if key.endswith("weight") and not (info.dtype in weight_files.READABLE and has_numbers):
            raise LorakitError(
                "{name} has {prefix}{key} in {dtype}, a quantization not read here: get it in fp16",
                *(name, prefix, key, info.dtype),
            )
    slots = _slots(name, part, component, prefix, {key: info.shape for key, info in inside.items()})
    _require_complete(name, component, slots, part.partial)
    return slots


def _require_complete(file: str, component: str, slots: Mapping[str, Slot], partial: str) -> None:
    """Refuse a component that lacks a tensor which its similar blocks have."""
    groups: dict[tuple[str, int], set[str]] = {}
    members: dict[tuple[str, int], set[str]] = {}
    for ours in slots:
        if match := _ONE_OF_MANY.fullmatch(ours):
            block, lacking = ours.removesuffix(match[2]), re.search(partial, match[2])
            # Some tensors are optional: a block has all or none of them.
            group = (lacking.lastindex or -1) if lacking else 0
            members.setdefault((block, group), set()).add(match[2])
            groups.setdefault((block.split(".")[-3], group), set()).add(match[2])
    for (block, group), leaves in members.items():
        if missing := groups[block.split(".")[-3], group] - leaves:
            raise LorakitError(
                "{file} lacks {component}.{block}{missing}, which its other blocks have: get the whole checkpoint",
                *(file, component, block, min(missing)),
            )


def place(family: str, parts: Mapping[str, Shapes]) -> dict[str, dict[str, Slot]]:
    """The slots in a single file for the tensors of a model in diffusers layout: the inverse of `read`.

    Args:
        parts: component -> diffusers' name -> shape; names of text encoders start with `text_model.`.

    Raises:
        LorakitError: a tensor has no name in single files.
    """
    placed: dict[str, dict[str, Slot]] = {}
    for component, part in layout_of(family).parts.items():
        if component not in parts:
            continue
        shapes = parts[component]
        names = part.names(shapes, False) if part.names else {}
        inverse = {
            str(ours): (theirs, len(group), third, type(ours))
            for theirs, target in names.items()
            for group in [target if isinstance(target, tuple) else (target,)]
            for third, ours in enumerate(group)
        }
        slots: dict[str, Slot] = {}
        for name, shape in shapes.items():
            if NOT_WEIGHTS.search(name):
                continue
            head, tail = _longest(name, inverse) if part.names else (name, "")
            if head is None:
                raise LorakitError(
                    "{component} has a tensor {name} that has no name in a single file: write a folder", component, name
                )
            theirs, count, third, form = inverse.get(head, (head, 1, 0, str))
            slots[name] = Slot(part.prefixes[0] + theirs + tail, shape, third if count > 1 else None, _form(form, tail))
        placed[component] = slots
    return placed


def tensors(header: safetensors_header.Header, slots: Mapping[str, Slot]) -> Iterator[tuple[str, torch.Tensor]]:
    """Diffusers' name and tensor of each slot. One of the file's tensors is in memory at a time."""
    import torch

    by_key: dict[str, list[str]] = {}
    for name, slot in slots.items():
        by_key.setdefault(slot.key, []).append(name)
    for name in by_key.pop("", []):
        yield name, torch.eye(slots[name].shape[0])
    scales = dict(safetensors_header.tensors(header, {slot.scale for slot in slots.values() if slot.scale}))
    for key, tensor in safetensors_header.tensors(header, by_key):
        for name in by_key[key]:
            scale = scales.get(slots[name].scale or "")
            yield name, view(tensor if scale is None else weight_files.dequantize(tensor, scale), slots[name])


def assemble(parts: list[torch.Tensor], slots: list[Slot]) -> torch.Tensor:
    """The file's tensor from the tensors of its slots, in order: the inverse of `view`."""
    import torch

    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    tensor = _exchanged(tensor.T if slots[0].form is Transposed else tensor, slots[0])
    return tensor.reshape(file_shape(slots[0])).contiguous()


def file_shape(slot: Slot) -> tuple[int, ...]:
    """The shape of the tensor in the file."""
    if slot.third is not None:
        return (3 * slot.shape[0], *slot.shape[1:])
    if slot.form is Transposed:
        return slot.shape[::-1]
    return (*slot.shape, 1, 1) if slot.form is Pointwise else slot.shape


def view(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    """A slot's part of a tensor of the file; it shares memory, unless it is `Swapped`."""
    part = tensor if slot.third is None else tensor.chunk(3)[slot.third]
    return _exchanged(part.T if slot.form is Transposed else part, slot).reshape(slot.shape)


def fill(tensor: torch.Tensor, slot: Slot, part: torch.Tensor) -> None:
    """Write a slot's part into a tensor of the file."""
    if slot.form is Swapped:
        tensor.copy_(_exchanged(part, slot))
    else:
        view(tensor, slot).copy_(part)


def _exchanged(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    return tensor.roll(len(tensor) // 2, 0) if slot.form is Swapped else tensor


def prediction(header: safetensors_header.Header, family: str) -> Prediction:
    """The model's prediction type: from a key, from the metadata, or by ComfyUI's rules."""
    shapes, metadata = header.shapes(), header.metadata
    if registry.family_of(family).prediction == FLOW:
        return Prediction(FLOW, False, "as every model of its family", certain=True)
    if "v_pred" in shapes:
        return Prediction("v_prediction", "ztsnr" in shapes, "as its key v_pred says", certain=True)
    value = metadata.get("modelspec.prediction_type", "").lower()
    for kind, words in {"v_prediction": ("v", "v_prediction", "v-prediction"), "epsilon": ("epsilon", "eps")}.items():
        if value in words:
            return Prediction(kind, "ztsnr" in shapes, Message("as its metadata says ({value})", value), certain=True)
    if any(word in value for word in ("flow", "edm", "sample")):
        raise LorakitError(
            "{file} predicts {kind!r}, as its metadata says, which lorakit does not train", header.path.name, value
        )
    if "768-v" in metadata.get("modelspec.architecture", ""):
        return Prediction("v_prediction", False, Message("as its metadata says ({value})", "768-v"), certain=True)
    if guess := layout_of(family).guess:
        return guess(header)
    return Prediction("epsilon", False, NOTHING_SAYS, certain=False)


_OTHERS = {
    "noise_augmentor.": "an unCLIP model, which draws from pictures",
    "edm_": "trained with EDM's noise (Playground, CosXL), which lorakit does not do",
}


def detect_family(shapes: Shapes, name: str) -> str:
    """The version of a file's family, from its keys.

    Raises:
        LorakitError: the model is of another kind (the message names it if known), or lacks its text encoder.
    """
    for start, what in _OTHERS.items():
        if any(key.startswith(start) for key in shapes):
            raise LorakitError("{name} is {what}; in one file lorakit reads {titles}", name, what, titles())
    counts = {family: sum(key.startswith(layout.marks) for key in shapes) for family, layout in layouts().items()}
    family = max(counts, key=lambda family: counts[family])
    if not counts[family]:
        raise LorakitError(
            "{name} lacks its text encoder (cond_stage_model.*, conditioner.*): get the whole checkpoint", name
        )
    for start, what in layout_of(family).others.items():
        if any(key.startswith(start) for key in shapes):
            raise LorakitError("{name} is {what}", name, what)
    return family


def _slots(file: str, part: FilePart, component: str, prefix: str, shapes: Shapes) -> dict[str, Slot]:
    names, pattern = part.names(shapes, True) if part.names else {}, re.compile(part.tensors)
    slots: dict[str, Slot] = {}
    for name, shape in shapes.items():
        if NOT_WEIGHTS.search(name) or weight_files.MARKS.search(name) or weight_files.SCALE.search(name):
            continue
        head, tail = _longest(name, names) if part.names else (name, "")
        full_name = name if name.startswith((part.level, "text_projection")) else part.level + name
        target = full_name if not part.names else names[head] if head is not None else ()
        group = target if isinstance(target, tuple) else (target,)
        targets = [(third, ours) for third, ours in enumerate(group) if pattern.fullmatch(ours + tail)]
        # Programs ignore unknown tensors of the other parts.
        if not targets and component == "unet":
            raise LorakitError("{file} has a tensor {name} that Stable Diffusion does not have", file, prefix + name)
        scale = weight_files.scale_of(name, shapes) if name.endswith(".weight") else None
        if len(group) > 1 and shape[0] % len(group):
            rows = Message("{shape} rows, which are not {count} equal shares", shape[0], len(group))
            raise LorakitError(
                "{file} has {prefix}{name} in {rows}: get the whole checkpoint", file, prefix, name, rows
            )
        for third, ours in targets:
            form = _form(type(ours), tail)
            own = (shape[0] // len(group), *shape[1:]) if len(group) > 1 else shape
            own = own[::-1] if form is Transposed else own[:2] if form is Pointwise else own
            slots[ours + tail] = Slot(
                prefix + name, own, third if len(group) > 1 else None, form, scale and prefix + scale
            )
    if part.identity and slots:
        name, like = part.identity
        if like not in slots:
            raise LorakitError("{file} lacks {component}.{like}: get the whole checkpoint", file, component, like)
        slots[name] = Slot("", (slots[like].shape[0],) * 2)
    if part.used_layers is None:
        return slots
    # Leave out the last layer of a text encoder that is read before it, and everything after it. Some converters leave
    # it out, too.
    layers = count(slots, r"text_model\.encoder\.layers\.(\d+)\.")
    last = [f"text_model.encoder.layers.{layers - 1}."] if layers != part.used_layers else []
    return {name: slot for name, slot in slots.items() if not name.startswith(("text_projection.", *last))}


def _form(form: type[str], tail: str) -> type[str]:
    """The form of a module's tensor: a bias has one axis, so it is never `Pointwise`."""
    return str if form is Pointwise and tail != ".weight" else form


def count(names: Collection[str], pattern: str) -> int:
    """One more than the highest number that the pattern's group matches."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _longest(name: str, names: Collection[str]) -> tuple[str | None, str]:
    """The longest prefix of a name that is among `names`, and the rest of the name; None if there is none."""
    head, tail = name, ""
    while head and head not in names:
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return (head, tail) if head else (None, "")


def read_header(path: Path) -> safetensors_header.Header:
    """The header of a single file; empty if it is not a .safetensors file."""
    is_safetensors = path.suffix.lower() == ".safetensors"
    return safetensors_header.read(path) if is_safetensors else safetensors_header.Header(path, {}, {}, 0)


def check_header(head: safetensors_header.Header) -> safetensors_header.Header:
    """Return the header if it is that of a trainable model. The file itself need not exist.

    Raises:
        LorakitError: it is something else; the message names it.
    """
    if kind := other_models.what_file(head):
        raise LorakitError("base {path} {what}", head.path.name, kind)
    detect_family(head.shapes(), head.path.name)
    return head
