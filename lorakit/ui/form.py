"""Convert the values of options to the values of widgets and back. The fields follow from `config.every_option()`.

Options that are `local_only` have no field. Otherwise every user of the page could start commands on this machine, or
make it send requests to addresses that only this machine can reach.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit import config as configuration
from lorakit.config import Config, ConfigError, Option
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.runs import quickstart
from lorakit.ui.access import Roots

# The line for an empty text in a list of texts, e.g. in `train.prior_prompts`. Empty lines are ignored.
NO_TEXT = '""'


@dataclass(frozen=True)
class Field:
    """An option as a form field.

    Attributes:
        kind: text, lines (a list of texts), table (TOML), number, whole, switch, choice or choices.
        optional: whether the field may be empty.
    """

    option: Option
    kind: str
    optional: bool
    choices: tuple[str, ...]

    @property
    def key(self) -> str:
        """The option's dotted key."""
        return self.option.key

    @property
    def in_words(self) -> bool:
        """Whether the widget of a number is a text field: a number field in a browser cannot be empty."""
        return self.optional and self.kind in ("number", "whole")

    def to_widget(self, value: Any) -> Any:
        """Convert the option's value to the widget's."""
        if self.kind == "lines":
            return value if isinstance(value, str) else "\n".join(str(line) or NO_TEXT for line in value)
        if self.kind == "table":
            return configuration.toml_value(value) if value else ""
        if self.in_words:
            return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        return list(value) if self.kind == "choices" else value

    def read(self, value: Any) -> Any:
        """Convert the widget's value to the option's. An invalid value is returned unchanged: the config reports it."""
        if self.kind == "lines":
            lines = [line.strip() for line in str(value or "").splitlines()]
            return tuple("" if line == NO_TEXT else line for line in lines if line)
        if self.kind == "choices":
            return tuple(value or ())
        if self.kind == "table":
            return configuration.parse_override(f"{self.key}={value or '{}'}")[1]
        if self.kind == "text":
            return str(value or "").strip()
        if self.in_words:
            value = _number(str(value if value is not None else "").strip())
        if self.kind == "whole" and isinstance(value, float) and value.is_integer():
            return int(value)
        return value

    def bounds(self) -> str:
        """The bounds as symbols without words: `1 … 1024`, `≥ 0`, `> 0`."""
        low, high, above = self.option.low, self.option.high, self.option.above
        if above is not None:
            return f"> {above:g}"
        if low is not None and high is not None and high < 1e6:
            return f"{low:g} … {high:g}"
        return "" if low is None else f"≥ {low:g}"


def _number(text: str) -> float | str | None:
    """The text as a number, None if it is empty, or the text itself if it is not a number."""
    try:
        return float(text) if text else None
    except ValueError:
        return text


def fields() -> dict[str, Field]:
    """The options of all adapter methods by key, in the order of the config's sections."""
    by_key = {option.key: _field(option) for option in configuration.every_option() if not option.local_only}
    order = list(configuration.SECTIONS)
    # `adapter.method` is the first of its section, because the others depend on it.
    return dict(
        sorted(by_key.items(), key=lambda item: (order.index(item[1].option.section), item[0] != "adapter.method"))
    )


def _field(option: Option) -> Field:
    value_type, optional = option.type, False
    if typing.get_origin(value_type) in (types.UnionType, typing.Union):
        optional = True
        (value_type,) = (part for part in typing.get_args(value_type) if part is not type(None))
    choices = typing.get_args(value_type) if typing.get_origin(value_type) is typing.Literal else option.choices
    if typing.get_origin(value_type) is tuple:
        kind = "choices" if choices else "lines"
    elif typing.get_origin(value_type) is dict:
        kind = "table"
    elif choices:
        kind = "choice"
    else:
        kind = {int: "whole", float: "number", bool: "switch", str: "text"}[value_type]
    return Field(option, kind, optional, tuple(choices))


def values(config: Config) -> dict[str, Any]:
    """Key of each option -> its widget's value. An option of another adapter method has its default."""
    of_method = {option.key for option in configuration.options(config.adapter.method)}
    return {
        key: field.to_widget(
            getattr(getattr(config, field.option.section), field.option.name)
            if key in of_method
            else field.option.default
        )
        for key, field in fields().items()
    }


def read(answers: Mapping[str, Any], roots: Roots) -> tuple[Config | None, dict[str, list[str]]]:
    """Convert the values of the form to a config.

    Paths are resolved below the roots. Options of other adapter methods are ignored.

    Returns:
        The config or None, and the problems by the key of their field ("" if a problem belongs to no field).
    """
    by_key = fields()
    method = answers.get("adapter.method", "lora")
    of_method = {k.key for k in configuration.options(method if method in configuration.ADAPTER_SECTIONS else "lora")}
    problems: dict[str, list[str]] = {}
    overrides: dict[str, Any] = {}
    for key, value in answers.items():
        if key not in of_method or key not in by_key:
            continue
        overrides[key] = by_key[key].read(value)
        if by_key[key].option.path and overrides[key] not in ("", by_key[key].option.default):
            try:
                overrides[key] = _resolve(key, overrides[key], roots)
            except LorakitError as error:
                problems.setdefault(key, []).append(str(error))
    try:
        config = configuration.load(None, overrides)
    except ConfigError as error:
        for problem in error.problems:
            problems.setdefault(field_of(problem, by_key), []).append(problem)
        return None, problems
    return (None if problems else config), problems


def refuse_local(options: Mapping[str, object]) -> None:
    """Refuse values of `local_only` options. Only the command line of the front end may set them.

    Raises:
        LorakitError: `options` contains one.
    """
    for option in configuration.every_option():
        if option.local_only and options.get(option.key):
            way = Message("start the front end with --{name}", option.name)
            raise LorakitError("{option} cannot be set from a page: leave it out, or {way}", option.key, way)


def without_local(toml: str) -> str:
    """Remove the `local_only` options from the TOML text of a config, because they may contain secrets."""
    names = "|".join(option.name for option in configuration.every_option() if option.local_only)
    return re.sub(rf"^({names}) = .+\n", "", toml, flags=re.MULTILINE)


def _resolve(key: str, value: object, roots: Roots) -> object:
    """Resolve a path, or each path of a table, below the roots. Other values are returned unchanged."""
    if isinstance(value, dict):
        return {name: _resolve(key, item, roots) for name, item in value.items()}
    return resolve_path(key, value, roots) if isinstance(value, str) and value.strip() else value


def table_of(key: str, text: str) -> dict[str, str]:
    """Convert the widget's text to a table. Values that are not texts are dropped."""
    table = fields()[key].read(text)
    return {k: v for k, v in table.items() if isinstance(v, str)} if isinstance(table, dict) else {}


def table_text(table: Mapping[str, str]) -> str:
    """Convert a table to the widget's text."""
    return configuration.toml_value(table) if table else ""


def resolve_path(key: str, text: str, roots: Roots) -> str:
    """Resolve a typed path below the roots. The hub id of a base or a VAE is returned unchanged, unless such a path
    exists.

    Raises:
        LorakitError: the path is outside of the roots.
    """
    path = roots.resolve(text)
    return (
        text
        if key in (quickstart.BASE, quickstart.VAE) and not path.exists() and quickstart.is_hub_id(text)
        else str(path)
    )


def field_of(problem: str, by_key: Mapping[str, Any]) -> str:
    """The first key of an option in a message, or ""."""
    return next((key for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", problem) if key in by_key), "")


def changed(current: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (the preset's value, the form's value) for each option with different values."""
    by_key = fields()
    return {
        key: (preset[key], current[key])
        for key in by_key
        if key in preset and key in current and by_key[key].read(current[key]) != by_key[key].read(preset[key])
    }
