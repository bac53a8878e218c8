"""A stand-in for ComfyUI: the functions that lorakit's nodes call, with the behaviour that they have in ComfyUI."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"


class InterruptProcessingException(Exception):
    """The exception of `comfy.model_management`."""


class Patcher:
    """A model or text encoder of ComfyUI. Patches are applied to a clone."""

    def __init__(self, patches: tuple = ()):
        self.patches = patches

    def clone(self) -> "Patcher":
        return Patcher(self.patches)


class Host:
    """A ComfyUI whose folders are in `root`.

    Attributes:
        interrupt: whether the user pressed Cancel.
        bars: (value, total, preview) of each update of a progress bar.
        calls: names of the called functions of the memory management.
    """

    def __init__(self, root: Path):
        self.root, self.interrupt, self.bars, self.calls = root, False, [], []
        self.on_bar = lambda: None
        for kind in ("checkpoints", "loras", "embeddings"):
            (root / "models" / kind).mkdir(parents=True)

    def modules(self) -> dict[str, ModuleType]:
        paths, management, utils = ModuleType("folder_paths"), ModuleType("model_management"), ModuleType("utils")
        paths.get_folder_paths = lambda kind: [str(self.root / "models" / kind)]
        paths.get_output_directory = lambda: str(self.root / "output")
        paths.get_filename_list = lambda kind: sorted(
            p.name for p in (self.root / "models" / kind).glob("*.safetensors")
        )
        paths.get_full_path_or_raise = self.full_path
        management.InterruptProcessingException = InterruptProcessingException
        management.processing_interrupted = lambda: self.interrupt
        management.throw_exception_if_processing_interrupted = self.throw
        management.unload_all_models = lambda: self.calls.append("unload_all_models")
        management.soft_empty_cache = lambda force=False: self.calls.append("soft_empty_cache")
        utils.ProgressBar = lambda total, node_id=None: SimpleNamespace(
            update_absolute=lambda value, total_=None, preview=None: self.update(value, total, preview)
        )
        utils.load_torch_file = lambda path, safe_load=False: load_file(path)
        sd, comfy, execution = ModuleType("sd"), ModuleType("comfy"), ModuleType("comfy_execution")
        sd.load_checkpoint_guess_config = lambda path, **_: (Patcher(), Patcher(), None, None)
        sd.load_lora_for_models = lambda model, clip, lora, strength_model, strength_clip: (
            Patcher((*model.patches, (lora, strength_model))),
            Patcher((*clip.patches, (lora, strength_clip))),
        )
        comfy.model_management, comfy.utils, comfy.sd = management, utils, sd
        graph = execution.graph_utils = ModuleType("graph_utils")
        graph.ExecutionBlocker = type("ExecutionBlocker", (), {"__init__": lambda self, message: None})
        names = {"folder_paths": paths, "comfy": comfy, "comfy.model_management": management, "comfy.utils": utils}
        return names | {"comfy.sd": sd, "comfy_execution": execution, "comfy_execution.graph_utils": graph}

    def full_path(self, kind: str, name: str) -> str:
        path = self.root / "models" / kind / name
        if not path.is_file():
            raise FileNotFoundError(f"Model in folder '{kind}' with filename '{name}' not found.")
        return str(path)

    def throw(self) -> None:
        if self.interrupt:
            self.interrupt = False
            raise InterruptProcessingException

    def update(self, value: int, total: int, preview: object) -> None:
        self.throw()  # ComfyUI's own hook also raises
        self.bars.append((value, total, preview))
        self.on_bar()


def load_nodes(monkeypatch: pytest.MonkeyPatch, host: Host, folder: Path = FOLDER) -> ModuleType:
    """Import the package like ComfyUI does: by its path, with a name without dots."""
    for name, module in host.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    name = str(folder).replace(".", "_x_")
    for part in [key for key in sys.modules if key.startswith(name)]:
        monkeypatch.delitem(sys.modules, part)
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
