"""The tests with the marker `gpu` pass on the make-believe card; tests/card/device.cpp says what this shows."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS / "card"))

import card  # noqa: E402

# Not here: tests of compilation, which need Triton, and tests of the timing of copies, which need a real card.
FILES = (
    "card/on_card.py",
    "card/on_graphs.py",
    "card/on_memory.py",
    "engine/test_cuda_graphs.py",
    "engine/test_quantized_weight.py",
)
COUNT = 33


def cache_folder() -> Path | None:
    """Return a folder of this user in which the library outlives the test, because compilation takes 10 s.

    Return None if others could write into the folder, because this process loads the library.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit-tests"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    status = folder.lstat()
    own = status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
    return folder if own and os.access(folder, os.W_OK) else None


@pytest.mark.slow
def test_gpu_tests_pass_on_the_make_believe_card(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if torch.backends.cuda.is_built() or not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs a torch without CUDA, whose place the make-believe card takes, and a C++ compiler, on Linux")
    library = card.build(cache_folder() or tmp_path, compiler)
    options = [
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        *(str(TESTS / name) for name in FILES),
    ]
    command = [sys.executable, str(TESTS / "card" / "card.py"), str(library), *options]
    # The inner pytest must not get options such as coverage: this test would read their output as its result.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    env["TORCHDYNAMO_DISABLE"] = "1"  # these tests compile nothing, and the import takes a second
    process = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=env)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    summary = process.stdout.strip().splitlines()[-1]
    assert f" {COUNT} passed" in summary and "skipped" not in summary, process.stdout[-500:]
