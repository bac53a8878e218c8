"""Tests that invalid safetensors headers are refused in one line, as strictly as by the library."""

import hostile
import pytest
import safetensors

from lorakit.core import prompt_syntax, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.formats import inspect, read


@pytest.mark.parametrize("name", hostile.DAMAGED)
def test_damage_is_reported_in_one_line(tmp_path, name):
    content, text = hostile.DAMAGED[name]
    path = hostile.write(tmp_path, name, content)
    for command in (safetensors_header.read, inspect.inspect, read):
        with pytest.raises(LorakitError) as error:
            command(path)
        line = str(error.value).removeprefix(f"{path}: ")
        assert text in line and line.isprintable() and len(line) < 300, (command, line)
    # The specification forbids the first; the library accepts it since 0.8. No program writes the other two.
    if name not in ("space before the brace", "name of 90,000 characters", "5,001 dimensions"):
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(content)


@pytest.mark.parametrize("name", hostile.COMPLETE)
def test_files_that_the_library_reads_are_read(tmp_path, name):
    content = hostile.COMPLETE[name]
    header = safetensors_header.read(hostile.write(tmp_path, name, content))
    assert {key: list(shape) for key, shape in header.shapes().items()} == {
        key: value["shape"] for key, value in safetensors.deserialize(content)
    }


@pytest.mark.parametrize(
    "start", [b"\x80\x02", b"\x80\x05", b"<!", b"PK\x03\x04", b"\x89PNG", b"GGUF", b"\xff\xd8\xff", b"<htm", b"<?xm"]
)
def test_a_length_with_another_formats_first_bytes_is_read(tmp_path, start):
    length = int.from_bytes(start[:2], "little") + 65536  # a test can only use the two lowest bytes of a length
    content = hostile.header_of_length(length)
    assert content[:2] == start[:2]
    assert set(safetensors_header.read(hostile.write(tmp_path, "x", content)).tensors) == {"a", "b"}
    with pytest.raises(LorakitError, match="cut off inside its header"):
        safetensors_header.read(hostile.write(tmp_path, "y", content[:9000]))


def test_prompt_patterns_take_linear_time():
    """Patterns that backtrack took hours for these captions."""
    size = 20_000
    for text in (":" + "1" * size, "[" + ":1" * size, "[x:" + "1:" * size, "a" + " " * size, " " * size + "BREA"):
        assert prompt_syntax.syntax(text) == "" and prompt_syntax.ignored(text) == []
    for text in ("(:1" * 2000, "[|" * 2000, ":" + "1" * size):
        assert prompt_syntax.parse(text)
