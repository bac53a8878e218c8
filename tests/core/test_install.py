"""Tests that install commands in messages fit the running Python and the way it was installed."""

import importlib.machinery
import importlib.metadata
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lorakit.core import install
from lorakit.runs import nvidia
from lorakit.runs.nvidia import Card

ROOT = Path(__file__).resolve().parents[2]
GRADIO = "gradio>=6.31,<7"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python environment with pip, without traces of uv and pipx."""
    folder = tmp_path / "lorakit"
    folder.mkdir()
    monkeypatch.setattr(sys, "prefix", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    return folder


def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == "pip":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def test_pip_of_this_python_is_called_by_its_path(environment: Path) -> None:
    line = install.command(GRADIO, "filelock")
    assert shlex.split(line) == [sys.executable, "-m", "pip", "install", GRADIO, "filelock"]


def test_a_path_with_a_space_is_one_argument(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", r"C:\Program Files\Python\python.exe")
    assert install.command("a").startswith(r'"C:\Program Files\Python\python.exe" -m pip install a')


def test_pipx_injects_into_its_environment(environment: Path) -> None:
    (environment / "pipx_metadata.json").write_text("{}", encoding="utf-8")
    assert install.command(GRADIO) == f'pipx inject lorakit "{GRADIO}"'
    assert install.command("torch", options="--index-url x") == 'pipx inject lorakit --pip-args="--index-url x" torch'


@pytest.mark.parametrize("lines", ["home = /usr\nuv = 0.9.1\n", ""])
def test_uv_is_used_without_pip(environment: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    (environment / "pyvenv.cfg").write_text(lines, encoding="utf-8")
    assert " -m pip install " in install.command(GRADIO)
    without_pip(monkeypatch)
    if not lines:
        assert " -m pip install " in install.command(GRADIO)
        monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/uv")
    assert shlex.split(install.command(GRADIO)) == ["uv", "pip", "install", "--python", sys.executable, GRADIO]


def test_an_extra_is_installed_by_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra, lines in table.items():
        expected = {Requirement(line).name for line in lines}
        assert {Requirement(line).name for line in install.requirements(extra)} == expected
        assert "lorakit" not in install.hint(extra).rpartition("install ")[2]

    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert {Requirement(line).name for line in install.requirements("ui")} == {"gradio", "filelock"}


def test_a_package_for_other_systems_only_has_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "bitsandbytes; sys_platform == 'plan9' and extra == 'bnb'"
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [line])
    monkeypatch.setattr(install, "PYPROJECT", Path("/nowhere/at/all"))
    assert install.hint("bnb") == f"there is none for {sys.platform}"


@pytest.mark.parametrize(
    ("cards", "index"),
    [
        ([Card("NVIDIA GeForce RTX 3060", "581.29", (8, 6))], "cu130"),
        ([Card("NVIDIA GeForce RTX 3060", "560.94", (8, 6))], "cu126"),  # the driver is too old for CUDA 13
        ([Card("NVIDIA GeForce GTX 1080", "581.29", (6, 1))], "cu126"),  # CUDA 13 does not support Pascal
        ([Card("NVIDIA GeForce RTX 5070", "572.16", (12, 0))], "cu130"),  # CUDA 12.6 does not support Blackwell
        ([Card("NVIDIA GeForce GTX 970", "472.12")], "cu126"),
        ([], "cu130"),
    ],
)
def test_the_build_of_torch_fits_the_cards(environment: Path, cards: list[Card], index: str) -> None:
    line = shlex.split(nvidia.torch_command(cards))
    assert line[-2:] == [f"https://download.pytorch.org/whl/{index}", nvidia.TORCH] and "--force-reinstall" in line
    names = [line for line in importlib.metadata.requires("lorakit") or [] if line.startswith("torch")]
    assert not names or Requirement(names[0]) == Requirement(nvidia.TORCH)


def test_cards_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in *compute_cap*) exit 2;; esac\necho 'NVIDIA GeForce GTX 970, 472.12'\n", encoding="utf-8"
    )
    program.chmod(0o755)
    monkeypatch.setattr(nvidia.shutil, "which", lambda name: str(program))
    nvidia.cards.cache_clear()
    assert nvidia.cards() == [Card("NVIDIA GeForce GTX 970", "472.12")]
    program.write_text("#!/bin/sh\necho 'Tesla V100, 550.1, 7.0'\necho 'Tesla V100, 550.1, 7.0'\n", encoding="utf-8")
    nvidia.cards.cache_clear()
    assert nvidia.cards() == [Card("Tesla V100", "550.1", (7, 0))] * 2
    nvidia.cards.cache_clear()


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", False),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", True),
        ("__version__ = '2.13.0'\n", True),
    ],
)
def test_the_build_of_torch_is_read_from_its_version_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cuda: bool
) -> None:
    (tmp_path / "version.py").write_text(text, encoding="utf-8")
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(nvidia.importlib.util, "find_spec", lambda name: spec)
    assert nvidia.torch_has_cuda() is cuda


def test_a_card_that_this_torch_cannot_use_is_named(
    monkeypatch: pytest.MonkeyPatch, environment: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(nvidia, "DRIVER_FILES", (tmp_path,))
    monkeypatch.setattr(nvidia, "cards", lambda: [Card("RTX", "581.1", (8, 6))])
    monkeypatch.setattr(nvidia, "torch_has_cuda", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = nvidia.unused()
    assert line is not None and line.startswith("an NVIDIA driver is installed, but torch ") and "cu130" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert nvidia.unused() is None
