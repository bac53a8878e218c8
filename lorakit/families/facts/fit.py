"""The tensors that a configuration implies, to check file headers before anything is loaded. No torch.

Shapes are those of diffusers' UNet2DConditionModel, SD3Transformer2DModel and AutoencoderKL and transformers'
CLIPTextModel and T5EncoderModel. Configurations with other options that change shapes are not checked; the libraries
report their errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.core.errors import LorakitError
from lorakit.core.layer_names import canonical

Shape = tuple[int, ...]
Config = Mapping[str, Any]
Shapes = Mapping[str, Shape]
# Options of a UNet that change its tensors -> values with the usual tensors.
_USUAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_embedding_dim"), (None,)),
    **dict.fromkeys(("encoder_hid_dim_type", "cross_attention_norm", "num_attention_heads"), (None,)),
    **dict.fromkeys(("only_cross_attention", "dual_cross_attention", "mid_block_only_cross_attention"), (None, False)),
    **dict.fromkeys(("class_embeddings_concat", "resnet_skip_time_act"), (None, False)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (None, 3)),
    "addition_embed_type": (None, "text_time"),
    "attention_type": (None, "default"),
    "resnet_time_scale_shift": (None, "default"),
    "time_embedding_type": (None, "positional"),
    "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
}
_BLOCKS = {f"{cross}{way}Block2D" for cross in ("", "CrossAttn") for way in ("Down", "Up")}


def require(base: str, component: str, config: Config, shapes: Shapes, reference: str) -> None:
    """Compare the tensors of a component, under diffusers' or transformers' names, with its configuration.

    Args:
        base: start of the messages.
        reference: the source of the expected shapes, for messages, as in "its config.json".

    Raises:
        LorakitError: a tensor is missing or has another shape.
    """
    kinds = {"SD3Transformer2DModel": _transformer, "UNet2DConditionModel": _unet, "t5": _t5, "clip_text_model": _text}
    kind = config.get("_class_name", config.get("model_type"))
    make = _vae if component == "vae" else kinds.get(kind, _unet if component == "unet" else _text)
    inside = dict(shapes)
    if make is not _t5:
        inside = {canonical(component, name).removeprefix(f"{component}."): shape for name, shape in shapes.items()}
    try:
        expected = dict(make(config))
    except (KeyError, TypeError, ValueError, IndexError):  # another kind of configuration, which the library refuses
        return
    _require_shares(base, config, reference)
    for name, shape in expected.items():
        if name not in inside:
            raise LorakitError("{base} lacks {tensor}: get the base again", base, f"{component}.{name}")
        if inside[name] != shape:
            sizes = ["x".join(map(str, one)) for one in (inside[name], shape)]
            raise LorakitError(
                "{base} has {tensor} in the shape {shape} where {what} has {other}: get the base again",
                *(base, f"{component}.{name}", sizes[0], reference, sizes[1]),
            )


def _require_shares(base: str, config: Config, reference: str) -> None:
    """Refuse a width that is not a multiple of its heads or groups; no model can be built from it."""
    widths = [*config.get("block_out_channels", ()), *([config["hidden_size"]] if "hidden_size" in config else [])]
    kinds = [*config.get("down_block_types", ()), *(["Attn"] * len(widths))]
    for name in ("attention_head_dim", "num_attention_heads", "norm_num_groups"):
        value = config.get(name)
        parts = _each(value, len(widths)) if isinstance(value, (int, list, tuple)) else []
        for width, part, kind in zip(widths, parts, kinds, strict=False):
            if (name == "norm_num_groups" or "Attn" in kind) and (part < 1 or width % part):
                raise LorakitError(
                    "{base}: {what} has {name} = {part}, but {width} channels are no multiple: get the base again",
                    *(base, reference, name, part, width),
                )


def cross_dim(denoiser: Config) -> int:
    """Width of the text embeddings that a denoiser attends to."""
    return int(denoiser.get("joint_attention_dim") or denoiser["cross_attention_dim"])


def require_channels(path: Path, into: int, latent: int) -> None:
    """Refuse a UNet whose number of input channels is neither that of text-to-image nor that of inpainting."""
    if into in (latent, 2 * latent + 1):
        return
    raise LorakitError(
        "base {path}: its UNet takes {into} channels, its latents have {latent}; that is not trained",
        *(path, into, latent),
    )


def require_widths(base: str, attended: int, configs: Mapping[str, Config]) -> None:
    """Refuse text encoders that do not belong to the UNet, which attends to texts of width `attended`.

    Raises:
        LorakitError: their widths do not add up to it.
    """
    widths = [config.get("hidden_size", 0) for name, config in configs.items() if name.startswith("text_encoder")]
    if all(widths) and sum(widths) != attended:
        raise LorakitError(
            "{base}: its UNet attends to texts of width {width}, and its text encoders make {other}: get the "
            "base again",
            *(base, attended, sum(widths)),
        )


def _layer(name: str, *shape: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _resnet(name: str, into: int, out: int, embedding: int | None) -> Iterator[tuple[str, Shape]]:
    yield from _layer(f"{name}.norm1", into)
    yield from _layer(f"{name}.conv1", out, into, 3, 3)
    if embedding:
        yield from _layer(f"{name}.time_emb_proj", out, embedding)
    yield from _layer(f"{name}.norm2", out)
    yield from _layer(f"{name}.conv2", out, out, 3, 3)
    if into != out:
        yield from _layer(f"{name}.conv_shortcut", out, into, 1, 1)


def _attention(name: str, width: int, depth: int, config: Config) -> Iterator[tuple[str, Shape]]:
    """The tensors of a Transformer2DModel."""
    point = () if config.get("use_linear_projection") else (1, 1)
    yield from _layer(f"{name}.norm", width)
    for side in ("in", "out"):
        yield from _layer(f"{name}.proj_{side}", width, width, *point)
    for n in range(depth):
        block = f"{name}.transformer_blocks.{n}"
        for number, context in ((1, width), (2, int(config["cross_attention_dim"]))):
            yield from _layer(f"{block}.attn{number}.to_q", width, width, bias=False)
            yield from _layer(f"{block}.attn{number}.to_k", width, context, bias=False)
            yield from _layer(f"{block}.attn{number}.to_v", width, context, bias=False)
            yield from _layer(f"{block}.attn{number}.to_out.0", width, width)
        for number in (1, 2, 3):
            yield from _layer(f"{block}.norm{number}", width)
        yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _layer(f"{block}.ff.net.2", width, 4 * width)


def _each(value: int | Sequence[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def _unet(config: Config) -> Iterator[tuple[str, Shape]]:
    widths: list[int] = list(config["block_out_channels"])
    count, first, embedding = len(widths), widths[0], 4 * widths[0]
    kinds = [*config["down_block_types"], *config["up_block_types"]]
    if any(config.get(key) not in values for key, values in _USUAL.items()) or not _BLOCKS.issuperset(kinds):
        raise ValueError("another kind of UNet")
    layers = _each(config.get("layers_per_block", 2), count)
    depths = _each(config.get("transformer_layers_per_block", 1), count)
    mirrored = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    yield from _layer("conv_in", first, config.get("in_channels", 4), 3, 3)
    yield from _layer("time_embedding.linear_1", embedding, first)
    yield from _layer("time_embedding.linear_2", embedding, embedding)
    if config.get("time_cond_proj_dim"):
        yield from _layer("time_embedding.cond_proj", first, config["time_cond_proj_dim"], bias=False)
    if config.get("addition_embed_type"):
        yield from _layer("add_embedding.linear_1", embedding, config["projection_class_embeddings_input_dim"])
        yield from _layer("add_embedding.linear_2", embedding, embedding)
    for n, (out, kind) in enumerate(zip(widths, config["down_block_types"], strict=True)):
        block, into = f"down_blocks.{n}", widths[max(n - 1, 0)]
        for k in range(layers[n]):
            yield from _resnet(f"{block}.resnets.{k}", out if k else into, out, embedding)
            if kind.startswith("CrossAttn"):
                yield from _attention(f"{block}.attentions.{k}", out, _each(depths[n], layers[n])[k], config)
        if n < count - 1:
            yield from _layer(f"{block}.downsamplers.0.conv", out, out, 3, 3)
    yield from _middle(config, widths[-1], depths[-1], embedding)
    for n, (out, kind) in enumerate(zip(widths[::-1], config["up_block_types"], strict=True)):
        block, into, skip = f"up_blocks.{n}", widths[::-1][max(n - 1, 0)], widths[::-1][min(n + 1, count - 1)]
        last = layers[::-1][n]
        for k in range(last + 1):
            yield from _resnet(
                f"{block}.resnets.{k}", (out if k else into) + (skip if k == last else out), out, embedding
            )
            if kind.startswith("CrossAttn"):
                yield from _attention(f"{block}.attentions.{k}", out, _each(mirrored[n], last + 1)[k], config)
        if n < count - 1:
            yield from _layer(f"{block}.upsamplers.0.conv", out, out, 3, 3)
    yield from _layer("conv_norm_out", first)
    yield from _layer("conv_out", config.get("out_channels", 4), first, 3, 3)


def _middle(config: Config, width: int, depth: int | list[int], embedding: int) -> Iterator[tuple[str, Shape]]:
    kind = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if kind is None:
        return
    yield from _resnet("mid_block.resnets.0", width, width, embedding)
    if kind == "UNetMidBlock2DCrossAttn":
        yield from _attention("mid_block.attentions.0", width, _each(depth, 1)[0], config)
        yield from _resnet("mid_block.resnets.1", width, width, embedding)


def _vae(config: Config) -> Iterator[tuple[str, Shape]]:
    widths: list[int] = list(config["block_out_channels"])
    layers, latent, count = config.get("layers_per_block", 1), config.get("latent_channels", 4), len(widths)
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or kinds != {
        "DownEncoderBlock2D",
        "UpDecoderBlock2D",
    }:
        raise ValueError("another kind of autoencoder")
    for side, order in (("encoder", widths), ("decoder", widths[::-1])):
        down = side == "encoder"
        way, resnets = ("down", layers) if down else ("up", layers + 1)
        outer = config.get("in_channels" if down else "out_channels", 3)
        yield from _layer(f"{side}.conv_in", order[0], outer if down else latent, 3, 3)
        for n, out in enumerate(order):
            for k in range(resnets):
                into = out if k else order[max(n - 1, 0)]
                yield from _resnet(f"{side}.{way}_blocks.{n}.resnets.{k}", into, out, None)
            if n < count - 1:
                yield from _layer(f"{side}.{way}_blocks.{n}.{way}samplers.0.conv", out, out, 3, 3)
        for k in range(2):
            yield from _resnet(f"{side}.mid_block.resnets.{k}", widths[-1], widths[-1], None)
        if config.get("mid_block_add_attention", True):
            yield from _layer(f"{side}.mid_block.attentions.0.group_norm", widths[-1])
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                yield from _layer(f"{side}.mid_block.attentions.0.{name}", widths[-1], widths[-1])
        yield from _layer(f"{side}.conv_norm_out", order[-1])
        yield from _layer(f"{side}.conv_out", 2 * latent if down else outer, order[-1], 3, 3)
    if config.get("use_quant_conv", True):
        yield from _layer("quant_conv", 2 * latent, 2 * latent, 1, 1)
    if config.get("use_post_quant_conv", True):
        yield from _layer("post_quant_conv", latent, latent, 1, 1)


def _text(config: Config) -> Iterator[tuple[str, Shape]]:
    name, width, inner = "text_model", config["hidden_size"], config["intermediate_size"]
    if config["model_type"] != "clip_text_model":
        raise ValueError("another kind of text encoder")
    yield f"{name}.embeddings.token_embedding.weight", (config["vocab_size"], width)
    yield f"{name}.embeddings.position_embedding.weight", (config["max_position_embeddings"], width)
    for n in range(config["num_hidden_layers"]):
        layer = f"{name}.encoder.layers.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{layer}.self_attn.{part}", width, width)
        for part in ("layer_norm1", "layer_norm2"):
            yield from _layer(f"{layer}.{part}", width)
        yield from _layer(f"{layer}.mlp.fc1", inner, width)
        yield from _layer(f"{layer}.mlp.fc2", width, inner)
    yield from _layer(f"{name}.final_layer_norm", width)
    if "WithProjection" in str(config["architectures"]):
        yield from _layer("text_projection", config["projection_dim"], width, bias=False)


def _transformer(config: Config) -> Iterator[tuple[str, Shape]]:
    head, patch = config["attention_head_dim"], config["patch_size"]
    width, layers = head * config["num_attention_heads"], config["num_layers"]
    if config.get("qk_norm") not in (None, "rms_norm"):
        raise ValueError("another kind of transformer")
    yield from _layer("pos_embed.proj", width, config["in_channels"], patch, patch)
    yield "pos_embed.pos_embed", (1, config["pos_embed_max_size"] ** 2, width)
    for name, into in {"timestep_embedder": 256, "text_embedder": config["pooled_projection_dim"]}.items():
        yield from _layer(f"time_text_embed.{name}.linear_1", width, into)
        yield from _layer(f"time_text_embed.{name}.linear_2", width, width)
    yield from _layer("context_embedder", config["caption_projection_dim"], config["joint_attention_dim"])
    for n in range(layers):
        block, is_dual, is_last = f"transformer_blocks.{n}", n in config["dual_attention_layers"], n == layers - 1
        yield from _layer(f"{block}.norm1.linear", (9 if is_dual else 6) * width, width)
        yield from _layer(f"{block}.norm1_context.linear", (2 if is_last else 6) * width, width)
        parts = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        parts += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", *([] if is_last else ["attn.to_add_out"])]
        parts += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"] if is_dual else []
        for part in parts:
            yield from _layer(f"{block}.{part}", width, width)
        norms = ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"]
        norms += ["attn2.norm_q", "attn2.norm_k"] if is_dual else []
        for norm in norms if config.get("qk_norm") else ():
            yield from _layer(f"{block}.{norm}", head, bias=False)
        for feed in ("ff",) if is_last else ("ff", "ff_context"):
            yield from _layer(f"{block}.{feed}.net.0.proj", 4 * width, width)
            yield from _layer(f"{block}.{feed}.net.2", width, 4 * width)
    yield from _layer("norm_out.linear", 2 * width, width)
    yield from _layer("proj_out", patch * patch * config["out_channels"], width)


def _t5(config: Config) -> Iterator[tuple[str, Shape]]:
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    yield "shared.weight", (config["vocab_size"], width)
    for n in range(config["num_layers"]):
        block = f"encoder.block.{n}.layer"
        for part in "qkv":
            yield f"{block}.0.SelfAttention.{part}.weight", (heads * config["d_kv"], width)
        yield f"{block}.0.SelfAttention.o.weight", (width, heads * config["d_kv"])
        if n == 0:
            table = f"{block}.0.SelfAttention.relative_attention_bias.weight"
            yield table, (config.get("relative_attention_num_buckets", 32), heads)
        for part in ("wi_0", "wi_1") if gated else ("wi",):
            yield f"{block}.1.DenseReluDense.{part}.weight", (inner, width)
        yield f"{block}.1.DenseReluDense.wo.weight", (width, inner)
        yield f"{block}.0.layer_norm.weight", (width,)
        yield f"{block}.1.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)
