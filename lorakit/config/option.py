"""An option of the config: its type, default, bounds and help, and the check of its values.

The options themselves are in `lorakit.config.schema`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.core.messages import Message
from lorakit.core.names import printable, shorten

# Pairs of quotes.
QUOTES = ("''", '""', "``", "‘’", "“”", "„“", "«»", "「」")
# Minimum similarity of a word to the suggested name (difflib's ratio).
NEAR = 0.72
# Maximum length of a value in a message.
MAX_VALUE_LENGTH = 80
# Maximum number of patterns in a table, and maximum length of each.
MAX_PATTERNS, MAX_PATTERN_LENGTH = 200, 200
# Maximum number of names of photos and folders in a table, which are looked up and not matched.
MAX_NAMES = 100_000
# "package.module:Class".
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def option(default: Any, help: str, **fields: object) -> Any:
    """Declare an option: its default, its help text, and other fields of `Option`, by name.

    `choices` may be any collection. It is read when `options` is called, so names that are added later count.
    """
    metadata = {"help": help, **fields}
    if isinstance(default, dict):
        return field(default_factory=default.copy, hash=False, metadata=metadata)  # a table has no hash
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One option with its section. The front end and `lorakit options` are built from these.

    Attributes:
        low, high, above: bounds of a number: `low <= value <= high`, `value > above`.
        path: whether the value is a path on the user's machine, which is never written to an adapter's metadata.
        private: whether the value contains names of the user, which are never written to an adapter's metadata either.
        choices: the valid values; () if any value is valid.
        import_path: whether "module:Class" is also valid.
        local_only: whether only config files and the command line can set it, but not the front end, which others may
            use.
        numbered: the choice that may be followed by ":" and a number.
        automatic: the word for None, if the value is determined when the run starts; else "".
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
    private: bool = False
    choices: tuple[str, ...] = ()
    import_path: bool = False
    local_only: bool = False
    numbered: str = ""
    automatic: str = ""

    @property
    def example(self) -> str:
        """An example of a table for this option."""
        if self.section == "data":
            values = {"edits": "{'a.jpg' = 'turn 90'}", "more_folders": "{'3_sks cat' = '/photos/cat'}"}
            return values.get(self.name, "{'10_faces' = 512}")
        patterns = typing.get_origin(self.type) is dict and typing.get_args(self.type)[1] is not Any
        return "{'*.attn2.*' = 8}" if patterns else "{betas = [0.9, 0.95]}"

    @property
    def key(self) -> str:
        """The dotted name: `section.name`."""
        return f"{self.section}.{self.name}"


def suggest(word: object, candidates: Iterable[str]) -> str:
    """A hint with the closest candidate, or "". For dotted keys, the part after the last dot is compared, too."""

    def likeness(first: str, second: str) -> float:
        return difflib.SequenceMatcher(None, first, second).ratio()

    def last_part(name: str) -> str:
        return re.split(r"\.(?=[a-z_])", name)[-1]  # apache-2.0 stays one part

    text = re.sub(r"[^\w.-]", "", str(word))
    near = [
        (score, likeness(text, name), name)
        for name in candidates
        if (score := likeness(last_part(text), last_part(name))) >= NEAR
    ]
    return Message(" (did you mean {name}?)", max(near)[2]) if near else ""


def label(name: str) -> str:
    """A third-party name for a message."""
    return shorten(printable(name), MAX_VALUE_LENGTH)


def to_text(value: object) -> str:
    """A value for a message."""
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except (ValueError, RecursionError):  # a number with too many digits for Python
        return Message("a value of type {name} that is too long to show", type(value).__name__)
    return shorten(text, MAX_VALUE_LENGTH)


def unquote(text: str) -> str:
    """Remove one pair of surrounding quotes: cmd.exe passes `'sks dog'` with its single quotes."""
    text = text.strip()
    is_quoted = len(text) > 2 and text[0] + text[-1] in QUOTES and not {*text[1:-1]} & {*text[0], *text[-1]}
    return text[1:-1].strip() if is_quoted else text


def check_value(opt: Option, value: Any) -> tuple[str | None, Any]:
    """Check a value. Return the problem or None, and the value converted to the type of the option."""
    value_type, optional = opt.type, False
    texts = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple, dict)) else []
    if any("\ud800" <= character <= "\udfff" for text in texts if isinstance(text, str) for character in text):
        way = "write it in UTF-8, or rename the file or folder; if the name is right, set PYTHONUTF8=1"
        return Message("{key} = {value}: not UTF-8; {way}", opt.key, label(str(value)), way), None
    if typing.get_origin(value_type) in (types.UnionType, typing.Union):
        optional = True
        (value_type,) = (t for t in typing.get_args(value_type) if t is not type(None))
    if optional and (value is None or value == (opt.automatic or None)):
        return None, None
    choices = typing.get_args(value_type) if typing.get_origin(value_type) is Literal else opt.choices
    if typing.get_args(value_type) == (int, ...):
        return _check_numbers(opt, value)
    if typing.get_origin(value_type) is tuple:
        # A text is a list of one item, even "[sketch], a dog"; a text that starts like a list of texts is a malformed
        # list.
        if isinstance(value, str) and not choices and not re.match(r"""\[\s*["']""", value):
            return None, (value,)
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            return Message("{key} = {value}: must be a list of strings", opt.key, to_text(value)), None
        value = tuple(value)
        if not all(isinstance(item, str) for item in value):
            return Message("{key} = {value}: must be a list of strings", opt.key, to_text(value)), None
        has_path = opt.import_path and any(IMPORT_PATH.fullmatch(item) for item in value)
        unknown = [i for i in value if choices and i not in choices and not (has_path and IMPORT_PATH.fullmatch(i))]
        if unknown or (choices and opt.default and not value):
            hint = suggest(unknown[0], choices) if unknown else ""
            more = " or write module:Class" if opt.import_path else ""
            values = (opt.key, to_text(value), ", ".join(choices), more, hint)
            return Message("{key} = {value}: choose from {choices}{more}{hint}", *values), None
        return None, value
    if typing.get_origin(value_type) is dict:
        return _check_table(opt, typing.get_args(value_type)[1], value)
    if opt.import_path and isinstance(value, str) and IMPORT_PATH.fullmatch(value):
        return None, value
    if choices:
        is_numbered = opt.numbered and re.fullmatch(rf"{opt.numbered}:\d{{1,3}}", str(value))
        if value not in choices and not is_numbered:
            numbered = Message(" or {example}", f"{opt.numbered}:1") if opt.numbered else ""
            more = " or write module:Class" if opt.import_path else numbered
            values = (opt.key, to_text(value), ", ".join(choices), more, suggest(value, choices))
            return Message("{key} = {value}: choose one of {choices}{more}{hint}", *values), None
        return None, value
    if value_type is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            return Message("{key} = {value}: the number is too large", opt.key, to_text(value)), None
    if type(value) is not value_type:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        several = ", or several as a list, [768, 512]" if opt.key == "data.resolution" else ""
        kind = names[value_type]
        return Message("{key} = {value}: must be {kind}{more}", opt.key, to_text(value), kind, several), None
    if value_type in (int, float) and not _in_bounds(opt, value):
        return Message("{key} = {value}: must be {bounds}", opt.key, to_text(value), _bounds(opt)), None
    return None, value


def _check_numbers(opt: Option, value: object) -> tuple[str | None, tuple[int, ...] | None]:
    """As `check_value`, for a list of integers; "512, 384" is one, too."""
    items = re.split(r"[,\s]+", value.strip("[] \n")) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return Message(
            "{key} = {value}: must be a list of whole numbers, such as [512, 384]", opt.key, to_text(value)
        ), None
    numbers = [int(i) if isinstance(i, str) and i.isdecimal() and len(i) < 10 else i for i in items if i != ""]
    each = dataclasses.replace(opt, type=int)
    problems = [problem for problem, _ in (check_value(each, number) for number in numbers) if problem]
    return (problems[0], None) if problems else (None, tuple(numbers))


def _check_table(opt: Option, item_type: type, value: object) -> tuple[str | None, Any]:
    """As `check_value`, for a table."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return Message(
            "{key} = {value}: must be a table, such as {example}", opt.key, to_text(value), opt.example
        ), None
    if item_type is not Any:
        return _check_patterns(opt, item_type, value)
    table = {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}
    for name, item in table.items():
        if not all(isinstance(each, (str, int, float)) for each in (item if isinstance(item, list) else [item])):
            name = f"{opt.key}.{label(name)}"
            return Message(
                "{key} = {value}: must be a number, a text, true, false, or a list of these", name, to_text(item)
            ), None
    return None, table


def _check_patterns(opt: Option, value_type: type, table: Mapping[str, object]) -> tuple[str | None, Any]:
    """Check a table of patterns: each value like an option with this type and these bounds."""
    limit = MAX_NAMES if opt.private or opt.path else MAX_PATTERNS
    if len(table) > limit or any(len(pattern) > MAX_PATTERN_LENGTH for pattern in table):
        return Message(
            "{option}: at most {count} patterns of at most {length} characters are read",
            opt.key,
            limit,
            MAX_PATTERN_LENGTH,
        ), None
    values = {}
    for pattern, item in table.items():
        if isinstance(item, Mapping):
            return Message(
                "{option}: put quotes around a pattern with dots, as in {example}", opt.key, opt.example
            ), None
        problem, values[pattern] = check_value(
            dataclasses.replace(opt, name=f"{opt.name}.{pattern}", type=value_type), item
        )
        if problem:
            return problem, None
    return None, values


def _in_bounds(opt: Option, value: float) -> bool:
    # NaN compares false with everything, so it is out of bounds.
    return (
        (opt.low is None or value >= opt.low)
        and (opt.high is None or value <= opt.high)
        and (opt.above is None or value > opt.above)
        and value == value
        and abs(value) != float("inf")
    )


def _bounds(opt: Option) -> str:
    if opt.low is not None and opt.high is not None:
        return Message("between {low} and {high}", format_bound(opt.low), format_bound(opt.high))
    if opt.above is not None:
        return Message("above {low:g}", opt.above)
    return Message("{low:g} or more", opt.low) if opt.low is not None else "a finite number"


def format_bound(bound: float) -> str:
    """A bound in decimal notation: 10000000, not 1e+07."""
    return str(int(bound)) if float(bound).is_integer() else f"{bound:g}"
