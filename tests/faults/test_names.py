"""Tests that a name inside another person's file never leads outside the folder that is read or written."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorakit.cli.main import main
from lorakit.config import ConfigError, from_tables
from lorakit.core.errors import LorakitError
from lorakit.core.names import is_file_name
from lorakit.families import weight_files
from lorakit.formats import inspect, read
from lorakit.formats.saving import save_adapter
from lorakit.runs import batch

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TENSORS = {
    f"{LAYER}.lora_down.weight": torch.ones(2, 768),
    f"{LAYER}.lora_up.weight": torch.ones(320, 2),
    f"{LAYER}.alpha": torch.tensor(2.0),
}
STRANGE = ["../x", "..", ".", ".hidden", "a/../../x", "/tmp/x", "..\\x", "C:x", "x.", "x\x00y", "x\x1b[2J", "x\u202ey"]
STRANGE += ["9" * 300, "\u00e9" * 150, "", "con", "NUL", "aux.v1", "com1", "lpt\u00b9"]


@pytest.mark.parametrize("word", STRANGE)
def test_a_word_in_an_adapter_cannot_lead_outside_the_folder(tmp_path, word):
    assert not is_file_name(word)
    file = tmp_path / "in" / "deep" / "x.safetensors"
    file.parent.mkdir(parents=True)
    (tmp_path / "in" / "x.safetensors").write_bytes(b"mine")
    for tensors, metadata in (
        ({f"bundle_emb.{word}.emb_params": torch.ones(1, 768)}, {}),
        ({}, {"lorakit.words": word}),
    ):
        save_file(TENSORS | tensors, file, metadata)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert inspect.inspect(file).to_text()
        if word:
            with pytest.raises(LorakitError, match=r"no file can have|which is no word") as caught:
                save_adapter(read(file), file.parent / "y", formats=["kohya"])
            assert str(file) in str(caught.value) and len(str(caught.value)) < 300 + len(str(file))
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("word", ["sks", "sks-2", "sks.v1", "<s0>", "\u732b"])
def test_ordinary_words_of_other_programs_are_read(tmp_path, word):
    save_file(TENSORS | {f"bundle_emb.{word}.emb_params": torch.ones(1, 768)}, tmp_path / "x.safetensors")
    assert list(read(tmp_path / "x.safetensors").embeddings) == [word] and is_file_name(word)


@pytest.mark.parametrize(
    "table", [{"a": name} for name in STRANGE] + [{"a": 1}, {"a": ["x"]}, {"a": None}, [], None, "x", 3]
)
def test_an_index_may_only_list_files_beside_it(tmp_path, table):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}), encoding="utf-8")
    with pytest.raises(LorakitError, match="is no name of a file beside it") as caught:
        weight_files.weight_files(tmp_path, "model")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300 + len(str(index))


@pytest.mark.parametrize(
    "tables", [{"x" * 3000: {}}, {"train": {"x" * 3000: 1}}, {"optimizer": {"args": {"\x1b[2J" * 1000: None}}}]
)
def test_strange_keys_of_a_config_are_reported_in_short_lines(tables):
    with pytest.raises(ConfigError) as caught:
        from_tables(tables, {})
    assert all(len(problem) < 300 and problem.isprintable() for problem in caught.value.problems)


DEVICE = r"{} = '{}': Windows keeps this name for a device, and has no file of it: choose another"


@pytest.mark.parametrize(
    ("options", "key", "name"),
    [
        ({"data.name": "con"}, "data.name", "con"),
        ({"data.name": "NUL."}, "data.name", "NUL."),
        ({"data.name": "aux dog", "adapter.new_tokens": 1}, "data.name", "aux dog"),
        ({"data.name": "com1 dog", "adapter.method": "embedding", "train.prior": "none"}, "data.name", "com1 dog"),
        ({"data.name": "sks dog", "output.folder": "runs/lpt9"}, "output.folder", "lpt9"),
        ({"data.name": "sks dog", "output.folder": "runs/Prn.old"}, "output.folder", "Prn.old"),
    ],
)
def test_device_names_of_windows_are_refused_for_a_run(options: dict[str, object], key: str, name: str):
    tables: dict[str, dict[str, object]] = {"train": {"steps": 1}}
    for dotted, value in options.items():
        section, _, option = dotted.partition(".")
        tables.setdefault(section, {})[option] = value
    with pytest.raises(ConfigError) as caught:
        from_tables(tables)
    assert str(caught.value) == DEVICE.format(key, name)
    from_tables({"train": {"steps": 1}, "data": {"name": "aux dog"}, "output": {"folder": "runs/console"}})


def test_device_names_of_windows_are_refused_for_an_adapter(tmp_path, capsys):
    save_file(TENSORS, tmp_path / "x.safetensors", {"ss_base_model_version": "sd_v1"})
    file, out = str(tmp_path / "x.safetensors"), str(tmp_path / "out")
    for command in (["combine", file, file, "--name", "con"], ["combine", file, file, "--name", "com1.safetensors"]):
        assert main([*command, "--output", out]) == 1
        name = command[-1].removesuffix(".safetensors")
        assert capsys.readouterr().err == f"lorakit: {DEVICE.format('--name', name)}\n"
    assert main(["merge", file, "--base", "pocket", "--output", str(tmp_path / "NUL.safetensors")]) == 1
    assert DEVICE.format("--output", "NUL.safetensors") in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "NUL.safetensors").exists()


def test_device_names_of_windows_are_refused_in_a_batch(tmp_path):
    for name in ("aux", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name / "a.png")
    with pytest.raises(ConfigError) as caught:
        batch.read(tmp_path / "photos", None, {}, tmp_path / "runs")
    assert DEVICE.format("name", "aux") in str(caught.value)
