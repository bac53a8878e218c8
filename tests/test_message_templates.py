"""Messages are templates with values: none is built outside of them, and each template has its values and a line."""

import ast
import string
from collections.abc import Iterator
from pathlib import Path

from test_house import PACKAGE, sources
from trees import nodes_of

from lorakit.ui import texts

MAKERS = {"Message", "LorakitError", "ConfigError", "MissingFile", "NotFinite", "Unwritable", "Unreadable"}
LISTS = {"problems", "errors", "warnings", "notes", "findings", "lines"}
# Messages that are put together from finished text, and templates without a line in a language: both may only fall.
OUTSIDE, UNTRANSLATED = 45, 234


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """The calls that take a message, by the name of what is called."""
    for node in nodes_of(path, ast.Call):
        if node.args:
            called = node.func
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            owner = getattr(called, "value", None)
            kind = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if name in MAKERS or (name == "append" and kind in LISTS) or (name == "say" and kind.endswith("events")):
                yield name, node


def templates(call: ast.Call) -> list[str]:
    """The template of a call, where it stands in the call."""
    first = call.args[0]
    choices = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
    return [node.value for node in choices if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def names(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def key(template: str, call: ast.Call) -> str:
    if len(call.args) == 1:
        return template
    parts = string.Formatter().parse(template)
    places = ((literal.replace("{", "{{").replace("}", "}}"), name) for literal, name, _, _ in parts)
    return "".join(literal + (f"{{{name}}}" if name else "") for literal, name in places)


def test_messages_are_built_from_templates() -> None:
    outside = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}"
        for path in sources()
        for name, call in calls(path)
        for argument in call.args
        if isinstance(argument, ast.JoinedStr | ast.BinOp) and (name != "Message" or argument is not call.args[0])
        if name != "Message" and argument is call.args[-1]
    ]
    assert len(outside) <= OUTSIDE, outside


def test_a_template_has_as_many_values_as_names() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}"
        for path in sources()
        for name, call in calls(path)
        for template in templates(call)
        if name in MAKERS - {"Unreadable"} and len(call.args) > 1
        if not any(isinstance(argument, ast.Starred) for argument in call.args)
        if len(call.args) - 1 != len(names(template))
    ]
    assert not wrong


def test_templates_have_a_line_in_chinese() -> None:
    lines = texts.sentences("zh-Hant").lines
    missing = {
        key(template, call)
        for path in sources()
        if path.relative_to(PACKAGE).parts[0] != "cli"
        for name, call in calls(path)
        for template in templates(call)
        if name != "Unreadable" and key(template, call) not in lines
    }
    assert len(missing) <= UNTRANSLATED, sorted(missing)
