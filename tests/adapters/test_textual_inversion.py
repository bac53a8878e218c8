"""Tests of a trigger with its own vectors: their place in the text, their initial values, and no other change."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from exercise import predict, train

from lorakit import adapters
from lorakit.adapters.textual_inversion import mark_token
from lorakit.config import AdapterConfig, LoraConfig
from lorakit.core.errors import LorakitError

END, PAD = 99, 0


def by_hand(ids: list[int], token_ids: list[int], count: int) -> list[int]:
    """Return the same ids, computed with lists."""
    result, place = [], 0
    while place < len(ids):
        if ids[place : place + len(token_ids)] == token_ids:
            result += [-1 - n for n in range(count)]
            place += len(token_ids)
        else:
            result.append(ids[place])
            place += 1
    result = (result + [ids[-1]] * len(ids))[: len(ids)]
    return result if END in result else [*result[:-1], END]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("token_ids", [[7], [7, 8], [7, 8, 9]])
def test_the_vectors_replace_the_tokens_of_the_word(token_ids: list[int], count: int) -> None:
    texts = [
        [1, *token_ids, 5, END, PAD, PAD, PAD, PAD],
        [1, 5, *token_ids, 6, *token_ids, END],
        [1, 5, 6, END, PAD, PAD],
        [1, *[5] * 5, *token_ids, END],
        [1, 7, 5, 8, 5, END, PAD],
        [*token_ids, END],
    ]
    wide = max(map(len, texts))
    rows = [text + [text[-1]] * (wide - len(text)) for text in texts]
    expected = [by_hand(row, token_ids, count) for row in rows]
    assert mark_token(torch.tensor(rows), torch.tensor(token_ids), count, END).tolist() == expected


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_one_vector_for_a_word_of_one_token_changes_no_bit(
    request: pytest.FixtureRequest, attach: Any, name: str
) -> None:
    family = request.getfixturevalue(name)
    before = predict(family)
    adapter = attach(family, LoraConfig(rank=2, new_tokens=1), trigger="sks")
    assert torch.equal(predict(family), before)
    assert [name for name in adapter.parameters() if name.endswith(".token")] == [
        f"{part}.token" for part in family.text_encoders
    ]
    assert set(adapter.describe()) == {"unet", *family.text_encoders}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_vectors_learn_and_can_be_disabled_and_detached(request: pytest.FixtureRequest, attach: Any, name: str) -> None:
    family = request.getfixturevalue(name)
    base, names = predict(family), {part: list(m.state_dict()) for part, m in family.modules().items()}
    adapter = attach(family, AdapterConfig(method="loha", rank=2, new_tokens=3), trigger="sks")
    first = adapter.weights().embeddings["sks"]
    train(family, adapter)
    trained, weights = predict(family), adapter.weights()
    for part, rows in weights.embeddings["sks"].items():
        assert rows.shape == (3, 32) and (rows != first[part]).any(1).all()
    with adapter.disabled():
        assert torch.equal(predict(family), base)
    assert torch.equal(predict(family), trained)
    state = adapter.state()
    adapter.detach()
    assert torch.equal(predict(family), base)
    assert {part: list(module.state_dict()) for part, module in family.modules().items()} == names

    applied = adapters.apply(family, weights)
    torch.testing.assert_close(predict(family), trained, rtol=1e-4, atol=1e-5)
    applied.detach()
    other = attach(family, AdapterConfig(method="loha", rank=2, new_tokens=3), trigger="sks")
    other.load_state(state)
    assert torch.equal(predict(family), trained)
    other.detach()
    third = attach(family, AdapterConfig(method="loha", rank=2, new_tokens=3), trigger="sks")
    third.load(weights)
    torch.testing.assert_close(predict(family), trained, rtol=1e-4, atol=1e-5)


def test_the_pooled_text_is_right_with_vectors_in_the_text(sdxl: Any, attach: Any) -> None:
    """The pooled text is the state of the last token. It is the same with and without the trigger's own vectors."""
    before = sdxl.encode_text(["a photo of sks toy"])["pooled"]
    attach(sdxl, LoraConfig(rank=2, new_tokens=1), trigger="sks")
    for text_encoder in sdxl.text_encoders.values():
        text_encoder.config.eos_token_id = 2  # as in published checkpoints: the largest id ends the text
    assert torch.equal(sdxl.encode_text(["a photo of sks toy"])["pooled"], before)


def test_unfit_vectors_and_missing_words_are_refused(sd1: Any, attach: Any) -> None:
    with pytest.raises(LorakitError, match="new_tokens needs a word to learn"):
        adapters.attach(sd1, LoraConfig(rank=2, new_tokens=1))
    adapter = attach(sd1, LoraConfig(rank=2, new_tokens=2), trigger="sks")
    weights = adapter.weights()
    adapter.detach()
    plain = attach(sd1, LoraConfig(rank=2))
    with pytest.raises(
        LorakitError, match=r"learned the word 'sks' with adapter.new_tokens = 2: set that, and begin data.name"
    ):
        plain.load(weights)
    plain.detach()
    wide = replace(weights, embeddings={"sks": {"text_encoder": torch.zeros(2, 768)}})
    with pytest.raises(LorakitError, match="embedding of 'sks' does not fit text_encoder: it is for another base"):
        adapters.apply(sd1, wide)
    two = replace(weights, embeddings={**weights.embeddings, "ohwx": weights.embeddings["sks"]})
    with pytest.raises(LorakitError, match="has vectors for 'sks' and 'ohwx': only one word can be applied"):
        adapters.apply(sd1, two)
    assert not hasattr(sd1.denoiser, "peft_config")
