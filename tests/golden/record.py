"""Record the golden results, or compare with them bit by bit on the machine that recorded them.

python tests/golden/record.py             record all results again
python tests/golden/record.py --check     compare; exit code 1 if a bit differs
python tests/golden/record.py --check sd1-lora pocket
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from safetensors.numpy import save_file  # noqa: E402

import runs  # noqa: E402


def differences(name: str, result: runs.Golden) -> list[str]:
    """Return a line for each part of a result in which any bit differs from the golden result."""
    recorded = runs.read(name)
    lines = []
    for what in ("losses", "gradient_norms"):
        for step, (old, new) in enumerate(zip(getattr(recorded, what), getattr(result, what), strict=True), start=1):
            if old != new:
                lines.append(f"{name}: {what} from step {step}: {old} became {new}")
                break
    if recorded.adapter.keys() != result.adapter.keys():
        lines.append(f"{name}: the file's keys differ")
        return lines
    changed = [key for key, value in recorded.adapter.items() if value.tobytes() != result.adapter[key].tobytes()]
    return lines + ([f"{name}: {len(changed)} of {len(recorded.adapter)} tensors differ"] if changed else [])


def main() -> int:
    """Run the given names; return the exit code."""
    parser = argparse.ArgumentParser(description="Record or check the golden results.")
    parser.add_argument("names", nargs="*", help="runs; all of them unless given")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    different = []
    for name in arguments.names or runs.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            result = runs.run(name, Path(folder))
        if arguments.check:
            different += differences(name, result)
            continue
        figures = {"losses": result.losses, "gradient_norms": result.gradient_norms}
        (runs.FOLDER / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        save_file(result.adapter, runs.FOLDER / f"{name}.safetensors")
    for line in different:
        print(line)
    print(f"{len(different)} differences" if arguments.check else "recorded")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
