"""Tests of fixed and dropped tags, several captions per photo, wildcards, and captions from file names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorakit import config
from lorakit.config import ConfigError, DataConfig
from lorakit.data import captions, photo_folder
from lorakit.data.latents import _TextTable

TEXT = "sks dog, red, blue, green, gold, grey"


def draws(text: str, **options: object) -> list[str]:
    return captions.variants(text, DataConfig(name="sks dog", **options), "seed")  # type: ignore[arg-type]


def test_first_tags_stay_in_front() -> None:
    for text in draws(TEXT, shuffle_tags=True, keep_tags=2):
        assert text.startswith("sks dog, red, blue, ") and sorted(text.split(", ")) == sorted(TEXT.split(", "))
    marked = "1girl, red ||| blue, green, gold ||| sks dog, grey"
    texts = draws(marked, shuffle_tags=True)
    assert texts[0] == "1girl, red, blue, green, gold, sks dog, grey" and len(texts) == 6
    assert all(text.startswith("1girl, red, ") and text.endswith(", sks dog, grey") for text in texts)
    assert draws(marked) == texts[:1] and len(set(texts)) == 6


def test_tags_are_dropped_by_chance_and_never_the_trigger() -> None:
    texts = draws(TEXT, tag_dropout=0.5)
    assert len(texts) == captions.MAX_TAG_ORDERS and texts == draws(TEXT, tag_dropout=0.5)
    assert texts[0] == TEXT and all(text.split(", ")[0] == "sks dog" for text in texts)
    order = TEXT.split(", ")
    for text in texts:
        assert [order.index(tag) for tag in text.split(", ")] == sorted(order.index(tag) for tag in text.split(", "))
    lengths = {len(text.split(", ")) for text in texts[1:]}
    assert min(lengths) < 4 and all("red" in text for text in draws(TEXT, tag_dropout=0.5, keep_tags=1))
    assert all("sks dog" in text for text in draws("red ||| sks dog, blue", tag_dropout=0.9))


def test_wildcards_are_drawn_only_if_enabled() -> None:
    text = "a {red|blue|green} sks dog, {old|young}"
    assert draws(text) == [text]
    texts = draws(text, wildcards=True)
    assert texts[0] == "a red sks dog, old" and len(texts) == 6
    assert all("{" not in text and "|" not in text for text in texts)


@pytest.mark.parametrize(
    ("text", "is_loose"),
    [("a {red|blue dog", True), ("a {x|y}} dog", True), ("a {red} dog", True), ("}{", True), ("a {red|blue}", False)],
)
def test_an_unmatched_brace_is_reported_if_wildcards_are_on(tmp_path: Path, text: str, is_loose: bool) -> None:
    photo = photo_folder.Photo(tmp_path / "a.png", "a.png", text)
    assert captions.loose_braces(photo, DataConfig()) == ""
    assert bool(captions.loose_braces(photo, DataConfig(wildcards=True))) == is_loose


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [("a photo of", "", "a photo of sks dog, red"), ("", ", sharp", "sks dog, red , sharp"), ("sks dog,", "", None)],
)
def test_a_prefix_and_a_suffix_are_in_every_text(prefix: str, suffix: str, expected: str | None) -> None:
    settings = DataConfig(name="sks dog", caption_prefix=prefix, caption_suffix=suffix)
    assert captions.final_text("sks dog, red" if expected else "red", settings) == (expected or "sks dog, red")
    assert captions.final_text(None, settings) == captions.instance_prompt(settings)


def test_lines_and_file_names_can_be_captions(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8))
    for name in ("a", "red_car-02", "0123"):
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a sks  dog\n\n a dog of sks\n", encoding="utf-8")
    unnamed, several, red = photo_folder.scan(tmp_path).photos
    plain = DataConfig(name="sks dog")
    assert captions.photo_texts(several, plain) == ["a sks dog a dog of sks"]
    lines = DataConfig(name="sks dog", caption_lines=True, caption_from_name=True)
    assert captions.photo_texts(several, lines) == ["a sks dog", "a dog of sks"]
    assert captions.own_text(several, lines) == "a sks dog"
    assert captions.own_text(red, plain) == "a photo of a sks dog"
    assert captions.own_text(red, lines) == "sks dog, red car"
    assert captions.own_text(unnamed, lines) == "a photo of a sks dog"
    table = _TextTable(lines, 0)
    assert [table.texts[at] for at in table.choices(several)] == ["a sks dog", "a dog of sks"]


def test_keep_tags_without_shuffle_or_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.keep_tags has no effect without data.shuffle_tags or"):
        config.load(None, {"train.steps": 1, "data.keep_tags": 2})
