"""Tests of a file's metadata: it has what programs look for, and of the user's data only the trigger."""

import getpass
import hashlib
import json
import struct
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
import random_adapters
import torch
from safetensors.torch import load_file, save, save_file

from lorakit import config as configuration
from lorakit.cli import main as cli
from lorakit.core import safetensors_header
from lorakit.formats import inspect, kohya, metadata, save as export_save

SHAPES = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (8, 8)}
SECRETS = [
    "Geburtstag bei Oma",
    "a photo of my daughter",
    "holiday-pictures",
    "secret-runs",
    "blurry aunt",
    "adapter-0",
]


@dataclass(frozen=True)
class Info:
    family: str = "sd1"
    prediction_type: str = "epsilon"
    title: str = "dreamshaper"
    hash: str = "0123abcd"
    source: str = ""


def metadata_of(info=None, **extra):
    config = configuration.load(
        None,
        {
            "model.base": str(Path.home() / "models" / "dreamshaper"),
            "data.folder": str(Path.home() / SECRETS[2]),
            "data.name": "sks dog",
            "data.instance_prompt": SECRETS[0],
            "data.class_prompt": SECRETS[1],
            "sample.prompts": [SECRETS[0], "sks dog on the moon"],
            "sample.negative_prompt": SECRETS[4],
            "train.init_from": str(Path.home() / f"{SECRETS[5]}.safetensors"),
            "output.folder": str(Path.home() / SECRETS[3]),
            "train.steps": 100,
            **extra,
        },
    )
    return metadata.build(
        config, info or Info(), name="sks-dog", images=5, steps=100, epochs=20, times=(1.7e9, 1.7e9 + 60)
    )


def test_no_private_data_is_in_the_file(tmp_path):
    paths = export_save(
        random_adapters.adapter(SHAPES, "sd1"),
        tmp_path,
        "sks-dog",
        ["kohya", "diffusers", "peft"],
        "fp16",
        metadata_of(),
    )
    files = [p for path in [*paths.values(), tmp_path] for p in ([path] if path.is_file() else path.rglob("*"))]
    for path in files:
        text = path.read_bytes() if path.is_file() else b""
        for secret in [*SECRETS, str(Path.home()), str(tmp_path), Path.cwd().name + "/"]:
            assert secret.encode() not in text, (path.name, secret)
    head = safetensors_header.read(paths["kohya"])
    user = getpass.getuser()
    assert not any(f"/{user}" in value for value in head.metadata.values())
    assert head.metadata["modelspec.trigger_phrase"] == "sks dog"


def test_every_entry_is_allowed_and_a_string():
    for key, value in metadata_of().items():
        assert key in metadata.ALLOWED and isinstance(value, str)


@pytest.mark.parametrize(
    ("family", "prediction", "version", "v2", "architecture"),
    [
        ("sd1", "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd1", "v_prediction", "sd_v1_v", "False", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd2", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
        ("sdxl", "v_prediction", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_web_uis_recognize_the_family(tmp_path, family, prediction, version, v2, architecture):
    entries = metadata_of(Info(family=family, prediction_type=prediction))
    weights = random_adapters.adapter(SHAPES, family, rank=8, alpha=4)
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp16", metadata=entries)
    head = safetensors_header.read(path).metadata
    assert head["ss_base_model_version"] == version and head["ss_v2"] == v2
    assert head["modelspec.architecture"] == architecture
    assert head["modelspec.prediction_type"] == ("epsilon" if prediction == "epsilon" else "v")
    assert (head["ss_network_module"], head["ss_network_dim"], head["ss_network_alpha"]) == ("networks.lora", "8", "4")
    assert head["modelspec.sai_model_spec"] == "1.0.1" and head["ss_output_name"] == "sks-dog"
    assert json.loads(head["ss_tag_frequency"]) == {"photos": {"sks dog": 5}}
    assert datetime.fromisoformat(head["modelspec.date"]).timestamp() == 1.7e9 + 60
    assert "lora_adapter_metadata" not in head and "ot_branch" not in head
    assert metadata.family(head) == family
    without = {key: value for key, value in head.items() if not key.startswith("lorakit.")}
    assert metadata.family(without) == family


def test_hashes_are_those_that_sd_scripts_computes(tmp_path):
    """The file is larger than 1 MiB, so that the legacy hash covers real bytes."""
    shapes = {f"unet.mid_block.attentions.0.{n}": (2048, 2048) for n in ("proj_in", "proj_out")}
    weights = random_adapters.adapter(shapes, "sdxl", rank=64)
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata=metadata_of(Info(family="sdxl")))
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    head = safetensors_header.read(path).metadata
    assert head["sshs_model_hash"] == hashlib.sha256(raw[8 + length :]).hexdigest()
    assert head["modelspec.hash_sha256"] == "0x" + head["sshs_model_hash"]
    plain = save(load_file(path), {key: value for key, value in head.items() if key.startswith("ss_")})
    assert head["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8] != "e3b0c442"


def test_small_files_have_the_legacy_hash_of_no_bytes(tmp_path):
    (path,) = kohya.write(random_adapters.adapter(SHAPES, "sd1"), tmp_path / "a.safetensors", dtype="fp16", metadata={})
    assert safetensors_header.read(path).metadata["sshs_legacy_hash"] == "e3b0c442"


def test_the_config_of_a_run_is_stored_and_can_be_loaded():
    tables = json.loads(metadata_of()["lorakit.config"])
    reloaded = configuration.from_tables(tables)
    assert reloaded.train.steps == 100 and reloaded.data.trigger == "sks" and reloaded.model.base == "pocket"
    assert reloaded.data.instance_prompt == "" and reloaded.sample.prompts == ()


def test_sidecar_has_what_a1111_and_invokeai_read():
    sidecar = metadata.sidecar(metadata_of(Info(family="sdxl")))
    assert (
        sidecar["activation text"] == "sks dog"
        and sidecar["sd version"] == "SDXL"
        and sidecar["preferred weight"] == 1.0
    )
    assert set(sidecar) == {
        "activation text",
        "preferred weight",
        "negative text",
        "description",
        "notes",
        "sd version",
    }


def test_the_family_is_unknown_without_evidence():
    assert metadata.family({}) is None and metadata.family({"format": "pt"}) is None


def test_several_subjects_are_all_named():
    entries = metadata.build(
        configuration.load(None, {"data.folder": "photos", "data.name": "sks dog", "train.steps": 9}),
        Info(),
        name="both",
        images=5,
        steps=9,
        epochs=1,
        times=(1.7e9, 1.7e9),
        subjects={"sks dog": 2, "ohwx cat": 3},
    )
    assert entries["modelspec.trigger_phrase"] == "sks dog, ohwx cat"
    assert json.loads(entries["ss_tag_frequency"]) == {"photos": {"sks dog": 2, "ohwx cat": 3}}
    assert metadata.sidecar(entries)["activation text"] == "sks dog, ohwx cat"


def test_without_a_trigger_no_trigger_is_written():
    entries = metadata_of(**{"data.name": ""})
    assert "modelspec.trigger_phrase" not in entries and "ss_tag_frequency" not in entries


# Written by sd-scripts, SwarmUI, Civitai's and A1111's tools.
FOREIGN = {
    **{"ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)", "ss_lr_scheduler": "cosine"},
    **{"ss_clip_skip": "2", "ss_min_snr_gamma": "5.0", "ss_training_comment": "my best", "ss_noise_offset": "0.05"},
    **{"ss_tag_frequency": json.dumps({"10_zib": {"zib hat": 10}}), "ss_sd_model_name": "v1-5.safetensors"},
    **{"modelspec.author": "Ada", "modelspec.license": "CC-BY-4.0", "modelspec.tags": "hat, red", "license": "mit"},
    **{"modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQ", "modelspec.usage_hint": "at 0.8"},
}
BEHIND = {
    **{"ss_dataset_dirs": json.dumps({"10_zib": {"n_repeats": 10}}), "ss_session_id": "12", "ss_datasets": "[]"},
    **{"ss_network_dim": "99", "ss_network_args": '{"conv_dim": 3}', "sshs_model_hash": "old", "ss_v2": "True"},
    **{"modelspec.hash_sha256": "0xold", "sshs_legacy_hash": "old", "ot_branch": "omi_format", "lorakit.secret": "1"},
    **{
        "ss_training_comment2": "from /srv/ada/photos",
        "ss_log": r'{"dir": "C:\\Users\\ada"}',
        "lora_adapter_metadata": "{}",
    },
    **{"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
}


@pytest.fixture
def foreign(tmp_path):
    """A LoRA for SD1 with the header of another program; some of its entries are wrong."""
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": torch.ones(4, 768), f"{stem}.lora_up.weight": torch.ones(8, 4)}
    entries = FOREIGN | BEHIND | {"ss_vae_name": "/srv/ada/vae/kl.safetensors", "modelspec.trigger_phrase": "zib"}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "hat.safetensors", metadata=entries)
    return tmp_path / "in" / "hat.safetensors"


@pytest.mark.parametrize(
    "command", [["export", "--to", "kohya"], ["export", "--to", "diffusers"], ["resize", "--rank", "2"], ["combine"]]
)
def test_only_harmless_metadata_of_other_programs_is_copied(foreign, tmp_path, command):
    name, *options = command
    assert cli.main([name, str(foreign), *options, "--output", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("*.safetensors")
    head = safetensors_header.read(path).metadata
    assert {key: head.get(key) for key in FOREIGN} == FOREIGN
    assert head["ss_vae_name"] == "kl.safetensors" and head["modelspec.trigger_phrase"] == "zib"
    assert not {key for key, value in BEHIND.items() if head.get(key) == value}
    assert (head["ss_base_model_version"], head["modelspec.architecture"]) == ("sd_v1", "stable-diffusion-v1/lora")
    raw = path.read_bytes()
    assert head["sshs_model_hash"] == hashlib.sha256(raw[8 + struct.unpack("<Q", raw[:8])[0] :]).hexdigest()
    assert "/srv" not in str(head) and "Users" not in str(head)
    assert head["ss_network_dim"] == ("2" if name == "resize" else "4")
    if path.with_suffix(".json").is_file():
        side = json.loads(path.with_suffix(".json").read_text())
        assert side["activation text"] == "zib" and side["notes"].startswith("written with lorakit")


def test_combined_metadata_has_what_is_true_of_all_adapters(tmp_path, foreign):
    entries = {
        "modelspec.author": "Bob",
        "license": "mit",
        "ss_clip_skip": "1",
        "ss_tag_frequency": '{"10_zib": {"cup": 3}}',
    }
    both = metadata.shared([safetensors_header.read(foreign).metadata, entries])
    assert (both["modelspec.author"], both["license"], both["modelspec.license"]) == ("Ada, Bob", "mit", "CC-BY-4.0")
    assert json.loads(both["ss_tag_frequency"]) == {"10_zib": {"zib hat": 10}, "10_zib (2)": {"cup": 3}}
    assert "ss_clip_skip" not in both and "modelspec.tags" not in both
    assert metadata.shared([{"ss_tag_frequency": "["}]) == {"ss_tag_frequency": "["}


@pytest.mark.parametrize("command", ["export", "resize"])
def test_the_preview_and_json_beside_are_copied(tmp_path, command, capsys):
    """A1111's preview, under each of its names, and the user's entries in the `.json` are copied."""
    adapter = random_adapters.adapter(SHAPES, "sd1")
    source = export_save(adapter, tmp_path, "one", ["kohya"], "fp16", {})["kohya"]
    (tmp_path / "one.preview.png").write_bytes(b"picture")
    (tmp_path / "one.json").write_text(json.dumps({"activation text": "zib", "notes": "mine", "sd version": "SDXL"}))
    size = ["--rank", "1"] if command == "resize" else ["--to", "kohya"]
    assert cli.main([command, str(source), *size, "--output", str(tmp_path / "new")]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.with_suffix(".png").read_bytes() == b"picture"
    table = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert (table["activation text"], table["notes"], table["sd version"]) == ("zib", "mine", "SD1")
    assert table["preferred weight"] == 1.0 and inspect.inspect(path).trigger == "zib"


def test_a_merged_bases_metadata_names_its_sources():
    base = {"modelspec.title": "base", "modelspec.license": "one", "other": "stays"}
    adapter = {"ss_output_name": "zib", "modelspec.license": "two", "modelspec.author": "me", "ss_network_dim": "4"}
    merged = metadata.of_merge(base, adapter | {"modelspec.trigger_phrase": "zib toy"})
    assert merged == base | {
        "modelspec.merged_from": "base, zib",
        "modelspec.license": "one, two",
        "modelspec.author": "me",
        "modelspec.trigger_phrase": "zib toy",
    }
    assert metadata.of_merge(merged, {"ss_output_name": "two"})["modelspec.merged_from"] == "base, zib, two"
    assert metadata.of_merge({"modelspec.title": "base"}, {})["modelspec.merged_from"] == "base"
