"""Tests that the text of every photo contains the trigger, whatever the options."""

import random
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from lorakit.config import DataConfig
from lorakit.core.errors import LorakitError
from lorakit.data import captions

SUBJECT = DataConfig(name="sks toy")
STYLE = DataConfig(name="sks style", kind="style")


@pytest.mark.parametrize(
    ("noun", "spoken"),
    [
        ("toy", "a toy"), ("umbrella", "an umbrella"), ("orange cat", "an orange cat"), ("unicorn", "a unicorn"),
        ("one-eyed cat", "a one-eyed cat"), ("hourglass", "an hourglass"), ("house", "a house"), ("ewe", "a ewe"),
        ("European castle", "a European castle"), ("ukulele", "a ukulele"), ("Apple", "an Apple"),
        ("sunglasses", "sunglasses"), ("bus", "a bus"), ("glass", "a glass"), ("lens", "a lens"), ("iris", "an iris"),
        ("the Eiffel tower", "the Eiffel tower"), ("my cat", "my cat"), ("", ""),
    ],
)  # fmt: skip
def test_a_or_an_follows_the_sound(noun: str, spoken: str) -> None:
    assert captions.article(noun) == spoken


def test_prompts_of_a_subject_name_it() -> None:
    assert captions.instance_prompt(SUBJECT) == "a photo of a sks toy"
    assert captions.instance_prompt(DataConfig(name="ohwx man")) == "a photo of an ohwx man"
    assert captions.instance_prompt(DataConfig(name="alice")) == "a photo of alice"
    assert captions.class_prompt(SUBJECT) == "a photo of a toy"
    assert captions.class_prompt(DataConfig(name="sks umbrella")) == "a photo of an umbrella"
    assert captions.class_prompt(DataConfig(name="sks")) == "a photo"
    assert captions.sample_prompts(SUBJECT) == [
        "a photo of a sks toy", "a photo of a sks toy on a beach", "a photo of a sks toy in the snow",
        "a photo of a toy",
    ]  # fmt: skip
    own = DataConfig(name="sks toy", instance_prompt="sks on a table", class_prompt="toys")
    assert (captions.instance_prompt(own), captions.class_prompt(own)) == ("sks on a table", "toys")


def test_prompts_of_a_style_name_it() -> None:
    assert captions.instance_prompt(STYLE) == "a picture in sks style"
    assert captions.class_prompt(STYLE) == "a picture"
    assert captions.sample_prompts(STYLE) == [
        "a picture of a house in sks style", "a picture of a cat in sks style", "a picture of a tree in sks style",
        "a picture of a house",
    ]  # fmt: skip
    ink = DataConfig(name="sks watercolor", kind="style")
    assert captions.instance_prompt(ink) == "a picture in sks watercolor style"
    assert captions.class_prompt(ink) == "a picture in watercolor style"


def test_prompts_without_a_name_have_no_trigger() -> None:
    assert captions.instance_prompt(DataConfig()) == captions.class_prompt(DataConfig()) == "a photo"
    assert captions.sample_prompts(DataConfig()) == ["a photo", "a photo on a beach", "a photo in the snow"]
    style = DataConfig(kind="style")
    assert captions.instance_prompt(style) == "a picture"
    assert captions.sample_prompts(style) == ["a picture of a house", "a picture of a cat", "a picture of a tree"]
    assert captions.final_text("a red cat", DataConfig()) == "a red cat"


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        (None, "a photo of a sks toy"),
        ("a photo of sks toy on a table", "a photo of sks toy on a table"),
        ("A photo of SKS", "A photo of SKS"),
        ("on a table", "sks toy, on a table"),
        ("a skslike thing", "sks toy, a skslike thing"),
        ("sks, table", "sks, table"),
    ],
)
def test_the_trigger_is_in_every_text(caption: str | None, text: str) -> None:
    assert captions.final_text(caption, SUBJECT) == text


def test_an_instance_prompt_without_the_trigger_gets_it() -> None:
    assert captions.final_text(None, DataConfig(name="sks toy", instance_prompt="my toy")) == "sks toy, my toy"


def test_a_trigger_with_special_characters_is_matched_literally() -> None:
    config = DataConfig(name="(x+y) cat")
    assert captions.has_trigger("a photo of (x+y) cat", config)
    assert not captions.has_trigger("a photo of xxy cat", config)


def test_the_trigger_survives_a_thousand_shuffles() -> None:
    shuffled = DataConfig(name="sks toy", shuffle_tags=True)
    words = ["table", "red light", "SKS toy, close up", "beach", "sks", "a photo of sks toy", "left, of, it"]
    draw = random.Random(0)
    for number in range(1000):
        caption = ", ".join(draw.sample(words, draw.randint(1, len(words))))
        final = captions.final_text(caption, shuffled)
        texts = captions.variants(final, shuffled, str(number))
        assert texts[0] == final
        tags = sorted(tag.strip() for tag in final.split(","))
        for text in texts:
            assert captions.has_trigger(text, shuffled)
            assert sorted(tag.strip() for tag in text.split(",")) == tags
        first = [next(tag for tag in final.split(", ") if captions.has_trigger(tag, shuffled))]
        assert {text.split(", ")[0] for text in texts[1:]} <= set(first)


def test_shuffles_are_many_different_and_repeatable() -> None:
    config = DataConfig(name="sks toy", shuffle_tags=True)
    texts = captions.variants("sks toy, a, b, c, d", config, "0/x.jpg")
    assert len(set(texts)) == len(texts) == captions.MAX_TAG_ORDERS
    assert texts == captions.variants("sks toy, a, b, c, d", config, "0/x.jpg")
    assert texts != captions.variants("sks toy, a, b, c, d", config, "1/x.jpg")
    assert captions.variants("sks toy, a", config, "0") == ["sks toy, a"]
    assert captions.variants("sks toy, a, b", SUBJECT, "0") == ["sks toy, a, b"]


def test_left_and_right_are_matched_as_words() -> None:
    assert captions.mentions_sides("the Left ear")
    assert not captions.mentions_sides("bright leftovers")


@pytest.mark.parametrize("format", ["two files", "one file"])
def test_tokens_are_counted_as_by_transformers(base, tmp_path: Path, format: str) -> None:
    """Compare with transformers' tokenizer of the same folder."""
    folder = base.path / "tokenizer"
    reference = CLIPTokenizer.from_pretrained(folder)
    if format == "one file":
        folder = tmp_path / "tokenizer"
        reference.save_pretrained(folder)
        assert (folder / "tokenizer.json").is_file()
        assert not (folder / "vocab.json").is_file()
    counter = captions.TokenCounter(folder, 12)
    for text in ["a photo of sks toy", "A  PHOTO of\nsks, it's 2 toys!", "naïve café – 猫", "", "photo " * 30]:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        count, cut = counter.count(text)
        assert count == len(ids)
        assert bool(cut) == (len(ids) > 10)
        assert text.rstrip().endswith(cut)
        fits = reference(text, truncation=True, max_length=12)["input_ids"][1:-1]
        if text.startswith("photo"):  # in other texts the limit divides a word
            assert reference(text[: len(text.rstrip()) - len(cut)], add_special_tokens=False)["input_ids"] == fits
    assert counter.count("photo " * 12)[1] == "photo photo"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"no tokenizer there \(tokenizer\.json, or vocab\.json and merges\.txt\)$"):
        captions.TokenCounter(tmp_path, 77)


@pytest.mark.parametrize(
    ("text", "kind", "name", "expected"),
    [
        ("a photo of a sks toy on a beach", "subject", "sks toy", "a photo of a toy on a beach"),
        ("SKS toy, red, outdoors", "subject", "sks toy", "toy, red, outdoors"),
        ("a photo of a sks toy", "subject", "sks toy", "a photo of a toy"),
        ("a photo of an ohwx man at night", "subject", "ohwx man", "a photo of a man at night"),
        ("A SKS umbrella", "subject", "sks umbrella", "an umbrella"),
        ("a photo of sks toy at night", "subject", "sks toy", "a photo of toy at night"),
        ("masks and a sks toy", "subject", "sks toy", "masks and a toy"),
        ("a picture of a mug on a beach in sks style", "style", "sks style", "a picture of a mug on a beach"),
        ("a cat, sks style", "style", "sks style", "a cat"),
        ("sks style", "style", "sks style", "a picture"),
    ],
)
def test_a_class_text_is_the_text_without_the_trigger(text, kind, name, expected):
    assert captions.class_text(text, DataConfig(kind=kind, name=name)) == expected


def test_a_configured_class_prompt_is_used_for_every_text():
    config = DataConfig(name="sks toy", class_prompt="a doll")
    assert captions.class_text("a photo of a sks toy on a beach", config) == "a doll"
