"""All texts of the front end: a table for each language, chosen from what the browser asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from lorakit.ui import form
from lorakit.ui.texts import en, zh_hant

LANGUAGES = {"en": en, "zh-Hant": zh_hant}
# The browser's names for Chinese; Simplified is not there, and its readers are better served by this than by English.
CHINESE = ("zh", "zh-TW", "zh-HK", "zh-MO", "zh-Hant", "zh-Hant-TW", "zh-Hant-HK", "zh-CN", "zh-SG")
Say = Callable[..., str]


@cache
def table(language: str) -> dict[str, str]:
    """Every text of a language by its key: `help.<knob>`, `knob.<knob>` and `section.<section>` among them."""
    module = LANGUAGES[language]
    texts = dict(module.TEXTS)
    texts |= {f"section.{name}": title for name, title in module.SECTIONS.items()}
    for key, field in form.fields().items():
        spelled = field.knob.name.replace("_", " ").capitalize()
        plain = (module.NAMES.get(key, spelled), field.knob.help)
        name, help = module.KNOBS.get(key, plain)
        texts |= {f"knob.{key}": name, f"help.{key}": f"{help} ({field.bounds()})" if field.bounds() else help}
    return texts


def tables() -> dict[str, dict[str, str]]:
    """The tables by every name under which a browser may ask for them."""
    return {"en": table("en")} | {name: table("zh-Hant") for name in CHINESE}


def language_of(accept_language: str) -> str:
    """The language of ours that a browser's Accept-Language header likes best; English where it names none."""
    weighed = []
    for part in (accept_language or "").split(","):
        name, _, weight = part.strip().partition(";q=")
        try:
            weighed.append((float(weight or 1), name.lower()))
        except ValueError:
            continue
    for _, name in sorted(weighed, key=lambda one: -one[0]):
        if name.startswith("zh"):
            return "zh-Hant"
        if name.startswith("en"):
            return "en"
    return "en"


def sayer(language: str) -> Say:
    """A function from a text's key, and what fills its gaps, to the text."""
    texts = table(language)
    return lambda key, **facts: texts[key].format(**facts) if facts else texts[key]
