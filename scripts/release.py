"""Check that this commit can be released: version, changelog and tag agree, links are there, and the built wheel runs.
Uploads nothing.

python scripts/release.py            build into dist/ and print the hashes
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The links that the package's page on PyPI shows. They need the public address of the repository.
URLS = ("Repository", "Issues", "Documentation")


def problems(root: Path, tags: list[str], status: str) -> list[str]:
    """A message for each reason why the checkout cannot be released.

    Args:
        root: folder of the checkout.
        tags: tags of the commit.
        status: output of `git status --porcelain`.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = project["version"]
    own = re.search(
        r'^__version__ = "(.*)"$', (root / "lorakit" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    heading = rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$"
    lines = [
        f"{name} has version {match[1] if match else 'none'}, pyproject.toml {version}"
        for name, match in (("lorakit/__init__.py", own), ("CITATION.cff", cited))
        if match is None or match[1] != version
    ]
    if not re.search(heading, (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE):
        lines.append(f"CHANGELOG.md has no heading '## {version} (YYYY-MM-DD)'")
    lines += [f"pyproject.toml has no {name} in [project.urls]" for name in URLS if name not in project.get("urls", {})]
    if f"v{version}" not in tags:
        lines.append(f"this commit has no tag v{version}: git tag v{version}")
    if status.strip():
        lines.append("git status is not clean")
    return lines


def build(folder: Path) -> list[Path]:
    """Build wheel and sdist into `folder`, then install the wheel into a fresh environment and run it there."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    files = sorted(folder.iterdir())
    (wheel,) = (file for file in files if file.suffix == ".whl")
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        python = Path(place) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel], check=True)
        for words in (["--version"], ["doctor"], ["options"]):
            subprocess.run([python, "-m", "lorakit", *words], check=True, cwd=place, stdout=subprocess.DEVNULL)
    return files


def main() -> int:
    """Check the commit, build, and print the hashes. Return the exit code."""
    git = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for words in (["tag", "--points-at", "HEAD"], ["status", "--porcelain"])
    ]
    lines = problems(ROOT, git[0].split(), git[1])
    for line in lines:
        print(line, file=sys.stderr)
    if lines:
        return 1
    for file in build(ROOT / "dist"):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
