"""The wheel of a release contains the package and works in another folder."""

import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lorakit import config
from lorakit.families import pocket

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    process = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    (file,) = folder.glob("lorakit-*.whl")
    return file


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def elsewhere(unpacked: Path, *arguments: str) -> str:
    """Run Python with the unpacked wheel first on its path, and return its output."""
    process = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=unpacked,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.mark.slow
def test_the_wheel_contains_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [path for path in (ROOT / "lorakit").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= names
    assert {f"lorakit/presets/{name}.toml" for name in config.preset_names()} <= names
    assert {"lorakit/ui/app.py", "lorakit/ui/style.css"} <= names
    weights = {str(path.relative_to(ROOT)) for path in pocket.path().rglob("*") if path.is_file()}
    assert weights and weights <= names
    assert "lorakit/families/pocket/weights/model_index.json" in names
    assert "lorakit/py.typed" in names


def test_the_wheel_contains_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests/", "benchmarks/", "docs/"))]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lorakit"}
    (licence,) = [name for name in names if name.endswith("LICENSE")]
    assert ".dist-info/" in licence
    assert wheel.stat().st_size < 60 * 2**20


def test_the_unpacked_wheel_finds_its_presets_and_its_model(unpacked: Path) -> None:
    script = (
        "import lorakit; from lorakit.families import pocket; "
        "print(lorakit.__file__, lorakit.load_config().model.base, pocket.path())"
    )
    file, base, weights = elsewhere(unpacked, "-c", script).split()
    assert Path(file).is_relative_to(unpacked)
    assert base == "pocket"
    assert Path(weights).is_relative_to(unpacked)
    assert (Path(weights) / "model_index.json").is_file()


def test_the_unpacked_wheel_has_every_preset(unpacked: Path) -> None:
    script = "from lorakit import config; print(*[config.load(n) and n for n in config.preset_names()])"
    assert elsewhere(unpacked, "-c", script).split() == config.preset_names()


def test_the_unpacked_wheel_has_the_command(unpacked: Path, wheel: Path) -> None:
    assert elsewhere(unpacked, "-m", "lorakit", "--version") == f"lorakit {wheel.name.split('-')[1]}"
    (entry,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "lorakit = lorakit.cli.main:main" in entry.read_text(encoding="utf-8")


def test_a_release_needs_links_and_that_version_changelog_and_tag_agree(tmp_path: Path) -> None:
    release = runpy.run_path(str(ROOT / "scripts" / "release.py"))["problems"]
    (tmp_path / "lorakit").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (tmp_path / "lorakit" / "__init__.py").write_text('__version__ = "1.1.0"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text("## 1.2.0 (not released yet)\n")
    assert release(tmp_path, ["v1.1.0"], " M README.md\n") == [
        "lorakit/__init__.py has version 1.1.0, pyproject.toml 1.2.0",
        "CHANGELOG.md has no heading '## 1.2.0 (YYYY-MM-DD)'",
        "pyproject.toml has no Repository in [project.urls]",
        "pyproject.toml has no Issues in [project.urls]",
        "pyproject.toml has no Documentation in [project.urls]",
        "this commit has no tag v1.2.0: git tag v1.2.0",
        "git status is not clean",
    ]
    (tmp_path / "lorakit" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## 1.2.0 (2026-12-01)\n")
    urls = "\n".join(f'{name} = "https://example.org"' for name in ("Repository", "Issues", "Documentation"))
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "1.2.0"\n[project.urls]\n{urls}\n')
    assert release(tmp_path, ["v1.2.0"], "") == []
