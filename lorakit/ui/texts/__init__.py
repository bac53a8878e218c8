"""All texts of the front end: a table for each language, chosen from what the browser asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from lorakit.core.messages import Message
from lorakit.ui import form
from lorakit.ui.texts import en, zh_hant, zh_hant_sentences
from lorakit.ui.texts.sentences import Sentences

LANGUAGES = {"en": en, "zh-Hant": zh_hant}
# What the rest of lorakit says, which is English already.
SENTENCES = {"zh-Hant": Sentences(zh_hant_sentences.SENTENCES, zh_hant_sentences.JOINTS)}
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
        sentences = SENTENCES.get(self.language)
        if sentences is None:
            return text
        lines = text.splitlines() if isinstance(text, Message) else text.split("\n")
        return sentences.translated(text) or "\n".join(sentences.translated(line) or line for line in lines)

    def explain(self, text: str) -> str:
        """As `translate`, with options by the names that they have on the page; in a command they stay as they are."""
        names, say = table(self.language), self
        return OPTION_KEY.sub(
            lambda match: say("train.quoted", name=names[key]) if (key := f"option.{match[0]}") in names else match[0],
            self.translate(text),
        )


@cache
def table(language: str) -> dict[str, str]:
    """Every text of a language by its key: `help.<option>`, `option.<option>` and `section.<section>` among them."""
    module = LANGUAGES[language]
    texts = dict(module.TEXTS)
    texts |= {f"section.{name}": title for name, title in module.SECTIONS.items()}
    for key, field in form.fields().items():
        name = field.option.name.replace("_", " ").capitalize()
        default = (module.NAMES.get(key, name), field.option.help)
        name, help = module.OPTIONS.get(key, default)
        texts |= {f"choice.{choice}": module.CHOICES[choice] for choice in field.choices if choice in module.CHOICES}
        texts |= {f"option.{key}": name, f"help.{key}": f"{help} ({field.bounds()})" if field.bounds() else help}
    return texts


def tables() -> dict[str, dict[str, str]]:
    """The tables by the names that the page asks for, see `language`."""
    return {"en": table("en"), "zh-TW": table("zh-Hant")}


def language_of(accept_language: str) -> str:
    """The language of ours that a browser's Accept-Language header likes best; English where it names none."""
    weighted = []
    for part in (accept_language or "").split(","):
        name, _, weight = part.strip().partition(";q=")
        try:
            weighted.append((float(weight or 1), name.lower()))
        except ValueError:
            continue
    for _, name in sorted(weighted, key=lambda one: -one[0]):
        if name.startswith("zh"):  # Simplified too, whose readers this serves better than English
            return "zh-Hant"
        if name.startswith("en"):
            return "en"
    return "en"


def sayer(language: str) -> Say:
    """Whoever speaks that language."""
    return Say(language)
