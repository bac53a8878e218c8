"""Tests of the loss in a merge into low precision: it is measured and reported, and refused if no change remains."""

import shutil
from pathlib import Path

import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file

from lorakit import families
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.cli import main as cli
from lorakit.config import ModelConfig
from lorakit.core.errors import LorakitError
from lorakit.formats import files
from lorakit.formats.edit import merge
from lorakit.formats.edit.precision import Precision
from lorakit.formats.saving import save

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as a folder and as a file, each in float32 and with its UNet in fp8."""
    room = tmp_path_factory.mktemp("precision")
    pipeline = small_models.small("sd1", room / "folder")
    small_models.write(room / "file.safetensors", "sd1", pipeline)
    shutil.copytree(room / "folder", room / "folder8")
    unet = room / "folder8" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.to(FP8) for name, tensor in load_file(unet).items()}, unet, metadata={"format": "pt"})
    tensors = load_file(room / "file.safetensors")
    small = {n: t.to(FP8) if n.startswith("model.") else t for n, t in tensors.items()}
    save_file(small, room / "file8.safetensors")
    return room


def described(room: Path, base: str) -> families.BaseInfo:
    tokenizer = str(room / "folder") if base.endswith("safetensors") else ""
    return families.describe(ModelConfig(base=str(room / base), tokenizer=tokenizer))


def adapter(info: families.BaseInfo, size: float) -> tuple[str, AdapterWeights]:
    name = next(name for name in info.layers if name.endswith("attn1.to_q"))
    rows, columns = info.layers[name]
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw)
    return name, AdapterWeights("sd1", "lora", {name: LoraLayer(down, size * up, 2.0)})


def weight(path: Path, name: str) -> torch.Tensor:
    """Return the layer's weight from diffusers' folder or from the file."""
    if path.is_dir():
        return load_file(path / "unet" / "diffusion_pytorch_model.safetensors")[f"{name.removeprefix('unet.')}.weight"]
    place = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    assert name == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return load_file(path)[place]


@pytest.mark.slow
@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
@pytest.mark.parametrize("base", ["folder8", "file8.safetensors"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_reported_loss_equals_the_files_difference(
    base: str, output: str, keep: bool, room: Path, tmp_path: Path
) -> None:
    info = described(room, base)
    name, weights = adapter(info, 2e-3)
    precision = Precision(keep_fp8=keep)
    path = merge.merge(weights, info, tmp_path / output, precision=precision)
    before, after = weight(room / base, name).float(), weight(path, name)
    assert before.dtype is torch.float32 and after.dtype is (FP8 if keep else torch.float16)
    change = weights.layers[name].delta()
    assert precision.changed == int(((before + change) != before).sum())
    assert precision.survived == int((after.float() != before).sum())
    error = (after.float() - (before + change)).norm() / change.norm()
    share = precision.survived / precision.changed
    expected = f"{share:.1%} of {precision.changed:,} changed weights differ from the base's; rounding is {error:.2%}"
    assert expected in precision.line()
    assert (share < 0.6 and error > 0.3) if keep else (share > 0.9 and error < 0.05)
    dtypes = {tensor.dtype for tensor in load_file(path).values()} if path.is_file() else set()
    assert keep or FP8 not in dtypes


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
@pytest.mark.parametrize("base", ["folder8", "file8.safetensors"])
def test_a_merge_without_remaining_change_is_refused(base: str, output: str, room: Path, tmp_path: Path) -> None:
    info = described(room, base)
    _, weights = adapter(info, 1e-7)
    with pytest.raises(LorakitError, match=r"in float8_e4m3fn none of the [\d,]+ changed .*: leave out --keep-fp8"):
        merge.merge(weights, info, tmp_path / output, precision=Precision(keep_fp8=True))
    with pytest.raises(LorakitError, match=r"in float16 none of the [\d,]+ changed .*: raise --strength"):
        merge.merge(weights, info, tmp_path / output, strength=1e-4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("base", ["folder", "file.safetensors"])
def test_full_precision_loses_nothing(base: str, room: Path, tmp_path: Path) -> None:
    info = described(room, base)
    precision = Precision()
    merge.merge(adapter(info, 1e-3)[1], info, tmp_path / "merged", precision=precision)
    assert precision.survived == precision.changed and precision.line().startswith("precision float32: 100.0% of ")


def test_the_command_reports_the_loss_in_one_line(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(adapter(described(room, "folder8"), 2e-3)[1], tmp_path, "a", ["kohya"], "fp32", {})["kohya"]
    arguments = ["merge", str(file), "--base", str(room / "folder8")]
    for flags, dtype in (([], "float16"), (["--keep-fp8"], "float8_e4m3fn")):
        assert cli.main([*arguments, *flags, "--output", str(tmp_path / dtype)]) == 0
        assert capsys.readouterr().err.startswith(f"precision {dtype}: ")
    assert cli.main([*arguments, "--strength", "0", "--output", str(tmp_path / "zero")]) == 0
    assert capsys.readouterr().err == "the adapter changes no weight of the base\n"


def test_weights_with_a_scale_stay_in_half_precision(room: Path, tmp_path: Path) -> None:
    tensors = load_file(room / "file8.safetensors")
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    save_file(tensors | {f"{key}.scale_weight": torch.tensor(0.5)}, tmp_path / "scaled.safetensors")
    info = families.describe(ModelConfig(base=str(tmp_path / "scaled.safetensors"), tokenizer=str(room / "folder")))
    weights = adapter(info, 2e-3)[1]
    with pytest.raises(LorakitError, match="weights with a scale are written in float16: leave out --keep-fp8"):
        merge.merge(weights, info, tmp_path / "x.safetensors", precision=Precision(keep_fp8=True))


@pytest.mark.parametrize("base", ["folder8", "file8.safetensors"])
def test_the_required_disk_space_follows_the_written_precision(
    base: str, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(files, "require_space", lambda folder, size: sizes.append(size))
    info = described(room, base)
    output = merge.merge(adapter(info, 2e-3)[1], info, tmp_path / f"out{Path(base).suffix}")
    paths = [output] if output.is_file() else list(output.rglob("*.safetensors"))
    after = sum(path.stat().st_size for path in paths)
    before = [room / base] if output.is_file() else list((room / base).rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in before) < after <= sizes[0] <= 1.05 * after
