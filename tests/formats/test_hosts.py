"""Tests of installing adapters into other programs' folders: complete, with side files, and without overwriting."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import random_adapters
import torch
from safetensors.torch import save_file

from lorakit import formats
from lorakit.adapters.weights import AdapterWeights
from lorakit.cli import main as cli
from lorakit.core.errors import LorakitError
from lorakit.formats.edit import hosts
from lorakit.formats.facts.hosts import HOSTS
from lorakit.formats.inspect import inspect

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_{}"
WIDTHS = {"sd1": 768, "sdxl": 2048}
SIDES = {
    "a1111": ("models/Lora", ".json", ".png"),
    "forge": ("models/Lora", ".json", ".png"),
    "comfyui": ("models/loras", ".png"),
    "swarmui": ("Models/Lora", ".json", ".png"),
    "fooocus": ("models/loras",),
    "invokeai": ("lora-import", ".json", ".png"),
}


def weights(family: str = "sd1", **changes: object) -> AdapterWeights:
    shapes = {LAYER.format(part): (640, WIDTHS[family]) for part in ("k", "v")}
    return replace(random_adapters.adapter(shapes, family), **changes)


def save(folder: Path, adapter: AdapterWeights, fmt: str = "kohya") -> Path:
    trigger = {"modelspec.trigger_phrase": "sks toy"}
    return formats.save(adapter, folder, "toy", [fmt], "fp32", trigger, preview=b"\x89PNG")[fmt]


def program(tmp_path: Path, key: str) -> Path:
    root = tmp_path / key
    (root / HOSTS[key].loras).mkdir(parents=True)
    (root / HOSTS[key].embeddings).mkdir(parents=True, exist_ok=True)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("key", HOSTS)
def test_each_program_gets_its_side_files(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "in", weights("sdxl"))
    root = program(tmp_path, key)
    monkeypatch.chdir(tmp_path)
    command = ["install-adapter", str(source), "--into", key, "--at", key, "--json"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    folder, *sides = SIDES[key]
    assert set(contents(root)) == {f"{folder}/toy{ending}" for ending in (".safetensors", *sides)}
    assert Path(json.loads(out)["adapter"]).read_bytes() == source.read_bytes()
    assert err.startswith(f"{HOSTS[key].title}: ") and "{" not in err
    if key == "invokeai":
        assert err.endswith(f"give it {root / folder}\n"), "a whole path, whatever --at was"
    if ".json" in sides:
        assert json.loads((root / folder / "toy.json").read_text())["activation text"] == "sks toy"
    before = contents(root)
    assert cli.main(command) == 0 and contents(root) == before, "the same adapter is not copied twice"


def test_existing_files_are_never_replaced(tmp_path: Path) -> None:
    root = program(tmp_path, "a1111")
    for name in ("toy.safetensors", "toy-2.preview.png", "toy-3.json"):
        (root / "models/Lora" / name).write_bytes(b"theirs")
    (root / "models/Lora/toy-4.safetensors").symlink_to("nowhere")
    files = hosts.install(save(tmp_path / "in", weights()), HOSTS["a1111"], root)
    assert files["adapter"].name == "toy-5.safetensors" and files["json"].name == "toy-5.json"
    assert (root / "models/Lora/toy.safetensors").read_bytes() == b"theirs"
    named = hosts.install(tmp_path / "in", HOSTS["forge"], root / "models/Lora", name="mine")
    assert named["adapter"] == root / "models/Lora/mine.safetensors" and named["preview"].suffix == ".png"


def test_another_programs_json_is_copied_with_it(tmp_path: Path) -> None:
    source = save(tmp_path / "in", weights())
    source.with_suffix(".json").write_text(json.dumps({"activation text": "my words", "notes": "mine"}))
    files = hosts.install(source, HOSTS["a1111"], program(tmp_path, "a1111"))
    assert json.loads(files["json"].read_text()) == {"activation text": "my words", "notes": "mine"}


@pytest.mark.parametrize("key", ["comfyui", "a1111"])
def test_the_embedding_is_installed_in_the_embeddings_folder(tmp_path: Path, key: str) -> None:
    source = save(tmp_path / "in", weights(embeddings={"sks": {"text_encoder": torch.ones(2, 768)}}))
    root = program(tmp_path, key)
    files = hosts.install(source, HOSTS[key], root / HOSTS[key].loras)
    assert files["embedding sks"] == root / HOSTS[key].embeddings / "sks.safetensors"
    files["embedding sks"].write_bytes(b"theirs")
    with pytest.raises(LorakitError, match="another embedding of that name: move it"):
        hosts.install(source, HOSTS[key], root, name="second")
    assert not (root / HOSTS[key].loras / "second.safetensors").exists()
    (root / HOSTS[key].embeddings).rename(root / "elsewhere")
    with pytest.raises(LorakitError, match="no such folder for the trigger's embedding"):
        hosts.install(source, HOSTS[key], root / HOSTS[key].loras, name="third")
    (source.parent / "toy-embedding/sks.safetensors").unlink()
    (root / "elsewhere").rename(root / HOSTS[key].embeddings)
    with pytest.raises(LorakitError, match="is not beside it: put it back"):
        hosts.install(source, HOSTS[key], root, name="third")


@pytest.mark.parametrize(
    ("key", "family", "fmt", "method", "message"),
    [
        ("a1111", "sd1", "diffusers", "lora", "lorakit export .* --to kohya"),
        ("invokeai", "sdxl", "diffusers", "lora", "lorakit export .* --to kohya"),
        ("forge", "sd1", "peft", "lora", "lorakit export .* --to kohya"),
        ("fooocus", "sd1", "kohya", "lora", "is for Stable Diffusion 1, and Fooocus draws with .*XL.* only"),
        ("fooocus", "sdxl", "kohya", "dora", "does not apply dora; .* lorakit merge .* --output NEW.safetensors"),
    ],
)
def test_an_adapter_that_the_program_does_not_read_is_refused(
    tmp_path: Path, key: str, family: str, fmt: str, method: str, message: str
) -> None:
    shapes = {LAYER.format(part): (640, WIDTHS[family]) for part in ("k", "v")}
    source = save(tmp_path / "in", random_adapters.adapter(shapes, family, method=method), fmt)
    root = program(tmp_path, key)
    with pytest.raises(LorakitError, match=message):
        hosts.install(source, HOSTS[key], root)
    assert not contents(root)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    adapter = weights()
    layer = adapter.layers[LAYER.format("k")]
    source = save(tmp_path / "in", adapter)
    raw = source.read_bytes()
    data = layer.up.numpy().tobytes()
    source.write_bytes(raw.replace(data, b"\xff" * len(data)))
    assert source.read_bytes() != raw
    with pytest.raises(LorakitError, match="it cannot be used anywhere"):
        hosts.install(source, HOSTS["comfyui"], program(tmp_path, "comfyui"))


def test_wrong_folders_and_names_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "in", weights())
    with pytest.raises(LorakitError, match="there is no such folder; name that of ComfyUI"):
        hosts.install(source, HOSTS["comfyui"], tmp_path / "nowhere")
    with pytest.raises(LorakitError, match="has no models/loras: it is not the folder of ComfyUI"):
        hosts.install(source, HOSTS["comfyui"], program(tmp_path, "a1111"))
    with pytest.raises(LorakitError, match="cannot be a file name"):
        hosts.install(source, HOSTS["comfyui"], tmp_path, name="../x")
    root = tmp_path / "invoke"
    root.mkdir()
    (root / "invokeai.yaml").touch()
    (root / "models").mkdir()
    assert hosts.install(source, HOSTS["invokeai"], root)["adapter"] == root / "lora-import/toy.safetensors"


@pytest.mark.parametrize("name", ["photos", "lorakit", "models/Stable-diffusion", "runs"])
def test_folders_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    source = save(tmp_path / "in", weights("sdxl"))
    folder = tmp_path / name
    folder.mkdir(parents=True)
    save_file({"model.diffusion_model.out.2.weight": torch.ones(4, 320)}, folder / "checkpoint.safetensors")
    before = contents(folder)
    for key in HOSTS:
        with pytest.raises(LorakitError, match=r"A folder of LoRA files has lora in its name or"):
            hosts.install(source, HOSTS[key], folder)
    assert contents(folder) == before
    assert hosts.install(source, HOSTS["a1111"], folder, any_folder=True)["adapter"] == folder / "toy.safetensors"
    assert hosts.install(source, HOSTS["forge"], folder, name="b")["adapter"] == folder / "b.safetensors", "it has one"


@pytest.mark.parametrize("name", ["Lora", "my-loras/people", "LyCORIS", "sdxl lora"])
def test_any_folder_with_lora_in_its_name_is_accepted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    files = hosts.install(save(tmp_path / "in", weights()), HOSTS["a1111"], tmp_path / name)
    assert files["adapter"] == tmp_path / name / "toy.safetensors"


@pytest.mark.parametrize("key", HOSTS)
def test_a_missing_adapters_folder_is_created(tmp_path: Path, key: str) -> None:
    (tmp_path / HOSTS[key].mark).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / HOSTS[key].mark).touch()
    source = save(tmp_path / "in", weights("sdxl"))
    assert hosts.install(source, HOSTS[key], tmp_path)["adapter"] == tmp_path / HOSTS[key].loras / "toy.safetensors"


def test_missing_side_files_of_the_same_adapter_are_added(tmp_path: Path) -> None:
    source, root = save(tmp_path / "in", weights()), program(tmp_path, "a1111")
    copied = root / "models/Lora/renamed.safetensors"
    copied.write_bytes(source.read_bytes())
    files = hosts.install(source, HOSTS["a1111"], root, name="renamed")
    assert files["adapter"] == copied
    assert json.loads(files["json"].read_text())["activation text"] == "sks toy" and files["preview"].is_file()
    files["json"].write_text("{}")
    files["preview"].rename(copied.with_suffix(".preview.png"))
    before = contents(root)
    assert hosts.install(source, HOSTS["a1111"], root, name="renamed") == {"adapter": copied}
    assert contents(root) == before, "theirs stay"


@pytest.mark.parametrize(
    ("width", "base", "words"),
    [(128, "pocket", "lorakit's bundled base"), (64, "mine", "a base that attends to text of width 64, not 768")],
)
def test_an_adapter_for_a_small_base_gets_a_note(tmp_path: Path, width: int, base: str, words: str) -> None:
    texts = {"lorakit.version": "0", "lorakit.family": "sd1", "ss_sd_model_name": base}
    small = random_adapters.adapter({LAYER.format("k"): (96, width)}, "sd1")
    source = formats.save(small, tmp_path, "toy", ["kohya"], "fp32", texts)["kohya"]
    report = inspect(source)
    assert report.only == words and f"{words}; its names are those of Stable Diffusion 1" in report.to_text()
    assert "on that base only" in report.to_text() and "<lora:" not in report.to_text()
    lines: list[str] = []
    hosts.install(source, HOSTS["comfyui"], program(tmp_path, "comfyui"), say=lines.append)
    assert lines == [f"toy.safetensors fits {words} only: ComfyUI lists it, and cannot draw with it on another base"]
    assert not inspect(formats.save(weights(), tmp_path, "b", ["kohya"], "fp32", texts)["kohya"]).only, "by its widths"


def test_a_full_disk_leaves_no_installed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    root = program(tmp_path, "a1111")
    source = save(tmp_path / "in", weights())
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(hosts.atomic, "replace", refuse)
    with pytest.raises(LorakitError, match=r"cannot be written \(No space left on device\); nothing there was changed"):
        hosts.install(source, HOSTS["a1111"], root)
    assert not contents(root)
