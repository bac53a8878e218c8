"""From options to widgets' values and back. All of it follows from `config.options()`; no option has a name here.

Options that are `local_only` have no field. Otherwise anyone who sees the page could start commands on this machine, or
make it send requests to addresses that only it reaches.
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

# Represents an empty text in a list of texts, as in `train.prior_prompts`, because empty lines are ignored.
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
        """A number that may be left out is a text field: a browser's number field has no empty."""
        return self.optional and self.kind in ("number", "whole")

    def to_widget(self, value: Any) -> Any:
        """The option's value as its widget holds it."""
        if self.kind == "lines":
            return value if isinstance(value, str) else "\n".join(str(line) or NO_TEXT for line in value)
        if self.kind == "table":
            return configuration.toml_value(value) if value else ""
        if self.in_words:
            return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        return list(value) if self.kind == "choices" else value

    def read(self, value: Any) -> Any:
        """The widget's value as the option's; what does not fit is left as it is, for the config to name."""
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
        """Its bounds as signs that need no language: `1 … 1024`, `≥ 0`, `> 0`."""
        low, high, above = self.option.low, self.option.high, self.option.above
        if above is not None:
            return f"> {above:g}"
        if low is not None and high is not None and high < 1e6:
            return f"{low:g} … {high:g}"
        return "" if low is None else f"≥ {low:g}"


def _number(text: str) -> float | str | None:
    """A number, None for nothing, or the text itself where it is neither."""
    try:
        return float(text) if text else None
    except ValueError:
        return text


def fields() -> dict[str, Field]:
    """Every option of every adapter method, by key, in the order of the config."""
    by_key = {option.key: _field(option) for option in configuration.every_option() if not option.local_only}
    order = list(configuration.SECTIONS)
    # The adapter's method says which other options there are.
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
    """The value of every option for its widget. An option that this method lacks has its default."""
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
    """The config that a filled-in form means, or None and every problem by the key of its field ("" for none).

    Paths are resolved below the roots. An option of another adapter method is left out.
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
    """Refuse values of options that only the command which starts the front end may set.

    Raises:
        LorakitError: there is one.
    """
    for option in configuration.every_option():
        if option.local_only and options.get(option.key):
            way = Message("start the front end with --{name}", option.name)
            raise LorakitError("{option} cannot be set from a page: leave it out, or {way}", option.key, way)


def without_local(toml: str) -> str:
    """The text of a config without secrets, for example an address with a token."""
    names = "|".join(option.name for option in configuration.every_option() if option.local_only)
    return re.sub(rf"^({names}) = .+\n", "", toml, flags=re.MULTILINE)


def _resolve(key: str, value: object, roots: Roots) -> object:
    """A path, or each path of a table, below the roots; what is neither is left for the config to name."""
    if isinstance(value, dict):
        return {name: _resolve(key, item, roots) for name, item in value.items()}
    return resolve_path(key, value, roots) if isinstance(value, str) and value.strip() else value


def table_of(key: str, text: str) -> dict[str, str]:
    """The table that a widget's text means; none where it means no table of texts."""
    table = fields()[key].read(text)
    return {k: v for k, v in table.items() if isinstance(v, str)} if isinstance(table, dict) else {}


def table_text(table: Mapping[str, str]) -> str:
    """A table as its widget holds it."""
    return configuration.toml_value(table) if table else ""


def resolve_path(key: str, text: str, roots: Roots) -> str:
    """The path below the roots that somebody typed; a base's hub id as it is, unless a file there has that name.

    Raises:
        LorakitError: it is outside of the roots.
    """
    path = roots.resolve(text)
    return (
        text
        if key in (quickstart.BASE, quickstart.VAE) and not path.exists() and quickstart.is_hub_id(text)
        else str(path)
    )


def field_of(problem: str, by_key: Mapping[str, Any]) -> str:
    """The key of the option that a message speaks of first, or ""."""
    return next((key for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", problem) if key in by_key), "")


def changed(current: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (the preset's value, the form's) where they differ."""
    by_key = fields()
    return {
        key: (preset[key], current[key])
        for key in by_key
        if key in preset and key in current and by_key[key].read(current[key]) != by_key[key].read(preset[key])
    }
