"""Each message is a template with values, and each template has a line in the tables of languages.

The tests follow names, lists and functions of a module to the parts of a message. They also find a sentence that code
builds first and uses later.
"""

import ast
import contextlib
import functools
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_house import PACKAGE, sources
from trees import nodes_of, syntax_tree, walk

from lorakit.core.units import count
from lorakit.ui import texts

MAKERS = {"Message", "LorakitError", "ConfigError", "MissingFile", "NotFinite", "Unwritable", "Unreadable", "Refusal"}
# Functions and exceptions that take a line for the user.
SPEAKERS = {"say", "complain", "remark", "print_lines", "fail", "ArgumentTypeError", "ValueError"}
LISTS = {"problems", "errors", "warnings", "notes", "findings", "lines"}
# Modules whose texts are not messages: prompts for the bundled base, and errors that only its developers can meet.
OTHER_TEXTS = ("families/pocket/",)
# Module -> number of places that build a plural.
PLURALS = {"core/units.py": 1}
# Matches two words, or the beginning or the end of a sentence.
WORDS = re.compile(r"[A-Za-z]{2,}[,:;]? [a-z]{2,}|[a-z]{3,} $|^ [a-z]{3,}|^[;:] [a-z]")
COMMAND = re.compile(r"(lorakit|pipx|uv|--[a-z-]+)( |$)| -m pip ")

# A number before a plural noun, such as "{count} photos" or "{count} of {all} photos are". At 1 it is wrong English.
# Write "photos: {count}", or take `units.count`.
NOUNS = (
    "adapters|batches|blocks|captions|cards|channels|checkpoints|embeddings|epochs|files|folders|images|jobs|layers|lines|"
    "modules|names|photos|pictures|points|processes|programs|prompts|resolutions|rows|runs|samples|steps|tags|tensors|"
    "texts|threads|times|tokens|vectors|weights|words"
)
NUMBER = r"\{(count|all|number|some|total|tokens|steps|photos|modules)(:[^}]*)?\}"
PLURAL_AT_ONE = re.compile(rf"{NUMBER} ([a-z'-]+ )?({NOUNS})\b|\}} of {NUMBER} ([a-z'-]+ )?({NOUNS}) (are|have|were)\b")
# Templates whose number is never 1, by their beginnings.
NEVER_ONE = (
    " at {count} resolutions",
    " at each of {count} resolutions",
    " of {count} photos",
    " of {count:.3g} photos",
    "CLIP reads {limit} of {count} tokens",
    "average: exported, drawn and validated is the average of about the last {count} steps",
    "demo: {count} photos of",
    "holds {count} pictures",
    "makes latents of {count} channels",
    "more than {count} files",
    "processes: {processes}, each with {parts} of the {all} batches",
    "tokenizer {folder} knows {count} words",
    "{name} of base {path} knows {count} words",
    "{option} = {own} on each of {processes} processes makes {all} batches",
    "its text has {tokens} tokens",
    "optimizer.lr_decay_ratio = {share",
    "texts: all are padded to {tokens} tokens",
    "the bundled picture classifier finds",
    "the trigger {word} has {tokens} tokens",
    "the trigger's vectors begin as",
    "the validation error still fell at the end of the {steps} steps",
    "validation: fewer than {count} photos",
    "validation: {count} of {all} photos held out",
    "{count} captions, of which one is drawn",
    "{count} steps go",
    "{count:.2g} steps go",
    "{count} times",
    "{names}: the same file, counted",
    "{name}/ {count} times",
)

Node = ast.AST


def called_name(call: ast.Call) -> str:
    called = call.func
    return called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""


def owner_name(call: ast.Call) -> str:
    """Return the name of the object whose method is called."""
    owner = getattr(call.func, "value", None)
    return owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")


def target_name(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> str:
    """Return the name or the attribute that is assigned."""
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield (name of the function, call) for each call that takes a message."""
    for node in nodes_of(path, ast.Call):
        if node.args:
            name, kind = called_name(node), owner_name(node)
            if name in MAKERS or (name == "append" and kind in LISTS) or (name == "say" and kind.endswith("events")):
                yield name, node


def templates(call: ast.Call) -> list[str]:
    """Return the templates that are literals in the call."""
    first = call.args[0]
    choices = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
    return [node.value for node in choices if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def names(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def key(template: str, call: ast.Call) -> str:
    return template if len(call.args) == 1 else as_key(template)


def as_key(template: str) -> str:
    """Return a template without its format specifications."""
    parts = string.Formatter().parse(template)
    places = ((literal.replace("{", "{{").replace("}", "}}"), name) for literal, name, _, _ in parts)
    return "".join(literal + (f"{{{name}}}" if name else "") for literal, name in places)


class Texts:
    """Finds the texts that an expression of a module can have as its value."""

    def __init__(self, tree: ast.Module):
        self.nodes = every = walk(tree)
        self.parents = {child: node for node in every for child in ast.iter_child_nodes(node)}
        functions = [node for node in every if isinstance(node, ast.FunctionDef)]
        self.returned: dict[str, list[Node]] = {
            function.name: [
                node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Return | ast.Yield) and node.value is not None and self.scope(node) is function
            ]
            for function in functions
        }
        self.assigned: dict[tuple[Node | None, str], list[Node]] = {}
        for node in every:
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
                targets = [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    value = getattr(node, "value")  # noqa: B009
                    self.assigned.setdefault((self.scope(node), target.id), []).append(value)

    def scope(self, node: Node) -> Node | None:
        """Return the function that contains the node."""
        inside = self.parents.get(node)
        while inside is not None and not isinstance(inside, ast.FunctionDef):
            inside = self.parents.get(inside)
        return inside

    def of(self, node: Node, before: frozenset[Node] = frozenset()) -> Iterator[Node]:
        """Yield the nodes of all texts that an expression can have as its value."""
        if node in before:
            return
        before |= {node}
        inside: list[Node] = []
        if isinstance(node, ast.IfExp):
            inside = [node.body, node.orelse]
        elif isinstance(node, ast.BoolOp):
            inside = [*node.values]
        elif isinstance(node, ast.List | ast.Tuple):
            inside = [*node.elts]
        elif isinstance(node, ast.ListComp | ast.GeneratorExp):
            inside = [node.elt]
        elif isinstance(node, ast.Starred | ast.NamedExpr):
            inside = [node.value]
        elif isinstance(node, ast.Name):
            here, module = (self.scope(node), node.id), (None, node.id)
            inside = self.assigned.get(here, self.assigned.get(module, []))
        elif isinstance(node, ast.Call) and called_name(node) in ("join", "next", "some", "filter"):
            separated = isinstance(node.func, ast.Name) and node.func.id == "join"
            inside = [*node.args[separated:]]
            yield node
        elif isinstance(node, ast.Call) and called_name(node) not in MAKERS | SPEAKERS:
            own = isinstance(node.func, ast.Name) or getattr(getattr(node.func, "value", None), "id", "") == "self"
            inside = [*self.returned.get(called_name(node), [])] if own else []
            yield node
        else:
            yield node
            if isinstance(node, ast.BinOp):
                inside = [node.left, node.right]
        for part in inside:
            yield from self.of(part, before)


@functools.cache
def texts_of(path: Path) -> Texts:
    return Texts(syntax_tree(path))


def is_built(node: Node) -> bool:
    """Return whether an expression builds a text from words: an f-string, "+", "%", `format`, or `join` with a word."""
    literals: list[Node] = []
    if isinstance(node, ast.JoinedStr):
        literals = [*node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mod):
        literals = [node.left, node.right]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "join"):
        literals = [node.func.value]
    words = [part.value for part in literals if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return any(map(WORDS.search, words)) and not any(map(COMMAND.match, words))


def outside(module: Texts) -> list[int]:
    """Return the lines of a module that build a message without a template."""
    places = set[int]()
    for node in module.nodes:
        messages: list[Node] = []
        if isinstance(node, ast.Call) and node.args:
            name, kind = called_name(node), owner_name(node)
            if name in MAKERS | SPEAKERS or (name in ("append", "extend") and kind in LISTS):
                messages = [*node.args]
            if name in MAKERS - {"Unreadable"}:  # the template must be a literal
                first = [text for text in module.of(node.args[0]) if isinstance(text, ast.JoinedStr | ast.BinOp)]
                places |= {text.lineno for text in first}
        elif isinstance(node, ast.AugAssign | ast.Assign | ast.AnnAssign) and target_name(node) in LISTS:
            messages = [node.value] if node.value else []
        places |= {getattr(text, "lineno", 0) for one in messages for text in module.of(one) if is_built(text)}
    return sorted(places)


@pytest.mark.parametrize(
    "built",
    [
        'raise LorakitError(f"{a} is bad")',
        'raise LorakitError(f"{a}{b}")',
        'raise ValueError(f"{a} is not there")',
        'raise LorakitError("{a} is bad: {b}", a, f"the file of {b}")',
        'raise LorakitError("{a} is bad: {b}", a, "the file " + b)',
        'raise LorakitError("%s is bad" % a)',
        'raise LorakitError("{} is not there".format(a))',
        'raise ConfigError([f"{a} is bad: {b}" for b in a])',
        'problems += [f"{a} is bad"]',
        'problems = [*b, f"{a} is bad"]',
        'self.notes.append(f"{a} is bad")',
        'text = f"{a} is bad"\nraise LorakitError(text)',
        'text = "good" if b else f"{a} is bad"\nsay(text)',
        'if text := f"{a} is bad":\n  raise LorakitError(text)',
        'say(f"{a} is bad")',
        'print_lines(*(f"{a} is bad" for a in b))',
        'def why(a):\n  return f"{a} is bad"\nraise LorakitError(why(b))',
        'def why(a):\n  text = b or f"{a} is bad"\n  return text\nraise LorakitError("{file}: {why}", a, why(b))',
        'raise LorakitError("; ".join(f"{a} is bad" for a in b))',
        'raise LorakitError("{names} differ", " as well as ".join(b))',
    ],
)
def test_a_message_without_a_template_is_found(built: str) -> None:
    assert outside(Texts(ast.parse(built)))


@pytest.mark.parametrize(
    "built",
    [
        'raise LorakitError("{name} is bad", f"{a}.{b}")',
        'raise LorakitError("good" if a else "{b} is bad", b)',
        'say(Message("{name} is bad", b))',
        'lines = [Message("{name} is bad", b)]',
        'raise LorakitError("{name} is bad", ", ".join(b))',
    ],
)
def test_a_message_with_a_template_passes(built: str) -> None:
    assert not outside(Texts(ast.parse(built)))


def test_messages_are_built_from_templates() -> None:
    lines = {path.relative_to(PACKAGE).as_posix(): outside(texts_of(path)) for path in sources()}
    built = {name: places for name, places in lines.items() if places and not name.startswith(OTHER_TEXTS)}
    assert {name: len(places) for name, places in built.items()} == PLURALS, built


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


def phrases(name: str, kind: str, call: ast.Call) -> list[ast.expr]:
    """Return the arguments that can be a message without values, or a part of one."""
    if name in MAKERS | {"Finding"} or (name == "say" and kind.endswith("events")):
        return call.args[name != "Unreadable" and name != "Finding" :]
    return call.args if name in SPEAKERS or (name in ("append", "extend") and kind in LISTS) else []


@functools.cache
def all_messages(path: Path) -> set[str]:
    """Return the keys of a module's messages: templates, and sentences and phrases without values."""
    return set(keys(texts_of(path)))


def keys(module: Texts) -> Iterator[str]:
    for node in module.nodes:
        first: list[ast.expr] = []
        rest: list[ast.expr] = []
        if isinstance(node, ast.Call) and node.args:
            name, kind = called_name(node), owner_name(node)
            rest = phrases(name, kind, node)
            is_template = name in MAKERS - {"Unreadable"} or (name == "say" and kind.endswith("events"))
            first = node.args[:1] if is_template else []
            noun = node.args[-1]
            if name == "count" and isinstance(noun, ast.Constant) and re.fullmatch("[A-Za-z ]+", str(noun.value)):
                yield from plurals(str(noun.value))
        elif isinstance(node, ast.AugAssign | ast.Assign | ast.AnnAssign) and target_name(node) in LISTS:
            rest = [node.value] if node.value else []
        for argument in first:
            for text in module.of(argument):
                if isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value:
                    assert isinstance(node, ast.Call)
                    yield key(text.value, node)
        for argument in rest:
            for text in module.of(argument):
                if isinstance(text, ast.Constant) and isinstance(text.value, str) and WORDS.search(text.value):
                    yield text.value


def plurals(noun: str) -> list[str]:
    """Return the keys of `units.count`: singular and plural."""
    return [str(getattr(count(number, noun), "template")) for number in (1, 2)] if noun else []  # noqa: B009


def literals(path: Path) -> Iterator[str]:
    """Yield all strings of a module, as keys."""
    for node in nodes_of(path, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
            with contextlib.suppress(ValueError):
                yield as_key(node.value)


def wrong_at_one(text: str) -> bool:
    """Return whether a template has a number before a plural noun, and the number can be 1."""
    return bool(PLURAL_AT_ONE.search(text)) and not text.startswith(NEVER_ONE)


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ("{count} photos added.", True),
        ("{count:,} more texts are cut off", True),
        ("{some} of {all} photos have a mask", True),
        ("photos added: {count}", False),
        ("{count} of {all} applied", False),
        ("{steps}{size}, each of {photos} seen {times}", False),
    ],
)
def test_plurals_after_a_number_are_found(text: str, is_wrong: bool) -> None:
    assert wrong_at_one(text) is is_wrong


def test_messages_with_a_number_are_right_at_one() -> None:
    by_count = {f"{{count}} {noun}" for noun in NOUNS.split("|")}  # `units.count` takes them from 2 on
    every = {text for path in sources() for text in {*all_messages(path), *literals(path)} if "\n" not in text}
    every |= set(texts.source("en").texts.values())
    assert sorted(filter(wrong_at_one, every - by_count)) == []


def test_each_message_has_a_line_in_chinese() -> None:
    """tests/ui/test_languages.py compares the other languages with Chinese. The command line has only English."""
    lines = texts.sentences("zh-Hant").lines
    ours = [path for path in sources() if not path.relative_to(PACKAGE).as_posix().startswith((*OTHER_TEXTS, "cli/"))]
    assert sorted({message for path in ours for message in all_messages(path)} - set(lines)) == []


def test_each_line_belongs_to_a_message() -> None:
    every = {text for path in sources() for text in literals(path)}
    every |= {message for path in sources() for message in all_messages(path)}
    assert sorted(set(texts.sentences("zh-Hant").lines) - every) == []
