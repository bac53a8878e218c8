"""Tests of a VAE that replaces the base's own: every form that is read, and the forms that are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import small_models
import tiny
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from lorakit import families
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.cli import main as cli
from lorakit.config import ModelConfig, load
from lorakit.core.errors import LorakitError
from lorakit.families import loading
from lorakit.formats.edit import merge
from lorakit.formats.saving import save
from lorakit.runs.preflight import preflight
from lorakit.ui import texts

FORMS = ("folder", "base", "fp16", "ldm", "prefixed", "diffusers file", "old names", "beside", "checkpoint")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as folder and file, a file without a VAE, and another VAE in every form."""
    room = tmp_path_factory.mktemp("vaes")
    pipeline = small_models.small("sd1", room / "sd1")
    small_models.write(room / "sd1.safetensors", "sd1", pipeline)
    plain = {k: v for k, v in load_file(room / "sd1.safetensors").items() if not k.startswith("first_stage_model.")}
    save_file(plain, room / "no-vae.safetensors")
    torch.manual_seed(7)
    pipeline.vae = small_models.vae("sd1", 32)
    pipeline.vae.save_pretrained(room / "folder")
    pipeline.vae.save_pretrained(room / "base" / "vae")
    pipeline.vae.save_pretrained(room / "fp16", variant="fp16")
    small_models.write(room / "checkpoint.safetensors", "sd1", pipeline)
    prefix = "first_stage_model."
    ldm = {k: v for k, v in load_file(room / "checkpoint.safetensors").items() if k.startswith(prefix)}
    save_file(ldm, room / "prefixed.safetensors")
    save_file({k.removeprefix(prefix): v for k, v in ldm.items()}, room / "ldm.safetensors")
    own = load_file(room / "folder" / "diffusion_pytorch_model.safetensors")
    save_file(own, room / "diffusers file.safetensors")
    (room / "beside").mkdir()
    for file in (room / "folder").iterdir():
        shutil.copy(file, room / "beside")
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in own.items():
        for word, before in words.items():
            name = name.replace(f".attentions.0.{word}.", f".attentions.0.{before}.")
        old[name] = tensor
    assert old.keys() != own.keys()
    save_file(old, room / "old names.safetensors")
    return room


def place(room: Path, form: str) -> Path:
    if form == "beside":
        return room / "beside" / "diffusion_pytorch_model.safetensors"
    return room / form if (room / form).is_dir() else room / f"{form}.safetensors"


def described(room: Path, base: str, vae: object = "") -> families.BaseInfo:
    tokenizer = str(room / "sd1") if base.endswith("safetensors") else ""
    return families.describe(ModelConfig(base=str(room / base), vae=str(vae), tokenizer=tokenizer))


def vae_of(info: families.BaseInfo) -> dict[str, torch.Tensor]:
    return loading.load_vae(info).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["sd1", "no-vae.safetensors"])
def test_every_form_is_the_same_vae(form: str, base: str, room: Path) -> None:
    expected = AutoencoderKL.from_pretrained(room / "folder")
    info = described(room, base, place(room, form))
    loaded = loading.load_vae(info)
    assert loaded.config.scaling_factor == expected.config.scaling_factor == 0.18215
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert f"vae: {place(room, form)}, as model.vae says" in info.notes and not info.warnings


def test_the_vae_changes_the_bases_hash(room: Path) -> None:
    """Caches, checkpoints and class images use the hash, and `resume` compares it."""
    hashes = [described(room, "sd1", vae).hash for vae in ("", room / "folder", room / "ldm.safetensors")]
    assert len(set(hashes)) == 3 and hashes[1] == described(room, "sd1", room / "folder").hash
    assert described(room, "sd1").bytes["vae"] == described(room, "sd1", room / "folder").bytes["vae"]


@pytest.mark.slow
@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
@pytest.mark.parametrize("base", ["sd1", "sd1.safetensors", "no-vae.safetensors"])
@pytest.mark.parametrize("form", ["fp16", "ldm", "old names"])
def test_a_merged_model_contains_the_vae(form: str, base: str, output: str, room: Path, tmp_path: Path) -> None:
    info = described(room, base, place(room, form))
    name = next(name for name in info.layers if name.endswith("attn1.to_q"))
    rows, columns = info.layers[name]
    weights = AdapterWeights("sd1", "lora", {name: LoraLayer(torch.ones(2, columns), torch.ones(rows, 2), 1.0)})
    merge.merge(weights, info, tmp_path / output)
    shutil.copytree(room / "sd1" / "tokenizer", tmp_path / "tokenizer")
    merged = families.describe(str(tmp_path / output))
    actual, expected = vae_of(merged), vae_of(described(room, base, room / "folder"))
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)
    assert "vae" in merged.configs["model_index"]


def test_a_base_without_a_vae_is_refused_with_the_option(room: Path, tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"lacks its vae .* or give one by model.vae \(--vae\)"):
        described(room, "no-vae.safetensors")
    folder = shutil.copytree(room / "sd1", tmp_path / "base", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(LorakitError, match=r"lacks vae/: get the base again, or give a VAE by model.vae \(--vae\)"):
        families.describe(folder)
    info = families.describe(ModelConfig(base=str(folder), vae=str(room / "folder")))
    assert vae_of(info).keys() == vae_of(described(room, "sd1")).keys()


def altered(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return target


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scaling_factor": 0.13025}, "has scaling factor 0.13025, and base sd1 has 0.18215: give"),
        ({"shift_factor": 0.1}, "has scaling factor 0.18215, and base sd1 has 0.18215, with another offset: give"),
        (
            {"latents_mean": [1, 0, 0, 0], "latents_std": [1, 1, 1, 1]},
            "has scaling factor 0.18215, and base sd1 has 0.18215, with another offset: give",
        ),
        ({"latent_channels": 16}, "makes latents of 16 channels, and base sd1 takes 4: give a VAE of its family"),
        ({"_class_name": "AutoencoderTiny"}, "is of class AutoencoderTiny, and only AutoencoderKL is read"),
        ({"block_out_channels": [32, 32, 32]}, "makes latents of another size"),
    ],
    ids=str,
)
def test_a_vae_of_another_family_is_refused(change: dict[str, Any], reason: str, room: Path, tmp_path: Path) -> None:
    vae = altered(room / "folder", tmp_path / "vae", **change)
    with pytest.raises(LorakitError, match=f"model.vae: .*{reason}") as error:
        described(room, "sd1", vae)
    assert texts.sentences("zh-Hant").translated(str(error.value))


def test_an_early_configuration_has_the_default_scaling_factor(room: Path, tmp_path: Path, tiny_sdxl: Path) -> None:
    """stabilityai/sd-vae-ft-mse has such a configuration: the default 0.18215 applies, which is not SDXL's value."""
    vae = altered(room / "folder", tmp_path / "vae", scaling_factor=None)
    assert described(room, "sd1", vae).configs["vae"].get("scaling_factor") is None
    with pytest.raises(LorakitError, match=r"scaling factor 0\.18215, and base sdxl has 0\.13025"):
        families.describe(ModelConfig(base=str(tiny_sdxl), vae=str(vae)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("gone", None, "does not exist: give a folder, a .safetensors file or a hub id"),
        ("kl-f8-anime2.vae.pt", b"PK\x03\x04", "is a pickle, .* convert it once with diffusers: AutoencoderKL"),
        ("lora.safetensors", {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, "has no encoder and decoder"),
        ("taesd.safetensors", {"encoder.layers.0.weight": torch.zeros(4, 3, 3, 3)}, "has no encoder and decoder"),
        ("decoder.safetensors", {"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, "has no encoder and decoder"),
        ("empty", {}, "has no config.json"),
        ("owner/name", None, "is not in the cache and HF_HUB_OFFLINE is set"),
        ("owner/name/vae.safetensors", None, "is not in the cache and HF_HUB_OFFLINE is set"),
    ],
)
def test_other_files_than_vaes_are_refused(name: str, content: Any, reason: str, room: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == {}:
        path.mkdir()
    elif isinstance(content, dict):
        save_file(content, path)
    elif content:
        path.write_bytes(content)
    with pytest.raises(LorakitError, match=rf"model\.vae: .*{reason}") as error:
        described(room, "sd1", name if "/" in name else path)
    assert texts.sentences("zh-Hant").translated(str(error.value))


def test_a_vae_named_after_another_family_gives_a_warning(room: Path, tmp_path: Path, tiny_sdxl: Path) -> None:
    """A VAE file does not contain its scaling factor."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for base, name in [(room / "sd1", "sdxl_vae.safetensors"), (tiny_sdxl, "vae-ft-mse-840000.safetensors")]:
        vae = tiny.autoencoder(0.13025)
        source = tmp_path / name
        save_file(vae.state_dict() if "ft" in name else load_file(room / "ldm.safetensors"), source)
        config = load(
            None,
            {"model.base": str(base), "model.vae": str(source), "data.folder": str(photos), "train.steps": 1},
        )
        assert any(f"{name} is called like a VAE of another family" in line for line in preflight(config).warnings)


def test_a_vae_with_a_hub_id_is_fetched_and_pinned(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    served = altered(room / "folder", tmp_path / "served")
    (served / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (served / "sdxl_vae.safetensors").write_bytes(b"twin")
    requests: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server.serve(served, requests, "org/vae") as address, monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        info = described(room, "sd1", "org/vae")
        with pytest.raises(LorakitError, match=r"model\.vae: org/gone is not on the hub"):
            described(room, "sd1", "org/gone")
    assert not any("twin" in line or ".bin" in line or "sdxl_vae" in line for line in requests)
    pinned = families.pin(ModelConfig(base=str(room / "sd1"), vae="org/vae"))
    assert pinned.vae == f"org/vae@{hub_server.COMMIT}"
    assert vae_of(families.describe(pinned)).keys() == vae_of(info).keys()


def test_the_commands_take_a_vae(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    base = ["--base", str(room / "no-vae.safetensors"), "--set", f"model.tokenizer={room / 'sd1'}"]
    arguments = ["check", str(photos), "--subject", "sks toy", *base]
    assert cli.main(arguments) == 1
    assert "model.vae (--vae)" in capsys.readouterr().err
    cli.main([*arguments, "--vae", str(room / "ldm.safetensors")])
    assert "model.vae" not in capsys.readouterr().err


def test_samples_are_decoded_by_the_vae(tiny_sd1: Path, tmp_path: Path) -> None:
    """The latents stay the same, because the UNet does not use the VAE; only the decoded pictures differ."""
    info = families.describe(tiny_sd1)
    name = next(name for name in info.layers if name.endswith("attn1.to_q"))
    layer = LoraLayer(torch.ones(2, info.layers[name][1]), torch.ones(info.layers[name][0], 2), 1.0)
    adapter = save(AdapterWeights("sd1", "lora", {name: layer}), tmp_path, "a", ["kohya"], "fp32", {})["kohya"]
    torch.manual_seed(3)
    tiny.autoencoder(0.18215).save_pretrained(tmp_path / "vae")
    shutil.copytree(tiny_sd1, tmp_path / "whole", ignore=shutil.ignore_patterns("vae"))
    shutil.copytree(tmp_path / "vae", tmp_path / "whole" / "vae")
    pictures = {}
    for number, (base, vae) in enumerate(
        [(tiny_sd1, []), (tiny_sd1, ["--vae", str(tmp_path / "vae")]), (tmp_path / "whole", [])]
    ):
        options = ["--prompt", "a toy", "--size", "64", "--set", "sample.steps=1", "--set", "memory.device=cpu"]
        out = tmp_path / str(number)
        assert cli.main(["sample", str(adapter), "--base", str(base), *vae, *options, "--output", str(out)]) == 0
        pictures[number] = np.asarray(Image.open(out / "01-strength-1.png"))
    assert np.array_equal(pictures[1], pictures[2]) and not np.array_equal(pictures[0], pictures[1])


def test_a_checkpoints_keys_determine_the_scaling_factor_of_its_vae(room: Path, tiny_sdxl: Path) -> None:
    with pytest.raises(LorakitError, match=r"^model\.vae: .* has scaling factor 0\.18215, and base .* has 0\.13025"):
        families.describe(ModelConfig(base=str(tiny_sdxl), vae=str(room / "checkpoint.safetensors")))
