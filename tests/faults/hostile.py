"""Safetensors files written byte by byte: valid files, every kind of damage, and files that no library writes."""

import json
from pathlib import Path
from typing import Any

DATA = bytes(range(48))


def file_of(header: bytes | str | dict[str, Any], data: bytes = DATA) -> bytes:
    """Return the bytes of a file with this header, valid or not."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def table(a: dict[str, Any] | None = None, b: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a header of two tensors that fill `DATA`, with the given changes."""
    return {"a": a or entry(), "b": b or entry(offsets=(24, 48)), **more}


T = json.dumps(entry())

# fmt: off
# name -> (content, part of the error). The library refuses all but the three that test_headers.py names.
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "seven bytes": (b"\x01" * 7, "not a safetensors file"),
    "no header": (bytes(8), "not a safetensors file"),
    "length of a header alone": ((20).to_bytes(8, "little"), "not a safetensors file"),
    "endless header": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "header over the limit": ((100_000_001).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header past the end": ((5000).to_bytes(8, "little") + b'{"a":', "cut off inside its header"),
    "array": (file_of("[1, 2]"), "not a safetensors file"),
    "string": (file_of('"text"'), "not a safetensors file"),
    "space before the brace": (file_of(" {}", b""), "not a safetensors file"),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}", b""), "not a safetensors file"),
    "half a header": (file_of('{"a": {"dtype": "F32"'), "does not parse"),
    "two tables": (file_of("{}{}", b""), "does not parse"),
    "comma at the end": (file_of('{"__metadata__": {},}', b""), "does not parse"),
    "zeros after it": (file_of(b"{}\0\0", b""), "does not parse"),
    "not UTF-8": (file_of(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "UTF-16": (file_of("{}".encode("utf-16-le"), b""), "does not parse"),
    "lone surrogate": (file_of('{"\\ud800": ' + T + "}", DATA[:24]), r"\ud800 in its header is not Unicode"),
    "surrogate in metadata": (
        file_of('{"__metadata__": {"k": "\\udfff"}}', b""),
        r"\udfff in its header",
    ),
    "deep arrays": (file_of('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"), "nested too deep"),
    "deep tables": (file_of('{"a":' * 200_000 + "1" + "}" * 200_000), "nested too deep"),
    "metadata is a list": (file_of(table(__metadata__=["a"])), "the __metadata__ in its header is no table"),
    "metadata is a text": (file_of(table(__metadata__="a")), "the __metadata__ in its header is no table"),
    "metadata is a number": (file_of(table(__metadata__=3)), "the __metadata__ in its header is no table"),
    "number in metadata": (
        file_of(table(__metadata__={"rank": 4})),
        "rank in the __metadata__ of its header is no",
    ),
    "null in metadata": (file_of(table(__metadata__={"rank": None})), "rank in the __metadata__"),
    "table in metadata": (file_of(table(__metadata__={"x": {}})), "x in the __metadata__ of its header is no text"),
    "tensor is a list": (file_of(table([1])), "a has no table in the header"),
    "tensor is a number": (file_of(table(7)), "a has no table in the header"),
    "tensor is empty": (file_of({"a": {}}, b""), "a has the dtype None"),
    "no dtype": (file_of({"a": {"shape": [2, 3], "data_offsets": [0, 24]}}, DATA[:24]), "a has the dtype None"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 24]}}, DATA[:24]), "the shape of a is None"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2, 3]}}, DATA[:24]), "the offsets of a are None"),
    "dtype of tomorrow": (file_of(table(entry("F3"))), "a has the dtype F3"),
    "dtype in small letters": (file_of(table(entry("f32"))), "a has the dtype f32"),
    "dtype is a list": (file_of(table(entry(["F32"]))), "a has the dtype ['F32']"),
    "dtype is a number": (file_of(table(entry(32))), "a has the dtype 32"),
    "dtype with an escape code": (file_of(table(entry("\x1b[31mF32"))), r"a has the dtype \x1b[31mF32"),
    "dtype of a megabyte": (file_of(table(entry("F" * 1_000_000))), "F…, which"),
    "lying dtype": (file_of(table(entry("F16"))), "a has 24 bytes, and not those of [2, 3] in F16"),
    "lying shape": (file_of(table(entry(shape=(2, 4)))), "a has 24 bytes, and not those of [2, 4] in F32"),
    "no shape for bytes": (file_of(table(entry(shape=()))), "a has 24 bytes"),
    "half a byte": (file_of({"a": entry("F4", (3,), (0, 1))}, b"x"), "a has 1 bytes, and not those of [3] in F4"),
    "shape of zeros": (file_of(table(entry(shape=(0, 3)))), "a has 24 bytes"),
    "negative shape": (file_of(table(entry(shape=(-2, -3)))), "its header has the number -2"),
    "fraction in a shape": (file_of(table(entry(shape=(2.0, 3)))), "the shape of a is [2.0, 3]"),
    "truth in a shape": (file_of(table(entry(shape=(True, 6)))), "the shape of a is [True, 6]"),
    "text in a shape": (file_of(table(entry(shape=("2", 3)))), "the shape of a is ['2', 3]"),
    "shape is a text": (file_of(table(entry(shape="ab"))), "the shape of a is ab"),
    "shape is a number": (file_of(table(entry(shape=6))), "the shape of a is 6"),
    "nested shape": (file_of(table(entry(shape=[[2, 3]]))), "the shape of a is [[2, 3]]"),
    "shape beyond 64 bits": (file_of(table(entry(shape=[1 << 64]))), "its header has the number 18446744073709551616"),
    "product beyond 64 bits": (file_of(table(entry(shape=[1 << 40, 1 << 40]))), "a has 24 bytes"),
    "product that wraps round": (file_of(table(entry(shape=[1 << 63, 2, 3]))), "a has 24 bytes"),
    "number of 5,000 digits": (file_of(json.dumps(table()).replace("2, 3", "9" * 5000)), "has the number 9999"),
    "infinity": (file_of('{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}'), "number Infinity"),
    "not a number": (file_of('{"a": NaN}'), "its header has the number NaN"),
    "one offset": (file_of(table(entry(offsets=[24]))), "the offsets of a are [24]"),
    "three offsets": (file_of(table(entry(offsets=[0, 24, 48]))), "the offsets of a are [0, 24, 48]"),
    "offsets are a table": (file_of(table(entry(offsets={"0": 24}))), "the offsets of a are {'0': 24}"),
    "text in the offsets": (file_of(table(entry(offsets=["0", 24]))), "the offsets of a are ['0', 24]"),
    "reversed offsets": (file_of(table(entry(offsets=(24, 0)))), "the offsets of a are [24, 0]"),
    "negative offsets": (file_of(table(entry(offsets=(-24, 0)))), "its header has the number -24"),
    "offset of a fraction": (file_of(table(entry(offsets=(0, 24.5)))), "the offsets of a are [0, 24.5]"),
    "overlap": (file_of(table(b=entry(offsets=(0, 24)))), "b overlaps a"),
    "overlap by a byte": (file_of(table(b=entry(offsets=(23, 47))), DATA[:47]), "b overlaps a"),
    "gap": (file_of(table(b=entry(offsets=(28, 52))), bytes(52)), "b leaves a gap after a"),
    "gap at the start": (file_of({"a": entry(offsets=(8, 32))}, bytes(32)), "a leaves a gap after the header"),
    "overlap with nothing": (file_of(table(c=entry(shape=[0], offsets=(5, 5)))), "overlaps"),
    "bytes after the last": (file_of(table(), DATA + b"x"), "1 bytes follow its last tensor"),
    "bytes and no tensor": (file_of("{}", b"x"), "1 bytes follow its last tensor"),
    "cut off": (file_of(table(), DATA[:40]), "cut off"),
    "cut off at the header": (file_of(table(), b""), "cut off"),
    "offsets of an exabyte": (file_of(table(b=entry("U8", [1 << 60], (24, 24 + (1 << 60))))), "cut off"),
    "twice the same tensor": (file_of('{"a":' + T + ',"a":' + T.replace("0, 24", "24, 48") + "}"), "has a twice"),
    "twice the same key": (file_of('{"a":' + T.replace("{", '{"dtype":"F32",') + "}", DATA[:24]), "has dtype twice"),
    "twice the metadata": (file_of('{"__metadata__":{},"__metadata__":{}}', b""), "has __metadata__ twice"),
    "5,001 dimensions": (file_of(table(entry(shape=[1] * 4999 + [2, 3]))), "has 5001 dimensions"),
    "name of 90,000 characters": (file_of({".lora_down" * 9000 + "\n\n": entry()}, DATA[:24]), "a name of 90002 char"),
    "pickle": (b"\x80\x02}q\x00(X\x05\x00\x00\x00epoch" + bytes(64), "a pickle"),
    "pickle of a newer protocol": (b"\x80\x04\x95" + bytes(64), "a pickle"),
    "zip": (b"PK\x03\x04" + bytes(64), "a pickle"),
    "page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "page in capitals": (b"\n<HTML><BODY>Access denied", "a web page"),
    "answer of a server": (b'{"error": "not found, sorry"}', "not a safetensors file"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "a picture"),
    "photo": (b"\xff\xd8\xff\xe0" + bytes(64), "a picture"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
}

# Files that both the library and lorakit read.
COMPLETE: dict[str, bytes] = {
    "plain": file_of(table()),
    "order of the header is not that of the data": file_of({"b": entry(offsets=(24, 48)), "a": entry()}),
    "spaces after the header": file_of(json.dumps(table()) + "  \n"),
    "no tensor": file_of("{}", b""),
    "no metadata": file_of(table(__metadata__=None)),
    "empty tensors": file_of(table(c=entry(shape=[0], offsets=(24, 24)), d=entry(shape=[3, 0], offsets=(48, 48)))),
    "scalar": file_of({"a": entry(shape=[], offsets=(0, 4))}, bytes(4)),
    "key of tomorrow": file_of(table({**entry(), "unit": "m"})),
    "half bytes": file_of({"a": entry("F4", (3, 2), (0, 3))}, bytes(3)),
    "six bits": file_of({"a": entry("F6_E2M3", (4,), (0, 3))}, bytes(3)),
    "pair of surrogates": file_of('{"\\ud83d\\ude00": ' + T + "}", DATA[:24]),
}
# fmt: on


def header_of_length(length: int) -> bytes:
    """Return the plain file with its header padded by spaces to this length."""
    return file_of(json.dumps(table()).ljust(length))


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / f"{name.replace(' ', '-')}.safetensors"
    path.write_bytes(content)
    return path
