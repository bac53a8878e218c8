"""Tests of merging from or into a single file: the model gives the outputs of base and adapter."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import random_adapters
import small_models
import torch
from safetensors.torch import load_file, save_file

from lorakit import adapters, families, formats
from lorakit.adapters.weights import AdapterWeights
from lorakit.cli import main as cli
from lorakit.config import ModelConfig
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.families import ldm
from lorakit.formats import files, keys
from lorakit.formats.edit import extract, merge

FAMILIES = ("sd1", "sd2", "sdxl")
PROMPTS = ["a photo of sks toy", ""]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Family -> folder in diffusers layout, single file."""
    room = tmp_path_factory.mktemp("bases")
    paths = {}
    for family in FAMILIES:
        pipeline = small_models.small(family, room / family)
        average = {"model_ema.diffusion_modelout2bias": torch.zeros(4)}
        metadata = {"modelspec.title": "base", "modelspec.hash_sha256": "0x00"}
        file = small_models.write(room / f"{family}.safetensors", family, pipeline, extra=average, metadata=metadata)
        paths[family] = room / family, file
    return paths


def describe(family: str, layout: str, bases: Any) -> families.BaseInfo:
    folder, file = bases[family]
    if layout == "file":
        return families.describe(ModelConfig(base=str(file), tokenizer=str(folder)))
    # The width of SD2's texts identifies it, and the small replica lacks that width, so the test sets the family.
    return dataclasses.replace(families.describe(folder), family=family)


def weights_for(info: families.BaseInfo, method: str = "lora", seed: int = 0) -> AdapterWeights:
    """Return random weights of rank 4 for the first layer of each kind in each component."""
    kinds = {re.sub(r"\d+", "", name): name for name in reversed(list(info.layers)) if keys.is_read_everywhere(name)}
    draw = torch.Generator().manual_seed(seed)
    layers = {name: random_adapters.layer(info.layers[name], 4, 2.0, draw, method == "dora") for name in kinds.values()}
    return AdapterWeights(info.family, method, layers)


def outputs(family: Any) -> list[torch.Tensor]:
    condition = family.encode_text(PROMPTS)
    condition = condition.with_sizes(family.size_conditions((64, 64), (0, 0), (64, 64)))
    noisy = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [condition["encoder_hidden_states"], family.predict(noisy, torch.tensor([10, 900]), condition)]


def load(path: Path, folder: Path) -> Any:
    tokenizer = str(folder) if path.is_file() else ""
    return families.load(families.describe(ModelConfig(base=str(path), tokenizer=tokenizer)), "cpu", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [*((family, "lora") for family in FAMILIES), ("sd1", "dora")])
def test_a_merged_file_gives_the_outputs_of_base_and_adapter(
    family: str, method: str, bases: Any, tmp_path: Path
) -> None:
    info = describe(family, "file", bases)
    weights = weights_for(info, method)
    loaded = families.load(info, "cpu", torch.float32)
    without = outputs(loaded)
    adapters.apply(loaded, weights).set_strength(1.0)
    expected = outputs(loaded)
    path = merge.merge(weights, info, tmp_path / "merged.safetensors")
    tensors = outputs(load(path, bases[family][0]))
    for before, after, merged in zip(without, expected, tensors, strict=True):
        effect = (after - before).norm()
        assert effect > 1e-3 * before.norm()
        assert (merged - after).norm() < 1e-3 * effect
    old, new = (safetensors_header.read(p) for p in (bases[family][1], path))
    assert list(new.tensors) == [key for key in old.tensors if not key.startswith("model_ema.")]
    assert {k: (t.dtype, t.shape) for k, t in new.tensors.items()}.items() <= {
        k: (t.dtype, t.shape) for k, t in old.tensors.items()
    }.items()
    assert new.metadata["modelspec.title"] == "base" and "modelspec.hash_sha256" not in new.metadata
    one, other = load_file(bases[family][1]), load_file(path)
    changed = {key for key in other if not torch.equal(one[key], other[key])}
    slots = {(part, n): slot.key for part, part_slots in info.slots.items() for n, slot in part_slots.items()}
    assert changed == {slots[n.partition(".")[0], n.partition(".")[2] + ".weight"] for n in weights.layers}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("layout", "output"), [("file", "merged"), ("folder", "merged.safetensors")])
def test_a_merge_into_the_other_layout_has_the_same_weights(
    family: str, layout: str, output: str, bases: Any, tmp_path: Path
) -> None:
    info, same = describe(family, layout, bases), describe(family, "file", bases)
    weights = weights_for(info)
    expected = load_file(merge.merge(weights, same, tmp_path / "same.safetensors", strength=0.5))
    path = merge.merge(weights, info, tmp_path / output, strength=0.5)
    if output == "merged":
        merged = families.describe(path)
        assert merged.layers == info.layers
        # A user loads such a folder like this.
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True)
        tensors = load_file(small_models.write(tmp_path / "again.safetensors", family, pipeline))
        assert {t.pad_token for t in pipeline.components.values() if hasattr(t, "pad_token")} == {
            "sd1": {"<|endoftext|>"},
            "sd2": {"!"},
            "sdxl": {"<|endoftext|>", "!"},
        }[family]
        unused = {
            key for key in tensors if "resblocks.3." in key or (key.endswith("text_projection") and family == "sd2")
        }
    else:
        tensors, unused = load_file(path), set()
        head = safetensors_header.read(path)
        assert ldm.read(head).family == family and head.metadata["modelspec.prediction_type"] == "epsilon"
        dropped = {"cond_stage_model.model.text_projection"}
        assert (
            expected.keys() - tensors.keys() <= {k for k in expected if k.endswith(("_ids", "logit_scale"))} | dropped
        )
        unused = {key for key in tensors if "resblocks.3." in key}
        assert bool(unused) == (family == "sd2")
    for key in expected.keys() & tensors.keys() - unused:
        torch.testing.assert_close(tensors[key], expected[key], rtol=1e-6, atol=1e-7, msg=key)


def test_a_vae_with_old_key_names_is_written_with_new_ones(bases: Any, tmp_path: Path) -> None:
    """The VAE in SD1.5's own repository has query, key, value and proj_attn."""
    folder = shutil.copytree(bases["sd1"][0], tmp_path / "old")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(path).items():
        for word, before in old.items():
            name = name.replace(f".attentions.0.{word}.", f".attentions.0.{before}.")
        renamed[name] = tensor
    assert sum("proj_attn" in name for name in renamed) == 4
    save_file(renamed, path, metadata={"format": "pt"})
    info = families.describe(folder)
    tensors = load_file(merge.merge(weights_for(info), info, tmp_path / "new.safetensors"))
    expected = load_file(bases["sd1"][1])
    vae = [name for name in expected if name.startswith("first_stage_model.")]
    assert vae and all(torch.equal(tensors[name], expected[name]) for name in vae)


def test_v_prediction_stays_recorded_in_the_file(tmp_path: Path) -> None:
    small_models.small("sdxl", tmp_path / "v", "v_prediction", zero_snr=True)
    info = families.describe(tmp_path / "v")
    path = merge.merge(weights_for(info), info, tmp_path / "v.safetensors")
    prediction = ldm.prediction(safetensors_header.read(path), "sdxl")
    assert (prediction.type, prediction.zero_snr, prediction.evidence) == (
        "v_prediction",
        True,
        "as its key v_pred says",
    )


def test_the_command_writes_a_file_and_refuses_wrong_outputs(bases: Any, tmp_path: Path, capsys: Any) -> None:
    file, info = bases["sd1"][1], describe("sd1", "file", bases)
    weights = weights_for(info)
    adapter = formats.save(weights, tmp_path, "toy", ["kohya"], "fp32", {})["kohya"]

    def run(*arguments: object) -> int:
        return cli.main([str(argument) for argument in arguments])

    out = tmp_path / "new.safetensors"
    assert run("merge", adapter, "--base", file, "--output", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    direct = load_file(merge.merge(weights, info, tmp_path / "direct.safetensors"))
    assert all(torch.allclose(direct[key], tensor, atol=1e-6) for key, tensor in load_file(out).items())
    assert run("merge", adapter, "--base", file, "--output", out) == 1
    assert "new.safetensors: exists already; name a new one with --output" in capsys.readouterr().err
    name = next(iter(weights.layers))
    for broken, words in (
        ({"unet.mid_block.attentions.7.proj_in": weights.layers[name]}, "the base has no layer unet.mid_block.attent"),
        ({name: random_adapters.layer((8, 8), 2, 2.0, torch.Generator())}, f"{name} has another shape in the base"),
    ):
        for layout in ("file", "folder"):
            wrong = AdapterWeights("sd1", "lora", broken)
            with pytest.raises(LorakitError, match=words):
                merge.merge(wrong, describe("sd1", layout, bases), tmp_path / "no.safetensors")
            assert not (tmp_path / "no.safetensors").exists() and not list(tmp_path.glob(".no*"))


@pytest.mark.slow
def test_extract_takes_single_files(bases: Any, tmp_path: Path) -> None:
    folder, file = bases["sdxl"]
    info = describe("sdxl", "file", bases)
    weights = weights_for(info)
    tuned = merge.merge(weights, info, tmp_path / "tuned.safetensors")
    for base, other in ((file, tuned), (folder, tuned)):
        merged = extract.extract(base, other, "sdxl", rank=4)
        assert merged.layers.keys() == weights.layers.keys()
        for name, layer in merged.layers.items():
            torch.testing.assert_close(layer.delta(), weights.layers[name].delta(), rtol=1e-3, atol=1e-5)


def test_inspect_reports_a_models_family_and_prediction_type(tmp_path: Path, capsys: Any) -> None:
    pipeline = small_models.small("sdxl", tmp_path / "v", "v_prediction", zero_snr=True)
    extra = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = small_models.write(tmp_path / "noob.safetensors", "sdxl", pipeline, extra=extra)
    assert cli.main(["inspect", str(file)]) == 0
    output = capsys.readouterr().out
    assert "noob.safetensors: a whole model" in output and "Stable Diffusion XL (evidence: its keys)" in output
    assert "; it predicts v_prediction with zero terminal SNR, as its key v_pred says" in output


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Any:
        yield torch.zeros(4)
        raise OSError(28, "No space left on device")

    with pytest.raises(LorakitError, match=r"x\.safetensors: cannot be written \(No space left on device\)"):
        files.stream(tmp_path / "x.safetensors", [("a", "F32", (4,)), ("b", "F32", (4,))], {}, failing())
    assert list(tmp_path.iterdir()) == []
    info = describe("sd1", "file", bases)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(LorakitError, match=r"MiB to write, 0\.0 MiB free"):
        merge.merge(weights_for(info), info, tmp_path / "out.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("output", ["merged.safetensors", "merged"])
def test_a_base_in_fp8_is_merged_in_half_precision(scaled: bool, output: str, bases: Any, tmp_path: Path) -> None:
    folder, file = bases["sd1"]
    narrow, plain = {}, {}
    for key, tensor in load_file(file).items():
        layer = key.startswith("model.diffusion_model.") and key.endswith(".weight") and tensor.ndim == 2
        narrow[key] = plain[key] = tensor
        if layer:
            scale = tensor.abs().max() / 448 if scaled else torch.tensor(1.0)
            narrow[key] = (tensor / scale).to(torch.float8_e4m3fn)
            plain[key] = narrow[key].float() * scale
            if scaled:
                narrow[key.removesuffix("weight") + "scale_weight"] = scale
    if scaled:
        narrow["model.diffusion_model.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    paths, weights = [], weights_for(describe("sd1", "file", bases))
    for name, tensors, target in (("narrow", narrow, output), ("plain", plain, "plain.out.safetensors")):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        info = families.describe(ModelConfig(base=str(tmp_path / f"{name}.safetensors"), tokenizer=str(folder)))
        paths.append(merge.merge(weights, info, tmp_path / target))
    merged, expected = (load(path, folder) for path in paths)
    for one, other in zip(merged.denoiser.parameters(), expected.denoiser.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    if output.endswith(".safetensors"):
        head = safetensors_header.read(paths[0])
        assert not [key for key in head.tensors if "scale" in key and "logit" not in key]
        assert not [key for key, info in head.tensors.items() if info.dtype.startswith("F8")]
