"""All texts of the front end: a file for each language in this folder, chosen from what the browser asks for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lorakit.core.messages import Message
from lorakit.ui import form
from lorakit.ui.texts.sentences import Sentences

FOLDER = Path(__file__).parent
LANGUAGES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
# An option's dotted key in a message; not in a command or a file's name.
OPTION_KEY = re.compile(r"(?<![\w`./-])(?<!--set )[a-z]+\.[a-z_0-9]+(?![\w/]|\.\w)")


@dataclass(frozen=True)
class Say:
    """All that a page says, in one language: its own texts by key, and what it passes on from other rooms."""

    language: str

    def __call__(self, key: str, **facts: object) -> str:
        """The text of that key, its gaps filled."""
        text = table(self.language)[key]
        return text.format(**facts) if facts else text

    def translate(self, text: str) -> str:
        """What another room said, line by line; as it was said where the language has no sentence for it."""
        table = sentences(self.language)
        if not table.lines:
            return text
        lines = text.splitlines() if isinstance(text, Message) else text.split("\n")
        return table.translated(text) or "\n".join(table.translated(line) or line for line in lines)

    def explain(self, text: str) -> str:
        """As `translate`, with options by the names that they have on the page; in a command they stay as they are."""
        names, say = table(self.language), self
        return OPTION_KEY.sub(
            lambda match: say("train.quoted", name=names[key]) if (key := f"option.{match[0]}") in names else match[0],
            self.translate(text),
        )


@dataclass(frozen=True)
class About:
    """Who reads a language: its name for itself, the browser's name of it, and the beginnings of those it serves."""

    name: str
    locale: str
    serves: list[str]
    by_machine: bool
    note: str


@dataclass(frozen=True)
class Source:
    """The file of a language, see docs/adding.md."""

    about: About
    texts: dict[str, str]
    sections: dict[str, str]
    options: dict[str, list[str]]
    choices: dict[str, str]
    joints: dict[str, str]
    sentences: dict[str, str]


@cache
def source(language: str) -> Source:
    """The file of a language."""
    content = json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    return Source(About(**content.pop("about")), **content)


@cache
def sentences(language: str) -> Sentences:
    """The table of messages from other rooms in that language. These rooms write English."""
    return Sentences(source(language).sentences, source(language).joints)


@cache
def table(language: str) -> dict[str, str]:
    """Every text of a language by its key: `help.<option>`, `option.<option>` and `section.<section>` among them.

    What its file lacks is there in English.
    """
    content = source(language)
    texts = dict(table("en")) if language != "en" else {}
    texts |= content.texts
    texts |= {f"section.{name}": title for name, title in content.sections.items()}
    texts |= {f"choice.{name}": words for name, words in content.choices.items()}
    for key, field in form.fields().items():
        # Where a file gives no name or no help, these are from config/schema.py.
        default = [texts.get(f"option.{key}", field.option.name.replace("_", " ").capitalize()), field.option.help]
        pair = content.options.get(key, [])
        name, help = pair + default[len(pair) :]
        texts |= {f"option.{key}": name, f"help.{key}": f"{help} ({field.bounds()})" if field.bounds() else help}
    if content.about.note:
        texts["app.tagline"] += f" {content.about.note}"
    return texts


def language_of(accept_language: str) -> str:
    """The language of ours that a browser's Accept-Language header likes best; English where it names none."""
    weighted = []
    for part in (accept_language or "").split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "")
        try:
            weighted.append((float(weight or 1), f"{name}-"))
        except ValueError:
            continue
    served = [(code.lower(), name) for name in LANGUAGES for code in source(name).about.serves]
    for _, tag in sorted((one for one in weighted if one[0] > 0), key=lambda one: -one[0]):
        fits = [(len(code), name) for code, name in served if tag.startswith(f"{code}-")]
        if fits:
            return max(fits)[1]
    return "en"


def sayer(language: str) -> Say:
    """Whoever speaks that language."""
    return Say(language)
