"""Files of sample prompts, and prompts with the settings of an earlier picture."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import main, train_commands
from lorakit.config import ConfigError, SampleConfig, load, sample_prompts

KOHYA = """\ufeff# prompt 1
masterpiece, (best quality:1.2), 1girl --n low quality, bad anatomy --w 768 --h 512 --d 42 --l 7.5 --s 28

  a photo of sks dog, on a beach
# --w 64
a {red|blue} toy --d 2
"""


def arguments(*words: str) -> argparse.Namespace:
    return main.parser().parse_args(["check", "photos", *words])


def test_a_file_of_kohya_is_read(tmp_path: Path) -> None:
    file = tmp_path / "my prompts.txt"
    file.write_text(KOHYA, encoding="utf-8")
    texts = train_commands.read_prompts(arguments("--prompt", "a dog, a cat", "--prompts", str(file)))
    assert texts is not None and texts[0] == "a dog, a cat" and len(texts) == 4
    config = load(None, {"train.steps": 1, "sample.prompts": texts})
    prompts = sample_prompts.parse_all(list(config.sample.prompts), config.sample, (512, 512))
    girl = prompts[1]
    assert (girl.text, girl.size) == ("masterpiece, (best quality:1.2), 1girl", (768, 512))
    own = girl.sample
    assert (own.negative_prompt, own.seed, own.guidance, own.steps) == ("low quality, bad anatomy", 42, 7.5, 28)
    assert prompts[2].text == "a photo of sks dog, on a beach" and prompts[3].sample.seed == 2
    assert train_commands.read_prompts(arguments()) is None


ROWS = ["a toy --d 7", "a (toy:1.2), red --n blue, dark --w 768 --h 512 --d 3 --s 28 --l 7.5"]
TABLE = {"prompt": "a (toy:1.2), red", "negative_prompt": "blue, dark", "width": 768, "height": 512, "seed": 3}
SUBSETS = """
[prompt]
width = 768
height = 512
[[prompt.subset]]
prompt = "a cat"
scale = 7.5
[[prompt.subset]]
prompt = "a dog, red"
seed = 5
"""


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", json.dumps([ROWS[0], {**TABLE, "sample_steps": 28, "scale": 7.5, "width": 768}]), ROWS),
        ("b.JSON", "\ufeff" + json.dumps({**TABLE, "steps": 28, "guidance": 7.5, "height": 512}), ROWS[1:]),
        ("c.json", json.dumps(["# a hash", {"prompt": "a dog", "seed": None}]), ["# a hash", "a dog"]),
        ("d.toml", SUBSETS, ["a cat --w 768 --h 512 --l 7.5", "a dog, red --w 768 --h 512 --d 5"]),
        ("e.toml", "[[prompt]]\nprompt = 'a dog'\n[[prompt]]\nprompt = 'a cat'\n", ["a dog", "a cat"]),
    ],
)
def test_kohyas_json_and_toml_are_read(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    texts = sample_prompts.read_file(tmp_path / name)
    assert texts == expected
    load(None, {"train.steps": 1, "sample.prompts": texts})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[", "a.json: cannot be read: Expecting value"),
        ("a.toml", "prompt = [", "a.toml: cannot be read: "),
        ("a.json", "[3]", "a.json: cannot be read: 3 is no prompt"),
        ("a.toml", "[prompt]\nsubset = [3]", "a.toml: cannot be read: 3 is no prompt"),
        ("a.json", "[]", "a.json: has no prompt"),
        ("a.toml", "[model]\nbase = 'x'", "a.toml: has no prompt"),
        ("a.json", '[{"prompt": "a", "sample_sampler": "euler"}]', "sample.prompts: unknown key sample_sampler"),
        ("a.json", '[{"width": 64}]', "sample.prompts: .* a table needs a prompt"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        sample_prompts.read_file(tmp_path / name)


@pytest.mark.parametrize("command", ["check", "train", "sample"])
def test_every_command_with_prompts_takes_files(command: str) -> None:
    assert main.parser().parse_args([command, "x", "--prompts", "a.txt", "--prompts", "b.txt"]).prompts == [
        "a.txt", "b.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"# nothing\n\n", "has no prompt; write one a line"),
        (b"\xff\xfe\x00\x01\xd8", "cannot be read: it is not text in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--prompts .*p\.txt: {message}"):
        sample_prompts.read_file(file)


@pytest.mark.parametrize("name", ["prompts.txt", "C:/me/samples.json", "sample_prompts.toml"])
def test_a_file_name_as_a_prompt_is_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, {"train.steps": 1, "sample.prompts": [name]})
    assert str(error.value) == f"sample.prompts: {name!r} is a file: give it with --prompts {name}"


@pytest.mark.parametrize(
    "text",
    [
        "a toy",
        "a toy, red --w 128 --h 64 --d 9 --s 3 --l 2.5 --n blue, dark",
        "a (toy:1.3) --l 1 --n ",
        "a\n toy --d 0",
    ],
)
def test_a_recipe_gives_its_prompt_with_its_settings(text: str) -> None:
    config = SampleConfig(steps=20, guidance=7.0, negative_prompt="ugly")
    before = sample_prompts.parse(text, config, (512, 256), 3)
    recipe: dict[str, Any] = {"prompt": before.text, "width": before.size[0], "height": before.size[1]}
    recipe |= {name: getattr(before.sample, name) for name in ("seed", "steps", "guidance", "negative_prompt")}
    line = sample_prompts.from_recipe(recipe | {"sampler": "DDIM", "adapter": "x", "strength": 1.0})
    assert "\n" not in line
    after = sample_prompts.parse(line, SampleConfig(), (64, 64))
    assert (" ".join(before.text.split()), before.size, before.sample) == (after.text, after.size, after.sample)
