"""Import of sd-scripts' configs: rates of blocks, several data sets, misspelt keys and sd-scripts' defaults."""

from __future__ import annotations

import gzip
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lorakit import config
from lorakit.adapters import targets
from lorakit.cli.main import main
from lorakit.config import foreign, importing

KEYS = Path(__file__).parents[1] / "formats" / "keys"
TABLE = {"network_module": "networks.lora", "network_train_unet_only": True, "network_dim": 8, "max_train_steps": 5}


def imported(arguments: list[str], **keys: Any) -> tuple[config.Config, list[str]]:
    text, rest, _ = importing.convert({**TABLE, "network_args": arguments, **keys})
    return config.from_tables(tomllib.loads(text)), rest


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        (
            ["down_lr_weight=0.5,0.5,0.5,0.5,1,1,1,1,1.5,1.5,1.5,1.5", "mid_lr_weight=2.0", "up_lr_weight=linear+.25"],
            {"down_blocks.0.attentions.0.x": 0.5, "down_blocks.2.attentions.1.x": 1.5, "mid_block.attentions.0.x": 2.0,
             "up_blocks.3.attentions.2.x": 1.25, "up_blocks.1.attentions.0.x": 3 / 11 + 0.25},
        ),
        (
            ["up_lr_weight=1,1,1,1,1,1,0.1,0.1,0.1,0.1,0.1,0.1"],
            {"down_blocks.0.attentions.0.x": 1.0, "up_blocks.1.attentions.2.x": 1.0, "up_blocks.2.attentions.0.x": 0.1},
        ),
        (
            ["down_lr_weight=0,0,0,0,0,0,1,1,1", "mid_lr_weight=1,0.5,1", "up_lr_weight=0.2,1,1,1,1,1,1,1,1"],
            {"down_blocks.2.attentions.0.x": 1.0, "mid_block.attentions.0.x": 0.5, "up_blocks.0.attentions.0.x": 0.2},
        ),
        (["mid_lr_weight=0.25"], {"mid_block.attentions.0.x": 0.25, "up_blocks.2.attentions.0.x": 1.0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("convolutions", [[], ["conv_dim=4"]])
def test_rates_of_blocks_are_patterns(arguments: list[str], rates: dict[str, float], convolutions: list[str]) -> None:
    read, rest = imported(arguments + convolutions)
    assert rest == []
    for name, rate in rates.items():
        assert targets.last_match(read.optimizer.rates, f"unet.{name}", 9.0) == pytest.approx(rate)
    family = "sdxl" if "mid_lr_weight=1,0.5,1" in arguments else "sd15"
    rows = gzip.decompress((KEYS / f"{family}.tsv.gz").read_bytes()).decode().splitlines()[1:]
    names = [row.split("\t")[0] for row in rows if row.startswith("unet.")]
    assert targets.pattern_problems(read, family.removesuffix("5"), names) == []


def test_a_block_of_rate_0_has_no_adapter() -> None:
    weights = ["down_lr_weight=0,0,0,0,0.05,1,1,1,1,1,1,1", "block_lr_zero_threshold=0.1"]
    read, _ = imported(weights)
    ranks = {n: targets.last_match(read.adapter.ranks, f"unet.down_blocks.{n}.attentions.0.x", 8) for n in (0, 1, 2)}
    assert ranks == {0: 0, 1: 0, 2: 8} and "unet.down_blocks.1.attentions.0.*" not in read.optimizer.rates


@pytest.mark.parametrize(
    "arguments", [["down_lr_weight=cosine"], ["up_lr_weight=1,2"], ["down_lr_weight=" + "1," * 13]]
)
def test_rates_that_fit_no_base_are_listed(arguments: list[str]) -> None:
    read, rest = imported(arguments)
    assert read.optimizer.rates == {} and rest[0].endswith("(12 values each, or 9 of SDXL)")


def data_sets(*rows: dict[str, Any], **general: Any) -> tuple[config.Config, list[str], list[str]]:
    text, rest, notes = importing.convert({**TABLE, "general": general, "datasets": list(rows)})
    return config.from_tables(tomllib.loads(text)), rest, notes


def test_the_same_photos_in_several_data_sets_are_several_resolutions() -> None:
    subset = [{"image_dir": "/d/photos", "class_tokens": "sks dog"}]
    read, rest, notes = data_sets(
        {"resolution": 512, "batch_size": 4, "subsets": subset},
        {"resolution": [768, 768], "batch_size": 2, "subsets": subset},
        {"resolution": 1024, "batch_size": 2, "subsets": subset},
        shuffle_caption=True,
    )
    assert rest == [] and notes[0] == "batch_size = 2: the smallest of 2, 4" and read.train.batch_size == 2
    assert (read.data.folder, read.data.name, read.data.shuffle_tags) == ("/d/photos", "sks dog", True)
    assert read.data.resolutions == (1024, 768, 512)


def test_folders_side_by_side_have_their_own_resolution_and_names() -> None:
    read, rest, notes = data_sets(
        {"resolution": 512, "keep_tokens": 1, "subsets": [
            {"image_dir": "C:\\d\\5_hoge girl", "class_tokens": "hoge girl", "num_repeats": 5},
            {"image_dir": "C:\\d\\fuga", "class_tokens": "fuga boy", "keep_tokens": 2},
            {"image_dir": "C:\\r\\reg", "is_reg": True},
        ]},
        {"resolution": [768, 768], "subsets": [{"image_dir": "C:\\d\\piyo", "class_tokens": "piyo", "num_repeats": 3}]},
        shuffle_caption=True,
    )  # fmt: skip
    assert (read.data.folder, read.data.concepts, read.data.resolution) == ("C:\\d", "folders", 768)
    assert read.data.folder_resolutions == {"5_hoge girl": 512, "fuga": 512}
    assert (read.data.class_folder, read.train.prior) == ("C:\\r\\reg", "images")
    assert rest == [
        "keep_tokens = [1, 2, None] (another one in each data set)",
        'class_tokens = "fuga boy" (name its folder so: 1_fuga boy)',
        "num_repeats = 3 (name the folder 3_piyo inside of data.folder)",
    ]
    assert "C:\\d: photos in all of its folders are trained" in notes


def test_folders_without_a_common_parent_are_listed() -> None:
    read, rest, _ = data_sets(
        {"resolution": 512, "subsets": [{"image_dir": "/a/x"}]}, {"resolution": 640, "subsets": [{"image_dir": "/b/y"}]}
    )
    assert read.data.folder == "" and rest == [
        "image_dir = ['/a/x', '/b/y'] (one folder with these in it is trained)",
        "resolution = [[512], [640]] (another one in each data set)",
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("netwrok_dim", "network_dim"),
        ("max_train_step", "max_train_steps"),
        ("train_batchsize", "train_batch_size"),
        ("epoc", "epoch"),
        ("sead", "seed"),
        ("lerning_rate", "learning_rate"),
        ("save_every_n_epochs", ""),
        ("caption_extension", ""),
        ("lr_scheduler_type", ""),
        ("keep_tokens_separator", ""),
        ("output_name", ""),
    ],
)
def test_a_misspelt_key_gets_a_suggestion(key: str, hint: str) -> None:
    _, rest = imported([], **{key: 3})
    assert rest == [f"{key} = 3{f' (did you mean {hint}?)' if hint else ''}"]


def test_defaults_of_sd_scripts_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"network_module": "networks.lora"}), encoding="utf-8")
    assert main(["import-config", str(tmp_path / "a.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "filled in or joined:",
        "  network_dim = 4: not set, so sd-scripts' own default",
        "  network_alpha = 1.0: not set, so sd-scripts' own default",
        "  max_train_steps = 1600: not set, so sd-scripts' own default",
        "  network_train_unet_only = false: not set, so sd-scripts' own default",
    ]
    assert importing.convert({**TABLE, "network_alpha": 4}).notes == []


def test_more_keys_are_converted(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog --w 512\n", encoding="utf-8")
    read, rest = imported(
        [],
        clip_skip=2,
        optimizer_args=["weight_decay=0.1", "betas=0.9,0.95"],
        sample_prompts=str(tmp_path / "p.txt"),
        v_parameterization=True,
        zero_terminal_snr=True,
        max_token_length=225,
        xformers=True,
    )
    assert rest == [] and read.model.clip_skip == 2 and read.sample.prompts == ("a dog --w 512",)
    assert (read.optimizer.weight_decay, read.optimizer.args) == (0.1, {"betas": [0.9, 0.95]})
    assert (read.model.prediction_type, read.data.max_tokens) == ("v_prediction_zero_snr", 225)
    assert imported([], clip_skip=1)[0].model.clip_skip is None
    read, rest = imported(["rank_dropout=0.2", "module_dropout=0.1"], network_module="", LoRA_type="LyCORIS/LoKr")
    assert rest == [] and getattr(read.adapter, "rank_dropout", None) == 0.2 and read.adapter.method == "lokr"


@pytest.mark.parametrize(
    "content",
    [
        {"datasets": [{}]},
        {"datasets": []},
        {"datasets": [3]},
        {"datasets": {"a": 1}},
        {"datasets": [{}], "general": 3},
        {
            "datasets": [
                {"subsets": [{"image_dir": "/a/b", "resolution": "big"}, {"image_dir": "/a/c", "resolution": 512}]}
            ]
        },
        {"datasets": [{"subsets": [{"image_dir": 3, "class_tokens": ["a"], "batch_size": "x"}, {"batch_size": 3}]}]},
    ],
)
def test_data_sets_of_odd_forms_are_read(content: dict[str, Any]) -> None:
    assert isinstance(foreign.program_of(content), str)
    assert "[data]" in importing.convert(content).text
