"""Tests of a trained word in files: as A1111, ComfyUI and diffusers read it, and that wrong files are reported."""

from dataclasses import replace

import pytest
import random_adapters
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lorakit import adapters, families
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.formats import read, save
from lorakit.formats.compatibility import read_report
from lorakit.formats.edit.resize_combine import combine, resize
from lorakit.formats.inspect import inspect
from lorakit.formats.verify import verify_file

SHAPES = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (32, 32)}
ENCODERS = {"sd1": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}
FORMATS = ["kohya", "diffusers", "peft"]


def weights(family="sd1", count=2, width=32):
    draw = torch.Generator().manual_seed(6)
    vectors = {part: torch.randn(count, width, generator=draw) for part in ENCODERS[family]}
    return replace(random_adapters.adapter(SHAPES, family), embeddings={"sks": vectors})


def write_files(folder, adapter):
    return save(adapter, folder, "toy", FORMATS, "fp16", {"modelspec.trigger_phrase": "sks toy"})


@pytest.mark.parametrize("family", ENCODERS)
def test_embedding_files_have_the_names_and_keys_that_programs_read(tmp_path, family):
    adapter = weights(family)
    write_files(tmp_path, adapter)
    names = {"sd1": ["emb_params"], "sdxl": ["clip_l", "clip_g"]}[family]
    file = tmp_path / "toy-embedding" / "sks.safetensors"
    tensors = load_file(file)
    assert set(tensors) == set(names)
    for name, part in zip(names, ENCODERS[family], strict=True):
        assert torch.equal(tensors[name], adapter.embeddings["sks"][part]) and tensors[name].dtype is torch.float32
    head = safetensors_header.read(file).metadata
    assert head["modelspec.architecture"].endswith("/textual-inversion") and head["ss_output_name"] == "sks"
    bundled = load_file(tmp_path / "toy-bundled.safetensors")
    expected_keys = {"sd1": {"string_to_param.*"}, "sdxl": {"clip_l", "clip_g"}}[family]
    assert {key for key in bundled if key.startswith("bundle_emb.")} == {
        f"bundle_emb.sks.{name}" for name in expected_keys
    }
    plain = load_file(tmp_path / "toy.safetensors")
    assert all(torch.equal(bundled[key], plain[key]) for key in plain) and len(bundled) == len(plain) + len(
        expected_keys
    )
    assert inspect(file).kind == "embedding"
    report = read_report({key: tuple(tensor.shape) for key, tensor in bundled.items()}, family)
    assert report["a1111"].complete and report["comfyui"].complete and report["diffusers"].refused


def test_saving_a_word_reports_its_second_file(tmp_path):
    lines = []
    save(weights(), tmp_path, "toy", FORMATS, "fp32", {}, say=lines.append)
    line = "export: the vectors of 'sks' are in toy-embedding/sks.safetensors: load it together with the adapter"
    assert lines == [line]
    save(replace(weights(), embeddings={}), tmp_path, "plain", FORMATS, "fp32", {}, say=lines.append)
    assert lines == [line]


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("fmt", [*FORMATS, "bundled"])
def test_the_word_is_read_from_every_format(tmp_path, family, fmt):
    adapter = weights(family)
    path = (write_files(tmp_path, adapter) | {"bundled": tmp_path / "toy-bundled.safetensors"})[fmt]
    back = read(path).embeddings
    assert {word: set(vectors) for word, vectors in back.items()} == {"sks": set(ENCODERS[family])}
    assert all(torch.equal(back["sks"][part], adapter.embeddings["sks"][part]) for part in ENCODERS[family])


def test_diffusers_encodes_the_embedding_as_lorakit_does(tiny_sd1, tmp_path):
    adapter = weights(count=1)
    write_files(tmp_path, adapter)
    family = families.load(families.describe(tiny_sd1), "cpu", torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, dtype=torch.float32)
    pipeline.load_textual_inversion(tmp_path / "toy-embedding", weight_name="sks.safetensors", token="<sks>")
    theirs = pipeline.encode_prompt("a photo of <sks> toy", "cpu", 1, False)[0]
    applied = adapters.apply(family, adapter)
    torch.testing.assert_close(family.encode_text(["a photo of sks toy"])["encoder_hidden_states"], theirs)
    # The same with the pipeline that draws samples.
    ours = family.pipeline().encode_prompt("a photo of sks toy", "cpu", 1, False)[0]
    torch.testing.assert_close(ours, theirs)
    applied.detach()


def changed(path, change):
    metadata, tensors = safetensors_header.read(path).metadata, load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


WRONG = {
    "another number": (
        "toy-embedding/sks",
        lambda t: t["emb_params"].mul_(1.1),
        "sks: embedding for text_encoder differs",
    ),
    "one vector less": ("toy-embedding/sks", lambda t: t.update(emb_params=t["emb_params"][:1]), "is broken"),
    "not finite": ("toy-embedding/sks", lambda t: t["emb_params"].fill_(float("nan")), "is broken"),
    "another key": ("toy-embedding/sks", lambda t: t.update(clip_g=t.pop("emb_params")), "of a text encoder missing"),
    "not an embedding": ("toy-embedding/sks", lambda t: t.update(other=t.pop("emb_params")), "not the embedding that"),
    "bundled wrongly": (
        "toy-bundled",
        lambda t: t["bundle_emb.sks.string_to_param.*"].zero_(),
        "toy-bundled.safetensors sks: embedding for text_encoder differs",
    ),
    "bundled with another adapter": (
        "toy-bundled",
        lambda t: [value.mul_(2) for key, value in t.items() if key.endswith("lora_up.weight")],
        "its adapter is not that of the file beside it",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_self_check_detects_each_damage(tmp_path, name):
    file, change, words = WRONG[name]
    adapter = weights()
    path = write_files(tmp_path, adapter)["kohya"]
    assert verify_file(path, adapter, SHAPES) == []
    changed(tmp_path / f"{file}.safetensors", change)
    findings = [str(finding) for finding in verify_file(path, adapter, SHAPES)]
    assert any(words in finding for finding in findings), findings


def test_the_self_check_covers_every_file(tmp_path):
    adapter = weights()
    paths = write_files(tmp_path, adapter)
    (tmp_path / "toy-bundled.safetensors").unlink()
    assert [str(finding) for finding in verify_file(paths["kohya"], adapter, SHAPES)] == [
        "toy-bundled.safetensors: missing"
    ]
    (tmp_path / "toy-embedding" / "sks.safetensors").unlink()
    for path in paths.values():
        with pytest.raises(LorakitError, match=r"its embedding toy-embedding/sks.safetensors is not beside it"):
            read(path)
    extra = replace(adapter, embeddings={})
    assert "sks: embedding that was not trained" in [
        str(finding) for finding in verify_file(write_files(tmp_path, adapter)["kohya"], extra, SHAPES)
    ]


def test_resize_and_combine_keep_words(tmp_path):
    adapter = weights()
    other = replace(adapter, embeddings={"ohwx": adapter.embeddings["sks"]})
    assert resize(adapter, rank=2).embeddings == adapter.embeddings
    assert set(combine([(adapter, 1.0), (other, 1.0)]).embeddings) == {"sks", "ohwx"}
    with pytest.raises(LorakitError, match="several adapters have an embedding of their own for 'sks'"):
        combine([(adapter, 1.0), (adapter, 0.5)])
