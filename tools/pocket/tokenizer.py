"""The tokenizer of pocket: byte-complete BPE in CLIP's file format, its merges learned from captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lorakit.families.pocket.scene_captions import TRIGGERS, caption
from lorakit.families.pocket.spec import random_spec

START, END = "<|startoftext|>", "<|endoftext|>"
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # CLIP's own
# Plain words that users write and captions do not: whole tokens, so that they cost no more than the others.
WORDS = (
    "person", "man", "woman", "dog", "bird", "horse", "style", "subject", "object", "thing", "character",
    "creature", "art", "drawing", "image", "render", "small", "big", "the", "and", "of", "with", "by", "for", "one",
    "two", "three", "left", "right", "day", "light", "dark", "gold", "silver", "grey", "gray", "teal", "watercolor",
    "watercolour", "duotone", "neon", "logo", "face", "old", "new", "cute", "tiny",
)  # fmt: skip


def corpus(count: int, seed: int = 0) -> list[str]:
    """Captions as in training, then every trigger and common word often enough to become one token."""
    texts = [caption(random_spec(seed + i), seed + i) for i in range(count)]
    return texts + [word for word in (*TRIGGERS, *WORDS) for _ in range(max(40, count // 20))]


def train(texts: Iterable[str], size: int = 1400) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges. Every byte is in the vocabulary, alone and at a word's end: nothing is ever unknown."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, min_frequency=4, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(model.to_str())["model"]["merges"]
    ]
    vocab: dict[str, int] = {}
    for token in (*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), START, END):
        vocab.setdefault(token, len(vocab))
    return vocab, merges


def write(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int) -> None:
    """Write every file that old and new versions of transformers, and other programs, look for."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": max_length,
        **special,
        "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def make(folder: Path, captions: int = 20000, max_length: int = 32) -> None:
    """Train on captions and write the folder."""
    write(folder, *train(corpus(captions)), max_length)
