"""Tests of the preflight for names without a trigger and for unusual values, and of hints for misspelt words."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lorakit import config
from lorakit.cli import main as cli
from lorakit.cli.terminal import Terminal
from lorakit.config import importing, resuming, sample_prompts
from lorakit.config.option import suggest
from lorakit.core.errors import ConfigError
from lorakit.runs import plan_lines
from lorakit.runs.preflight import preflight


@pytest.mark.parametrize(
    ("changes", "problem", "warning"),
    [
        ({"data.name": "a b c d e"}, 'its first word, "a", would be the trigger', ""),
        ({"data.name": "The dog"}, 'as in "sks dog"', ""),
        ({"data.name": "a"}, 'as in "sks dog"', ""),
        ({"data.name": "sks dog"}, "", ""),
        ({"optimizer.learning_rate": 9.0}, "", "optimizer.learning_rate = 9: with adamw 0.0001 to 0.001 is usual"),
        ({"optimizer.learning_rate": 9.0, "optimizer.name": "prodigy"}, "", ""),
        ({"adapter.rank": 1024}, "", "adapter.rank = 1024: 4 to 128 is usual"),
        ({"adapter.rank": 128}, "", ""),
    ],
)
def test_unusual_values_give_a_problem_or_a_warning(
    changes: dict[str, object], problem: str, warning: str, tmp_path: Path
) -> None:
    settings = {"data.folder": str(tmp_path), "data.name": "sks toy", "output.folder": str(tmp_path / "run")}
    result = preflight(config.load("subject-pocket", {**settings, **changes}))
    for text, lines, mark in ((problem, result.problems, "data.name"), (warning, result.warnings, " is usual")):
        assert any(text in line for line in lines) if text else not any(mark in line for line in lines)


@pytest.mark.parametrize("options", [{"adapter.method": "embedding"}, {"adapter.new_tokens": 2}, {}])
def test_a_word_is_learned_only_if_it_fits_into_a_chunk(options: dict[str, object], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "a.png")
    for length in (31, 33):  # letters; the bundled base reads 30 tokens at once
        changes = {"data.folder": str(tmp_path), "data.name": "s" * length + " toy", **options}
        result = preflight(config.load("subject-pocket", changes))
        problem = f"has {length - 1} tokens; adapter.new_tokens learns a word of 30 at most"
        assert any(problem in line for line in result.problems) == (length == 33 and bool(options)), result.problems


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("nonsense", ""),
        ("nonsense.key", ""),
        ("optimizer.lr", ""),
        ("train.quux", ""),
        ("rank", "adapter.rank"),
        ("optimizer.rank", "adapter.rank"),
        ("train.setps", "train.steps"),
        ("sample.stpes", "sample.steps"),
        ("data.nam", "data.name"),
    ],
)
def test_a_hint_names_only_a_similar_option(word: str, near: str, tmp_path: Path) -> None:
    assert suggest(word, [option.key for option in config.options()]) == (near and f" (did you mean {near}?)")
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(config.load("subject-pocket", {"data.name": "sks toy"})), encoding="utf-8")
    errors = []
    for load in (lambda: config.load("subject-pocket", {word: 1}), lambda: resuming.load_changed(file, {word: 1})):
        with pytest.raises(ConfigError) as caught:
            load()
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_file_with_a_mistake_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json, toml = tmp_path / "y.json", tmp_path / "z.toml"
    json.write_text('{"a": 1}', encoding="utf-8")
    toml.write_text("[model\n", encoding="utf-8")
    for read in (lambda: sample_prompts.read_file(json), lambda: config.load(toml)):
        with pytest.raises(ConfigError) as caught:
            read()
        assert all(str(tmp_path) in line for line in caught.value.problems)
    with pytest.raises(ConfigError, match="neither a config of"):
        importing.convert({"a": 1})
    assert cli.main(["import-config", str(json)]) == 2
    assert f"{json}: this is neither a config of kohya" in capsys.readouterr().err


def test_the_plan_names_every_subject() -> None:
    photos = [SimpleNamespace(subject=name) for name in ("sks dog", "ohwx cat", "sks dog")]
    settings = config.load(None, {"train.steps": 1, "data.concepts": "folders", "train.prior": "images"})
    report = SimpleNamespace(photos=photos, class_photos=[])
    assert plan_lines.triggers(settings, report) == 'in prompts: "sks dog" (trigger sks), "ohwx cat" (trigger ohwx)'
    assert '"a photo of a dog", "a photo of a cat"' in plan_lines.prior(settings, report)
    one = config.load(None, {"train.steps": 1, "data.name": "sks dog"})
    assert plan_lines.triggers(one, report) == 'in prompts: "sks dog" (trigger sks)'


def test_a_stop_at_the_terminal_ends_the_bar_and_names_the_adapter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.cli import train_commands
    from lorakit.core.errors import Stopped

    terminal = Terminal()
    with pytest.MonkeyPatch.context():
        terminal.in_place = True

    def job(**_: object) -> None:
        with terminal.progress(10) as bar:
            bar.advance(4)
            terminal.bar = bar
            raise Stopped(Path("runs/x"), 4, Path("runs/x/sks-toy.safetensors"))

    assert train_commands._trained(SimpleNamespace(json=False), terminal, job) == 130
    out, err = capsys.readouterr()
    assert out.splitlines()[-2:] == [out.splitlines()[-2], "adapter of step 4: runs/x/sks-toy.safetensors"]
    assert "training 4/10" in out.splitlines()[-2] and err == (
        "lorakit: stopped after step 4; go on with: lorakit resume runs/x\n"
    )
