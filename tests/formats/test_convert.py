"""Tests that pickled weights become .safetensors with equal bits, and that no code in a pickle is run."""

import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorakit import families
from lorakit.cli import main as cli
from lorakit.core.errors import LorakitError
from lorakit.families import weight_files
from lorakit.formats.edit import convert

WEIGHTS = {"model.a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(2, dtype=torch.float16)}
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """A checkpoint of a training program from 2022: it contains classes that are not installed, and numpy numbers."""
    names = [CALLBACK.rsplit(".", n)[0] for n in range(3)]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": CALLBACK})
    sys.modules[CALLBACK].ModelCheckpoint = callback  # type: ignore[attr-defined]
    state = {"best": np.float64(3.0), "scores": np.zeros(3), "self": callback()}
    return {"epoch": 1, "state_dict": WEIGHTS, "callbacks": {callback: state}}


def same(tensors: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == WEIGHTS.keys() and all(torch.equal(tensors[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("archive", [True, False])
def test_weights_are_read_beside_unknown_classes(archive: bool, checkpoint: dict[Any, Any], tmp_path: Path) -> None:
    for number, content in enumerate([checkpoint, WEIGHTS, {"state_dict": WEIGHTS}]):
        path = tmp_path / f"{number}.ckpt"
        torch.save(content, path, _use_new_zipfile_serialization=archive)
        assert same(convert._weights(path))


@pytest.mark.slow
def test_the_command_writes_beside_the_file_and_never_overwrites(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "my model.v1.ckpt"
    torch.save({"state_dict": WEIGHTS}, path)
    # Files in the current folder are not imported.
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", path.name]) == 0
    assert capsys.readouterr().out == "my model.v1.safetensors\n"
    assert same(load_file(tmp_path / "my model.v1.safetensors"))
    for name, words in {path.name: "exists already: move it away", "none.pt": "none.pt: no such file"}.items():
        assert cli.main(["convert", name]) == 1
        assert words in capsys.readouterr().err
    path.rename("wrong.safetensors")
    with pytest.raises(LorakitError, match=r"can run code when opened; convert it once: lorakit convert FILE"):
        families.describe("wrong.safetensors")
    assert cli.main(["convert", "wrong.safetensors"]) == 1
    assert "if it is a pickle, rename it to .ckpt first" in capsys.readouterr().err


class Runs:
    """An object that a plain pickle.load creates by calling a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("form", ["archive", "old", "raw", "parameter"])
@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr], ids=lambda f: f.__name__)
def test_a_malicious_pickle_is_refused_without_running_it(form: str, function: Any, tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "x.ckpt"
    if function is os.system:
        evil = Runs(function, f"touch {proof}")
    elif function is __import__:
        evil = Runs(function, "antigravity")
    elif function is getattr:
        evil = Runs(function, "text", "upper")
    else:
        evil = Runs(function, f"open({str(proof)!r}, 'w')")
    content = {"state_dict": WEIGHTS, "callbacks": evil}
    if form == "raw":
        path.write_bytes(pickle.dumps(content["callbacks"], protocol=2))
    else:
        content = {**WEIGHTS, "evil": evil} if form == "parameter" else content
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(LorakitError, match=r"x\.ckpt: names \S+, which could run code: do not open this file$"):
        convert._weights(path)
    assert not proof.exists() and "antigravity" not in sys.modules


@pytest.mark.slow
def test_a_failed_process_reports_its_error_and_leaves_no_file(tmp_path: Path) -> None:
    torch.save({"x": Runs(os.system, f"touch {tmp_path / 'proof'}")}, tmp_path / "x.bin")
    with pytest.raises(LorakitError, match=r"x\.bin: names \S*system, which could run code"):
        convert.convert(tmp_path / "x.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("content", ["junk", "empty", "cut", "list", "script", "complex", "sparse"])
def test_other_pickles_than_weights_are_refused(content: str, tmp_path: Path) -> None:
    path, target = tmp_path / "x.pt", tmp_path / "x.safetensors"
    words = "is no pickle of weights"
    if content == "script":
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    elif content in ("list", "complex", "sparse"):
        words = "holds no weights under names" if content == "list" else "a is a tensor of a kind that .safetensors"
        tensor = torch.zeros(2, dtype=torch.complex64) if content == "complex" else torch.eye(2).to_sparse()
        torch.save([1, 2] if content == "list" else {"a": tensor}, path)
    else:
        torch.save(WEIGHTS, path)
        path.write_bytes({"junk": b"x" * 100, "empty": b"", "cut": path.read_bytes()[:400]}[content])
    with pytest.raises(LorakitError, match=words):
        convert._write(path, target)
    assert not target.exists()


@pytest.mark.slow
def test_a_folder_with_only_bin_files_is_converted(tiny_sd1: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny_sd1, tmp_path / "old")
    before = families.describe(folder)
    for file in list(folder.rglob("*.safetensors")):
        name = (
            file.name.replace("model.safetensors", "pytorch_model.bin") if file.name[0] == "m" else f"{file.stem}.bin"
        )
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    with pytest.raises(LorakitError, match=r"\.bin is a pickle, .*: lorakit convert ") as caught:
        families.describe(folder)
    target = Path(str(caught.value).partition("lorakit convert ")[2])
    assert {path.parent.name for path in convert.convert(target).values()} == {"unet", "vae", "text_encoder"}
    assert families.describe(folder).layers == before.layers
    families.load(families.describe(folder), "cpu", torch.float32)
    with pytest.raises(LorakitError, match=r"no part of it has weights in \.bin alone"):
        convert.convert(folder)


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "diffusion_pytorch_model.fp16"])
def test_shards_get_an_index(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in this process: `_main` is the function that the other process would run."""
    monkeypatch.setattr(convert, "_in_a_process", convert._main)
    part = tmp_path / "unet"
    part.mkdir()
    for number, (name, tensor) in enumerate(WEIGHTS.items(), 1):
        torch.save({name: tensor}, part / f"{stem}-{number:05}-of-00002.bin")
    index = f"diffusion_pytorch_model.safetensors.index{stem[23:]}.json"
    last = part / f"{stem}-00002-of-00002.bin"
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(LorakitError, match=r"-00002-of-00002\.bin is missing: get the base again"):
        convert.convert(tmp_path)
    last.write_bytes(content)
    assert [path.name for path in convert.convert(tmp_path).values()] == [
        f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors", index,
    ]  # fmt: skip
    paths, variant = weight_files.weight_files(part, "diffusion_pytorch_model")
    assert same({name: tensor for path in paths for name, tensor in load_file(path).items()})
    assert variant == (stem[24:] or None) and last.is_file()
    # The conversion was interrupted before it wrote the index.
    (part / index).unlink()
    assert list(convert.convert(tmp_path).values()) == [part / index]
