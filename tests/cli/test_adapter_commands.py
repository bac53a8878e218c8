"""The commands export, resize, combine, merge and extract."""

import json
from pathlib import Path

import pytest
import torch

from lorakit import formats
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.cli import main as cli

NAMES = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_{part}" for part in ("q", "k")]


def adapter(seed: int = 0, family: str = "sd1") -> AdapterWeights:
    """Return a rank-4 LoRA of two layers in the tiny pipelines' middle block: width 64, text width 32."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoraLayer(torch.randn(4, into, generator=generator), torch.randn(64, 4, generator=generator) * 0.1, 2.0)
        for name, into in zip(NAMES, (64, 32), strict=True)
    }
    return AdapterWeights(family, "lora", layers)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    metadata = {"modelspec.trigger_phrase": "sks toy"}
    return formats.save(adapter(), tmp_path / "in", "toy", ["kohya"], "fp32", metadata)["kohya"]


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_export_does_not_write_over_what_it_reads(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = toy.read_bytes()
    assert run("export", toy, "--to", "kohya", "--output", toy.parent) == 1
    assert "would be overwritten: give another folder with --output" in capsys.readouterr().err
    assert run("export", toy, "--to", "peft", "--output", tmp_path, "--dtype", "fp32", "--json") == 0
    path = Path(json.loads(capsys.readouterr().out)["peft"])
    assert toy.read_bytes() == before
    actual, expected = formats.read(path), formats.read(toy)
    assert actual.metadata["modelspec.trigger_phrase"] == "sks toy"
    assert all(torch.equal(actual.layers[name].delta(), expected.layers[name].delta()) for name in NAMES)


def test_a_folder_of_one_adapter_gives_files_the_adapters_name(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exports"
    assert run("export", toy.parent, "--to", "diffusers", "--output", folder) == 0
    assert run("resize", toy.parent, "--rank", 2, "--output", folder) == 0
    assert {path.name for path in folder.glob("*.safetensors")} == {
        "toy-diffusers.safetensors",
        "toy-resized.safetensors",
    }


def test_resize(toy: Path, tmp_path: Path) -> None:
    assert run("resize", toy, "--rank", 2, "--output", tmp_path) == 0
    result = formats.read(tmp_path / "toy-resized.safetensors")
    assert {layer.rank for layer in result.layers.values()} == {2}
    assert result.metadata["ss_output_name"] == "toy-resized" and result.metadata["ss_network_dim"] == "2"
    assert run("resize", toy, "--energy", 2, "--output", tmp_path) == 1
    with pytest.raises(SystemExit):
        run("resize", toy, "--output", tmp_path)


def test_combine(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = formats.save(adapter(1), tmp_path / "in", "hat", ["peft"], "fp32", {"modelspec.trigger_phrase": "zib hat"})
    assert run("combine", f"{toy}=0.5", other["peft"], "--name", "both", "--output", tmp_path, "--dtype", "fp32") == 0
    result = formats.read(tmp_path / "both.safetensors")
    assert result.metadata["modelspec.trigger_phrase"] == "sks toy, zib hat"
    for name in NAMES:
        expected = 0.5 * adapter().layers[name].delta() + adapter(1).layers[name].delta()
        assert torch.allclose(result.layers[name].delta(), expected, atol=1e-6)
    assert run("combine", toy, "--name", "n" * 201, "--output", tmp_path) == 1
    assert "this name is too long for a file; give one of at most 200 letters" in capsys.readouterr().err
    assert run("combine", toy, "--name", "one.safetensors", "--output", tmp_path) == 0
    assert (tmp_path / "one.safetensors").is_file()
    assert run("combine", f"{toy}=much") == 1
    assert "write ADAPTER=STRENGTH, e.g. toy.safetensors=0.7" in capsys.readouterr().err


def test_merge_and_extract(toy: Path, tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path, capsys) -> None:
    tuned = tmp_path / "tuned"
    assert run("merge", toy, "--base", tiny_sd1, "--output", tuned) == 0
    assert run("extract", tuned, "--base", tiny_sd1, "--rank", 4, "--dtype", "fp32", "--output", tmp_path) == 0
    result = formats.read(tmp_path / "tuned-extracted.safetensors")
    assert set(result.layers) == set(NAMES)
    for name in NAMES:
        assert torch.allclose(result.layers[name].delta(), adapter().layers[name].delta(), atol=1e-5)
    assert run("merge", toy, "--base", tiny_sdxl, "--output", tmp_path / "no") == 1
    assert "toy.safetensors is for sd1, but base" in capsys.readouterr().err
    assert run("extract", tuned, "--base", tiny_sdxl, "--rank", 4) == 1
    assert "both must be of one family" in capsys.readouterr().err


@pytest.mark.parametrize("fmt", ["kohya", "peft"])
@pytest.mark.parametrize("command", [["resize", "--rank", 2], ["combine", "--name", "toy-resized"], ["export"]])
def test_nothing_is_written_over_without_force(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fmt: str, command: list[object]
) -> None:
    arguments = [command[0], toy, *command[1:], "--to", fmt, "--output", tmp_path / "out"]
    assert run(*arguments) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run(*arguments) == 1
    assert "exists already: name another folder with --output, or give --force" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run(*arguments, "--force") == 0
    if fmt == "kohya":  # a side file without its adapter is not overwritten either
        next(path for path in before if path.suffix == ".safetensors").unlink()
        assert run(*arguments) == 1
