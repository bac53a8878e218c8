"""Tests that a GGUF file given as a base is identified. The files are written by ggml's description of the format."""

import struct
from pathlib import Path

import pytest

from lorakit import families
from lorakit.core.errors import LorakitError
from lorakit.families.facts import gguf
from lorakit.ui import texts

WAY = "whose weights lorakit does not read: give the model's .safetensors file; memory.base_storage = 'nf4' keeps it"
XL = ["input_blocks.4.1.proj_in.weight", "label_emb.0.0.weight"]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write(path: Path, names: list[str]) -> Path:
    """Write a header with a text, a number, and arrays of both, as other programs do."""
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("x"),
        text("general.file_type") + struct.pack("<II", 4, 7),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("▁b"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, -1.0),
    ]
    tensors = [text(name) + struct.pack("<IQQIQ", 2, 64, 4, 8, 0) for name in names]
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join([*pairs, *tensors]) + bytes(64)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "is a FLUX.1 model; lorakit trains"),
        (["blocks.0.self_attn.q.weight"], "is a Wan model; lorakit trains"),
        (XL, f"is a GGUF file of Stable Diffusion XL's denoiser alone, {WAY}"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], f"is a GGUF file of Stable Diffusion 3's denoiser alone, {WAY}"),
        (
            ["model.diffusion_model.input_blocks.0.0", "cond_stage_model.x"],
            "is a GGUF file of Stable Diffusion, ",
        ),
        (["token_embd.weight", "enc.blk.0.attn_q.weight"], "is a text encoder (T5) alone: give the whole model"),
        (["blk.0.attn_q.weight"], "is a GGUF file, whose weights lorakit does not read"),
    ],
)
def test_a_gguf_model_is_identified_by_its_tensors(names: list[str], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", names)
    assert gguf.names(path) == names
    with pytest.raises(LorakitError) as caught:
        families.describe(str(path))
    assert str(caught.value).startswith(f"base x.gguf {words}")
    assert texts.sentences("zh-Hant").translated(str(caught.value))


def test_a_damaged_gguf_file_is_identified_as_gguf(tmp_path: Path) -> None:
    intact = write(tmp_path / "x.gguf", XL).read_bytes()
    for content in (intact[:-150], intact[:30], b"GGUF", b"", intact[:12] + b"\xff" * 100):
        (tmp_path / "x.gguf").write_bytes(content)
        assert gguf.names(tmp_path / "x.gguf") == []
    assert gguf.names(tmp_path / "none.gguf") == []
