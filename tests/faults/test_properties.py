"""Tests that any file or argument gives a value or one of lorakit's errors, and no other exception.

`LORAKIT_EXAMPLES=20000` tests each property with more examples than the suite has time for, and new ones each time.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hostile
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.strategies import SearchStrategy

from lorakit.config import ConfigError, from_tables, load, parse_override
from lorakit.config.loading import options
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.data import photo_folder
from lorakit.formats import inspect, read
from lorakit.formats.edit import resize_combine
from lorakit.formats.saving import save_adapter

EXAMPLES = int(os.environ.get("LORAKIT_EXAMPLES", "0"))
budget = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.0]))
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "\x1b[31m", "\n", "\u202e", "\0", "a" * 3000, "[" * 3000, "9" * 5000])
)
ANYTHING: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def mutations(content: bytes) -> SearchStrategy[bytes]:
    """Return the content with a few bytes replaced, inserted, deleted or doubled."""

    def change(draw: Any) -> bytes:
        result = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            start = draw(st.integers(0, len(result)))
            end = draw(st.integers(start, min(len(result), start + 20)))
            result[start:end] = draw(
                st.one_of(
                    st.binary(max_size=6),
                    st.just(bytes(result[start:end] * 2)),
                    st.sampled_from([b"0", b"-1", b"1e9", b"null", b"[]", b"{}", b'""', b"true", b'"', b"\\ud800"]),
                )
            )
        return bytes(result)

    return st.composite(change)()


# -- safetensors ------------------------------------------------------------------------------------------------------


@budget
@given(st.sampled_from(list(hostile.COMPLETE.values())).flatmap(mutations))
def test_a_header_is_read_if_and_only_if_the_library_reads_it(tmp_path, content):
    problem = _header_problem(hostile.write(tmp_path, "x", content))
    assert (problem is None) == _is_header(content) or re.search(STRICTER, str(problem)), problem


# The library accepts these and lorakit refuses them: duplicate names, long names, many dimensions.
STRICTER = " twice|has a name of [0-9]+ characters|has [0-9]+ dimensions"


def _is_header(content: bytes) -> bool:
    """Return whether the library reads the file and its header begins as the specification says."""
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return content[8:9] == b"{"


def _header_problem(path: Path) -> str | None:
    try:
        safetensors_header.read(path)
    except LorakitError as error:
        return str(error)
    return None


ENTRIES = st.fixed_dictionaries({}, optional={"dtype": ANYTHING, "shape": ANYTHING, "data_offsets": ANYTHING})
VALID = st.sampled_from([hostile.entry(), hostile.entry(offsets=(24, 48)), hostile.entry("F16", (12,))])


@pytest.mark.slow
@budget
@given(st.dictionaries(TEXTS | st.just("__metadata__"), ENTRIES | VALID | ANYTHING, max_size=4))
def test_any_json_header_is_read_if_and_only_if_the_library_reads_it(tmp_path, table):
    content = hostile.file_of(table)
    problem = _header_problem(hostile.write(tmp_path, "x", content))
    assert (problem is None) == _is_header(content) or re.search(STRICTER, str(problem)), problem


DTYPES = ["F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "F8_E8M0"]
LAYERS = [
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    "lora_unet_mid_block_attentions_0_proj_in",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "unet.mid_block.attentions.0.proj_in",
    "text_encoder.encoder.layers.0.mlp.fc1",
    "base_model.model.mid_block.attentions.0.proj_in",
    "diffusion_model.middle_block.1.proj_in",
    "transformer.transformer_blocks.0.attn.to_q",
    "bundle_emb.sks",
    "unet.mid_block.attentions.0.processor.to_q_lora",
]
PARTS = [
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "lora_A.weight"),
    *(
        "lora_B.weight",
        "lora.down.weight",
        "lora.up.weight",
        "lora_magnitude_vector",
        "hada_w1_a",
        "hada_w1_b",
        "hada_w2_a",
    ),
    *(
        "hada_w2_b",
        "hada_t1",
        "hada_t2",
        "lokr_w1",
        "lokr_w2",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
    ),
    *("diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "on_input", "a1.weight", "string_to_param"),
]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=5)
METADATA_KEYS = [
    *("lorakit.family", "lorakit.method", "lorakit.config", "lorakit.layers_per_block", "ss_tag_frequency", "ss_seed"),
    *(
        "lora_adapter_metadata",
        "ss_network_module",
        "ss_base_model_version",
        "modelspec.architecture",
        "lorakit.words",
    ),
    *("ss_network_args", "modelspec.trigger_phrase", "ss_network_alpha", "ss_network_dim"),
]
VALUES = TEXTS | ANYTHING.map(json.dumps) | st.sampled_from(["sd1", "rslora", "lokr", "{}", "[]", "null"])


@st.composite
def adapter_files(draw: Any, layers: Sequence[str] = LAYERS) -> bytes:
    """Return a valid file whose tensors have adapter names and random shapes and dtypes."""
    table, data = {}, b""
    for layer in draw(st.lists(st.sampled_from(layers), min_size=1, max_size=2, unique=True)):
        for part in draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4, unique=True)):
            dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
            bits = safetensors_header.BITS[dtype]
            for side in shape:
                bits *= side
            size = -(-bits // 8)
            table[f"{layer}.{part}"] = hostile.entry(dtype, shape, (len(data), len(data) + size))
            data += draw(st.sampled_from([b"\0", b"\x3c", b"\xff"])) * size
    table["__metadata__"] = draw(st.dictionaries(st.sampled_from(METADATA_KEYS), VALUES, max_size=3))
    return hostile.file_of(table, data)


def _problems_of(path: Path) -> list[str]:
    """Return the errors of all commands for a file."""
    commands: list[Callable[[], object]] = [
        lambda: inspect.inspect(path).to_text(),
        lambda: resize_combine.resize(read(path), rank=2),
        lambda: save_adapter(read(path), path.parent / "export" / "x", formats=["kohya", "peft"]),
    ]
    problems = []
    for command in commands:
        try:
            with warnings.catch_warnings(action="ignore"):
                command()
        except LorakitError as error:
            problems.append(str(error))
    return problems


def _is_a_line(problem: str) -> bool:
    return 0 < len(problem) < 1000 and "\n" not in problem


@budget
@given(adapter_files())
def test_an_adapter_of_any_shapes_and_metadata_is_read_or_refused(tmp_path, content):
    problems = _problems_of(hostile.write(tmp_path, "x", content))
    assert all(map(_is_a_line, problems)), problems


CONFIG_KEYS = ["r", "lora_alpha", "alpha", "alpha_pattern", "rank_pattern", "use_rslora", "target_modules", "peft_type"]


@budget
@given(
    adapter_files([f"base_model.model.{layer.partition('.')[2]}" for layer in LAYERS if "." in layer]),
    ANYTHING | st.dictionaries(st.sampled_from(CONFIG_KEYS), ANYTHING | st.just({"(": 2, "a+b": "x"}), max_size=3),
)
def test_a_peft_folder_with_any_config_is_read_or_refused(tmp_path, content, config):
    folder = tmp_path / "unet"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    problems = _problems_of(tmp_path)
    assert all(map(_is_a_line, problems)), problems


# -- options ----------------------------------------------------------------------------------------------------------

KEYS = [option.key for option in options()]


def _config_problems(read_config: Callable[[], object]) -> Sequence[str]:
    try:
        read_config()
    except ConfigError as error:
        return error.problems
    return ()


@budget
@given(
    st.one_of(
        st.builds("{}={}".format, st.sampled_from(KEYS), TEXTS | NUMBERS.map(str) | ANYTHING.map(json.dumps)),
        st.text(max_size=20),
        st.sampled_from(KEYS).map(lambda key: f"{key}=" + "9" * 5000),
        st.sampled_from(KEYS).map(lambda key: f"{key}=" + "[" * 3000),
    )
)
def test_any_set_argument_gives_a_value_or_a_problem(text):
    def override() -> None:
        key, value = parse_override(text)
        load(None, {"train.steps": 2, key: value})

    problems = _config_problems(override)
    assert all(len(problem) < 1000 for problem in problems), problems


@budget
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4))
def test_any_value_of_an_option_is_accepted_or_a_problem(values):
    tables: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    for config in (tables, {**tables, "train": ANYTHING}):
        problems = _config_problems(lambda config=config: from_tables(config, {}))
        assert all(len(problem) < 1000 for problem in problems), problems


TOML = b'[data]\nname = "sks dog"\nresolution = 512\n[train]\nsteps = 20\n[adapter]\nrank = 4\ntarget_modules = ["a"]\n'


@budget
@given(st.one_of(mutations(TOML), st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8"))))
def test_any_toml_is_read_or_refused(tmp_path, content):
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    problems = _config_problems(lambda: load(file))
    assert all(len(problem) < 1000 for problem in problems), problems


# -- captions ---------------------------------------------------------------------------------------------------------

ROWS = [
    b'{"file_name": "a.png", "text": "a dog"}\n{"file_name": "b.png", "caption": "b"}\n',
    b'{"a": {"caption": "x", "tags": "y, z"}, "b.png": "w"}',
    b'file_name,text\na.png,a dog\nb.png,"two, words"\n',
    "ein Hündchen, \u200b\n".encode(),
    "ein Hündchen".encode("cp1252"),
    "ein Hund".encode("utf-16"),
]
CAPTION_FILES = ["metadata.jsonl", "metadata.json", "meta_cap.json", "captions.csv", "metadata.csv", "a.txt", "a.json"]


@budget
@given(
    st.sampled_from(CAPTION_FILES),
    st.one_of(
        st.sampled_from(ROWS).flatmap(mutations),
        st.binary(max_size=60),
        ANYTHING.map(lambda value: json.dumps(value).encode()),
        st.dictionaries(st.sampled_from(["file_name", "text", "caption", "tags", "a", "a.png"]), ANYTHING).map(
            lambda value: json.dumps(value).encode()
        ),
    ),
)
def test_any_caption_is_read_or_refused(tmp_path, name, content):
    (tmp_path / "a.png").touch()
    for old in CAPTION_FILES:
        (tmp_path / old).unlink(missing_ok=True)
    (tmp_path / name).write_bytes(content)
    try:
        photos = photo_folder.scan(tmp_path).photos
    except LorakitError as error:
        assert str(error).replace(str(tmp_path), "").isprintable()
        return
    for photo in photos:
        (photo.caption or "").encode()
