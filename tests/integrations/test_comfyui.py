"""The nodes for ComfyUI with a stand-in for ComfyUI. `integrations/comfyui/try_server.py` runs them in ComfyUI."""

import ast
import inspect
import os
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import comfyui_host
import numpy as np
import pytest
import torch
from comfyui_host import FOLDER, Host
from PIL import Image

from lorakit import config

RUN = {"base": "a.safetensors", "kind": "subject", "name": "sks toy", "preset": "auto", "steps": 4, "seed": 0}
RUN |= {"prompts": "", "options": ""}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path / "ComfyUI")
    (host.root / "models/checkpoints/a.safetensors").write_bytes(b"base")
    return host


@pytest.fixture
def nodes(host: Host, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("LORAKIT_PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return comfyui_host.load_nodes(monkeypatch, host)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Replace lorakit's Python by a shell script that gets lorakit's arguments."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\nshift 3\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("LORAKIT_PYTHON", str(path))


# -- ComfyUI's rules for nodes ----------------------------------------------------------------------------------------


def test_every_node_follows_the_rules_of_comfyui(nodes: ModuleType) -> None:
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        assert inputs.keys() <= {"required", "optional", "hidden"}, name
        method = inspect.signature(getattr(node(), node.FUNCTION))
        names = [key for section in inputs.values() for key in section]
        assert len(names) == len(set(names))
        method.bind(**dict.fromkeys(names))
        method.bind(**dict.fromkeys(inputs["required"]))  # the other inputs are optional
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) > 0
        assert node.CATEGORY == "lorakit" and node.DESCRIPTION
        for key, (kind, *options) in ((key, value) for key, value in inputs["required"].items()):
            assert isinstance(kind, str) or all(isinstance(choice, str) for choice in kind), key
            assert all(isinstance(option, dict) for option in options)
            if isinstance(kind, str) and kind.isupper() and kind in ("INT", "FLOAT"):
                option = options[0]
                assert option["min"] <= option["default"] <= option["max"]


def test_the_choices_are_the_hosts_files_and_lorakits_presets(nodes: ModuleType, host: Host) -> None:
    (host.root / "models/loras/toy.safetensors").touch()
    inputs = nodes.NODE_CLASS_MAPPINGS["LorakitTrain"].INPUT_TYPES()["required"]
    assert inputs["base"][0][0] == "a.safetensors" and inputs["base"][0][1].startswith("pocket")
    assert set(inputs["preset"][0]) == {"auto", *config.preset_names()}
    assert nodes.NODE_CLASS_MAPPINGS["LorakitInspect"].INPUT_TYPES()["required"]["lora_name"][0] == ["toy.safetensors"]
    assert nodes.NODE_CLASS_MAPPINGS["LorakitMerge"].INPUT_TYPES()["required"]["base"][0] == ["a.safetensors"]


def test_only_the_standard_library_is_imported_when_the_host_starts() -> None:
    allowed = sys.stdlib_module_names | {"__future__"}
    for path in FOLDER.glob("*.py"):
        if path.name == "try_server.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            assert {name.partition(".")[0] for name in names} <= allowed, path.name
        imports = (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
        assert not [node for node in imports if "lorakit" in ast.unparse(node)], path.name


def test_pyproject_has_the_fields_of_comfyuis_registry() -> None:
    table = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    assert table["project"].keys() >= {"name", "version", "description", "license"} and table["tool"]["comfy"]
    assert table["project"]["dependencies"] == [], "the host's packages are left alone"


# -- finding lorakit --------------------------------------------------------------------------------------------------


def test_without_lorakit_the_error_has_the_line_that_installs_it(
    nodes: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: Host
) -> None:
    child = sys.modules[f"{nodes.__name__}.child"]
    monkeypatch.delenv("LORAKIT_PYTHON")
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(child.shutil, "which", lambda name: None)
    monkeypatch.setattr(child, "CHECKOUT", tmp_path / "lorakit folder")
    with pytest.raises(child.Failed, match=r"lorakit is not installed. Install it with this line") as error:
        child.command()
    assert 'pip install -e "FOLDER_OF_LORAKIT"' in str(error.value) and "python.txt" in str(error.value)
    (child.CHECKOUT / "lorakit").mkdir(parents=True)
    (child.CHECKOUT / "lorakit/__init__.py").touch()
    (child.CHECKOUT / "pyproject.toml").touch()
    line = child.install_line()
    assert "\n" not in line and line.endswith(f'-m pip install -e "{child.CHECKOUT}"')
    python = Path(re.findall(r'"([^"]*)"', line)[2])
    python.parent.mkdir(parents=True)
    python.touch()
    assert child.command() == [str(python), "-P", "-m", "lorakit"], "where the line puts it, it is found"
    monkeypatch.setattr(child, "SETTING", tmp_path / "python.txt")
    child.SETTING.write_text(f"{sys.executable}\n")
    assert child.command()[0] == sys.executable
    monkeypatch.setenv("LORAKIT_PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(child.Failed, match=r"LORAKIT_PYTHON names .*nothing, but there is no such file"):
        child.command()


def test_lorakit_is_found_in_the_hosts_python_and_on_the_path(
    nodes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = sys.modules[f"{nodes.__name__}.child"]
    monkeypatch.delenv("LORAKIT_PYTHON")
    assert child.command() == [sys.executable, "-P", "-m", "lorakit"]
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(child, "CHECKOUT", Path("nowhere"))
    monkeypatch.setattr(child.shutil, "which", lambda name: "/usr/bin/lorakit")
    assert child.command() == ["/usr/bin/lorakit"]


def test_the_tokenizer_is_looked_for_in_the_hosts_folder(
    nodes: ModuleType, monkeypatch: pytest.MonkeyPatch, host: Host
) -> None:
    child = sys.modules[f"{nodes.__name__}.child"]
    monkeypatch.delenv("LORAKIT_HOSTS", raising=False)
    sys.modules["folder_paths"].__file__ = str(host.root / "folder_paths.py")
    assert child.environment()["LORAKIT_HOSTS"] == str(host.root)
    monkeypatch.setenv("LORAKIT_HOSTS", "mine")
    assert child.environment()["LORAKIT_HOSTS"].split(os.pathsep) == ["mine", str(host.root)]


# -- photos -----------------------------------------------------------------------------------------------------------


def test_pictures_of_the_graph_become_photos_with_captions(nodes: ModuleType, host: Host) -> None:
    node = nodes.NODE_CLASS_MAPPINGS["LorakitPhotos"]()
    batches = [torch.rand(2, 8, 16, 3), torch.rand(1, 16, 8, 4)]
    place, count = node.gather([""], batches, ["one\ntwo\n\nthree"])
    assert count == 3 and Path(place).is_relative_to(host.root / "output/lorakit/photos")
    files = sorted(path.name for path in Path(place).iterdir())
    assert files == [f"{stem}.{ending}" for stem in ("0001", "0002", "0003") for ending in ("png", "txt")]
    assert (Path(place) / "0002.txt").read_text() == "two\n"
    with Image.open(Path(place) / "0003.png") as picture:
        assert picture.size == (8, 16) and picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), (batches[1][0, ..., :3] * 255).round().byte().numpy())
    assert node.gather([""], batches, ["one", "two", "three"]) == (place, 3), "the same again is the same folder"
    other, _ = node.gather([""], batches, ["the same"])
    assert other != place and (Path(other) / "0003.txt").read_text() == "the same\n"


@pytest.mark.parametrize(
    ("folder", "images", "captions", "message"),
    [
        ("", None, "", "name a folder, or connect pictures"),
        ("nowhere", None, "", "nowhere: there is no such folder"),
        ("nowhere", "images", "", "give a folder or connect pictures, not both"),
        ("", "images", "one\ntwo", "2 captions for 3 pictures: give one for each, or one for all"),
        (".", None, "", "has no pictures"),
    ],
)
def test_wrong_inputs_of_photos_are_refused(
    nodes: ModuleType, folder: str, images: object, captions: str, message: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    batch = None if images is None else [torch.rand(3, 8, 8, 3)]
    with pytest.raises(RuntimeError, match=message):
        nodes.NODE_CLASS_MAPPINGS["LorakitPhotos"]().gather([folder], batch, [captions])


def test_a_changed_folder_is_read_again(nodes: ModuleType, photos: Path) -> None:
    node = nodes.NODE_CLASS_MAPPINGS["LorakitPhotos"]
    before = node.IS_CHANGED([str(photos)])
    assert node.IS_CHANGED([str(photos)]) == before
    (photos / "0.txt").write_text("a caption")
    assert node.IS_CHANGED([str(photos)]) != before


# -- a run ------------------------------------------------------------------------------------------------------------


def test_each_line_of_the_options_is_an_option(nodes: ModuleType) -> None:
    module = sys.modules[f"{nodes.__name__}.nodes"]
    text = '# mine\nadapter.rank = 8\n\n[train]\nbatch_size=2\nnote = a = b\n[memory]\ndevice = "cpu"'
    assert module.assignments(text) == [
        "adapter.rank=8",
        "train.batch_size=2",
        "train.note=a = b",
        'memory.device="cpu"',
    ]
    with pytest.raises(RuntimeError, match=r"'rank 8': write it as section.key = value"):
        module.assignments("rank 8")


def test_the_same_settings_and_photos_are_the_same_run(nodes: ModuleType, photos: Path) -> None:
    module = sys.modules[f"{nodes.__name__}.nodes"]
    place = module.run_folder(module.arguments(str(photos), **RUN), "sks toy")
    assert module.run_folder(module.arguments(str(photos), **RUN), "sks toy") == place
    assert re.fullmatch(r"sks-toy-[0-9a-f]{8}", place.name)
    assert module.run_folder(module.arguments(str(photos), **{**RUN, "seed": 1}), "sks toy") != place
    (photos / "1.txt").write_text("a caption")
    assert module.run_folder(module.arguments(str(photos), **RUN), "sks toy") != place


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("""echo '{"event": "error", "message": "no room"}'; exit 1""", "no room"),
        ("echo 'lorakit: unknown option train.stepz' >&2; exit 2", "unknown option train.stepz"),
        ("echo 'Traceback' >&2; echo 'ImportError: torch' >&2; exit 1", "Traceback\nImportError: torch"),
        ("exit 3", "lorakit ended with exit code 3"),
    ],
)
def test_errors_of_lorakit_reach_the_user(
    nodes: ModuleType,
    host: Host,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    message: str,
) -> None:
    program(tmp_path, monkeypatch, script)
    with pytest.raises(RuntimeError) as error:
        nodes.NODE_CLASS_MAPPINGS["LorakitTrain"]().train(str(photos), 1.0, **RUN)
    assert str(error.value) == message
    assert host.calls == ["unload_all_models", "soft_empty_cache"], "the card is lorakit's before it starts"


def test_a_cancel_before_the_run_begins_ends_the_process(
    nodes: ModuleType, host: Host, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, "exec sleep 60")
    host.interrupt = True
    with pytest.raises(comfyui_host.InterruptProcessingException):
        nodes.NODE_CLASS_MAPPINGS["LorakitTrain"]().train(str(photos), 1.0, **RUN)
    host.interrupt = True
    with pytest.raises(comfyui_host.InterruptProcessingException):
        nodes.NODE_CLASS_MAPPINGS["LorakitCheck"]().check(str(photos), **RUN)


def test_cancel_saves_and_the_same_settings_resume(
    nodes: ModuleType, host: Host, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in waits for the stop file of a run. At its second start it must get `resume`."""
    program(
        tmp_path,
        monkeypatch,
        """
        [ "$1" = resume ] && { echo "{\\"event\\": \\"error\\", \\"message\\": \\"resumed $2\\"}"; exit 1; }
        while [ "$1" != --output ]; do shift; done
        mkdir -p "$2"; touch "$2/config.toml"
        echo "{\\"event\\": \\"start\\", \\"folder\\": \\"$2\\", \\"steps\\": 9}"
        mkdir -p "$2/samples"; cp SAMPLE "$2/samples/step-000003.png"
        echo "{\\"event\\": \\"sample\\", \\"step\\": 3, \\"file\\": \\"step-000003.png\\"}"
        echo "{\\"event\\": \\"progress\\", \\"step\\": 3, \\"loss\\": null, \\"eta_s\\": 600}"
        while [ ! -e "$2/stop" ]; do sleep 0.05; done
        echo "{\\"event\\": \\"stopped\\", \\"message\\": \\"stopped after step 3\\", \\"folder\\": \\"$2\\"}"
        exit 130""".replace("SAMPLE", str(photos / "0.png")),
    )
    host.on_bar = lambda: setattr(host, "interrupt", host.bars[-1][0] == 3)
    node = nodes.NODE_CLASS_MAPPINGS["LorakitTrain"]()
    with pytest.raises(comfyui_host.InterruptProcessingException):
        node.train(str(photos), 1.0, **RUN)
    assert [bar[:2] for bar in host.bars] == [(0, 9), (3, 9)]
    assert host.bars[0][2][1].size == (64, 64), "the newest sample is the preview"
    (place,) = (host.root / "output/lorakit").glob("sks-toy-*")
    with pytest.raises(RuntimeError, match=f"resumed {place}"):
        node.train(str(photos), 1.0, **RUN)


@pytest.mark.slow
def test_the_bundled_base_is_trained(nodes: ModuleType, host: Host, photos: Path) -> None:
    """ComfyUI cannot load that base, so the node returns its input models with the adapter."""
    base = nodes.NODE_CLASS_MAPPINGS["LorakitTrain"].INPUT_TYPES()["required"]["base"][0][-1]
    options = "train.prior=none\n[train]\nbatch_size=1\nholdout=0\nvalidate_at_end=false\n[sample]\nat_start=false\n"
    options += "at_end=false\n[memory]\ndevice=cpu\n[adapter]\nrank=2\ntrain_text_encoder=false"
    inputs = RUN | {"base": base, "options": options, "steps": 2, "prompts": "a sks toy"}
    node = nodes.NODE_CLASS_MAPPINGS["LorakitTrain"]()
    result = node.train(str(photos), 0.5, comfyui_host.Patcher(), comfyui_host.Patcher(), **inputs)
    model, clip, name, samples, run = result["result"]
    (place,) = (host.root / "output/lorakit").glob("sks-toy-*")
    assert Path(run) == place and name == "sks-toy.safetensors"
    assert samples.ndim == 4 and samples.shape[-1] == 3 and 0 <= samples.min() <= samples.max() <= 1
    assert host.bars[-1][:2] == (2, 2)
    installed = host.root / "models/loras" / name
    assert installed.read_bytes() == (place / name).read_bytes()
    ((tensors, strength),) = model.patches
    assert strength == 0.5 and clip.patches[0][1] == 0.5
    assert any(key.endswith("lora_down.weight") for key in tensors)
    calls = list(host.calls)
    second = node.train(str(photos), 1.0, comfyui_host.Patcher(), comfyui_host.Patcher(), **inputs)["result"]
    assert second[2:3] == (name,) and host.calls == calls, "what was trained already is not trained again"
    report = nodes.NODE_CLASS_MAPPINGS["LorakitInspect"]().inspect(name)["result"]
    assert report[0].startswith("ComfyUI: unet 129/129\n") and report[1] == "sks toy"
