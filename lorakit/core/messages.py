"""Messages for the user: an English template with named values, whose translation is looked up by the template.

A message is a `str`, its English text, and prints as one. It also has its template and its values, so that the front
end can translate it and programs can parse a log.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex, TypeVar

Value = str | int | float
# If this variable is set, commands also write the keys of their messages, in lines that start with KEY_LINE, and
# `export` and `resize` the numbers of their steps in lines with STEP_LINE.
KEYS, KEY_LINE, STEP_LINE = "LORAKIT_KEYS", "lorakit-key: ", "lorakit-step: "
# Ends a list of messages that has been cut.
OTHER_LINES = "lorakit check --json has the other lines like the last ({count}): {cause}"
Own = TypeVar("Own", bound="Message")


class Message(str):
    """`Message("step {step}: {problem}", 3, error)`: the values are in the order of their names in the template.

    Without values the text is used as it is.

    Attributes:
        template: its key in the tables of languages, `"step {step}: {problem}"`, without format specifications.
        values: name -> value; a value can be a message, too.
    """

    template: str
    values: Mapping[str, Value]

    def __new__(cls, template: str, /, *values: object) -> Message:
        """Fill in the template; a name that occurs twice has one value."""
        if not values:
            return template if isinstance(template, Message) else _new(cls, template, template, {})
        places = list(string.Formatter().parse(template))
        by_name = dict(zip(dict.fromkeys(name for _, name, _, _ in places if name), values, strict=True))
        key, text, own = [], [], {}
        for literal, name, spec, conversion in places:
            key.append(literal.replace("{", "{{").replace("}", "}}"))
            text.append(literal)
            if name is not None:
                value = by_name[name]
                if conversion:
                    value = string.Formatter().convert_field(value, conversion)
                if spec or not isinstance(value, Value):
                    value = format(value, spec or "")  # an error becomes its message
                key.append(f"{{{name}}}")
                text.append(str(value))
                own[name] = value
        return _new(cls, "".join(text), "".join(key), own)

    def __str__(self) -> str:
        """The message itself, so that `str(error)` of an error is its message."""
        return self

    def __getnewargs__(self) -> tuple[Value, ...]:  # type: ignore[override]
        return self.template, *self.values.values()

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Message:
        """As `str.replace`, also in its values, so that the result can still be translated."""
        values = {name: v.replace(old, new, count) if isinstance(v, str) else v for name, v in self.values.items()}
        return _new(type(self), super().replace(old, new, count), self.template, values)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """Its lines; those of `join("\\n", ...)` are messages still."""
        if "\n" not in self:
            return [self] if self else []
        return super().splitlines(keepends)

    def to_json(self) -> dict[str, Any]:
        """Its key and values, for a log; `from_json` is the inverse."""
        return {"key": self.template, "values": {name: _value_to_json(value) for name, value in self.values.items()}}


class Joined(Message):
    """Several joined messages. `template` is the separator."""

    parts: tuple[str, ...]

    def __getnewargs__(self) -> tuple[Value, ...]:  # type: ignore[override]
        return self.template, *self.parts

    def __new__(cls, separator: str, /, *parts: str) -> Joined:
        """Join the parts with the separator."""
        self = _new(cls, separator.join(parts), separator, {})
        self.parts = parts
        return self

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Joined:
        return Joined(self.template, *(part.replace(old, new, count) for part in self.parts))

    def splitlines(self, keepends: bool = False) -> list[str]:
        """The lines of its parts, if each part has one or more lines."""
        if self.template != "\n" or keepends:
            return super().splitlines(keepends)
        return [line for part in self.parts for line in (part.splitlines() or [""])]

    def to_json(self) -> dict[str, Any]:
        return {"join": self.template, "parts": [_value_to_json(part) for part in self.parts]}


def join(separator: str, parts: Iterable[str]) -> str:
    """As `separator.join(parts)`, but each part can still be translated. A single part is returned as it is."""
    every = tuple(parts)
    return every[0] if len(every) == 1 else Joined(separator, *every)


def some(parts: Iterable[str], limit: int, separator: str = ", ") -> str:
    """The first `limit` parts, and the number of the remaining ones: `a, b and 3 more`, `a; b; and 3 more`."""
    every = list(parts)
    names, rest = join(separator, every[:limit]), len(every) - limit
    template = "{names} and {count} more" if separator == ", " else "{names}; and {count} more"
    return Message(template, names, rest) if rest > 0 else names


def abridge(lines: Iterable[str], limit: int = 5) -> list[str]:
    """The first `limit` messages of each template, and the number of the others, so that messages about two hundred
    files do not hide the rest."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        has_key = isinstance(line, Message) and line.values and not line.template.startswith(("{names}", "{folder}"))
        groups.setdefault(line.template if has_key and isinstance(line, Message) else line, []).append(line)
    result = []
    for group in groups.values():
        result += group if len(group) <= limit + 1 else group[:limit]
        if (rest := len(group) - limit) > 1:
            cause = str(group[limit]).partition(": ")[2]
            result.append(Message(OTHER_LINES, rest, cause))
    return result


def key_of(message: object) -> dict[str, Any]:
    """`to_json` of a message, to merge into the table with its text; {} for a plain text."""
    return message.to_json() if isinstance(message, Message) else {}


def to_lines(message: str) -> str:
    """A message for the log of a command: its lines and, with `KEYS` set, a line for the program that started it."""
    lines = "".join(f"lorakit: {line}\n" for line in message.splitlines() or [""])
    key = key_of(message) if os.environ.get(KEYS) else {}
    return lines + (f"{KEY_LINE}{json.dumps({'text': message, **key})}\n" if key else "")


def from_lines(log: str) -> list[str]:
    """The problems in a command's log from `to_lines`, as messages. From a log without keys, its lines."""
    keyed = [json.loads(line.removeprefix(KEY_LINE)) for line in log.splitlines() if line.startswith(KEY_LINE)]
    unkeyed = [line.removeprefix("lorakit: ") for line in log.splitlines() if line.startswith("lorakit: ")]
    return [from_json(table["text"], table) for table in keyed] or unkeyed


def from_json(text: str, table: Mapping[str, Any]) -> str:
    """The message from a log's table with `text` and key; `text` if there is no key."""
    if isinstance(parts := table.get("parts"), list) and isinstance(separator := table.get("join"), str):
        return Joined(separator, *(str(_value_from_json(part)) for part in parts))
    key, values = table.get("key"), table.get("values")
    if not isinstance(key, str) or not isinstance(values, Mapping):
        return text
    return _new(Message, text, key, {name: _value_from_json(value) for name, value in values.items()})


def _new(cls: type[Own], text: str, template: str, values: Mapping[str, Value]) -> Own:
    self = str.__new__(cls, text)
    self.template, self.values = template, values
    return self


def _value_to_json(value: Value) -> object:
    return {"text": value, **value.to_json()} if isinstance(value, Message) else value


def _value_from_json(value: object) -> Value:
    if isinstance(value, Mapping):
        return from_json(str(value.get("text", "")), value)
    return value if isinstance(value, Value) else str(value)
