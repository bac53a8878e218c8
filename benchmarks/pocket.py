"""Measure how the bundled model draws 512 combinations that it never saw, and print its classifier's scores.

python benchmarks/pocket.py [--quick] [--json FILE] [--samples FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lorakit.families.pocket


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        default=lorakit.families.pocket.path(),
        help="pipeline folder with a judge (default: the bundled one)",
    )
    parser.add_argument("--quick", action="store_true", help="64 combinations instead of 512")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device of the model (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--samples", type=Path, help="write the first 64 pictures here, as one PNG")
    args = parser.parse_args()

    from tools.pocket import measure

    values, images = measure.table(args.model, 64 if args.quick else 512, args.guidance, args.steps, args.device)
    print(measure.text_table(values))
    if args.json:
        args.json.write_text(json.dumps(values, indent=2) + "\n")
    if args.samples:
        measure.sheet(images[:64], args.samples)


if __name__ == "__main__":
    main()
