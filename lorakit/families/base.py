"""What a base model is, read from its configuration and its files' headers; nothing is asked, torch is not needed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit import modelfile, pocket
from lorakit.errors import LorakitError
from lorakit.families import headers
from lorakit.weights import canonical

CONVERT = "convert it once with diffusers: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
PREDICTIONS = ("epsilon", "v_prediction")
# What the name of a pipeline class in model_index.json may begin with -> the loader in registry.FAMILIES.
LOADERS = {"StableDiffusionXL": "sdxl", "StableDiffusion": "sd"}
# Not every class with such a name is one of these families.
OTHERS = ("StableDiffusion3", "StableDiffusionUpscale", "StableDiffusionLatentUpscale", "StableDiffusionImageVariation")
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


@dataclass(frozen=True)
class BaseInfo:
    """What is known of a base before it is loaded.

    Attributes:
        path: its folder, in diffusers layout.
        family: "sd1", "sd2" or "sdxl": what adapters for it are called. With one text encoder it is sd2 where the
            UNet's cross-attention is 1024 wide, which only SD2's OpenCLIP has, and sd1 otherwise, small ones included.
        loader: name in `registry.FAMILIES`.
        prediction_type: "epsilon" or "v_prediction", from the scheduler's configuration.
        latent_channels: channels of the latents.
        downscale: pixels to a latent, along a side.
        max_tokens: tokens of a text, start and end included.
        cross_dim: width of the text embeddings that the UNet attends to.
        layers: canonical name -> weight shape of every linear and convolutional layer of UNet and text encoders.
        idle: layers that no gradient ever reaches: SDXL reads its first text encoder before the last layer.
        bytes: component -> bytes of its weights on disk.
        variants: component -> variant in its files' names ("fp16", "bf16" or None).
        hash: identity of weights and configuration, cheap to compute.
        title: name to call it by.
    """

    path: Path
    family: str
    loader: str
    prediction_type: str
    latent_channels: int
    downscale: int
    max_tokens: int
    cross_dim: int
    layers: dict[str, tuple[int, ...]] = field(repr=False)
    idle: frozenset[str] = field(repr=False)
    bytes: dict[str, int]
    variants: dict[str, str | None]
    hash: str
    title: str


def describe(base: str | Path) -> BaseInfo:
    """Read what `base` is: "pocket", or a folder in diffusers layout.

    Raises:
        LorakitError: it is not there, is something else (named for what it is), or lacks something (all of it listed).
    """
    path = pocket.path() if str(base) == "pocket" else Path(base).expanduser()
    index = _index(path, str(base))
    loader = _loader(path, index)
    encoders = ["text_encoder", "text_encoder_2"] if loader == "sdxl" else ["text_encoder"]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    missing = [name for name in ("unet", "vae", "scheduler", *encoders, *tokenizers) if not (path / name).is_dir()]
    if missing:
        raise LorakitError(f"base {path} lacks {', '.join(f'{name}/' for name in missing)}: get the base again")
    for name in tokenizers:
        _check_tokenizer(path / name)
    unet, vae = (headers.read_json(path / name / "config.json") for name in ("unet", "vae"))
    scheduler = headers.read_json(path / "scheduler" / "scheduler_config.json")
    texts = [headers.read_json(path / name / "config.json") for name in encoders]
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise LorakitError(f"base {path} predicts {prediction!r}: only {' and '.join(PREDICTIONS)} can be trained")
    channels = vae.get("latent_channels", 4)
    _check_channels(path, unet.get("in_channels", 4), channels)
    found = {name: headers.weight_files(path / name, WEIGHTS.get(name, "model")) for name in ("unet", "vae", *encoders)}
    layers: dict[str, tuple[int, ...]] = {}
    for component in ("unet", *encoders):
        layers |= _layers(component, headers.shapes(found[component][0]))
    cross_dim = unet["cross_attention_dim"]
    family = "sdxl" if loader == "sdxl" else "sd2" if cross_dim == 1024 else "sd1"
    return BaseInfo(
        path=path,
        family=family,
        loader=loader,
        prediction_type=prediction,
        latent_channels=channels,
        downscale=2 ** (len(vae["block_out_channels"]) - 1),
        max_tokens=min(_max_tokens(path / name, text) for name, text in zip(tokenizers, texts, strict=True)),
        cross_dim=cross_dim,
        layers=layers,
        idle=frozenset(_last_text_layer(layers, "text_encoder") if loader == "sdxl" else ()),
        bytes={name: sum(file.stat().st_size for file in files) for name, (files, _) in found.items()},
        variants={name: variant for name, (_, variant) in found.items()},
        hash=headers.identity([*_configs(path), *(file for files, _ in found.values() for file in files)]),
        title="pocket" if str(base) == "pocket" else path.resolve().name,
    )


def _index(path: Path, asked: str) -> dict[str, Any]:
    """The folder's model_index.json, or what is there instead."""
    if path.is_file():
        raise LorakitError(f"base {path.name} {_what_file(path)}")
    if not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", asked) and not path.parent.is_dir():
            raise LorakitError(f"base {asked!r} is not a folder here; hub ids are not read yet: download it first")
        raise LorakitError(f"base folder {path} does not exist")
    if not (path / "model_index.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise LorakitError(f"base {path} is a PEFT adapter, not a base model")
        inside = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
        found = f"it holds {', '.join(inside[:5])}{' ...' if len(inside) > 5 else ''}" if inside else "it is empty"
        raise LorakitError(f"base {path} is not a folder in diffusers layout: no model_index.json; {found}")
    return headers.read_json(path / "model_index.json")


def _loader(path: Path, index: dict[str, Any]) -> str:
    name = str(index.get("_class_name", "unknown"))
    for start, loader in LOADERS.items():
        if name.startswith(start) and not name.startswith(OTHERS):
            return loader
    raise LorakitError(f"base {path} is a {name}; lorakit trains Stable Diffusion 1.x, 2.x and XL")


def _check_channels(path: Path, into: int, latent: int) -> None:
    if into == latent:
        return
    if into == 2 * latent + 1:
        raise LorakitError(f"base {path} is an inpainting model ({into} input channels), which is not trained yet")
    raise LorakitError(f"base {path}: its UNet takes {into} channels, its latents have {latent}; that is not trained")


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise LorakitError(f"{folder.name}/{name} is missing in {folder.parent}: get the base again")


def _configs(path: Path) -> list[Path]:
    """Configuration files: with the same weights, another prediction type or schedule makes another base."""
    return [path / "unet" / "config.json", path / "vae" / "config.json", path / "scheduler" / "scheduler_config.json"]


def _max_tokens(tokenizer: Path, text: dict[str, Any]) -> int:
    # A tokenizer without a configuration says 1e30; the text encoder's positions are the true limit.
    positions = int(text.get("max_position_embeddings", 77))
    config = tokenizer / "tokenizer_config.json"
    said = headers.read_json(config).get("model_max_length", positions) if config.is_file() else positions
    return int(min(said, positions))


def _layers(component: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Linear and convolutional layers: weights of two or four axes that are not embedding tables."""
    return {
        canonical(component, name.removesuffix(".weight")): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4) and "embeddings." not in name
    }


def _last_text_layer(layers: Iterable[str], component: str) -> list[str]:
    numbered = {
        name: int(match[1]) for name in layers if (match := re.match(rf"{component}\..*\.layers\.(\d+)\.", name))
    }
    last = max(numbered.values(), default=-1)
    return [name for name, number in numbered.items() if number == last]


_ADAPTER = "is an adapter (LoRA), not a base model: give the model that it was made for"
_KINDS = {
    "adapter": _ADAPTER,
    "lycoris": _ADAPTER,
    "checkpoint": f"is a single-file checkpoint, which is not read yet; {CONVERT}",
    "unet": "is a UNet alone: give the whole folder in diffusers layout",
    "vae": "is a VAE alone, not a base model",
    "text encoder": "is a text encoder alone: give the whole folder in diffusers layout",
    "embedding": "is a textual-inversion embedding, not a base model",
    "controlnet": "is a ControlNet, not a base model",
    "unknown": "is a safetensors file of no kind known here: give a folder in diffusers layout",
}


def _what_file(path: Path) -> str:
    """What a single file given as a base is, and what to do with it; continues "base NAME ..."."""
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return f"is a pickle, which can run code when it is read; {CONVERT}"
    if path.suffix != ".safetensors":
        return "is a file, not a base model: give a folder in diffusers layout"
    return _KINDS[modelfile.kind(modelfile.read(path).shapes())]
