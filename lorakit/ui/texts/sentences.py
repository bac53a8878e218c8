"""Translate finished English messages for the front end. The other rooms write English and know no language.

A table has a line for each message: its English with named holes, `"{photo}: its caption in {file} is empty"`, and the
translation with the same holes in any order. A hole is filled with the characters that stand there in the message.
`{rest:said}` is translated itself, and must have a line too; in `{rest:words}` known phrases are replaced. A message
that fits no line stays in English.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from functools import cached_property

from lorakit.core.messages import Joined, Message, Value

# Marks between parts, as Chinese has them.
JOINTS = {", ": "、", "; ": "；", ": ": "：", ". ": "。"}
# What a hole may stand for: in a sentence anything, in a phrase one word.
ANYTHING, WORD = "(?P<{}>.*?)", r"(?P<{}>[^\s,;:()]+(?:,[^\s,;:()]+)*)"


class Sentences:
    """The sentences and phrases of one language, by the English ones."""

    def __init__(self, sentences: Mapping[str, str], phrases: Mapping[str, str]):
        self._sentences, self._phrases = sentences, phrases
        self._cache: dict[str, str | None] = {}

    def by_key(self, text: str) -> str | None:
        """A message by its template, a text by itself; None where the table has no such key."""
        if isinstance(text, Joined):
            mark = JOINTS.get(text.template, text.template)
            return mark.join(self.by_key(part) or self.translated(part) or part for part in text.parts)
        if not isinstance(text, Message):
            return self._keys.get(text)
        template = self._keys.get(text.template)
        if template is None or not text.values:
            return template
        parts = []
        for literal, hole, how, _ in string.Formatter().parse(template):
            parts += [literal, self._value(text.values.get(hole, ""), how or "") if hole else ""]
        return "".join(parts)

    def _value(self, value: Value, how: str) -> str:
        text = str(value)
        if isinstance(value, Message) or text in self._keys:
            return self.by_key(text) or self.translated(text) or text
        return {"said": self.translated, "words": self._with_phrases}.get(how, str)(text) or text

    def translated(self, text: str) -> str | None:
        """A whole sentence, or None where none of the table is like it."""
        if (by_key := self.by_key(text)) is not None:
            return by_key
        if text not in self._cache:
            if len(self._cache) > 10_000:
                self._cache.clear()
            self._cache[text] = next((patterns for patterns in self._fitting(text) if patterns is not None), None)
        return self._cache[text]

    def _fitting(self, text: str) -> Iterator[str | None]:
        for pattern, template in self._patterns:
            if match := pattern.fullmatch(text):
                yield self._filled(template, match)

    def _filled(self, template: str, match: re.Match[str]) -> str | None:
        filled = []
        for literal, hole, how, _ in string.Formatter().parse(template):
            part: str | None = match[hole] if hole else ""
            if how == "said" and part is not None:
                part = self.translated(part)
            elif how == "words" and part:
                part = self._with_phrases(part)
            if part is None:
                return None
            filled += [literal, part]
        return "".join(filled)

    def _with_phrases(self, words: str) -> str:
        for pattern, template in self._phrase_patterns:
            words = "".join(self._replaced(pattern, template, words))
        return words

    def _replaced(self, pattern: re.Pattern[str], template: str, words: str) -> Iterator[str]:
        end = 0
        for match in pattern.finditer(words):
            yield words[end : match.start()]
            yield self._filled(template, match) or match[0]
            end = match.end()
        yield words[end:]

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {
            re.sub(r"(?<!{)({\w+):\w+}", r"\1}", english): other
            for english, other in {**self._sentences, **self._phrases}.items()
        }

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return _compiled(self._sentences, ANYTHING)

    @cached_property
    def _phrase_patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return _compiled(self._phrases, WORD)


def _compiled(table: Mapping[str, str], hole: str) -> list[tuple[re.Pattern[str], str]]:
    """A pattern for each line. What fits several means the most particular: those that begin with a word of their own
    come first, then those that say most."""
    patterns = []
    for english, template in table.items():
        parts = list(string.Formatter().parse(english))
        text = "".join(re.escape(literal) + (hole.format(name) if name else "") for literal, name, *_ in parts)
        for name in {name for _, name, *_ in parts if name}:  # twice the same
            first, *others = text.split(hole.format(name))
            text = first + "".join([hole.format(name), f"(?P={name})".join(others)] if others else [])
        # One of them is "1 step" and not "1 steps".
        text = re.sub(r"(?<=\\ )(step|epoch|batch)(e?s)\b", r"\1(?:\2)?", text)
        # "1 photo" is no part of "11 photos".
        text = rf"(?<!\w){text}" if english[0].isalnum() else text
        text = rf"{text}(?!\w)" if english[-1].isalnum() else text
        order = bool(parts[0][0]), sum(len(literal) for literal, *_ in parts)
        patterns.append((order, re.compile(text, re.DOTALL), template))
    return [(pattern, template) for _, pattern, template in sorted(patterns, key=lambda one: one[0], reverse=True)]
