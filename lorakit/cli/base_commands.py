"""Commands for base models: probe."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorakit import config as configuration
from lorakit.cli import threads
from lorakit.cli.imports import model_imports
from lorakit.cli.terminal import print_json, print_lines
from lorakit.cli.train_commands import Command, add_model, read_overrides
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.units import count

# The bundled subject, and its number of photos, to measure on if no photo is given.
BUNDLED_SUBJECT, BUNDLED_PHOTOS = "zib", 4


def add(command: Command) -> None:
    """Add the commands of this module by `command(name, run, help)`."""
    probe = command(
        "probe", run_probe, "measure on photos whether a base predicts the noise (epsilon) or the velocity (v)"
    )
    probe.add_argument("base", metavar="BASE", help="base model: a file, a folder or a hub id")
    probe.add_argument(
        "--photo",
        action="append",
        metavar="FILE",
        help="photo to measure on (default: bundled photos); may be repeated",
    )
    add_model(probe)


def run_probe(args: argparse.Namespace) -> int:
    """`lorakit probe`. The exit code is 1 if the measurement does not decide between the prediction types."""
    threads.use_idle_cores()
    flags = {"model.base": args.base, "train.steps": 1} | ({"model.vae": args.vae} if args.vae else {})
    config = configuration.load(None, flags | read_overrides(args.set))

    with model_imports():
        from lorakit import families
        from lorakit.data import decode
        from lorakit.families.pocket import subjects
        from lorakit.inference.measure_prediction import measure

    info = families.describe(config.model)
    if problem := info.tokenizer_problem():
        raise LorakitError(problem)
    if args.photo:
        pictures = [decode.decode(Path(photo)).image for photo in args.photo]
    else:
        pictures = [image for image, _ in subjects.photos(BUNDLED_SUBJECT, BUNDLED_PHOTOS)]
    family, _ = families.load_as_configured(info, config)
    verdict = measure(family, pictures)
    if args.json:
        print_json(verdict.to_json())
    else:
        print_lines(
            Message("base: {name} ({family}), {photos}", info.title, info.family, count(len(pictures), "photo")),
            *verdict.lines(),
        )
    return 0 if verdict.prediction_type else 1
