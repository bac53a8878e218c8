"""Tests of the tokenizer: no token is unknown, a trigger is one token, and captions fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

import lorakit.families.pocket
from lorakit.families.pocket.scene_captions import TRIGGERS, caption
from lorakit.families.pocket.spec import random_spec
from tools.pocket import tokenizer

FOLDER = lorakit.families.pocket.path() / "tokenizer"


@pytest.fixture(scope="module")
def tokens() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(FOLDER))


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a mug",
        "übergröße",
        "日本語 の 絵",
        "🎨🦊",
        "naïve café",
        "snake_case & <tags>",
        "ไทย עברית",
        "\u00a0x",
    ],
)
def test_every_text_is_decoded_unchanged(tokens: CLIPTokenizer, text: str) -> None:
    ids = tokens(text).input_ids
    assert tokens.unk_token_id not in ids[1:-1]
    decoded = tokens.decode(ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(text.lower().split())


def test_every_byte_is_in_the_vocabulary_alone_and_at_a_words_end() -> None:
    vocab = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(len(vocab)))
    letters = [token for token in vocab if len(token) == 1]
    assert len(letters) == 256 and all(letter + "</w>" in vocab for letter in letters)


@pytest.mark.parametrize("word", TRIGGERS)
def test_a_trigger_is_one_token(tokens: CLIPTokenizer, word: str) -> None:
    assert tokens.tokenize(f"a photo of a {word} toy")[-2] == f"{word}</w>"


def test_captions_fit_into_the_token_limit(tokens: CLIPTokenizer) -> None:
    assert tokens.model_max_length == 32
    longest = max(len(tokens(caption(random_spec(seed), seed)).input_ids) for seed in range(1500))
    assert longest <= 26  # leaves room for a few more words


def test_a_second_tokenizer_has_the_same_tokens(tmp_path: Path) -> None:
    """The tokens are the same, but not their ids: the trainer orders equally frequent pairs at random."""
    tokenizer.make(tmp_path / "a", captions=2000)
    tokenizer.make(tmp_path / "b", captions=2000)
    a, b = (json.loads((tmp_path / name / "vocab.json").read_text(encoding="utf-8")) for name in "ab")
    assert len(a) == len(b) > 512
    assert {token for token in a if token.endswith("</w>")} == {token for token in b if token.endswith("</w>")}
    assert set(TRIGGERS) <= {token.removesuffix("</w>") for token in a}
    assert CLIPTokenizer.from_pretrained(str(tmp_path / "a")).model_max_length == 32
