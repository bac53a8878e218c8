"""Whole models in one file, in the layout of LDM and SGM: what each tensor is called there and in diffusers.

The tables are explicit and serve both directions: reading a file, and writing one. Blocks are counted, not assumed, so
they hold for any width and depth. No torch, except where tensors are read.

Names: CompVis/latent-diffusion and Stability-AI/generative-models (the modules themselves); OpenCLIP's text model. The
keys that say what a file predicts are those ComfyUI reads (comfy/supported_models.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.families import scaled_weight

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
UNET = "model.diffusion_model."
# Family -> component -> what stands before its tensors' names. Where there are several, the first is the usual one; the
# last component's tells the family.
PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "sdxl": {
        "unet": (UNET,),
        "vae": ("first_stage_model.",),
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
    "sd2": {
        "unet": (UNET,),
        "vae": ("first_stage_model.",),
        "text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    },
    "sd1": {"unet": (UNET,), "vae": ("first_stage_model.",), "text_encoder": ("cond_stage_model.transformer.",)},
}
# Text encoders under OpenCLIP's names; the others have those of transformers.
OPENCLIP = {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}
# SD2 reads its text encoder before the last layer, which diffusers leaves out altogether.
UNUSED = {("sd2", "text_encoder")}
# Of the published SD2's 24.
USED_LAYERS = 23
# Tensors that no module of diffusers has: buffers, and what only CLIP's own training needs.
NOT_WEIGHTS = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask)$")
# Keys of so many files that nothing is said of them: the noise schedule, marks, projections that nothing reads.
USUAL = re.compile(
    rf"(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_\w+|posterior_\w+|logvar|scale_factor|v_pred|ztsnr"
    rf"|denoiser\..*)|.*({NOT_WEIGHTS.pattern}|(^|\.)text_projection(\.weight)?$|{scaled_weight.MARKS.pattern})"
)
# Families that were published in two kinds, with the same keys and shapes, that predict different things.
TWO_KINDS = {"sd2"}
# What stands before the weights' moving average, which is of training and of no use here.
AVERAGE = "model_ema."

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPENCLIP_TOP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
_OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPENCLIP_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_HF_UNFUSED = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.(q|k|v)_proj\.(weight|bias)")
_THIRDS = ("q", "k", "v")
_LAYER = r"text_model\.encoder\.layers\.(\d+)\."
_RESNETS = r"\w+(\.\d+)?\.resnets\.\d+\.(norm[12]|conv[12]|time_emb_proj|conv_shortcut)|\w+\.\d\.\w+samplers\.0\.conv"
_CLIP = r"embeddings\.(token|position)_embedding|final_layer_norm|encoder\.layers\.\d+\.(layer_norm[12]|mlp\.fc[12]"
# What diffusers calls the modules that a component has.
_MODULES = {
    "unet": rf"(time|add)_embedding\.linear_[12]|conv_in|conv_norm_out|conv_out|{_RESNETS}"
    r"|\w+(\.\d+)?\.attentions\.\d+\.(norm|proj_in|proj_out|transformer_blocks\.\d+\."
    r"(norm[123]|attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2)))",
    "vae": rf"(post_)?quant_conv|(en|de)coder\.(conv_in|conv_norm_out|conv_out|{_RESNETS}"
    r"|mid_block\.attentions\.0\.(group_norm|to_([qkv]|out\.0)))",
    "text_encoder": rf"text_model\.({_CLIP}|self_attn\.([qkv]|out)_proj))|text_projection",
}
# One of several modules that are alike.
_ONE_OF_MANY = re.compile(r"(.*\.(resnets|attentions|transformer_blocks|layers)\.)\d+\.(.+)")


@dataclass(frozen=True)
class Slot:
    """Where one of diffusers' tensors lies in a file.

    Attributes:
        key: the tensor in the file.
        shape: in diffusers; the file's may differ by axes of length 1.
        third: 0, 1 or 2 where it is that third of the file's rows (q, k, v in one), else None.
        transposed: whether the file has it transposed.
        scale: the tensor in the file by which its numbers are multiplied, if there is one (see `scaled_weight`).
    """

    key: str
    shape: tuple[int, ...]
    third: int | None = None
    transposed: bool = False
    scale: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What a model was trained to predict, and how that was told: in words, and whether for certain."""

    type: str
    zero_snr: bool
    evidence: str
    certain: bool


@dataclass(frozen=True)
class Checkpoint:
    """A file in this layout, taken apart: component -> diffusers' tensor name -> Slot.

    Attributes:
        ignored: keys that such a model does not have and that every program ignores.
    """

    family: str
    parts: dict[str, dict[str, Slot]]
    prediction: Prediction
    ignored: tuple[str, ...] = ()


def unet_table(levels: int, layers: int, attention_ups: Collection[int]) -> dict[str, str]:
    """LDM's name of a module -> diffusers', for `levels` resolutions with `layers` resnets each on the way down.

    `attention_ups` are the up blocks with attention: there the upsampler comes third in its block, elsewhere second.
    """
    table, row = dict(_UNET_TOP), layers + 1
    pairs = [("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")]
    table["middle_block.1"] = "mid_block.attentions.0"
    for block in range(levels):
        for n in range(layers):
            place = f"input_blocks.{1 + row * block + n}"
            pairs.append((f"{place}.0", f"down_blocks.{block}.resnets.{n}"))
            table[f"{place}.1"] = f"down_blocks.{block}.attentions.{n}"
        table[f"input_blocks.{row * (block + 1)}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
        for n in range(row):
            place = f"output_blocks.{row * block + n}"
            pairs.append((f"{place}.0", f"up_blocks.{block}.resnets.{n}"))
            table[f"{place}.1"] = f"up_blocks.{block}.attentions.{n}"
        slot = 2 if block in attention_ups else 1
        table[f"output_blocks.{row * block + layers}.{slot}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    return table | {f"{a}.{leaf}": f"{b}.{name}" for a, b in pairs for leaf, name in _RESNET.items()}


def vae_table(levels: int, layers: int) -> dict[str, str]:
    """The same for the autoencoder; its decoder has a resnet more at each level and counts levels from the bottom."""
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        pairs = [(f"{side}.mid.block_{n + 1}", f"{side}.mid_block.resnets.{n}") for n in range(2)]
        for leaf, name in _VAE_ATTENTION.items():
            table[f"{side}.mid.attn_1.{leaf}"] = f"{side}.mid_block.attentions.0.{name}"
        way, step, count = ("down", "downsample", layers) if side == "encoder" else ("up", "upsample", layers + 1)
        for level in range(levels):
            block = level if side == "encoder" else levels - 1 - level
            theirs, ours = f"{side}.{way}.{level}", f"{side}.{way}_blocks.{block}"
            pairs += [(f"{theirs}.block.{n}", f"{ours}.resnets.{n}") for n in range(count)]
            table[f"{theirs}.{step}.conv"] = f"{ours}.{step}rs.0.conv"
        for a, b in pairs:
            table |= {f"{a}.{leaf}": f"{b}.{leaf}" for leaf in ("norm1", "conv1", "norm2", "conv2")}
            table[f"{a}.nin_shortcut"] = f"{b}.conv_shortcut"
    return table


def openclip_table(layers: int) -> dict[str, str]:
    """The same for OpenCLIP's text model, but for q, k and v, which it has in one."""
    table = dict(_OPENCLIP_TOP)
    for n in range(layers):
        for leaf, name in _OPENCLIP_LAYER.items():
            table[f"transformer.resblocks.{n}.{leaf}"] = f"text_model.encoder.layers.{n}.{name}"
    return table


def is_checkpoint(shapes: Shapes) -> bool:
    """Whether a file holds a whole model in this layout (or at least its UNet)."""
    return any(name.startswith(UNET) for name in shapes)


def read(header: safetensors_header.Header) -> Checkpoint:
    """Take a file apart.

    Raises:
        LorakitError: a model that is not Stable Diffusion 1, 2 or XL (named where it is known), one that lacks a part,
            or a tensor that such a model does not have.
    """
    shapes, name = header.shapes(), header.path.name
    family = _family(shapes, name)
    parts: dict[str, dict[str, Slot]] = {}
    rest = set(shapes)
    for component, prefixes in PREFIXES[family].items():
        prefix = next((p for p in prefixes if any(key.startswith(p) for key in shapes)), prefixes[0])
        inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        if not inside:
            raise LorakitError(f"{name} lacks its {component} ({prefixes[0]}*): get the whole checkpoint")
        for key in inside:
            dtype = header.tensors[prefix + key].dtype
            if key.endswith("weight") and dtype not in scaled_weight.READABLE:
                raise LorakitError(f"{name} has {prefix}{key} in {dtype}, a quantization not read here: get it in fp16")
        parts[component] = slots = _slots(name, family, component, prefix, inside)
        rest -= {key for slot in slots.values() for key in (slot.key, slot.scale) if key}
        _require_whole(name, component, slots)
    lost = sorted(key for key in rest if scaled_weight.SCALE.search(key) and not key.startswith(AVERAGE))
    if lost:
        raise LorakitError(f"{name} has {lost[0]}, a scale that belongs to no weight: get the file in fp16")
    ignored = tuple(sorted(key for key in rest if not USUAL.fullmatch(key)))
    unused = {key for key in ignored if (family, "text_encoder") in UNUSED and ".resblocks." in key}
    return Checkpoint(family, parts, prediction(header, family), tuple(key for key in ignored if key not in unused))


def _require_whole(file: str, component: str, slots: Mapping[str, Slot]) -> None:
    """Refuse a part that lacks a tensor that others of its blocks have."""
    groups: dict[str, set[str]] = {}
    members: dict[str, set[str]] = {}
    for ours in slots:
        if match := _ONE_OF_MANY.fullmatch(ours):
            place = ours.removesuffix(match[3])
            kind = f"{component}.{match[2]}"
            members.setdefault(place, set()).add(match[3])
            if "conv_shortcut" not in match[3]:
                groups.setdefault(kind, set()).add(match[3])
    for place, leaves in members.items():
        kind = place.split(".")[-3]
        if missing := groups.get(f"{component}.{kind}", set()) - leaves:
            raise LorakitError(
                f"{file} lacks {component}.{place}{min(missing)}, which its other blocks have: get the whole checkpoint"
            )


def place(family: str, parts: Mapping[str, Shapes]) -> dict[str, dict[str, Slot]]:
    """Where the tensors of a model in diffusers layout go in such a file: the inverse of `read`.

    Args:
        parts: component -> diffusers' name -> shape; names of text encoders with `text_model.`.

    Raises:
        LorakitError: a tensor that has no name there.
    """
    placed: dict[str, dict[str, Slot]] = {}
    for component, prefixes in PREFIXES[family].items():
        shapes = parts[component]
        openclip = (family, component) in OPENCLIP
        table = {ours: theirs for theirs, ours in _table(family, component, shapes, theirs=False).items()}
        slots: dict[str, Slot] = {}
        for name, shape in shapes.items():
            if NOT_WEIGHTS.search(name):
                continue
            fused = _HF_UNFUSED.fullmatch(name) if openclip else None
            if fused:
                key = f"transformer.resblocks.{fused[1]}.attn.in_proj_{fused[3]}"
                slots[name] = Slot(prefixes[0] + key, shape, third=_THIRDS.index(fused[2]))
                continue
            renamed = _renamed(name, table) if table else name
            if renamed is None:
                raise LorakitError(f"{component} has a tensor {name} that has no name in a single file: write a folder")
            slots[name] = Slot(prefixes[0] + renamed, shape, transposed=openclip and name.startswith("text_projection"))
        placed[component] = slots
    return placed


def tensors(header: safetensors_header.Header, slots: Mapping[str, Slot]) -> Iterator[tuple[str, torch.Tensor]]:
    """Diffusers' name and tensor of each slot, one of the file's tensors at a time."""
    by_key: dict[str, list[str]] = {}
    for name, slot in slots.items():
        by_key.setdefault(slot.key, []).append(name)
    scales = dict(safetensors_header.tensors(header, {slot.scale for slot in slots.values() if slot.scale}))
    for key, tensor in safetensors_header.tensors(header, by_key):
        for name in by_key[key]:
            scale = scales.get(slots[name].scale or "")
            yield name, view(tensor if scale is None else scaled_weight.dequantize(tensor, scale), slots[name])


def assemble(parts: list[torch.Tensor], slots: list[Slot], component: str) -> torch.Tensor:
    """The file's tensor from the tensors of the slots that it holds, in their order: the inverse of `view`."""
    import torch

    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    return (tensor.T if slots[0].transposed else tensor).reshape(file_shape(component, slots[0])).contiguous()


def file_shape(component: str, slot: Slot) -> tuple[int, ...]:
    """The shape that the file's tensor has."""
    if slot.third is not None:
        return (3 * slot.shape[0], *slot.shape[1:])
    if slot.transposed:
        return slot.shape[::-1]
    convolution = component == "vae" and ".attn_1." in slot.key and len(slot.shape) == 2
    return (*slot.shape, 1, 1) if convolution else slot.shape


def view(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The part of one of the file's tensors that a slot stands for, sharing its memory."""
    part = tensor if slot.third is None else tensor.chunk(3)[slot.third]
    return (part.T if slot.transposed else part).reshape(slot.shape)


def prediction(header: safetensors_header.Header, family: str) -> Prediction:
    """What the model predicts: said by a key, by the metadata, or guessed as ComfyUI does it."""
    shapes, metadata = header.shapes(), header.metadata
    if "v_pred" in shapes:
        return Prediction("v_prediction", "ztsnr" in shapes, "as its key v_pred says", certain=True)
    value = metadata.get("modelspec.prediction_type", "").lower()
    for kind, words in {"v_prediction": ("v", "v_prediction", "v-prediction"), "epsilon": ("epsilon", "eps")}.items():
        if value in words:
            return Prediction(kind, "ztsnr" in shapes, f"as its metadata says ({value})", certain=True)
    if any(word in value for word in ("flow", "edm", "sample")):
        raise LorakitError(f"{header.path.name} predicts {value!r}, as its metadata says, which lorakit does not train")
    if "768-v" in metadata.get("modelspec.architecture", ""):
        return Prediction("v_prediction", False, "as its metadata says (768-v)", certain=True)
    if family not in TWO_KINDS or shapes[f"{UNET}input_blocks.0.0.weight"][1] != 4:
        return Prediction("epsilon", False, "as nothing in the file says otherwise", certain=False)
    # Of the released models, those that predict v have this bias spread wider.
    pattern = rf"{re.escape(UNET)}output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias"
    found = {int(match[1]): name for name in shapes if (match := re.fullmatch(pattern, name))}
    values = (safetensors_header.values(header, found[max(found)]) if found else []) or [0.0]
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    kind, side = ("v_prediction", "above") if spread > 0.09 else ("epsilon", "not above")
    return Prediction(kind, False, f"as its last norm1.bias spreads by {spread:.3f}, {side} 0.09", certain=False)


_OTHERS = {
    f"{UNET}joint_blocks.": "a Stable Diffusion 3 model",
    f"{UNET}double_blocks.": "a FLUX model",
    "noise_augmentor.": "an unCLIP model, which draws from pictures",
    "edm_": "trained with EDM's noise (Playground, CosXL), which lorakit does not do",
}


def _family(shapes: Shapes, name: str) -> str:
    for start, what in _OTHERS.items():
        if any(key.startswith(start) for key in shapes):
            raise LorakitError(f"{name} is {what}; in one file lorakit reads Stable Diffusion 1.x, 2.x and XL")
    sized = f"{UNET}label_emb.0.0.weight" in shapes
    for family, prefixes in PREFIXES.items():
        last = list(prefixes.values())[-1]
        if any(key.startswith(last) for key in shapes):
            if sized and "text_encoder_2" not in prefixes:
                raise LorakitError(f"{name} is SDXL's refiner, which no adapter is trained on: give the SDXL base")
            return family
    raise LorakitError(f"{name} lacks its text encoder (cond_stage_model.*, conditioner.*): get the whole checkpoint")


def _slots(file: str, family: str, component: str, prefix: str, shapes: Shapes) -> dict[str, Slot]:
    table = _table(family, component, shapes, theirs=True)
    openclip = (family, component) in OPENCLIP
    modules = re.compile(rf"({_MODULES[component.removesuffix('_2')]})\.(weight|bias)")
    projection = component == "text_encoder_2" or openclip
    slots: dict[str, Slot] = {}
    for name, shape in shapes.items():
        if NOT_WEIGHTS.search(name) or scaled_weight.MARKS.search(name) or scaled_weight.SCALE.search(name):
            continue
        fused = _OPENCLIP_FUSED.fullmatch(name) if openclip else None
        if fused:
            for third, letter in enumerate(_THIRDS):
                ours = f"text_model.encoder.layers.{fused[1]}.self_attn.{letter}_proj.{fused[2]}"
                slots[ours] = Slot(prefix + name, (shape[0] // 3, *shape[1:]), third)
            continue
        # Some early files of SD1 lack the level `text_model`.
        clip = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
        renamed = _renamed(name, table) if table else clip
        if renamed is None or not modules.fullmatch(renamed):
            # Programs read the other parts without a look at what else is there.
            if component == "unet":
                raise LorakitError(f"{file} has a tensor {prefix}{name} that Stable Diffusion does not have")
            continue
        if renamed == "text_projection.weight" and not projection:
            continue
        # What is a 1x1 convolution in the autoencoder's attention there is linear here.
        flat = shape[:2] if component == "vae" and ".attentions." in renamed else shape
        transposed = openclip and name == "text_projection"
        scale = scaled_weight.scale_of(name, shapes) if name.endswith(".weight") else None
        shape = flat[::-1] if transposed else flat
        slots[renamed] = Slot(prefix + name, shape, transposed=transposed, scale=scale and prefix + scale)
    return slots if (family, component) not in UNUSED else _used(slots)


def _used(slots: dict[str, Slot]) -> dict[str, Slot]:
    """Without the last layer of a text encoder that is read before it, and without what comes after."""
    layers = _count(slots, _LAYER)
    # Some converters leave it out themselves.
    gone = ("text_projection.", *([f"text_model.encoder.layers.{layers - 1}."] if layers != USED_LAYERS else []))
    return {name: slot for name, slot in slots.items() if not name.startswith(gone)}


def _table(family: str, component: str, shapes: Shapes, *, theirs: bool) -> dict[str, str]:
    """The table for a model under LDM's names (`theirs`) or diffusers'; {} for CLIP under those of transformers."""
    if component == "unet":
        if theirs:
            samplers = _count(shapes, r"input_blocks\.(\d+)\.0\.op\.") - 1
            levels = 1 + sum(1 for name in shapes if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name))
            layers = samplers // (levels - 1) - 1 if levels > 1 else _count(shapes, r"input_blocks\.(\d+)\.") - 1
            ups = {
                int(match[1]) // (layers + 1)
                for name in shapes
                if (match := re.match(r"output_blocks\.(\d+)\.1\.proj_in\.", name))
            }
        else:
            levels = _count(shapes, r"down_blocks\.(\d+)\.")
            layers = _count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")
            ups = {int(match[1]) for name in shapes if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
        return unet_table(levels, layers, ups)
    if component == "vae":
        level, block = (r"encoder\.down\.", r"\.block\.") if theirs else (r"encoder\.down_blocks\.", r"\.resnets\.")
        return vae_table(_count(shapes, rf"{level}(\d+)\."), _count(shapes, rf"{level}0{block}(\d+)\."))
    if (family, component) in OPENCLIP:
        pattern = r"transformer\.resblocks\.(\d+)\." if theirs else _LAYER
        return openclip_table(_count(shapes, pattern))
    return {}


def _count(names: Collection[str], pattern: str) -> int:
    """One more than the highest number that the pattern's group matches."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """The name with its longest known beginning replaced, or None where no beginning is known."""
    head, tail = name, ""
    while head:
        if head in table:
            return table[head] + tail
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return None
