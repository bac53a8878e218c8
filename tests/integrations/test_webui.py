"""The extension of AUTOMATIC1111 and Forge: its tab with stubs of their modules and a real front end."""

import ast
import json
import os
import runpy
import sys
import threading
import time
import tomllib
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lorakit.ui.app", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.core.errors import LorakitError
from lorakit.formats import save as export_save
from lorakit.ui import access
from lorakit.ui.guard import Guard
from lorakit.ui.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = ROOT / "integrations" / "webui"
# The address of the host's page. A real host listens there; in these tests nothing does.
ORIGIN = "http://127.0.0.1:7777"
# Import lorakit from this tree: the child process gets no PYTHONPATH from the environment.
PROGRAM = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lorakit.cli.main import main; sys.exit(main())"
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


class Host:
    """Stubs of the host's modules, with the names of AUTOMATIC1111 1.10 and Forge. They record the calls."""

    def __init__(self, data: Path):
        self.calls: list[str] = []
        self.callbacks: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        lora, models = data / "models" / "Lora", data / "models" / "Stable-diffusion"
        for folder in (lora, models):
            folder.mkdir(parents=True)
        page = SimpleNamespace(name="lora", refresh=lambda: self.calls.append("refresh"))
        facts: dict[str, dict[str, Any]] = {
            "paths_internal": {"data_path": str(data)},
            "call_queue": {"queue_lock": threading.Lock()},
            "ui_extra_networks": {"extra_pages": [page]},
            "shared": {
                "cmd_opts": SimpleNamespace(lora_dir=str(lora), ckpt_dir=None),
                "opts": SimpleNamespace(add_option=self.options.__setitem__, lorakit_photos=str(data / "photos")),
                "OptionInfo": lambda *values, **more: (values, more),
            },
            "sd_models": {
                "model_path": str(models),
                "model_data": SimpleNamespace(sd_model="model"),
                "unload_model_weights": lambda: self.calls.append("unload"),
                "send_model_to_device": lambda model: self.calls.append(f"load {model}"),
            },
            "script_callbacks": {
                name: lambda callback, name=name: self.callbacks.__setitem__(name, callback)
                for name in ("on_ui_tabs", "on_ui_settings", "on_script_unloaded")
            },
        }
        self.modules = {"modules": types.ModuleType("modules")}
        for name, values in facts.items():
            module = self.modules[f"modules.{name}"] = types.ModuleType(f"modules.{name}")
            vars(module).update(values)
            setattr(self.modules["modules"], name, module)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, dict[str, Any]]]:
    """The host, and the names of the tab's file after the host has run it."""
    data = tmp_path_factory.mktemp("host")
    host = Host(data)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in host.modules.items():
            patch.setitem(sys.modules, name, module)
        patch.syspath_prepend(str(EXTENSION))
        import lorakit_child

        patch.setattr(lorakit_child, "command", lambda: [sys.executable, "-c", PROGRAM])
        patch.setattr(lorakit_child, "POLL", 3600.0)  # the tests call `look` themselves
        tab = runpy.run_path(str(EXTENSION / "scripts" / "lorakit_tab.py"))
        yield host, tab
        host.callbacks["on_script_unloaded"]()
    sys.modules.pop("lorakit_child", None)


@pytest.mark.parametrize("path", sorted(EXTENSION.rglob("*.py")), ids=lambda path: path.name)
def test_the_host_may_be_python_3_10(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    names = {alias.name.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    names |= {(n.module or "").partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names <= {*sys.stdlib_module_names, "gradio", "modules", "lorakit_child"}


def test_the_tab_has_its_name_and_settings(loaded) -> None:
    host, _ = loaded
    ((page, title, element),) = host.callbacks["on_ui_tabs"]()
    assert (title, element) == ("lorakit", "lorakit_tab")
    assert {"lorakit_start", "lorakit_stop"} <= {block.elem_id for block in page.blocks.values()}
    host.callbacks["on_ui_settings"]()
    assert list(host.options) == ["lorakit_photos"]


@pytest.mark.slow
def test_a_real_page_can_be_framed_only_by_this_host(loaded) -> None:
    host, tab = loaded
    (Path(host.modules["modules.sd_models"].model_path) / "some-model.safetensors").write_bytes(b"")
    frame = tab["show"](SimpleNamespace(headers={"origin": ORIGIN}))
    assert frame.startswith('<iframe src="http://127.0.0.1:'), frame
    url = frame.split('"')[1]
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
        headers = {name.lower(): value for name, value in answer.getheaders()}
    assert "lorakit" in text and "some-model.safetensors" in text  # the page offers a base of the host
    assert headers["content-security-policy"] == f"frame-ancestors 'self' {ORIGIN}" and "x-frame-options" not in headers
    request = urllib.request.Request(f"{url}gradio_api/upload", b"", {"Origin": ORIGIN}, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:  # the host's page may only frame it
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 403
    refused.value.close()
    assert tab["show"](SimpleNamespace(headers={"origin": ORIGIN})) == frame  # the front end is still running
    assert "stopped" in tab["stop"]()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)


def write_state(run: Path, **facts: Any) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "state.json").write_text(json.dumps({"pid": os.getpid(), "updated": time.time(), **facts}), encoding="utf-8")


@pytest.mark.slow
def test_the_host_frees_the_card_for_a_run_and_lists_its_adapter(loaded) -> None:
    host, tab = loaded
    watcher, run = tab["watcher"], tab["WORK"] / "runs" / "one"
    host.calls.clear()
    write_state(run, state="preparing")
    watcher.look()
    watcher.look()
    assert host.calls == ["unload"]
    layer = LoraLayer(torch.ones(2, 768), torch.ones(1280, 2), 2.0)
    texts = {"modelspec.trigger_phrase": "sks toy"}
    export_save(AdapterWeights("sd1", "lora", {LAYER: layer}), run, "sks-toy", ["kohya"], "fp16", texts)
    (run / "sks-toy.png").write_bytes(b"a picture")
    write_state(run, state="done", adapter="sks-toy.safetensors")
    watcher.look()
    watcher.look()
    assert host.calls == ["unload", "load model", "refresh"], watcher.messages
    lora = Path(host.modules["modules.shared"].cmd_opts.lora_dir)
    assert {path.name for path in lora.iterdir()} == {"sks-toy.safetensors", "sks-toy.json", "sks-toy.png"}
    assert json.loads((lora / "sks-toy.json").read_text(encoding="utf-8"))["activation text"] == "sks toy"
    assert "sks-toy.safetensors is in the Lora tab" in tab["messages"]()


class OldHeaders:
    """Headers with the interface of Gradio 3.41."""

    def __init__(self, **values: str):
        vars(self).update(values)

    def __getitem__(self, name: str) -> str:
        return vars(self)[name]

    def __contains__(self, name: str) -> bool:
        return name in vars(self)


@pytest.mark.parametrize("kind", [dict, OldHeaders])
@pytest.mark.parametrize("origin", [{}, {"origin": "http://192.168.1.5:7860"}])
def test_the_origin_is_read_from_the_headers_of_either_gradio(loaded, monkeypatch, kind, origin) -> None:
    _, tab = loaded
    monkeypatch.delenv("LORAKIT_PASSWORD", raising=False)
    headers = kind(host="192.168.1.5:7860", **origin)
    assert "LORAKIT_PASSWORD" in tab["show"](SimpleNamespace(headers=headers))


def test_missing_password_encryption_and_a_failed_start_are_reported(loaded, tmp_path, monkeypatch) -> None:
    _, tab = loaded
    child = sys.modules["lorakit_child"]
    monkeypatch.delenv("LORAKIT_PASSWORD", raising=False)
    assert "LORAKIT_PASSWORD" in tab["show"](SimpleNamespace(headers={"host": "192.168.1.5:7860"}))
    assert "in its own window" in child.frame("https://box.example", 7861)
    assert "<iframe" not in child.frame("https://box.example", 7861)
    monkeypatch.setattr(child, "command", lambda: [sys.executable, "-c", "print('no gradio'); raise SystemExit(1)"])
    assert "did not start:\nno gradio" in tab["show"](SimpleNamespace(headers={"origin": ORIGIN}))
    write_state(tmp_path / "runs" / "dead", state="running", pid=2**22 + 1)
    calls: list[Any] = []
    watcher = child.Watcher(tmp_path / "runs", "a1111", tmp_path, lambda: calls.append(1), calls.append)
    watcher.look()  # the process of that run has ended
    assert calls == []
    assert watcher.install(tmp_path / "none.safetensors") == [] and watcher.messages


def test_lorakit_is_found_or_lines_that_install_it_are_reported(monkeypatch, tmp_path) -> None:
    spec = runpy.run_path(str(EXTENSION / "lorakit_child.py"))
    monkeypatch.setenv("LORAKIT_PYTHON", sys.executable)
    assert spec["command"]() == [sys.executable, "-m", "lorakit"]
    monkeypatch.setenv("LORAKIT_PYTHON", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="LORAKIT_PYTHON names"):
        spec["command"]()
    monkeypatch.delenv("LORAKIT_PYTHON")
    monkeypatch.setenv("PATH", str(tmp_path))
    spec["command"].__globals__.update(HERE=tmp_path, CHECKOUT=tmp_path)
    with pytest.raises(RuntimeError, match="not installed") as absent:
        spec["command"]()
    assert "-m venv" in str(absent.value) and 'pip install "lorakit[ui]"' in str(absent.value)


@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")
def test_a_python_that_cannot_create_an_environment_is_skipped(monkeypatch, tmp_path) -> None:
    for minor, code in ((14, 127), (13, 1), (12, 0), (11, 0)):
        (tmp_path / f"python3.{minor}").write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / f"python3.{minor}").chmod(0o755)
    find = runpy.run_path(str(EXTENSION / "lorakit_child.py"))["find_python"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    assert find() == [str(tmp_path / "python3.12")]


def test_on_windows_torch_with_cuda_is_installed_first(monkeypatch) -> None:
    steps = runpy.run_path(str(EXTENSION / "lorakit_child.py"))["install_steps"]
    assert [len(words) for words in steps()] == [1]
    monkeypatch.setitem(steps.__globals__, "os", SimpleNamespace(name="nt"))
    (torch_words, words) = steps()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    limit = next(text for text in project["dependencies"] if text.startswith("torch")).partition(",")[2]
    assert torch_words[0] == f"torch{limit}" and torch_words[2] in (ROOT / "docs/install.md").read_text(
        encoding="utf-8"
    )
    assert words == [f"{ROOT}[ui]"]


@pytest.mark.parametrize("embed", ["*", "http://a.example/path", "a.example", "http://a.example https://b.example"])
def test_only_one_origin_may_frame_the_front_end(embed: str) -> None:
    with pytest.raises(LorakitError, match="give the origin of one program"):
        access.require_origin(embed)
    for origin in ("", ORIGIN, "http://localhost:7860", "https://box.example", "http://[::1]:7860"):
        access.require_origin(origin)
    assert Guard(lambda *_: None, (), "", 1).headers["X-Frame-Options"] == "SAMEORIGIN"


def test_bases_of_a_folder_are_offered(tmp_path: Path) -> None:
    (folder := tmp_path / "models").mkdir()
    for name in (
        "b.safetensors",
        "sub/a.safetensors",
        "sub/x.vae.safetensors",
        "d/model_index.json",
        "d/unet/w.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    workspace = Workspace(tmp_path / "runs", [], [folder])
    assert workspace.bases() == [folder / "b.safetensors", folder / "d", folder / "sub" / "a.safetensors"]
    assert workspace.roots.resolve(folder / "b.safetensors")
