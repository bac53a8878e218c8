"""Compare validation curves of one run with its base in float32 and in bf16.

    python benchmarks/precision.py [--steps 120] [--quick] [--storages int8,w8a8] [--json FILE] [--output PICTURE.png]

Each run trains the bundled model on a bundled subject with its preset and the same seed, without a prior, on the CPU.
`--storages` adds a run in bf16 for each of these values of `memory.base_storage`. `--output` draws the curves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import common
import matplotlib

from lorakit import config
from lorakit.cli import demo
from lorakit.training import run as train

matplotlib.use("Agg")
from matplotlib import pyplot

NAMES = {"fp32": "float32", "bf16": "bf16"}
STORAGES = {name: f"bf16, {name}" for name in ("int8", "w8a8", "nf4")}


def main() -> None:
    """Train each variant, print the table, and write the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="training steps (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 steps")
    parser.add_argument(
        "--storages", default="", help=f"values of memory.base_storage, separated by commas: {', '.join(STORAGES)}"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--output", type=Path, help="draw the curves into this file")
    args = parser.parse_args()
    steps = 20 if args.quick else args.steps
    with tempfile.TemporaryDirectory() as scratch:
        photos = demo.write_photos(subjects()[0], Path(scratch) / "photos")
        curves = {text: curve(photos, Path(scratch) / name, name, steps) for name, text in NAMES.items()}
        for name in filter(None, args.storages.split(",")):
            curves[STORAGES[name]] = curve(photos, Path(scratch) / name, "bf16", steps, name)
    rows, first = [], dict(curves["float32"])
    for name, points in curves.items():
        rows += [
            common.row(f"{name} validation mse, step {step}", value, "mse", first[step] / value)
            for step, value in points
        ]
    common.finish(rows, args.json)
    if args.output:
        draw(curves, args.output)


def subjects() -> list[str]:
    """Return the names of the bundled subjects."""
    from lorakit.families.pocket import subjects as bundled

    return list(bundled.SUBJECTS)


def curve(photos: Path, folder: Path, precision: str, steps: int, storage: str = "full") -> list[tuple[int, float]]:
    """Train a run and return its (step, validation mse) pairs."""
    run_config = config.load(
        "subject-pocket",
        {
            "data.folder": str(photos),
            "data.name": "sks toy",
            "train.prior": "none",
            "train.steps": steps,
            "train.holdout": 0.2,
            "train.validate_every": max(1, steps // 12),
            "train.save_every": steps,
            "sample.every": steps,
            "sample.steps": 1,
            "memory.mixed_precision": precision,
            "memory.base_storage": storage,
            "memory.device": "cpu",
            "output.folder": str(folder),
        },
    )
    run = train.train(run_config).folder
    events = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(event["step"], event["mse"]) for event in events if event["event"] == "validation"]


def draw(curves: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """Draw the curves over the steps into a file."""
    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for (name, points), style in zip(curves.items(), itertools.cycle(("-", "--", ":"))):
        axes.plot(*zip(*points, strict=True), style, marker=".", label=name)
    axes.set(xlabel="step", ylabel="validation mse", title="the same run, its base in float32 and in bf16")
    axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
