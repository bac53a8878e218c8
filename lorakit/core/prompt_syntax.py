"""The prompt syntax of web UIs: weights, new chunks, and other marks. No torch.

`(a)` has weight 1.1, `(a:1.3)` 1.3, `[a]` 1 / 1.1. Nested weights are multiplied. A backslash makes a bracket a letter.
`BREAK` starts a new chunk. Source: AUTOMATIC1111's stable-diffusion-webui, wiki "Features", "Attention/emphasis".
ComfyUI has the same syntax, except square brackets and BREAK. There `<lora:NAME:1>` selects an adapter; here the
adapter is a separate argument.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from lorakit.core.messages import Message

# Weight of text in one pair of brackets.
EMPHASIS = 1.1
# Maximum nesting of brackets; deeper ones are letters.
MAX_DEPTH = 20
NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
# Captions are untrusted: possessive quantifiers (`*+`) avoid backtracking, so that no pattern takes forever.
_NEW_CHUNK = re.compile(r"(?:(?<!\s)\s*+)?\bBREAK\b\s*+")
_WEIGHT = re.compile(r":\s*+([+-]?(?:\d++\.?\d*+|\.\d++))\s*+\)")
_TOKENS = re.compile(rf"\\[\\()\[\]]|[()\[\]]|{_WEIGHT.pattern}|(?:(?!{_WEIGHT.pattern})[^\\()\[\]])+|\\")
# Prompts that change during sampling, or are combined: `[a:b:0.5]`, `[a|b]`, `a AND b`.
_SCHEDULE = re.compile(r"(?<!\\)\[[^\[\]|:]*+(?:\||:[^\[\]|\d]*+[|\d])[^\[\]]*+\]|\bAND\b")
# Syntax of web UIs. Brackets without a weight are not included, because they occur in any text.
_SYNTAX = (NETWORK, _NEW_CHUNK, re.compile(r"\([^()]*" + _WEIGHT.pattern), re.compile(r"\\[()\[\]]"), _SCHEDULE)
# One of several words, chosen by an extension of web UIs, or by data.wildcards.
_CHOICE = re.compile(r"\{[^{}|]*+\|[^{}]*+\}")
_BRACKETS = re.compile(r"\(\([^()]*\)+|\[[^\[\]]*\]")


class Part(NamedTuple):
    """A piece of a prompt and its weight."""

    text: str
    weight: float = 1.0


# One tuple of parts for each `BREAK`.
Prompt = tuple[tuple[Part, ...], ...]


def literal(text: str) -> Prompt:
    """A text without any syntax."""
    return ((Part(text),),)


def parse(prompt: str) -> Prompt:
    """Parse a prompt in the syntax of web UIs."""
    return tuple(tuple(_weighted(part)) for part in _NEW_CHUNK.split(NETWORK.sub("", prompt)))


def syntax(text: str) -> str:
    """The first part of a text that is syntax in web UIs, such as "(tag:1.3)"; "" if there is none."""
    matches = [match for pattern in (*_SYNTAX, _BRACKETS, _CHOICE) if (match := pattern.search(text))]
    return min(matches, key=lambda match: match.start())[0].strip() if matches else ""


def ignored(prompt: str) -> list[str]:
    """Messages about parts of a prompt that are left out or read differently than in a web UI."""
    lines: list[str] = [
        Message("{part} is left out: the adapter is named beside the prompt", match)
        for match in NETWORK.findall(prompt)
    ]
    if match := _SCHEDULE.search(NETWORK.sub("", prompt)):
        lines.append(
            Message("{part} is read as letters: a prompt here stays the same while a picture is drawn", match[0])
        )
    return lines


def _weighted(text: str) -> list[Part]:
    """The parts of a prompt in order; adjacent parts of the same weight are joined.

    An unclosed bracket extends to the end. A closing bracket without an opening one is a letter.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []

    def close(bracket: str, weight: float, letters: str) -> None:
        if not opened or opened[-1][0] != bracket:
            pieces.append((letters, 1.0))
            return
        start = opened.pop()[1]
        pieces[start:] = [(piece, value * weight) for piece, value in pieces[start:]]

    for match in _TOKENS.finditer(text):
        token = match[0]
        if token[0] == "\\":
            pieces.append((token[1:] or token, 1.0))
        elif token in "([" and len(opened) < MAX_DEPTH:
            opened.append((token, len(pieces)))
        elif token == ")":
            close("(", EMPHASIS, token)
        elif token == "]":
            close("[", 1 / EMPHASIS, token)
        elif match[1] is not None:
            close("(", float(match[1]), token)
        else:
            pieces.append((token, 1.0))
    while opened:
        close(opened[-1][0], EMPHASIS if opened[-1][0] == "(" else 1 / EMPHASIS, "")
    groups = itertools.groupby(pieces, key=lambda piece: piece[1])
    parts = [Part("".join(letters for letters, _ in group), weight) for weight, group in groups]
    return parts or [Part("")]
