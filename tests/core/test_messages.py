"""Tests that a message is its English text and keeps the template and values for other languages."""

import copy
import json
import pickle

import pytest

from lorakit.core.errors import ConfigError, LorakitError
from lorakit.core.events import Event
from lorakit.core.messages import KEYS, Joined, Message, from_json, from_lines, join, to_lines

NESTED = Message(
    "{file}: {problem}; {share:.1%} of {{a|b}}, {name!r}, {step}",
    "a.png",
    LorakitError("cut off at {size} bytes", 3),
    0.25,
    "x",
    7,
)


def test_a_message_is_its_english_text_with_a_template_and_values():
    assert NESTED == "a.png: cut off at 3 bytes; 25.0% of {a|b}, 'x', 7"
    assert NESTED.template == "{file}: {problem}; {share} of {{a|b}}, {name}, {step}"
    assert NESTED.values == {
        "file": "a.png",
        "problem": "cut off at 3 bytes",
        "share": "25.0%",
        "name": "'x'",
        "step": 7,
    }
    problem = NESTED.values["problem"]
    assert isinstance(problem, Message) and (problem.template, problem.values) == (
        "cut off at {size} bytes",
        {"size": 3},
    )
    assert Message("{braces} without values") == "{braces} without values"
    assert str(NESTED) is NESTED and Message(NESTED) is NESTED


def test_an_error_has_a_message():
    error = LorakitError("{path} is empty", "a.txt")
    assert str(error) == "a.txt is empty" and str(error).template == "{path} is empty"  # type: ignore[attr-defined]
    assert str(LorakitError("100 % {sure}")) == "100 % {sure}"
    both = ConfigError([str(error), "data.folder: missing"])
    assert str(both) == "a.txt is empty\ndata.folder: missing"
    assert [type(line) for line in str(both).splitlines()] == [Message, str]
    with pytest.raises(ValueError, match="zip"):
        LorakitError("{path} is empty", "a.txt", 3)


def test_parts_are_joined_and_stay_messages():
    parts = [Message("{number} photos", 2), "a\nb"]
    joined = join("\n", parts)
    assert joined == "2 photos\na\nb" and joined.splitlines() == ["2 photos", "a", "b"]
    assert isinstance(joined, Joined) and joined.parts == tuple(parts) and join(", ", parts[:1]) is parts[0]
    assert join("\n", []) == "" and join("\n", []).splitlines() == []


def test_replacing_in_a_message_replaces_in_its_values():
    inner = Message("{name} has {count} bytes", "/tmp/1/a.png", 3)
    lines = join("\n", [Message("{path}: {problem}", "/tmp/1/a.png", inner), "in /tmp/1/"]).replace("/tmp/1/", "")
    assert lines == "a.png: a.png has 3 bytes\nin "
    first = lines.splitlines()[0]
    assert isinstance(first, Message) and first.template == "{path}: {problem}" and first.values["path"] == "a.png"
    problem = first.values["problem"]
    assert isinstance(problem, Message) and problem.values == {"name": "a.png", "count": 3}


@pytest.mark.parametrize("message", [NESTED, join("; ", [NESTED, "plain", Message("{a}", 1)])])
def test_a_message_is_restored_from_a_log_and_another_process(message: Message):
    line = Event("message", 3, {"message": message}).to_json()
    table = json.loads(json.dumps(line))
    for same in (from_json(table["message"], table), pickle.loads(pickle.dumps(message)), copy.deepcopy(message)):
        assert same == message and same.to_json() == message.to_json()  # type: ignore[attr-defined]


@pytest.mark.parametrize("table", [{}, {"key": 3, "values": {}}, {"key": "a"}, {"parts": 3, "join": ""}])
def test_a_log_line_without_keys_is_plain_text(table: dict[str, object]):
    assert from_json("a line", table) == "a line" and type(from_json("a line", table)) is str


def test_a_command_sends_message_keys_to_its_parent_process(monkeypatch: pytest.MonkeyPatch):
    problem = join("\n", [Message("{file} is empty", "a.txt"), "else"])
    assert to_lines(problem) == "lorakit: a.txt is empty\nlorakit: else\n"
    assert from_lines("first\n" + to_lines(problem)) == ["a.txt is empty", "else"]
    monkeypatch.setenv(KEYS, "1")
    (message,) = from_lines(to_lines(problem) + "last\n")
    assert message == problem and message.splitlines()[0].template == "{file} is empty"  # type: ignore[attr-defined]
