"""The command that installs packages into this Python, for messages.

No message installs lorakit from an index: an extra is given by its packages, which every installer finds.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from lorakit.core.messages import Message

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def command(*requirements: str, options: str = "") -> str:
    """A command for any system's terminal that installs `requirements` into the running Python.

    Args:
        options: options of `pip install`, put before the requirements.
    """
    packages = " ".join(map(_quoted, requirements))
    arguments = f"{options} {packages}" if options else packages
    environment, python = Path(sys.prefix), _quoted(sys.executable)
    if (environment / "pipx_metadata.json").is_file():
        pip_options = f"--pip-args={_quoted(options)} " if options else ""
        return f"pipx inject {environment.name} {pip_options}{packages}"
    if not _has_pip() and (_is_of_uv(environment) or shutil.which("uv")):
        return f"uv pip install --python {python} {arguments}"
    return f"{python} -m pip install {arguments}"


def hint(extra: str) -> str:
    """Advice for an extra of lorakit whose packages are missing: "install it with: ..."."""
    packages = requirements(extra)
    return (
        Message("install it with: {command}", command(*packages))
        if packages
        else Message("there is none for {platform}", sys.platform)
    )


def requirements(extra: str) -> list[str]:
    """The requirements of an extra on this system, such as "gradio>=6.31,<7"."""
    lines = list(map(Requirement, _metadata()))
    members = [
        line
        for line in lines
        if line.marker and line.marker.evaluate({"extra": extra}) and not line.marker.evaluate({"extra": ""})
    ]
    if not members and PYPROJECT.is_file():  # not installed, or installed before the extra existed
        table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        members = [line for line in map(Requirement, table[extra]) if not line.marker or line.marker.evaluate()]
    return [f"{line.name}{line.specifier}" for line in members]


def with_bounds(package: str) -> str:
    """A package with the version bounds of lorakit's requirements, if any, as in "tensorboard>=2.20"."""
    lines = (line for line in map(Requirement, _metadata()) if line.name == package and line.specifier)
    return next((f"{line.name}{line.specifier}" for line in lines), package)


def _metadata() -> list[str]:
    """The requirements of the installed lorakit; [] if it is not installed."""
    try:
        return importlib.metadata.requires("lorakit") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _has_pip() -> bool:
    """Whether pip is installed. `find_spec` is not used: setuptools removes its own distutils when pip is looked up
    that way."""
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_of_uv(environment: Path) -> bool:
    """Whether uv created the environment: it writes its version into pyvenv.cfg."""
    try:
        lines = (environment / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return any(line.partition("=")[0].strip() == "uv" for line in lines)


def _quoted(text: str) -> str:
    """Text as one argument for sh, cmd.exe and PowerShell."""
    return f'"{text}"' if set(text) & set(" <>=!;~&|()[]") else text
