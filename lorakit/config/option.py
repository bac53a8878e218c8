"""What an option of the config is: its type, default, bounds and help, and the check of a value against them.

The options themselves are on one page, `lorakit.config`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# "package.module:Class".
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def option(default: Any, help: str, **facts: object) -> Any:
    """One option: its default, its help text, and what else `Option` has, by the same names.

    `choices` may be any collection. It is read when the options are listed, so names that are added later count.
    """
    metadata = {"help": help, **facts}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """What is known of one option; the front end and `lorakit options` are made from these.

    Attributes:
        low, high, above: bounds of a number: `low <= value <= high`, `value > above`.
        path: the value names a place on the user's machine: it never enters an adapter's metadata.
        choices: the valid values; () where any is valid.
        import_path: beside the choices, "module:Class" is valid too.
    """

    section: str
    name: str
    type: Any
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    path: bool = False
    choices: tuple[str, ...] = ()
    import_path: bool = False

    @property
    def key(self) -> str:
        """The dotted name: `section.name`."""
        return f"{self.section}.{self.name}"


def near(word: Any, known: Iterable[str]) -> str:
    """A hint with the nearest known name; a bare key is also compared with the part after the dot."""
    names = list(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if not close and isinstance(word, str):
        last = {name.rpartition(".")[2]: name for name in names}
        close = [last[n] for n in difflib.get_close_matches(word.rpartition(".")[2], last, n=1, cutoff=0.6)]
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any) -> str:
    """A value as it may stand in a message."""
    return repr(list(value) if isinstance(value, tuple) else value)


def checked(k: Option, value: Any) -> tuple[str | None, Any]:
    """The problem with a value, or None, and the value in the option's own type."""
    wanted, optional = k.type, False
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):
        optional = True
        (wanted,) = (t for t in typing.get_args(wanted) if t is not type(None))
    if optional and value is None:
        return None, None
    choices = typing.get_args(wanted) if typing.get_origin(wanted) is Literal else k.choices
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            return f"{k.key} = {shown(value)}: must be a list of strings", None
        value = tuple(value)
        if not all(isinstance(item, str) for item in value):
            return f"{k.key} = {shown(value)}: must be a list of strings", None
        wrong = [item for item in value if choices and item not in choices]
        if wrong or (choices and not value):
            hint = near(wrong[0], choices) if wrong else ""
            return f"{k.key} = {shown(value)}: choose from {', '.join(choices)}{hint}", None
        return None, value
    if typing.get_origin(wanted) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            return f"{k.key} = {shown(value)}: must be a table, such as {{betas = [0.9, 0.95]}}", None
        table = {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}
        for name, item in table.items():
            if not all(isinstance(each, (str, int, float)) for each in (item if isinstance(item, list) else [item])):
                return (
                    f"{k.key}.{name} = {shown(item)}: must be a number, a text, true, false, or a list of these",
                    None,
                )
        return None, table
    if k.import_path and isinstance(value, str) and IMPORT_PATH.fullmatch(value):
        return None, value
    if choices:
        if value not in choices:
            more = " or write module:Class" if k.import_path else ""
            return f"{k.key} = {shown(value)}: choose one of {', '.join(choices)}{more}{near(value, choices)}", None
        return None, value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        return f"{k.key} = {shown(value)}: must be {names[wanted]}", None
    if wanted in (int, float) and not _inside(k, value):
        return f"{k.key} = {shown(value)}: must be {_bounds(k)}", None
    return None, value


def _inside(k: Option, value: float) -> bool:
    # Written so that NaN, which compares false with everything, is outside.
    return (
        (k.low is None or value >= k.low)
        and (k.high is None or value <= k.high)
        and (k.above is None or value > k.above)
        and value == value
        and abs(value) != float("inf")
    )


def _bounds(k: Option) -> str:
    if k.low is not None and k.high is not None:
        return f"between {number(k.low)} and {number(k.high)}"
    if k.above is not None:
        return f"above {k.above:g}"
    return f"{k.low:g} or more" if k.low is not None else "a finite number"


def number(bound: float) -> str:
    """A bound as a person writes it: 10000000, not 1e+07."""
    return str(int(bound)) if float(bound).is_integer() else f"{bound:g}"
