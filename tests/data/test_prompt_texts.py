"""Tests of web UIs' prompt syntax: it is parsed in prompts and warned of in captions. One string is one prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit import config
from lorakit.cli import main as cli
from lorakit.config.option import unquote
from lorakit.core import prompt_syntax


def parts(prompt: str) -> list[list[tuple[str, float]]]:
    return [[(part.text, round(part.weight, 4)) for part in group] for group in prompt_syntax.parse(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a dog, a cat", [("a dog, a cat", 1)]),
        ("(a:1.3) dog", [("a", 1.3), (" dog", 1)]),
        ("((a)) [b]", [("a", 1.21), (" ", 1), ("b", 0.9091)]),
        (r"emily \(pokemon\), \[x\]", [("emily (pokemon), [x]", 1)]),
        ("a (b (c:2) d:1.5) e", [("a ", 1), ("b ", 1.5), ("c", 3), (" d", 1.5), (" e", 1)]),
        ("(long, hair: 1.2 ), x", [("long, hair", 1.2), (", x", 1)]),
        ("(open a", [("open a", 1.1)]),
        ("close) at 3:30, b:1.3)", [("close) at 3:30, b:1.3)", 1)]),
        ("<lora:x:0.8>a(b:-.5)", [("a", 1), ("b", -0.5)]),
        ("", [("", 1)]),
    ],
)
def test_prompts_are_read_as_web_uis_read_them(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert parts(prompt) == [expected]


def test_break_starts_a_group_and_only_as_a_word() -> None:
    assert parts("a BREAK (b:1.2)\nBREAK\nBREAKFAST") == [[("a", 1)], [("b", 1.2)], [("BREAKFAST", 1)]]


@pytest.mark.parametrize(
    ("text", "actual"),
    [
        ("toy, (smile:1.3), (x:1.1)", "(smile:1.3)"),
        (r"emily \(pokemon\)", r"\("),
        ("toy BREAK table", "BREAK"),
        ("a {red|blue} toy", "{red|blue}"),
        ("toy <lora:style:0.7>", "<lora:style:0.7>"),
        ("[blurred] toy", "[blurred]"),
        ("((toy)) on grass", "((toy))"),
        ("a toy (red), at 3:30, breakfast", ""),
        ("a toy :) <3", ""),
    ],
)
def test_the_first_prompt_syntax_in_a_caption_is_found(text: str, actual: str) -> None:
    assert prompt_syntax.syntax(text) == actual


def test_unsupported_prompt_syntax_is_reported() -> None:
    assert prompt_syntax.ignored("<lora:x:1>, a dog, (b:1.2)") == [
        "<lora:x:1> is left out: the adapter is named beside the prompt"
    ]
    assert prompt_syntax.ignored("[cat:dog:0.5] on grass AND a tree")[0].startswith("[cat:dog:0.5] is read as letters")
    assert prompt_syntax.ignored("a [dog], (cat:1.2) BREAK tree") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog, red, on grass", "a dog, red, on grass"),
        ("[sketch], a dog", "[sketch], a dog"),
        ("(a:1.2), [b]", "(a:1.2), [b]"),
        ('["a, b", "c"]', ["a, b", "c"]),
        ('["a, b", "c"', '["a, b", "c"'),
    ],
)
def test_a_string_is_one_prompt_and_a_list_is_several(text: str, expected: object) -> None:
    assert config.parse_override(f"sample.prompts={text}") == ("sample.prompts", expected)


def test_a_string_in_a_preset_is_one_prompt(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[train]\nsteps = 1\n[sample]\nprompts = "a, b"\n', encoding="utf-8")
    assert config.load(tmp_path / "own.toml").sample.prompts == ("a, b",)
    with pytest.raises(config.ConfigError, match=r"sample\.prompts = .*must be a list of strings"):
        config.load(None, {"train.steps": 1, "sample.prompts": '["a, b", "c"'})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'sks dog'", "sks dog"),
        (' "dog" ', "dog"),
        ("“sks dog”", "sks dog"),
        ("'a' and 'b'", "'a' and 'b'"),
        ("the dog's 'toy'", "the dog's 'toy'"),
        ("'", "'"),
        ("", ""),
    ],
)
def test_only_quotes_around_a_complete_text_are_removed(text: str, expected: str) -> None:
    assert unquote(text) == expected


def test_check_takes_prompts_and_removes_quotes(
    photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from test_checks import fill

    fill(photos)
    (photos / "0.txt").write_text("sks dog, (smile:1.3), emily \\(pokemon\\)", encoding="utf-8")
    (photos / "1.txt").write_text("sks dog (red)", encoding="utf-8")
    arguments = ["check", str(photos), "--subject", "'sks dog'", "--prompt", "'a, b'", "--prompt", "c, d"]
    assert cli.main([*arguments, "--set", "data.class_prompt='dog'", "--json"]) == 0
    printed = capsys.readouterr().out
    assert '"text": "a photo of a sks dog"' in printed and "'sks" not in printed.replace("around 'sks dog'", "")
    assert "data.name: the quotes around 'sks dog' are left out" in printed
    assert "sample.prompts: the quotes around 'a, b' are left out" in printed
    assert "texts with what web UIs read as weights or commands" in printed
    assert "such as (smile:1.3): 1 of 5 (0.png)" in printed
