"""The texts of the front end. This folder has a file for each language."""

from __future__ import annotations

import dataclasses
import json
import re
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, some
from lorakit.runs import quickstart
from lorakit.ui import form
from lorakit.ui.texts.sentences import Sentences, meet

FOLDER = Path(__file__).parent
# Matches an option's dotted key in a message, but not in a command or a file name.
OPTION_KEY = re.compile(r"(?<![\w`./-])(?<!--set )[a-z]+\.[a-z_0-9]+(?![\w/]|\.\w)")
# Flags and commands that the front end has a field or a place for.
PLACES = {
    "--base": "option.model.base",
    "--vae": "option.model.vae",
    "--prompt": "captions.prompt",
    "`lorakit caption`": "captions.title",
}
NAMES = re.compile(rf"{OPTION_KEY.pattern}|(?<![\w-])(?:{'|'.join(PLACES)})(?![\w-])")
# A flag in brackets after the key of its option.
TWICE = re.compile(r" ?[(（]--vae[)）]")


@dataclass(frozen=True)
class Say:
    """The texts of the pages and the translations of messages, in one language."""

    language: str

    def __call__(self, key: str, **facts: object) -> str:
        """The text of a key, formatted with `facts`."""
        text = table(self.language)[key]
        return text.format(**facts) if facts else text

    def translate(self, text: str) -> str:
        """Translate a message of another package as a whole or line by line. Lines without a translation stay."""
        table = sentences(self.language)
        if not table.lines:
            return text
        lines = text.splitlines() if isinstance(text, Message) else text.split("\n")
        return table.translated(text) or "\n".join(table.translated(line) or line for line in lines)

    def explain(self, text: str, *, places: bool = False) -> str:
        """Translate a message. Replace option keys and flags with the labels of their fields, except in commands.

        Args:
            places: whether to name the sections of the page that these fields are in, too.
        """
        say, names, text = self, table(self.language), TWICE.sub("", self.translate(text))
        result, end = "", 0
        for match in NAMES.finditer(text):
            key = PLACES.get(match[0], f"option.{match[0]}")
            line = text[: match.start()].rpartition("\n")[2]
            if key not in names or (match[0].startswith("--") and "lorakit " in line):
                continue
            name, section = names[key], f"section.{match[0].partition('.')[0]}"
            if places and section in names and match[0] not in (*quickstart.BASIC_OPTIONS, *quickstart.SET_BY_CALLER):
                name = say("train.place", options=names["train.options"], section=names[section], name=name)
            result = meet(meet(result, text[end : match.start()]), say("train.quoted", name=name))
            end = match.end()
        return meet(result, text[end:])


@dataclass(frozen=True)
class About:
    """The head of a language's file.

    Attributes:
        name: the language's name in that language.
        locale: its code in browsers, e.g. "zh-Hant".
        serves: codes of browser languages that get this language, with all codes that begin with them.
        by_machine: whether a program wrote the translation.
        note: a text after the page's first line, or "".
    """

    name: str
    locale: str
    serves: list[str]
    by_machine: bool
    note: str


@dataclass(frozen=True)
class Source:
    """The content of a language's file, see docs/adding.md. Missing texts are shown in English."""

    about: About
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    sections: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    choices: dict[str, str] = dataclasses.field(default_factory=dict)
    joints: dict[str, str] = dataclasses.field(default_factory=dict)
    sentences: dict[str, str] = dataclasses.field(default_factory=dict)


def read_all(folder: Path) -> tuple[dict[str, Source], list[str]]:
    """Read the languages of a folder.

    Returns:
        Name -> language, and a message for each file that is invalid or contains invalid texts.

    Raises:
        LorakitError: the file of English is invalid.
    """
    languages, problems = {"en": _read(folder / "en.json")}, list[str]()
    for file in sorted(set(folder.glob("*.json")) - {folder / "en.json"}):
        try:
            language = languages[file.stem] = _read(file)
        except LorakitError as problem:
            problems.append(Message("{problem}; the page leaves this language out", problem))
            continue
        english = languages["en"].texts
        wrong = [key for key, text in language.texts.items() if not _places(text) <= _places(english.get(key, ""))]
        for key in wrong:
            del language.texts[key]
        if wrong:
            line = "{file}: the names in braces of {keys} are not those of English; these texts are in English"
            problems.append(Message(line, file, some(wrong, 5)))
    return dict(sorted(languages.items())), problems


def _read(file: Path) -> Source:
    """Read the file of a language.

    Raises:
        LorakitError: the file cannot be read, or its content is invalid.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        source = Source(About(**content.pop("about")), **content)
    except OSError as error:
        raise LorakitError("{file}: cannot be read ({reason})", file, error.strerror or error) from None
    except (ValueError, RecursionError) as error:
        raise LorakitError("{file}: no JSON in UTF-8 ({reason})", file, error) from None
    except (KeyError, TypeError, AttributeError):
        raise LorakitError("{file}: its parts are not those that docs/adding.md names", file) from None
    for name, part in {**vars(source.about), **vars(source)}.items():
        if not _is_right(name, part):
            raise LorakitError("{file}: {part} is of the wrong kind, see docs/adding.md", file, name)
    return source


def _is_right(name: str, part: object) -> bool:
    """Whether a value in a language's file, or in its `about`, has the type of its field in `Source` or `About`."""
    if name in ("about", "by_machine"):
        return isinstance(part, About if name == "about" else bool)
    if name == "serves":
        return isinstance(part, list) and all(isinstance(code, str) for code in part)
    if name in About.__annotations__:
        return isinstance(part, str)
    if not isinstance(part, dict):
        return False
    values = part.values()
    if name == "options":
        return all(
            isinstance(pair, list) and len(pair) < 3 and all(isinstance(e, str) for e in pair) for pair in values
        )
    return all(isinstance(text, str) for text in values)


def _places(text: str) -> set[str]:
    """The names in braces. For a text that cannot be formatted, the text itself, which matches no name."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError:
        return {text}


SOURCES, PROBLEMS = read_all(FOLDER)
LANGUAGES = tuple(SOURCES)


def source(language: str) -> Source:
    """The content of a language's file."""
    return SOURCES[language]


@cache
def sentences(language: str) -> Sentences:
    """The translations of the messages of other packages, which are in English."""
    return Sentences(source(language).sentences, source(language).joints)


@cache
def table(language: str) -> dict[str, str]:
    """The texts of a language by key, with `help.<option>`, `option.<option>`, `section.<section>` and `choice.<name>`.

    Texts that its file lacks are in English.
    """
    content = source(language)
    texts = dict(table("en")) if language != "en" else {}
    texts |= content.texts
    texts |= {f"section.{name}": title for name, title in content.sections.items()}
    texts |= {f"choice.{name}": words for name, words in content.choices.items()}
    for key, one in form.fields().items():
        # The name and the help of an option come from config/schema.py if the file does not have them.
        default = [texts.get(f"option.{key}", one.option.name.replace("_", " ").capitalize()), one.option.help]
        pair = content.options.get(key, [])
        name, help = pair + default[len(pair) :]
        texts |= {f"option.{key}": name, f"help.{key}": f"{help} ({one.bounds()})" if one.bounds() else help}
    if content.about.note:
        texts["app.tagline"] += f" {content.about.note}"
    return texts


def language_of(accept_language: str) -> str:
    """The available language with the highest weight in an Accept-Language header, or "en" if there is none."""
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
    """The texts in a language."""
    return Say(language)
