"""Tests that a base is described from configurations and headers, and that other folders are identified."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors_by_hand
import tiny
import torch
from refusal import refusal
from safetensors import safe_open

from lorakit import families
from lorakit.core import cache_dir, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.families import weight_files
from lorakit.families.facts import fit

Copy = Callable[..., Path]
MAKERS: dict[str, Any] = {"unet": fit._unet, "text_encoder": fit._text}


@pytest.fixture
def copy(tiny_sd1: Path, tmp_path: Path) -> Copy:
    """Return a function that copies the tiny SD1, so that a test can damage the copy."""

    def make(source: Path = tiny_sd1) -> Path:
        return shutil.copytree(source, tmp_path / "base")

    return make


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_sd1_is_read_without_torch(tiny_sd1: Path) -> None:
    program = (
        "import sys; from lorakit import families; "
        f"info = families.describe({str(tiny_sd1)!r}); "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'heavy'; "
        "print(info.family, info.loader, info.prediction_type, info.latent_channels, info.downscale, info.max_tokens, "
        "info.cross_dim, info.title)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (process.stdout.strip(), process.stderr) == ("sd1 sd epsilon 4 8 77 32 sd1", "")


def test_sdxl_and_v_prediction_are_recognized_from_the_configuration(tiny_sdxl: Path, tiny_sd1_v: Path) -> None:
    info = families.describe(tiny_sdxl)
    assert (info.family, info.loader, info.prediction_type, info.cross_dim) == ("sdxl", "sdxl", "epsilon", 64)
    assert families.describe(tiny_sd1_v).prediction_type == "v_prediction"


def test_sd2_is_recognized_by_the_width_of_its_text(copy: Copy) -> None:
    """The tiny text encoder is replaced by one of that width whose weights are zeros."""
    folder = copy()
    for part, keys in {"unet": ("cross_attention_dim",), "text_encoder": ("hidden_size", "intermediate_size")}.items():
        change(folder / part / "config.json", **dict.fromkeys(keys, 1024))
        config = json.loads((folder / part / "config.json").read_text())
        safetensors_by_hand.write(next((folder / part).glob("*.safetensors")), dict(MAKERS[part](config)))
    assert families.describe(folder).family == "sd2"


def test_layers_have_the_files_shapes_and_canonical_names(tiny_sdxl: Path) -> None:
    info = families.describe(tiny_sdxl)
    expected = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        (path,) = (tiny_sdxl / component).glob("*.safetensors")
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(key).get_shape())
                if key.endswith(".weight") and len(shape) > 1 and "embedding" not in key.replace("time_embedding", ""):
                    expected[f"{component}.{key.removesuffix('.weight')}"] = shape
    expected |= {f"unet.add_embedding.linear_{n}": info.layers[f"unet.add_embedding.linear_{n}"] for n in (1, 2)}
    assert info.layers == expected
    assert all(".text_model." in n or n.endswith("projection") for n in info.layers if n.startswith("text_encoder"))
    assert info.layers["text_encoder_2.text_projection"] == (32, 32)


def test_files_without_the_text_model_prefix_get_canonical_names(copy: Copy) -> None:
    folder = copy()
    before = families.describe(folder).layers
    path = folder / "text_encoder" / "model.safetensors"
    shapes = {name.removeprefix("text_model."): shape for name, shape in weight_files.shapes([path]).items()}
    safetensors_by_hand.write(path, shapes)
    assert families.describe(folder).layers == before


def test_untrained_layers_are_the_last_of_sdxls_first_text_encoder(tiny_sdxl: Path, tiny_sd1: Path) -> None:
    last = "text_encoder.text_model.encoder.layers.2."
    info = families.describe(tiny_sdxl)
    assert info.untrained_layers == {name for name in info.layers if name.startswith(last)}
    assert len(info.untrained_layers) == 6
    assert families.describe(tiny_sd1).untrained_layers == frozenset()


def test_bytes_equal_the_size_on_disk(tiny_sd1: Path) -> None:
    for component, size in families.describe(tiny_sd1).bytes.items():
        assert size == sum(path.stat().st_size for path in (tiny_sd1 / component).glob("*.safetensors"))


def test_the_hash_covers_weights_and_configuration_and_not_the_path(copy: Copy, tiny_sd1: Path) -> None:
    before = families.describe(tiny_sd1).hash
    folder = copy()
    assert families.describe(folder).hash == before
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    other = families.describe(folder).hash
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert len({before, other, families.describe(folder).hash}) == 3


def flip_last_bit(path: Path, tensor: str) -> None:
    info = safetensors_header.read(path).tensors[tensor]
    content = bytearray(path.read_bytes())
    content[info.end - 1] ^= 1
    path.write_bytes(content)


def test_one_changed_bit_changes_the_hash(copy: Copy, tiny_sd1: Path) -> None:
    folder, before = copy(), families.describe(tiny_sd1).hash
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = list(safetensors_header.read(path).tensors)
    hashes = {before}
    for name in (names[0], names[len(names) // 2], names[-1]):
        flip_last_bit(path, name)
        hashes.add(families.describe(folder).hash)
    assert len(hashes) == 4


def test_a_change_with_the_same_size_and_time_changes_the_hash(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cp --preserve` and `rsync --times` do this. The cache holds the hash of the former file."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_dir, "CLOCK_TICK", -1.0)
    folder = copy()
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    before, stat = families.describe(folder).hash, path.stat()
    flip_last_bit(path, next(iter(safetensors_header.read(path).tensors)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert families.describe(folder).hash != before


def test_the_hash_of_a_large_file_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_dir, "CLOCK_TICK", -1.0)
    (tmp_path / "base").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert cache_dir.file_hash(tmp_path / "base") == digest
    (entry,) = (tmp_path / "cache" / "file-hashes").iterdir()
    entry.write_text("a" * 64)
    assert cache_dir.file_hash(tmp_path / "base") == "a" * 64
    entry.write_text("damaged")
    assert cache_dir.file_hash(tmp_path / "base") == digest == entry.read_text()


def test_half_precision_files_and_shards_are_found(copy: Copy, tiny_sd1: Path) -> None:
    folder = copy()
    full = families.describe(folder)
    path = folder / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shapes = weight_files.shapes([unet])
    unet.unlink()
    names = list(shapes)
    parts = {"a.safetensors": names[:50], "b.safetensors": names[50:]}
    for file, part in parts.items():
        safetensors_by_hand.write(unet.with_name(file), {name: shapes[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    unet.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    info = families.describe(folder)
    assert info.layers == full.layers
    assert info.variants == {"unet": None, "vae": None, "text_encoder": "fp16"}
    assert info.bytes["unet"] == sum(unet.with_name(file).stat().st_size for file in parts)
    unet.with_name("b.safetensors").unlink()
    assert "unet/b.safetensors is missing" in refusal(folder)


def test_a_half_precision_variant_is_loaded(copy: Copy) -> None:
    folder = copy()
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    family = families.load(families.describe(folder), "cpu", torch.float32)
    assert family.denoiser.dtype is torch.float32


def test_max_tokens_come_from_the_text_encoder_if_need_be(copy: Copy) -> None:
    folder = copy()
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    assert families.describe(folder).max_tokens == 77


# -- what is not a base -----------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal("nowhere.safetensors")
    assert "does not exist" in refusal("./models/sd15")


def test_a_folder_that_is_not_a_base_is_refused(tmp_path: Path) -> None:
    assert "no model_index.json; it is empty" in refusal(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "no model_index.json; it holds notes.txt" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    assert "is a PEFT adapter, not a base model" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("FluxPipeline", "a FLUX.1 model"),
        ("StableDiffusionUpscalePipeline", "a Stable Diffusion upscaler model"),
        ("TomorrowPipeline", "a TomorrowPipeline"),
    ],
)
def test_another_family_is_refused_by_name(copy: Copy, name: str, title: str) -> None:
    folder = copy()
    change(folder / "model_index.json", _class_name=name)
    assert f"is {title}; lorakit trains Stable Diffusion 1, Stable Diffusion 2, " in refusal(folder)


def test_all_missing_parts_are_listed(copy: Copy) -> None:
    folder = copy()
    for part in ("vae", "tokenizer"):
        shutil.rmtree(folder / part)
    assert "lacks vae/, tokenizer/" in refusal(folder)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("unet/config.json", "unet/config.json is missing"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json is missing"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors is missing"),
        ("tokenizer/merges.txt", "tokenizer/merges.txt is missing"),
        ("tokenizer/vocab.json", "tokenizer/vocab.json is missing"),
    ],
)
def test_a_missing_file_is_named(copy: Copy, missing: str, words: str) -> None:
    folder = copy()
    (folder / missing).unlink()
    assert words in refusal(folder)


def test_pickled_weights_are_refused_with_advice(copy: Copy) -> None:
    folder = copy()
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.bin"))
    message = refusal(folder)
    assert "unet/diffusion_pytorch_model.bin is a pickle" in message
    assert message.endswith(f"convert it once: lorakit convert {folder}")


@pytest.mark.parametrize("channels", [5, 7, 8])
def test_unets_of_other_tasks_are_refused(copy: Copy, channels: int) -> None:
    folder = copy()
    change(folder / "unet" / "config.json", in_channels=channels)
    assert f"its UNet takes {channels} channels, its latents have 4; that is not trained" in refusal(folder)


def test_another_prediction_type_is_refused(copy: Copy) -> None:
    folder = copy()
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    assert "predicts 'sample': only epsilon and v_prediction can be trained" in refusal(folder)


def test_damaged_files_are_refused(copy: Copy) -> None:
    folder = copy()
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    assert "cut off: " in refusal(folder)
    path.write_bytes(b"")
    assert "the file is empty" in refusal(folder)
    path.write_bytes((20).to_bytes(8, "little") + b"x" * 40)
    assert "not a safetensors file" in refusal(folder)
    path.write_bytes(content)
    (folder / "unet" / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(folder)
    (folder / "unet" / "config.json").write_text("[]")
    assert "does not hold a JSON object" in refusal(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_unet_mid_block_x.lora_down.weight"], "is an adapter (LoRA), not a base model"),
        (["unet.mid_block.x.lora_A.weight"], "is an adapter (LoRA), not a base model"),
        (["time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"], "is a UNet alone"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is a VAE alone"),
        (["emb_params"], "is a textual-inversion embedding"),
        (["something"], "is a safetensors file of no kind known here"),
    ],
)
def test_other_single_files_are_identified(tmp_path: Path, names: list[str], words: str) -> None:
    path = safetensors_by_hand.write(tmp_path / "file.safetensors", dict.fromkeys(names, (1,)))
    assert f"base file.safetensors {words}" in refusal(path)


def test_pickles_and_other_files_are_refused(tmp_path: Path) -> None:
    for suffix in ("ckpt", "pt", "bin"):
        path = tmp_path / f"model.{suffix}"
        path.touch()
        assert "is a pickle" in refusal(path)
    (tmp_path / "model.GGUF").touch()
    assert "is a GGUF file, whose weights lorakit does not read" in refusal(tmp_path / "model.GGUF")
    (tmp_path / "photo.jpg").touch()
    assert "is a file, not a base model" in refusal(tmp_path / "photo.jpg")
    broken = safetensors_by_hand.write(tmp_path / "half.safetensors", {"x": (100,)}, missing_bytes=50)
    assert "half.safetensors: cut off: " in refusal(broken)


def test_a_broken_tokenizer_is_refused(copy: Copy) -> None:
    folder = copy()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(LorakitError, match=r"tokenizer of base .* knows 3 words where its text encoder has 523"):
        families.load(families.describe(folder), "cpu", torch.float32)


def test_weights_that_do_not_fit_are_refused_by_name(copy: Copy) -> None:
    folder = copy()
    change(folder / "unet" / "config.json", block_out_channels=[32, 128])
    words = (
        "has unet.down_blocks.1.resnets.0.conv1.weight in the shape 64x32x3x3 where its unet/config.json has 128x32x3x3"
    )
    assert words in refusal(folder)


def test_an_unknown_scheduler_is_named(copy: Copy) -> None:
    folder = copy()
    change(folder / "scheduler" / "scheduler_config.json", _class_name="TomorrowsScheduler")
    with pytest.raises(LorakitError, match=r"names a scheduler 'TomorrowsScheduler' that diffusers .* lacks"):
        families.load(families.describe(folder), "cpu", torch.float32)


def test_the_tiny_pipelines_have_the_keys_of_published_ones(tiny_sdxl: Path) -> None:
    for component in ("text_encoder", "text_encoder_2"):
        keys = weight_files.shapes([tiny_sdxl / component / "model.safetensors"])
        assert all(key.startswith(("text_model.", "text_projection.")) for key in keys)
    words = json.loads((tiny_sdxl / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert set(tiny.byte_characters()) <= set(words)
