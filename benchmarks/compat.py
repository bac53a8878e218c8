"""Test whether older releases of diffusers, transformers and PEFT read the right delta W from lorakit's files.

    python benchmarks/compat.py                  # diffusers 0.32.1, transformers 4.54.1, PEFT 0.14
    python benchmarks/compat.py diffusers==0.33.1 transformers==4.56.2 peft==0.15.2

This process writes the files. The installed releases read them first. Then a second virtual environment reads them: it
has the older packages from pip's index, and torch from this environment. This takes some minutes and needs the index,
so the tests do not run it; they read the same files with the installed releases. The output is the table of
docs/formats.md. The exit code is 1 if a delta W differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OLD = ["diffusers==0.32.1", "transformers==4.54.1", "peft==0.14.0", "huggingface_hub<1"]
FAMILIES, METHODS, FORMATS = (
    ["sd1", "sd2", "sdxl"],
    ["lora", "rslora", "pissa", "loha", "lokr"],
    ["kohya", "diffusers", "peft"],
)
RANK = 4
ALPHAS = [1.0, RANK / 2, float(RANK), 2.0 * RANK]
TOLERANCE = 1e-5


def main() -> int:
    """Write the files, read them in both environments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "packages", nargs="*", default=OLD, metavar="PACKAGE", help=f"packages to install (default: {' '.join(OLD)})"
    )
    packages = parser.parse_args().packages
    with tempfile.TemporaryDirectory() as room:
        cases = write(Path(room) / "files")
        results = {"installed": read_with(Path(sys.executable), Path(room) / "files")}
        old = environment(Path(room) / "venv", packages)
        results["older"] = read_with(old, Path(room) / "files")
    return report(results, cases)


def write(folder: Path) -> list[str]:
    """Write small bases, adapters of each method, format and alpha, and the delta W that a reader must find."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "formats")]
    import random_adapters
    import tiny
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    from lorakit.formats import diffusers, kohya, peft

    writers = {"kohya": kohya, "diffusers": diffusers, "peft": peft}
    cases = []
    for family in FAMILIES:
        base = getattr(tiny, f"save_{family}")(folder / family)
        shapes = random_adapters.pipeline_shapes(DiffusionPipeline.from_pretrained(base))
        for method in METHODS:
            for alpha in ALPHAS:
                # As training writes them: alpha contains the scale of rank-stabilized LoRA, and PiSSA is plain LoRA of
                # twice the rank.
                times = {"rslora": RANK**0.5, "pissa": 2}.get(method, 1)
                rank = 2 * RANK if method == "pissa" else RANK
                weights = random_adapters.adapter(shapes, family, rank=rank, alpha=alpha * times, method=method)
                truth = {n: torch.from_numpy(random_adapters.reference_delta(x)) for n, x in weights.layers.items()}
                for fmt in FORMATS:
                    if writers[fmt].check(method, family) or (fmt == "kohya" and method in ("loha", "lokr")):
                        continue  # diffusers does not read LoHa and LoKr; the tests read them with LyCORIS
                    case = f"{family} {method} {fmt} {alpha:g}"
                    place = folder / case.replace(" ", "-")
                    place.mkdir()
                    path = place / ("a" if fmt == "peft" else "a.safetensors")
                    writers[fmt].write(weights, path, dtype="fp32", metadata={})
                    save_file({n: t.float().contiguous() for n, t in truth.items()}, place / "truth.safetensors")
                    cases.append(case)
    (folder / "cases.json").write_text(json.dumps(cases))
    return cases


def environment(folder: Path, packages: list[str]) -> Path:
    """Create a virtual environment on top of this one with other releases of some packages; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    here = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    python = folder / "bin" / "python"
    # The new environment also finds the packages of this one, after its own.
    inside = next((folder / "lib").glob("python*/site-packages"))
    (inside / "behind.pth").write_text(here + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *packages], check=True)
    return python


def read_with(python: Path, folder: Path) -> dict[str, Any]:
    """Run compat_reader.py with another interpreter and return its report."""
    command = [str(python), str(Path(__file__).with_name("compat_reader.py")), str(folder)]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def report(results: dict[str, dict[str, Any]], cases: list[str]) -> int:
    """Print the table and the largest error; return the exit code."""
    wrong = 0
    print("| For | Method | Format | " + " | ".join(result["versions"] for result in results.values()) + " |")
    print("| --- | --- | --- | " + " | ".join("---" for _ in results) + " |")
    for row in dict.fromkeys(case.rpartition(" ")[0] for case in cases):
        cells = []
        for result in results.values():
            values = [result["errors"][case] for case in cases if case.rpartition(" ")[0] == row]
            bad = [error for error in values if not (isinstance(error, float) and error <= TOLERANCE)]
            wrong += len(bad)
            cells.append(f"{len(values) - len(bad)} of {len(values)}" + (f" ({bad[0]})" if bad else ""))
        print("| " + " | ".join([*row.split(), *cells]) + " |")
    errors = [e for result in results.values() for e in result["errors"].values() if isinstance(e, float)]
    print(f"\nlargest error of a delta W, relative to its largest number: {max(errors):.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
