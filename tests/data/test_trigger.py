"""Tests of what the check reports about triggers that the base already knows."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lorakit.config import DataConfig
from lorakit.data.captions import TokenCounter
from lorakit.data.checks import texts
from lorakit.data.checks.report import Item, Report
from lorakit.data.photo_folder import Photo

# Token ids in CLIP's vocabulary of 49,408 tokens.
RANKS = {"anna": 2_160, "toy": 5_988, "lulu": 26_935, "ohwx": 47_993, "sks": 48_136}


def findings(folder: Path, name: str, size: int = 49_408) -> list[str]:
    """Return the findings for a tokenizer of `size` tokens, in which the words of RANKS have their ids."""
    ranks = {word: rank % size for word, rank in RANKS.items()}
    words = {f"<{rank}>": rank for rank in set(range(size)) - set(ranks.values())} | ranks
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    report = Report(folder, 64, 8, [Item(Photo(folder / "a.png", "a.png"))])
    texts.check_texts(report, DataConfig(name=name), TokenCounter(folder, 77))
    return report.trigger_findings


@pytest.mark.parametrize("name", ["anna toy", "lulu toy"])
def test_a_common_word_is_reported_with_its_token_id(tmp_path: Path, name: str) -> None:
    word = name.split()[0]
    (line,) = findings(tmp_path, name)
    assert line.startswith(f'the trigger "{word}" is a word that the base knows well (number {RANKS[word]} of its ')
    assert line.endswith("a rare one such as ohwx does not")


@pytest.mark.parametrize("name", ["ohwx toy", "a-word-of-pieces toy"])
def test_a_rare_word_and_a_word_of_several_tokens_pass(tmp_path: Path, name: str) -> None:
    assert findings(tmp_path, name) == []


def test_sks_is_reported_as_the_name_of_a_rifle(tmp_path: Path) -> None:
    assert findings(tmp_path, "sks toy") == [
        "the trigger sks is the name of a rifle too, which Stable Diffusion may draw; ohwx has no such meaning"
    ]


@pytest.mark.parametrize("name", ["anna toy", "sks toy"])
def test_a_small_vocabulary_gives_no_finding(tmp_path: Path, name: str) -> None:
    assert findings(tmp_path, name, size=900) == []
