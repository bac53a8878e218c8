"""Tests that the work for a prompt of 4,000 brackets grows in proportion to its length."""

from __future__ import annotations

import pytest

from lorakit.core import prompt_syntax


class Counter(float):
    """A weight that counts how often it is multiplied."""

    products = 0

    def __rmul__(self, other: float) -> float:
        Counter.products += 1
        return float(self) * other


@pytest.mark.parametrize(
    "unit",
    [
        "(",
        ")",
        "()",
        "[",
        "[]",
        "(a",
        "a)",
        "(a:1.2)",
        "((a)",
        r"\\(",
        r"\\",
        "[a)",
        "(a]",
        "a ",
        "((((a))))",
        "(a (b (c",
    ],
)
def test_work_grows_linearly_with_the_length(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    characters = []

    class Part(prompt_syntax.Part):
        def __new__(cls, text: str, weight: float = 1.0) -> Part:
            characters.append(len(text))
            return super().__new__(cls, text, weight)

    monkeypatch.setattr(prompt_syntax, "Part", Part)
    monkeypatch.setattr(prompt_syntax, "EMPHASIS", Counter(1.1))
    text = unit * (4_000 // len(unit))
    Counter.products = 0
    prompt_syntax.parse(text)
    assert sum(characters) <= len(text)
    assert Counter.products <= (prompt_syntax.MAX_DEPTH + 1) * len(text)
