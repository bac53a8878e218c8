"""An autoencoder instead of the base's own: `model.vae` names a folder, a file or a hub id. No torch.

Its latents must match those that the base was trained with: number of channels, size and scale. Files lack the scale;
their names and metadata are checked instead, and only cause a warning.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.core import registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import expand
from lorakit.families import hub, ldm, single_file, weight_files
from lorakit.families.facts import fit
from lorakit.families.spec import Configs

_Config = dict[str, Any]

CLASS, WEIGHTS = "AutoencoderKL", "diffusion_pytorch_model"
# diffusers' default; early configurations leave it out.
SCALING_FACTOR = 0.18215
SCALE_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
FACTS = (*SCALE_KEYS, "norm_num_groups", "force_upcast")
CONVERT = "convert it once with diffusers: AutoencoderKL.from_single_file(FILE).save_pretrained(FOLDER)"
# Names of the attention's parts in early diffusers; SD1.5's own repository still has them.
_OLD_ATTENTION = re.compile(r"\.attentions\.0\.(query|key|value|proj_attn)\.")
_OLD_WORDS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Source:
    """The location of one component's weights.

    Attributes:
        path: a folder in diffusers layout, or a file.
        slots: the slot of each tensor in the file; None for a folder.
        variant: the variant in the folder's file names.
    """

    path: Path
    slots: Mapping[str, ldm.Slot] | None = None
    variant: str | None = None


@dataclass(frozen=True)
class Vae:
    """An autoencoder: its location, its config.json (real or derived), its files, and messages for the user."""

    source: Source
    config: _Config
    content: tuple[Path, ...]
    note: str
    warning: str = ""


def find(name: str, base: str, family: str, configs: Configs) -> Vae:
    """The autoencoder that `model.vae` names.

    Args:
        base: the base's title, for messages.
        configs: configurations of the base's parts, with "vae" if the base has one.

    Raises:
        LorakitError: it does not exist, is something else, or its latents do not match the base.
    """
    path, note = expand(name), Message("vae: {place}, as model.vae says", name)
    if not path.exists():
        hub_id = hub.parse(name)
        if hub_id is None:
            raise LorakitError("model.vae: {name} does not exist: give a folder, a .safetensors file or a hub id", name)
        path, _ = hub.find_vae(hub_id)
    layout = registry.version_of(family).layout
    own = configs.get("vae") or {"scaling_factor": layout.scaling_factor if layout else None}
    vae = _of_folder(path, note) if path.is_dir() else _of_file(path, note, family, own)
    if problem := _misfit(vae.config, own, configs["unet"], base):
        raise LorakitError("model.vae: {name} {why}: give a VAE of its family", name, problem)
    slots, files = vae.source.slots, [path for path in vae.content if path.suffix != ".json"]
    tensors = {n: slot.shape for n, slot in slots.items()} if slots else weight_files.shapes(files)
    present = {current_name(key): shape for key, shape in tensors.items()}
    fit.require(f"model.vae: {name}", "vae", vae.config, present, "the rest of it")
    return vae


def replacement(name: str, facts: _Config) -> dict[str, Any]:
    """The changed facts of a `describe.BaseInfo` with the autoencoder of `model.vae`.

    Raises:
        LorakitError: as `find`.
    """
    vae = find(name, facts["title"], facts["family"], facts["configs"])
    index = facts["configs"]["model_index"] | {"vae": ["diffusers", CLASS]}
    return {
        "configs": facts["configs"] | {"vae": vae.config, "model_index": index},
        "sources": {**facts.get("sources", {}), "vae": vae.source},
        "bytes": facts["bytes"] | {"vae": sum(path.stat().st_size for path in vae.content if path.suffix != ".json")},
        "variants": facts["variants"] | {"vae": vae.source.variant},
        "content": (*facts["content"], *vae.content),
        "notes": (*facts["notes"], vae.note),
        "warnings": tuple(filter(None, [vae.warning])),
    }


def pin(name: str) -> str:
    """`model.vae` with the current commit of its hub id.

    Raises:
        LorakitError: as `find`, if a hub id cannot be found.
    """
    hub_id = hub.parse(name) if name and not expand(name).exists() else None
    return name if hub_id is None else hub_id.at(hub.find_vae(hub_id)[1])


def _of_folder(path: Path, note: str) -> Vae:
    folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise LorakitError("model.vae: {path} has no config.json: give a folder in diffusers layout, or a file", path)
    files, variant = weight_files.weight_files(folder, WEIGHTS)
    config = weight_files.read_json(folder / "config.json")
    return Vae(Source(folder, None, variant), config, (folder / "config.json", *files), note)


def _of_file(path: Path, note: str, family: str, own: _Config) -> Vae:
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise LorakitError(
            "model.vae: {file} is a pickle, which can run code when it is read; {how}", path.name, CONVERT
        )
    header = safetensors_header.read(path)
    slots = _slots(header)
    if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= slots.keys():
        raise LorakitError(
            "model.vae: {file} has no encoder and decoder of Stable Diffusion's VAE: give a VAE", path.name
        )
    neighbor = path.parent / "config.json"
    if path.stem.startswith(WEIGHTS) and neighbor.is_file():
        return Vae(Source(path, slots), weight_files.read_json(neighbor), (neighbor, path), note)
    # Facts that shapes do not show, including the scale, are taken from the base's own.
    facts = {key: own[key] for key in ("sample_size", *FACTS) if own.get(key) is not None}
    # The file of a model shows its family, and so its scale.
    with contextlib.suppress(LorakitError):
        facts["scaling_factor"] = ldm.layout_of(ldm.detect_family(header.shapes(), path.name)).scaling_factor
    config = single_file.vae_config({name: slot.shape for name, slot in slots.items()}, 512) | facts
    words = " ".join([path.name, header.metadata.get("modelspec.architecture", "")])
    called = [layout for layout in ldm.layouts().values() if re.search(layout.vae_names, words, re.IGNORECASE)]
    alien = called and not any(layout.scaling_factor == own.get("scaling_factor") for layout in called)
    warning = Message(
        "model.vae: {file} is called like a VAE of another family than {family}: colors may be wrong", path.name, family
    )
    return Vae(Source(path, slots), config, (path,), note, warning if alien else "")


def _slots(header: safetensors_header.Header) -> dict[str, ldm.Slot]:
    """The slots of its tensors in a separate file or in a model's file, under LDM's or diffusers' names."""
    names = {key: current_name(key) for key in header.tensors}
    if not any(key.startswith("encoder.down_blocks.") for key in names):
        return ldm.read_part(header, "vae", replace(single_file.VAE, prefixes=("first_stage_model.", "vae.", "")))
    pattern, shapes = re.compile(single_file.VAE.tensors), header.shapes()
    return {
        ours: ldm.Slot(key, shapes[key][:2] if ".attentions." in ours else shapes[key])
        for key, ours in names.items()
        if pattern.fullmatch(ours)
    }


def current_name(name: str) -> str:
    """The name of an autoencoder's tensor in today's diffusers."""
    return _OLD_ATTENTION.sub(lambda match: f".attentions.0.{_OLD_WORDS[match[1]]}.", name)


def _misfit(config: _Config, own: _Config, unet: _Config, base: str) -> str:
    """The reason why an autoencoder's latents do not match a base, or "". `own` has the known facts of the base's
    autoencoder."""
    if config.get("_class_name", CLASS) != CLASS:
        return Message("is of class {kind}, and only {own} is read", config["_class_name"], CLASS)
    channels, into = config.get("latent_channels", 4), unet.get("in_channels", 4)
    if into not in (channels, 2 * channels + 1):
        return Message("makes latents of {count} channels, and base {base} takes {into}", channels, base, into)
    if "block_out_channels" in own and len(own["block_out_channels"]) != len(config["block_out_channels"]):
        return Message("makes latents of another size than those of base {base}", base)
    if own.get("scaling_factor", SCALING_FACTOR) is None:
        return ""
    before, after = (tuple(_scale(source, key) for key in SCALE_KEYS) for source in (own, config))
    if before != after:
        factors = [f"{source.get('scaling_factor', SCALING_FACTOR):g}" for source in (config, own)]
        factors[1] += ", with another offset" if factors[0] == factors[1] else ""
        return Message("has scaling factor {one}, and base {base} has {two}", factors[0], base, factors[1])
    return ""


def _scale(config: _Config, key: str) -> tuple[float, ...]:
    value = config.get(key)
    if value is None:
        value = SCALING_FACTOR if key == "scaling_factor" else 0.0
    return tuple(round(number, 4) for number in (value if isinstance(value, list) else [value]))
