"""Tests of sample prompts with their own size, seed, negative prompt, steps and guidance."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from test_sampling import family_of

from lorakit import config
from lorakit.config import ConfigError, SampleConfig, sample_prompts
from lorakit.core.image_grid import grid
from lorakit.inference import sampling
from lorakit.runs.run_folder import RunFolder

SAMPLE = SampleConfig(steps=2, seed=5, negative_prompt="bad")


def test_letters_and_tables_give_the_same_settings(tmp_path):
    line = "a dog, red --w 128 --h 64 --d 7 --s 1 --l 3.5 --n ugly, blurred"
    own = sample_prompts.parse(line, SAMPLE, (512, 512), 3)
    assert own.text == "a dog, red" and own.size == (128, 64)
    assert own.sample == SampleConfig(steps=1, seed=7, guidance=3.5, negative_prompt="ugly, blurred")
    plain = sample_prompts.parse("a --well-known dog -- here", SAMPLE, (512, 256), 3)
    assert plain.text == "a --well-known dog -- here" and plain.size == (512, 256)
    assert plain.sample == SampleConfig(steps=2, seed=8, negative_prompt="bad")
    file = tmp_path / "c.toml"
    file.write_text(
        '[train]\nsteps = 1\n[[sample.prompts]]\nprompt = "a dog, red"\nwidth = 128\nheight = 64\nseed = 7\n'
        'steps = 1\nguidance = 3.5\nnegative_prompt = "ugly, blurred"\n',
        encoding="utf-8",
    )
    assert config.load(file).sample.prompts == (line,)
    assert config.load(file) == config.from_tables(config.as_tables(config.load(file)))


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ("a --w 100", "--w must be a multiple of 8 between 64 and 4096"),
        ("a --s many", "--s must be between 1 and 1000"),
        ("a --d", "--d must be between 0 and 2147483647"),
        ("a --ss euler", "--ss is none of --w, --h, --d, --s, --l, --n"),
        ({"prompt": "a", "heigth": 64}, r"unknown key heigth \(did you mean height\?\)"),
        ({"width": 64}, "a table needs a prompt"),
    ],
)
def test_a_wrong_setting_is_refused(value, messages):
    with pytest.raises(ConfigError, match=messages):
        config.load(None, {"train.steps": 1, "sample.prompts": [value]})


def test_invalid_sizes_are_refused():
    with pytest.raises(ConfigError, match="must be multiples of 8 and 64 or more, or 0"):
        config.load(None, {"train.steps": 1, "sample.width": 100})


def test_pictures_are_drawn_with_their_own_settings(tiny_sd1, tmp_path):
    family = family_of(tiny_sd1)
    lines = ["a dog --w 96 --h 64 --d 9 --s 1", "a dog", "a dog --n worse --l 2 --d 9"]
    first, second, third = sampling.draw(family, lines, SAMPLE, (64, 72))
    assert [picture.size for picture in (first, second, third)] == [(96, 64), (64, 72), (64, 72)]
    facts = [json.loads(picture.info["lorakit"]) for picture in (first, second, third)]
    assert [(fact["seed"], fact["steps"], fact["negative_prompt"]) for fact in facts] == [
        (9, 1, "bad"),
        (6, 2, "bad"),
        (9, 2, "worse"),
    ]
    assert all(fact["prompt"] == "a dog" for fact in facts) and "Size: 96x64" in first.info["parameters"]
    changed = SampleConfig(steps=2, seed=9, negative_prompt="worse", guidance=2.0)
    (repeat,) = sampling.draw(family, ["a dog"], changed, (64, 72))
    assert repeat.tobytes() == third.tobytes() != second.tobytes()
    run = RunFolder(tmp_path)
    run.save_samples(1, [first, second, third], lines)


def test_a_grid_keeps_the_shape_of_each_picture():
    wide, tall = Image.new("RGB", (320, 160), "red"), Image.new("RGB", (160, 320), "blue")
    sheet = grid([wide, tall], [""], ["a", "b"])
    colours = {colour: count for count, colour in sheet.getcolors(2**20)}
    assert colours[255, 0, 0] == colours[0, 0, 255] == 320 * 160
