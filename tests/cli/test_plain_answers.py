"""Answers to errors of beginners: unknown flags, merging an unusual base into one file, rates of text encoders."""

import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from lorakit import config, formats
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.cli import main as cli
from lorakit.config import lr_schedule
from lorakit.families import describe
from lorakit.runs import preflight
from lorakit.ui import texts


@pytest.mark.parametrize(
    ("flag", "hints"),
    [
        ("--rank", ["adapter.rank"]),
        ("--outputs", ["adapter.outputs"]),  # only one method has this option
        ("--batch-size=4", ["train.batch_size"]),
        ("--learning_rat", ["optimizer.learning_rate"]),
        ("--stepz", ["train.steps", "sample.steps"]),
        ("--nothing-like-it", []),
    ],
)
def test_a_flag_that_is_an_option_is_named_as_one(
    flag: str, hints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", flag])
    error = capsys.readouterr().err
    assert [f"--set {hint}=..." in error for hint in hints] == [True] * len(hints)
    assert error.count("=...") == len(hints)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "See lorakit COMMAND --help for its options. Start with: lorakit demo"),
        (["train", "photos", "--subjet", "sks dog"], "--subjet sks dog (did you mean --subject?)"),
        (["train", "photos", "--subjet=sks dog"], "(did you mean --subject?)"),
        (["train", "my", "photos"], "lorakit train: error: unrecognized arguments: photos; put quotes around a path"),
    ],
)
def test_wrong_words_get_a_suggestion(words: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = cli.main(words)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert answer in err


def test_a_preset_of_stable_diffusion_needs_a_base(capsys: pytest.CaptureFixture[str]) -> None:
    """With the bundled base, the run would train twelve hours at 1024 px."""
    assert cli.main(["train", "photos", "--subject", "sks dog", "--preset", "subject-sdxl"]) == 2
    assert capsys.readouterr().err == "lorakit: --preset subject-sdxl needs a base model: give it with --base\n"


@pytest.mark.parametrize("command", ["check", "train", "probe-rate"])
def test_the_named_option_leaves_unreadable_photos_out(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "我的 photos"
    photos.mkdir()
    for name, size in (("a.png", 64), ("c.png", 72)):
        Image.effect_noise((size, size), 80).save(photos / name)
    (photos / "it's 壞的.jpg").write_bytes(b"hello")
    words = ["check", str(photos), "--subject", "sks toy"]
    assert cli.main([command, *words[1:]]) == 1
    advice = capsys.readouterr().err.splitlines()[-1]
    assert advice.startswith("lorakit: or leave these photos out: --set ")
    assert cli.main([*words, *shlex.split(advice.partition("photos out: ")[2])]) == 0
    assert "photos: 2 to train on" in capsys.readouterr().out


def test_check_prints_problems_before_the_table_and_the_verdict_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, box in enumerate([(0, 0), (0, 80), (80, 0), (80, 80), (40, 40)]):
        picture = Image.effect_noise((160, 160), 80).convert("RGB")
        picture.paste((10, 200, 40 * number), (*box, box[0] + 70, box[1] + 70))
        picture.save(tmp_path / f"{number}.png")
    words = ["check", str(tmp_path), "--subject", "sks toy", "--set", "memory.device=cpu"]
    assert cli.main(words) == 0
    output = capsys.readouterr()
    assert output.out.endswith("\n\nNo problems found.\n") and output.err == ""
    assert texts.sayer("en")("photos.fine") == preflight.FINE
    assert cli.main([*words, "--json"]) == 0
    assert preflight.FINE not in capsys.readouterr().out
    (tmp_path / "text.jpg").write_text("hello", encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert cli.main(words) == 1
    printed = capsys.readouterr().out
    places = [
        printed.index(part) for part in ("text.jpg: text, not a picture", "or leave these photos out", "unreadable")
    ]
    assert places == sorted(places) and preflight.FINE not in printed


def test_an_unusual_base_is_merged_into_a_folder_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = describe("pocket").layers
    name = next(name for name in layers if name.endswith("attn1.to_q"))
    rows, columns = layers[name]
    import torch

    weights = AdapterWeights("sd1", "lora", {name: LoraLayer(torch.ones(2, columns), torch.ones(rows, 2) / 100, 2.0)})
    file = formats.save(weights, tmp_path, "toy", ["kohya"], "fp32", {})["kohya"]
    merge = ["merge", str(file), "--base", "pocket", "--output"]
    assert cli.main([*merge, str(tmp_path / "whole.SafeTensors")]) == 1
    assert "does not tell unet's attention_head_dim of base pocket" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.json", "toy.safetensors"]
    assert cli.main([*merge, str(tmp_path / "whole")]) == 0


@pytest.mark.parametrize(
    ("rates", "line"),
    [
        ({}, ""),
        ({"text_encoder_learning_rate": 1e-3}, ""),
        ({"text_encoder_learning_rate": 3e-3}, "learning rate: 0.001, text encoder 0.003"),
        (
            {"text_encoder_learning_rate": 3e-3, "text_encoder_2_learning_rate": 2e-3},
            "learning rate: 0.001, text encoder 0.003, text encoder 2 0.002",
        ),
        ({"text_encoder_2_learning_rate": 2e-3}, "learning rate: 0.001, text encoder 2 0.002"),
    ],
)
def test_the_plan_shows_the_rate_of_text_encoders(rates: dict[str, float], line: str) -> None:
    assert lr_schedule.text_rates(config.OptimizerConfig(learning_rate=1e-3, **rates)) == line
