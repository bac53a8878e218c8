"""Import of other trainers' configs, and Windows paths in TOML: the resulting options and the messages."""

from __future__ import annotations

import gzip
import json
import tomllib
from pathlib import Path

import pytest

from lorakit import config
from lorakit.adapters import targets
from lorakit.cli.main import _with_full_names, main
from lorakit.config import ConfigError, foreign, importing, sd_scripts

KEYS = Path(__file__).parents[1] / "formats" / "keys"
KOHYA = """
[model_arguments]
pretrained_model_name_or_path = "/models/sd15.safetensors"
[network]
network_module = "networks.lora"
network_dim = 32
unet_lr = 2e-4
text_encoder_lr = 5e-5
optimizer_type = "AdamW8bit"
[training]
max_train_epochs = 10
resolution = "768,512"
seed = 42
mixed_precision = "bf16"
network_args = ["a=1"]
optimizer_name_of_mine = 3
"""
DATASET = """
[general]
shuffle_caption = true
[[datasets]]
resolution = 640
batch_size = 4
  [[datasets.subsets]]
  image_dir = "photos"
  class_tokens = "sks dog"
  num_repeats = 10
"""
GUI = {"LoRA_type": "LyCORIS/LoHa", "network_dim": 8, "network_alpha": 4, "network_dropout": 0.5, "epoch": 3}
ONE_TRAINER = {
    "training_method": "LORA",
    "base_model_name": "owner/name",
    "lora_rank": 8,
    "optimizer": {"optimizer": "PRODIGY"},
    "epochs": 20,
    "text_encoder": {"train": False},
}


def test_kohyas_options_are_converted_and_others_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "my run.toml"
    source.write_text(KOHYA, encoding="utf-8")
    assert main(["import-config", str(source)]) == 0
    text = capsys.readouterr().out
    assert "optimizer_name_of_mine = 3" in text and "network_args" in text and "unet_lr" not in text
    assert f"lorakit check --preset '{tmp_path}/my run-lorakit.toml'" in text
    imported = config.load(tmp_path / "my run-lorakit.toml")
    assert (imported.adapter.rank, imported.adapter.effective_alpha, imported.adapter.train_text_encoder) == (
        32,
        1.0,
        True,
    )
    assert imported.adapter.target_modules == "linear" and imported.model.base == "/models/sd15.safetensors"
    assert (imported.optimizer.name, imported.optimizer.learning_rate) == ("adamw8bit", 2e-4)
    assert imported.optimizer.text_encoder_learning_rate == 5e-5 and imported.train.epochs == 10
    assert imported.data.resolution == 624 and imported.train.seed == 42 and imported.memory.mixed_precision == "bf16"
    assert main(["import-config", str(source)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_data_set_of_one_folder_and_configs_of_front_ends(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text(DATASET, encoding="utf-8")
    text, rest, _ = importing.convert(foreign.read(tmp_path / "d.toml"))
    assert (
        rest == ["num_repeats = 10 (name the folder 10_sks dog inside of data.folder)"]
        and 'name = "sks dog"' in text
        and "resolution = 640" in text
    )
    text, rest, _ = importing.convert(GUI)
    assert 'method = "loha"' in text and "rank = 8" in text and "epochs = 3" in text
    assert len(rest) == 1 and rest[0].startswith("adapter.dropout = 0.5 (unknown option adapter.dropout")
    text, rest, _ = importing.convert(ONE_TRAINER)
    assert 'name = "prodigy"' in text and "learning_rate = 1.0" in text and "epochs = 20" in text
    assert rest == ['training_method = "LORA"']
    with pytest.raises(ConfigError, match="neither a config of kohya's sd-scripts nor of OneTrainer"):
        importing.convert({"rank": 3})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("k.toml", KOHYA, "k.toml is a config of kohya's sd-scripts: lorakit import-config .*k.toml writes one for"),
        ("d.toml", DATASET, "d.toml is a config of kohya's sd-scripts"),
        ("a b.json", json.dumps(GUI), "a b.json is a config of kohya's sd-scripts: lorakit import-config '.*a b.json'"),
        ("o.json", json.dumps(ONE_TRAINER), "o.json is a config of OneTrainer"),
        ("x.json", "{}", "x.json is no preset: presets of lorakit are TOML files"),
        ("x.json", "{", "x.json cannot be read: "),
        ("x.yaml", "job: 1", "x.yaml is no preset: presets of lorakit are TOML files"),
        (
            "w.toml",
            '[model]\nbase = "C:\\Users\\me"\n',
            "w.toml: not valid TOML: .*; write a path of Windows in single",
        ),
        ("w.toml", '[model]\nbase = "D:\\train\\base"\n', "model.base = .*: write a path of Windows in single quotes"),
        ("w.toml", '[output]\nfolder = "D:\\new"\n', "output.folder = .*: write a path of Windows in single quotes"),
        ("w.toml", "[model]\nbase = \n", "w.toml: not valid TOML: [^;]*$"),
    ],
)
def test_a_file_that_is_no_preset_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        config.load(tmp_path / name)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "p", "--subject", "'sks dog'"], ["train", "p", "--subject", "'sks dog'"]),
        (["--subject", "'sks", "toy", "dog'", "p"], ["--subject", "'sks toy dog'", "p"]),
        (["--style='sks", "style'", "p"], ["--style='sks style'", "p"]),
        (["--set", "data.name='sks", "dog'"], ["--set", "data.name='sks dog'"]),
        (["--prompt", "'tis the day'"], ["--prompt", "'tis the day'"]),
        (["--subject", "'sks", "p"], ["--subject", "'sks", "p"]),
        (["p", "--prompt", "'a", "dog'", "q"], ["p", "--prompt", "'a dog'", "q"]),
        (["--prompt", "'tis", "--prompt", "dogs'"], ["--prompt", "'tis", "--prompt", "dogs'"]),
    ],
)
def test_words_of_a_name_without_quotes_are_joined(argv: list[str], expected: list[str]) -> None:
    assert _with_full_names(argv) == expected


def test_network_arguments_of_sd_scripts_are_converted() -> None:
    arguments = ["loraplus_lr_ratio=16", "conv_dim=4", "rank_dropout=0.1", "module_dropout=0.2", "algo=x"]
    blocks = [2] * 12 + [0] + [4] * 12
    table = {"network_dim": 8, "network_module": "networks.lora", "scale_weight_norms": 1.0}
    text, rest, _ = importing.convert(
        table | {"network_args": [*arguments, "block_dims=" + ",".join(map(str, blocks))], "max_train_steps": 5}
    )
    read = config.from_tables(tomllib.loads(text))
    assert (read.optimizer.loraplus_lr_ratio, read.train.max_weight_norm) == (16.0, 1.0)
    assert isinstance(read.adapter, config.LoraConfig)
    assert (read.adapter.rank_dropout, read.adapter.module_dropout) == (0.1, 0.2)
    assert rest == ['network_args = ["algo=x"]']
    places = {
        "unet.down_blocks.1.attentions.0.x": 2,
        "unet.down_blocks.2.downsamplers.0.conv": 2,
        "unet.mid_block.attentions.0.x": 0,
        "unet.up_blocks.3.attentions.2.x": 4,
        "unet.up_blocks.0.upsamplers.0.conv": 4,
    }
    for name, rank in places.items():
        assert targets.last_match(read.adapter.ranks, name, 8) == rank


@pytest.mark.parametrize(("family", "values"), [("sd15", 25), ("sdxl", 23)])
@pytest.mark.parametrize("convolutions", [[], ["conv_dim=4"]])
def test_every_pattern_of_an_imported_config_matches(family: str, values: int, convolutions: list[str]) -> None:
    table = {"network_module": "networks.lora", "network_train_unet_only": True, "network_dim": 8}
    blocks = ",".join(str(2 + number % 3) for number in range(values))
    text, *_ = importing.convert(
        table | {"network_args": [f"block_dims={blocks}", f"block_alphas={blocks}", *convolutions]}
    )
    read = config.from_tables(tomllib.loads(text))
    rows = gzip.decompress((KEYS / f"{family}.tsv.gz").read_bytes()).decode().splitlines()[1:]
    names = [row.split("\t")[0] for row in rows if row.startswith("unet.")]
    assert len(names) > 100 and targets.pattern_problems(read, family.removesuffix("5"), names) == []
    assert set(read.adapter.ranks.values()) == {2, 3, 4}


@pytest.mark.parametrize(
    ("index", "layer"),
    [
        (2, "down_blocks.0.resnets.0.conv1"),
        (4, "down_blocks.0.downsamplers.0.conv"),
        (6, "down_blocks.1.attentions.1.x"),
        (9, "down_blocks.2.attentions.1.x"),
        (10, "mid_block.resnets.0.conv1"),
        (11, "mid_block.attentions.0.x"),
        (13, "up_blocks.0.attentions.0.x"),
        (18, "up_blocks.1.upsamplers.0.conv"),
        (21, "up_blocks.2.resnets.2.conv1"),
    ],
)
def test_blocks_of_sdxl_equal_those_of_sd_scripts(index: int, layer: str) -> None:
    patterns = sd_scripts.block_patterns(",".join(str(number) for number in range(23)))
    assert targets.last_match(patterns, f"unet.{layer}", -1.0) == index
