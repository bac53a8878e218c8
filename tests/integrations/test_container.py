"""The Dockerfile, checked without Docker. With LORAKIT_DOCKER=1 a test also builds the image."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("lorakit.ui.app", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from packaging.specifiers import SpecifierSet

from lorakit.core.errors import LorakitError
from lorakit.ui import access, app

ROOT = Path(__file__).resolve().parents[2]
# Release of Ubuntu -> its version of Python.
PYTHONS = {"24.04": "3.12", "22.04": "3.10"}


def instructions(name: str) -> list[str]:
    """Return the arguments of each instruction of this name."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*)$", text, re.MULTILINE)


def is_copied(path: str) -> bool:
    """Return whether .dockerignore includes a file in the build. The last matching line decides."""
    included = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.lstrip("!")
        if line and not line.startswith("#"):
            parts = [path, *(str(parent) for parent in Path(path).parents)]
            included = line.startswith("!") if any(fnmatch.fnmatch(part, pattern) for part in parts) else included
    return included


def test_the_base_image_is_one_version_with_a_python_that_fits() -> None:
    (image,) = instructions("FROM")
    match = re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu(\d+\.\d+)", image)
    assert match, image
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert PYTHONS[match[1]] in SpecifierSet(project["requires-python"])
    (extras,) = re.findall(r"\.\[([\w,]+)\]", " ".join(instructions("RUN")))
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def test_the_build_gets_the_sources_of_the_package_and_nothing_else() -> None:
    sources = [source for line in instructions("COPY") for source in shlex.split(line)[:-1]]
    assert {"pyproject.toml", "lorakit", "presets", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and is_copied(source), source
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert set(wheel["wheel"]["only-include"]) <= set(sources)  # the sources of the package
    for path in ("runs", "photos/a.png", ".env", ".git/config", "model.safetensors", "tests/tiny.py", ".venv/x"):
        assert not is_copied(path), path
    assert is_copied("lorakit/cli/main.py") and not is_copied("lorakit/cli/__pycache__/main.cpython-312.pyc")


def test_the_command_of_the_image_needs_a_password() -> None:
    (command,) = instructions("CMD")
    program, first, *rest = json.loads(command)
    args = app.parser().parse_args(rest)
    assert (program, first) == ("lorakit", "ui") and str(args.port) in instructions("EXPOSE")
    assert args.runs.startswith(instructions("VOLUME")[0]) and args.root == instructions("VOLUME")
    with pytest.raises(LorakitError, match="set a password in LORAKIT_PASSWORD"):
        access.require_password(args.host, args.share, "", args.public)
    access.require_password(args.host, args.share, "eight or more", args.public)


def test_no_secret_is_in_the_image() -> None:
    lines = [*instructions("ENV"), *instructions("ARG"), *instructions("RUN")]
    assert not [line for line in lines if re.search(r"PASSWORD|TOKEN|SECRET|_KEY", line, re.IGNORECASE)]


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("LORAKIT_DOCKER") or shutil.which("docker") is None, reason="LORAKIT_DOCKER=1 and docker"
)
def test_the_image_builds_and_its_commands_run() -> None:
    subprocess.run(["docker", "build", "-t", "lorakit-test", str(ROOT)], check=True)
    line = ["docker", "run", "--rm", "lorakit-test", "lorakit", "--version"]
    assert "lorakit" in subprocess.run(line, capture_output=True, text=True, check=True).stdout
