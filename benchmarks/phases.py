"""Measure the memory of each phase of a run at its true size, on the make-believe card of tests/card.

    python benchmarks/phases.py PHOTO [--family sd1|sdxl] [--preset NAME] [--folder DIR] [--set KEY=VALUE] [--json FILE]

The run has two steps of a preset on a base of the true architecture with random weights, from loading to the last
sample. On this card, torch places and frees each tensor as on CUDA, and their bytes are counted. The count does not
include the CUDA context, the kernels' workspace and the allocator's rounding. CUDA graphs are off. The VAE works in
strips, as on a card with little memory. It needs a C++ compiler. SD1.5 takes 5 minutes on one core and 3 GB of disk,
SDXL 20 minutes and 9 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "card")]

import card as make_believe  # noqa: E402

GIB = 2**30


def main() -> None:
    """Build card and base in their own process (torch looks for a card only once), then run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photo", type=Path, help="photo to train on")
    parser.add_argument(
        "--family", choices=("sd1", "sdxl"), default="sd1", help="family of the base (default: %(default)s)"
    )
    parser.add_argument("--preset", help="default: style-sd15-lowmem or style-sdxl-lowmem")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="option of the run, as in lorakit train"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = (args.folder or Path(temporary)).resolve()
        args.folder.mkdir(parents=True, exist_ok=True)
        if args.build:
            build(args.folder, args.family)
            return
        command = [sys.executable, __file__, str(args.photo), "--family", args.family, "--folder", str(args.folder)]
        subprocess.run([*command, "--build"], check=True)
        figures = measure(args)
    print(f"{'phase':<40} {'peak, GiB':>10}")
    for name, size in figures.items():
        print(f"{name:<40} {size / GIB:>10.2f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def build(folder: Path, family: str) -> None:
    """Build the card's library and write the base. This process imports torch without the card."""
    import small_models

    make_believe.build(folder, "c++")
    small_models.of_true_size(folder, family)


def measure(args: argparse.Namespace) -> dict[str, int]:
    """Return phase -> peak bytes of tensors on the card."""
    os.environ |= {"LORAKIT_CACHE": str(args.folder / "cache"), "TRANSFORMERS_VERBOSITY": "error"}
    card = make_believe.present(args.folder / "device.so")
    import torch

    from lorakit import config
    from lorakit.cli import train_commands
    from lorakit.engine import cuda_graphs
    from lorakit.families import tiled_vae
    from lorakit.runs import report
    from lorakit.training import loop, out_of_memory, run as train, validation

    torch.set_num_threads(1)
    seconds_of_phase: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        card.reset_peak()
        start = time.monotonic()
        yield
        seconds_of_phase[name] = max(seconds_of_phase.get(name, 0), card.peak())
        print(f"{name}: {card.peak() / GIB:.2f} GiB, {time.monotonic() - start:.0f} s", flush=True)

    def within(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            with phase(name):
                return function(*arguments, **named)

        return call

    explain = out_of_memory.explain_out_of_memory

    @contextlib.contextmanager
    def timed_phase(doing: str, run_config: Any) -> Iterator[None]:
        with explain(doing, run_config), phase(doing):
            yield

    out_of_memory.explain_out_of_memory = timed_phase
    loop.Run.draw = within("drawing samples", loop.Run.draw)  # type: ignore[method-assign]
    # Validation runs many slow forward passes and needs less memory than a step.
    validation.Validation.run = lambda *_, **__: {"mse": 0.0, "prior_drift": 0.0}  # type: ignore[method-assign]
    report.write = lambda *_: None  # type: ignore[assignment]
    cuda_graphs.capturer = lambda *_: (None, "")
    tiled_vae.fits = lambda *_: False
    preset, settings = run_settings(args)
    train.train(config.load(preset, settings | train_commands.read_overrides(args.set)))
    return seconds_of_phase


def run_settings(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return preset and options of a run of two steps on one photo."""
    photos = Path(tempfile.mkdtemp(dir=args.folder))
    (photos / args.photo.name).write_bytes(args.photo.read_bytes())
    preset = args.preset or f"style-{'sd15' if args.family == 'sd1' else 'sdxl'}-lowmem"
    return preset, {
        "model.base": str(args.folder / f"{args.family}-random.safetensors"),
        "data.folder": str(photos),
        "data.name": "sks thing",
        "train.steps": 2,
        "memory.device": "cuda",
        "memory.mixed_precision": "bf16",
        "sample.steps": 1,
        "sample.prompts": ["a photo of a sks thing"],
        "sample.every": 2,
        # At an ordinary learning rate, bf16's rounding errors would be larger than the effect of two steps.
        "optimizer.learning_rate": 0.01,
        "output.folder": str(photos / "run"),
    }


if __name__ == "__main__":
    main()
