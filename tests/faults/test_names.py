"""What a file of somebody else's gives as a name of a file never leads out of the folder that is written or read."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lorakit.config import ConfigError, from_tables
from lorakit.core.errors import LorakitError
from lorakit.core.names import is_file_name
from lorakit.families import weight_files
from lorakit.formats import inspect, read
from lorakit.formats.saving import save_adapter

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TENSORS = {
    f"{LAYER}.lora_down.weight": torch.ones(2, 768),
    f"{LAYER}.lora_up.weight": torch.ones(320, 2),
    f"{LAYER}.alpha": torch.tensor(2.0),
}
STRANGE = ["../x", "..", ".", ".hidden", "a/../../x", "/tmp/x", "..\\x", "C:x", "x.", "x\x00y", "x\x1b[2J", "x\u202ey"]
STRANGE += ["9" * 300, "\u00e9" * 150, ""]


@pytest.mark.parametrize("word", STRANGE)
def test_a_word_that_an_adapter_carries_cannot_be_written_elsewhere(tmp_path, word):
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
def test_words_of_other_programs_are_brought_back(tmp_path, word):
    save_file(TENSORS | {f"bundle_emb.{word}.emb_params": torch.ones(1, 768)}, tmp_path / "x.safetensors")
    assert list(read(tmp_path / "x.safetensors").embeddings) == [word] and is_file_name(word)


@pytest.mark.parametrize(
    "table", [{"a": name} for name in STRANGE] + [{"a": 1}, {"a": ["x"]}, {"a": None}, [], None, "x", 3]
)
def test_an_index_lists_files_beside_it(tmp_path, table):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}), encoding="utf-8")
    with pytest.raises(LorakitError, match="is no name of a file beside it") as caught:
        weight_files.weight_files(tmp_path, "model")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300 + len(str(index))


@pytest.mark.parametrize(
    "tables", [{"x" * 3000: {}}, {"train": {"x" * 3000: 1}}, {"optimizer": {"args": {"\x1b[2J" * 1000: None}}}]
)
def test_a_config_names_strange_keys_shortly(tables):
    with pytest.raises(ConfigError) as caught:
        from_tables(tables, {})
    assert all(len(problem) < 300 and problem.isprintable() for problem in caught.value.problems)
