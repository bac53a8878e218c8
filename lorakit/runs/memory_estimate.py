"""Estimate the memory of a run from the config and the base's layer shapes. No torch.

What is kept for the backward pass follows from the layers' outputs with factors that were fitted to exact counts of
every tensor's life (`benchmarks/memory.py`); docs/memory.md has how far each prediction is off.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.config import Config, sample_prompts
from lorakit.config.graphs import graphs_off
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join
from lorakit.engine import weight_storage
from lorakit.families.spec import LayerUse

if TYPE_CHECKING:
    from lorakit.families.describe import BaseInfo

GIB = 2**30
# Activations kept for the backward pass, as multiples of the values that come out of layers: of blocks, and of the
# largest recomputed block. First of layers that save as little as they can, then of others.
SAVE_LESS_FACTORS = {"attention": (1.15, 2.1), "linear": (1.22, 3.2), "linear+conv": (1.35, 4.2)}
SAVE_ALL_FACTORS = {"attention": (1.75, 3.4), "linear": (1.95, 3.4), "linear+conv": (2.05, 3.4)}
# The same for the outputs of layers that are in no block, and for the inputs of recomputed blocks.
OUTSIDE, INPUTS = 0.9, 0.6
# The same for the outputs of a trained text encoder's layers, which save all and are never recomputed. These are of
# CLIP's quick GELU; a GELU saves less.
TEXT_FACTORS = {"attention": 1.7, "linear": 2.3, "linear+conv": 2.3}
# Random texts of `train.text_prior_weight` in a step for each photo.
RANDOM_TEXTS_A_PHOTO = 2
# A block that can be recomputed, by its path in the UNet.
BLOCK = re.compile(r"(?:.+\.)?(?:transformer_blocks|resnets)\.\d+")
# Share of the window of streamed weights that is filled at the peak: where pictures are largest weights are smallest.
FILLED = 0.65
# Memory of Python, torch and its kernels before a model is loaded.
RUNTIME_BYTES = {"cpu": 0.5 * GIB, "cuda": 0.6 * GIB, "mps": 0.6 * GIB}
# Stable Diffusion's autoencoder in float32: its weights, and what a pixel takes to encode, to decode, and to do either
# by strips, which `families.tiled_vae` does on a card that has no room for more.
VAE_BYTES, ENCODING, DECODING, TILED_VAE = 335_000_000, 2560, 3072, 288
TOO_LARGE = (
    "memory: the card has {gib} free, and a step may need more even with every block computed again; "
    "memory.base_storage = 'nf4' or a lower data.resolution makes it smaller"
)
# For each number of the largest weight, while it alone is stepped: gradient, weight and rounding in float32.
STEP_BYTES = 16
# Rows of CLIP's table of words, which is no layer.
VOCABULARY = 49408


def training(config: Config, info: BaseInfo, modules: Mapping[str, tuple[int, int]], device: str) -> dict[str, int]:
    """Part -> bytes at the peak of a training step.

    Args:
        info: the base, `families.BaseInfo`.
        modules: component -> (adapted layers, trained weights).
        device: "cpu", "cuda" or "mps".

    Raises:
        LorakitError: as `recomputed_blocks`.
    """
    recomputed = set(recomputed_blocks(config, info, modules, device))
    rest = _rest(config, info, modules, device)
    return {
        "base": rest["base"],
        "adapter and optimizer": rest["adapter and optimizer"],
        "activations": _activations(config, _blocks(config, info), device, recomputed) + rest["texts"],
        "runtime": rest["runtime"],
    }


def _rest(config: Config, info: BaseInfo, modules: Mapping[str, tuple[int, int]], device: str) -> dict[str, int]:
    """Memory of a training step in addition to the activations of the UNet."""
    width = _width(config, device)
    # The text encoders and the VAE leave a GPU once they have run; on a CPU there is nowhere to go.
    base_bytes = _unet(config, info, device)[0]
    base_bytes += sum(size for name, size in _encoders(info, width).items() if name in modules or device == "cpu")
    base_bytes += _vae(info) if device == "cpu" else 0
    trained = sum(weights for _, weights in modules.values())
    state = registry.optimizer(config.optimizer.name).state_bytes + (4 if config.train.ema_decay else 0)
    own = trained * (4 + 4 + state)
    if config.adapter.whole_model:
        # The weights are the base's. A gradient is freed as soon as its weight is stepped, in float32, unless several
        # batches add up.
        largest = max((math.prod(shape) for name, shape in info.layers.items() if name.startswith("unet.")), default=0)
        own = trained * (state + (width if config.train.gradient_accumulation_steps > 1 else 0)) + STEP_BYTES * largest
    return {
        "base": base_bytes,
        # The weight itself, its gradient and its average are float32.
        "adapter and optimizer": round(own),
        "texts": _text_activations(config, info, modules, device),
        "runtime": round(RUNTIME_BYTES[device]),
    }


def _text_activations(config: Config, info: BaseInfo, modules: Mapping[str, tuple[int, int]], device: str) -> int:
    """Bytes that trained text encoders save for the backward pass, if no two texts of a step are equal."""
    outputs = sum(
        shape[0]
        for name, shape in info.layers.items()
        if (component := name.partition(".")[0]) != "unet" and component in modules and ".layers." in name
    )
    tokens = info.text_tokens if registry.family_of(info.family).chunked_texts else info.max_tokens
    train = config.train
    texts = train.batch_size * (1 if train.prior == "none" else 2)
    texts += 1 + RANDOM_TEXTS_A_PHOTO * train.batch_size if train.text_prior_weight else 0
    return round(TEXT_FACTORS[config.adapter.target_modules] * outputs * tokens * texts * _width(config, device))


def peaks(config: Config, info: BaseInfo, modules: Mapping[str, tuple[int, int]], device: str) -> dict[str, int]:
    """Phase ("encoding", "training" or "samples") -> estimated peak in bytes.

    On a GPU, each part of the base is loaded alone while it encodes, and the autoencoder works in strips.
    """
    training_bytes = training(config, info, modules, device)
    pixels = config.data.resolution**2
    sizes = sample_prompts.parse_all(
        list(config.sample.prompts) or [""],
        config.sample,
        sample_prompts.default_size(config.sample, config.data.resolution),
    )
    sample_pixels = max(math.prod(prompt.size) for prompt in sizes)
    if device == "cpu":
        resident = training_bytes["base"] + training_bytes["runtime"]
        encoding = resident + ENCODING * pixels
        samples = resident + DECODING * sample_pixels + training_bytes["adapter and optimizer"]
        return {"encoding": encoding, "training": sum(training_bytes.values()), "samples": samples}
    width = _width(config, device)
    unet, encoders = _unet(config, info, device)[0], sum(_encoders(info, width).values())
    pictures = _vae(info) + (TILED_VAE if device == "cuda" else DECODING) * pixels
    # Class images and samples are drawn once their texts are embedded. What is trained never leaves.
    drawing = unet + pictures
    encoding = max(encoders, drawing if config.train.prior == "images" else pictures)
    trained = training_bytes["base"] - unet
    drawing = unet + _vae(info) + (TILED_VAE if device == "cuda" else DECODING) * sample_pixels
    samples = max(unet + encoders, drawing + trained) if trained else drawing
    return {
        "encoding": encoding + training_bytes["runtime"],
        "training": sum(training_bytes.values()),
        # Graphs keep their memory between steps.
        "samples": samples
        + training_bytes["adapter and optimizer"]
        + training_bytes["runtime"]
        + (training_bytes["activations"] if device == "cuda" and not graphs_off(config) else 0),
    }


def use_save_less(config: Config, device: str) -> bool:
    """Whether layers save less for the backward pass (`engine.recompute`): on a GPU memory is scarce, on a CPU time is.
    Compiled blocks save what the compiler chooses, plain blocks what autograd saves."""
    return device == "cuda" and not config.memory.compile and not config.engine_is_off


def limit_to(
    available: int | None, config: Config, info: BaseInfo, modules: Mapping[str, tuple[int, int]], device: str
) -> Config:
    """The config with the limit that an unset `memory.limit_gib` comes to on a CUDA card.

    It is the same config if a step needs no more than `available`. All blocks are recomputed if a step needs more even
    then.

    Args:
        available: bytes for this process, or None if unknown.
    """
    memory = config.memory
    is_auto = memory.limit_gib is None and not memory.gradient_checkpointing and not memory.compile
    if not is_auto or device != "cuda" or available is None:
        return config
    limited = dataclasses.replace(config, memory=dataclasses.replace(memory, limit_gib=available // (GIB // 10) / 10))
    try:
        return limited if recomputed_blocks(limited, info, modules, device) else config
    except LorakitError:
        return dataclasses.replace(config, memory=dataclasses.replace(memory, gradient_checkpointing=True))


def recomputed_blocks(config: Config, info: BaseInfo, modules: Mapping[str, tuple[int, int]], device: str) -> list[str]:
    """The UNet's blocks (their paths in it) that a step computes again in the backward pass: none, all, or those that
    `memory.limit_gib` asks for, first those where an operation saves most.

    Raises:
        LorakitError: a step takes more than the limit even with all of them.
    """
    blocks = _blocks(config, info)
    paths = [path for path in blocks if path]
    limit = config.memory.limit_gib
    if limit is None:
        return paths if config.memory.gradient_checkpointing else []
    factor, _ = _factors(config, device)
    order = sorted(paths, key=lambda path: blocks[path].memory_gain(factor) / blocks[path].flop, reverse=True)
    rest = sum(_rest(config, info, modules, device).values())
    for count in range(len(order) + 1):
        size = rest + _activations(config, blocks, device, set(order[:count]))
        if size <= limit * GIB:
            return order[:count]
    everything = dataclasses.replace(config.memory, limit_gib=None, gradient_checkpointing=True)
    unlimited = dataclasses.replace(config, memory=everything)
    raise LorakitError(
        "memory.limit_gib = {limit:g}: a step takes {size:.1f} GiB even if every block is computed again; "
        "raise it, or set {ways}",
        limit,
        size / GIB,
        _ways(unlimited, device),
    )


@dataclass
class _Block:
    """A part of the UNet: values that go into it and out of its layers, for one picture, and its multiplications."""

    inputs: int
    outputs: int = 0
    flop: float = 0

    def memory_gain(self, factor: float) -> float:
        return factor * self.outputs - INPUTS * self.inputs


def _blocks(config: Config, info: BaseInfo) -> dict[str, _Block]:
    """Path -> block; what is in none is under ""."""
    side = config.data.resolution // info.downscale
    result: dict[str, _Block] = {}
    for use in registry.family_of(info.family).layer_uses(info.layers, side, side, info.text_tokens):
        path = match[0] if (match := BLOCK.match(use.name.removeprefix("unet."))) else ""
        block = result.setdefault(path, _Block(use.shape[1] * use.places))
        block.outputs += use.shape[0] * use.places
        block.flop += flop(use)
    return result


def _activations(config: Config, blocks: Mapping[str, _Block], device: str, recomputed: set[str]) -> int:
    """Bytes saved for the backward pass when the blocks in `recomputed` are computed again in it."""
    factor, recomputed_factor = _factors(config, device)
    inner = {path: block for path, block in blocks.items() if path}
    total = OUTSIDE * (blocks[""].outputs if "" in blocks else 0)
    total += factor * sum(block.outputs for path, block in inner.items() if path not in recomputed)
    total += INPUTS * sum(inner[path].inputs for path in recomputed)
    total += recomputed_factor * max((inner[path].outputs for path in recomputed), default=0)
    pictures = config.train.batch_size * (1 if config.train.prior == "none" else 2)
    return round(total * _width(config, device) * pictures)


def _factors(config: Config, device: str) -> tuple[float, float]:
    return (SAVE_LESS_FACTORS if use_save_less(config, device) else SAVE_ALL_FACTORS)[config.adapter.target_modules]


def flop(use: LayerUse) -> float:
    """Multiplications and additions of a layer of the denoiser in a forward pass, those of attention with its query."""
    return 2.0 * math.prod(use.shape) * use.places + 4 * use.attended * use.shape[0]


def advice(doing: str, config: Config | None = None, device: str = "cuda") -> str:
    """Options that reduce memory, cheapest first. With a config, only those that it does not use yet."""
    return Message("{doing}: not enough memory on the device; cheapest first, set {ways}", doing, _ways(config, device))


def _ways(config: Config | None, device: str) -> str:
    ways = list[str]()
    if config is not None and config.memory.limit_gib is not None:
        ways.append(Message("a lower memory.limit_gib (now {gib:g})", config.memory.limit_gib))
    elif config is None or not config.memory.gradient_checkpointing:
        ways.append("memory.gradient_checkpointing = true")
    fused = config is None or not config.engine_is_off
    if config is None or (fused and config.memory.base_storage == "full"):
        ways.append("memory.base_storage = 'nf4'")
    if device == "cuda" and (config is None or (fused and not config.memory.stream_base)):
        ways.append("memory.stream_base = true")
    if config is None or config.train.batch_size > 1:
        pictures = "..." if config is None else config.train.batch_size * config.train.gradient_accumulation_steps
        ways.append(Message("train.batch_size = 1 with train.gradient_accumulation_steps = {pictures}", pictures))
    side = "a lower data.resolution"
    ways.append(Message("a lower data.resolution (now {side})", config.data.resolution) if config else side)
    return Message("{ways}, or {last}", join(", ", ways[:-1]), ways[-1]) if len(ways) > 1 else ways[-1]


def _width(config: Config, device: str) -> int:
    """Bytes of one of the base's weights in full."""
    precision = config.memory.mixed_precision
    return 2 if precision in ("bf16", "fp16") or (precision == "auto" and device == "cuda") else 4


def host_bytes(config: Config, info: BaseInfo, device: str) -> int:
    """Bytes of the host's memory that the UNet's weights take where they are streamed to a device, else 0."""
    return _unet(config, info, device)[1]


def _unet(config: Config, info: BaseInfo, device: str) -> tuple[int, int]:
    """Bytes of the UNet's weights as they are stored: on the device, and in the host's memory to be streamed there."""
    kind, width = config.memory.base_storage, _width(config, device)
    streamed = config.memory.stream_base and device == "cuda"
    there = host = 0
    for name, shape in info.layers.items():
        path = name.removeprefix("unet.")
        size = weight_storage.weight_nbytes(path, shape, kind, width) if path != name else 0
        if streamed and weight_storage.is_quantizable(path, math.prod(shape)):
            host += size
        else:
            there += size
    return there + min(host, round(FILLED * weight_storage.WINDOW_BYTES)), host


def _vae(info: BaseInfo) -> int:
    """Bytes of the autoencoder's weights. On disk they may be in half precision; in memory they never are."""
    source = info.sources.get("vae")
    slots = source.slots if source else (info.slots or {}).get("vae")
    if slots is not None:
        return sum(4 * math.prod(slot.shape) for slot in slots.values())
    return int(info.bytes.get("vae", VAE_BYTES)) * (2 if info.variants.get("vae") else 1)


def _encoders(info: BaseInfo, width: int) -> dict[str, int]:
    """Text encoder -> bytes of its weights."""
    result: dict[str, int] = {}
    for name, shape in info.layers.items():
        component = name.partition(".")[0]
        if component != "unet":
            if component not in result:  # the first layer is as wide as the table of words
                result[component] = VOCABULARY * shape[1] * width
            result[component] += math.prod(shape) * width
    return result
