"""A base in one file: names and configurations of the parts that families share, the autoencoder and CLIP. No torch.

Facts that shapes do not show are the same in all models of a version, and are in the family's `single_file.py`. Each
value is that of the published model in diffusers layout (CompVis, StabilityAI). Names: CompVis/latent-diffusion (the
autoencoder's modules), OpenCLIP's text model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.families import ldm, weight_files
from lorakit.families.ldm import Pointwise, Transposed, count
from lorakit.families.spec import Configs, FilePart, Shapes

if TYPE_CHECKING:
    from lorakit.families.describe import BaseInfo

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
CLASSES |= {"text_encoder_2": "CLIPTextModelWithProjection"}
# Width of an attention head of CLIP.
HEAD = 64
# The noise schedule of every Stable Diffusion before 3.
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
RESNETS = r"\w+(\.\d+)?\.resnets\.\d+\.(norm[12]|conv[12]|time_emb_proj|conv_shortcut)|\w+\.\d\.\w+samplers\.0\.conv"
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPENCLIP_TOP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": Transposed("text_projection.weight"),
}
_OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def configs(checkpoint: ldm.Checkpoint, shapes: Mapping[str, Shapes] | None = None) -> Configs:
    """The config.json of each part in diffusers layout, as dicts; with "scheduler" and "model_index".

    Args:
        shapes: component -> diffusers' name -> shape, if they differ from the file's.
    """
    if shapes is None:
        shapes = {part: {name: slot.shape for name, slot in slots.items()} for part, slots in checkpoint.parts.items()}
    reads: list[str] = []
    named = {part: NamedShapes(part, inside, reads) for part, inside in shapes.items()}
    prediction = checkpoint.prediction
    try:
        return ldm.layout_of(checkpoint.family).configs(named, prediction.type, prediction.zero_snr)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise LorakitError("{key} has a shape that no such model has: get the whole checkpoint", reads[-1]) from error


# Values that programs derive from the kind of model, because files in LDM layout lack them; and the defaults of
# configs.
_UNTOLD = {"attention_head_dim": 8, "num_attention_heads": None, "scaling_factor": 0.18215, "norm_num_groups": 32}


def untold(info: BaseInfo) -> str:
    """A value in which a base in a folder differs from the programs' assumption for one file, or ""."""
    layout = registry.version_of(info.family).layout
    if info.slots is not None or layout is None:
        return "" if layout is not None else "layout"
    parts = [part for part in layout.parts if part in info.configs]
    shapes = {part: weight_files.of_source(info.weights(part)) for part in parts}
    derived = layout.configs(shapes, info.prediction_type, False)
    for part in parts:
        for name, usual in _UNTOLD.items():
            ours, theirs = (values.get(name, usual) for values in (info.configs[part], derived[part]))
            if (list(ours) if isinstance(ours, (list, tuple)) else ours) != (
                list(theirs) if isinstance(theirs, (list, tuple)) else theirs
            ):
                return f"{part}'s {name}"
    return ""


class NamedShapes(dict[str, tuple[int, ...]]):
    """Shapes of a part. A missing name raises an error with that name; `reads` are the names that were looked up."""

    def __init__(self, part: str, shapes: Shapes, reads: list[str] | None = None):
        super().__init__({name: tuple(shape) for name, shape in shapes.items()})
        self.part, self.reads = part, [] if reads is None else reads

    def __getitem__(self, name: str) -> tuple[int, ...]:
        self.reads.append(f"{self.part}.{name}")
        if name not in self:
            raise LorakitError("{key} is missing: get the whole checkpoint", self.reads[-1])
        return super().__getitem__(name)


def vae_names(shapes: Shapes, theirs: bool) -> dict[str, str]:
    """See `FilePart.names`. In the file, the decoder has one more resnet per level and counts its levels from the
    bottom."""
    level, block = (r"encoder\.down\.", r"\.block\.") if theirs else (r"encoder\.down_blocks\.", r"\.resnets\.")
    levels, layers = count(shapes, rf"{level}(\d+)\."), count(shapes, rf"{level}0{block}(\d+)\.")
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        pairs = [(f"{side}.mid.block_{n + 1}", f"{side}.mid_block.resnets.{n}") for n in range(2)]
        for leaf, name in _VAE_ATTENTION.items():
            ours = f"{side}.mid_block.attentions.0.{name}"
            table[f"{side}.mid.attn_1.{leaf}"] = ours if leaf == "norm" else Pointwise(ours)
        way, resampler, resnets = (
            ("down", "downsample", layers) if side == "encoder" else ("up", "upsample", layers + 1)
        )
        for n in range(levels):
            theirs_n, ours = f"{side}.{way}.{n}", f"{side}.{way}_blocks.{n if side == 'encoder' else levels - 1 - n}"
            pairs += [(f"{theirs_n}.block.{k}", f"{ours}.resnets.{k}") for k in range(resnets)]
            table[f"{theirs_n}.{resampler}.conv"] = f"{ours}.{resampler}rs.0.conv"
        for a, b in pairs:
            table |= {f"{a}.{leaf}": f"{b}.{leaf}" for leaf in ("norm1", "conv1", "norm2", "conv2")}
            table[f"{a}.nin_shortcut"] = f"{b}.conv_shortcut"
    return table


def openclip_names(shapes: Shapes, theirs: bool) -> ldm.Names:
    """See `FilePart.names`: OpenCLIP has q, k and v in one tensor."""
    names: dict[str, str | tuple[str, ...]] = dict(_OPENCLIP_TOP)
    pattern = r"transformer\.resblocks\.(\d+)\." if theirs else r"text_model\.encoder\.layers\.(\d+)\."
    for n in range(count(shapes, pattern)):
        block, layer = f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}"
        names |= {f"{block}.{leaf}": f"{layer}.{name}" for leaf, name in _OPENCLIP_LAYER.items()}
        for kind in ("weight", "bias"):
            names[f"{block}.attn.in_proj_{kind}"] = tuple(f"{layer}.self_attn.{q}_proj.{kind}" for q in "qkv")
    return names


def vae_config(shapes: Shapes, side: int, **facts: object) -> dict[str, Any]:
    """The config.json of an AutoencoderKL, with `facts` that shapes do not show; without shapes, only these."""
    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    if not levels:
        return {"_class_name": CLASSES["vae"], **facts}
    return {
        "_class_name": CLASSES["vae"],
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down_blocks.{n}.resnets.0.conv1.weight"][0] for n in range(levels)],
        "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": side,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any("mid_block.attentions." in name for name in shapes),
        **facts,
    }


def text_config(shapes: Shapes, *, openclip: bool, projection: bool = False) -> dict[str, Any]:
    """The same for CLIP's text model. OpenAI's uses quick GELU; OpenCLIP's uses GELU and pads with token 0."""
    words, width = shapes["text_model.embeddings.token_embedding.weight"]
    projected = shapes["text_projection.weight"] if projection else shapes.get("text_projection.weight", (width,))
    return {
        "architectures": [CLASSES["text_encoder_2" if "text_projection.weight" in shapes else "text_encoder"]],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "projection_dim": projected[0],
        # The two special words are the last of the vocabulary.
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": 0 if openclip else words - 1,
    }


def model_index(pipeline: str, parts: Configs, **facts: object) -> dict[str, Any]:
    """The model_index.json of a pipeline with these parts."""
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, part in parts.items():
        is_encoder = name.startswith("text_encoder")
        kind = part["architectures"][0] if is_encoder else part["_class_name"]
        index[name] = ["transformers" if is_encoder else "diffusers", kind]
        if is_encoder:
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return index | facts


def ddim(prediction: str, zero_snr: bool) -> dict[str, Any]:
    """A scheduler for v-prediction and for zero terminal SNR on the schedule of every Stable Diffusion before 3."""
    config = {**SCHEDULE, "prediction_type": prediction, "steps_offset": 1}
    result = {"_class_name": "DDIMScheduler", **config, "clip_sample": False, "set_alpha_to_one": False}
    # Lin et al. 2023, arXiv 2305.08891: sampling must start at the last timestep, which is pure noise.
    return result | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {})


_CLIP = (
    r"text_model\.(embeddings\.(token|position)_embedding|final_layer_norm"
    r"|encoder\.layers\.\d+\.(layer_norm[12]|mlp\.fc[12]|self_attn\.([qkv]|out)_proj))\.(weight|bias)"
)
VAE = FilePart(
    prefixes=("first_stage_model.",),
    tensors=rf"((post_)?quant_conv|(en|de)coder\.(conv_in|conv_norm_out|conv_out|{RESNETS}"
    r"|mid_block\.attentions\.0\.(group_norm|to_([qkv]|out\.0))))\.(weight|bias)",
    names=vae_names,
)


def clip(
    *prefixes: str, projection: bool = False, optional: bool = False, identity: tuple[str, str] | None = None
) -> FilePart:
    """CLIP's text model with transformers' names; some early files lack the prefix `text_model`."""
    tensors = rf"{_CLIP}|text_projection\.weight" if projection else _CLIP
    return FilePart(prefixes, tensors, level="text_model.", optional=optional, identity=identity)


def openclip(*prefixes: str, used_layers: int | None = None) -> FilePart:
    """OpenCLIP's text model with its own names."""
    tensors = rf"{_CLIP}|text_projection\.weight"
    return FilePart(prefixes, tensors, openclip_names, used_layers=used_layers)
