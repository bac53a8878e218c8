"""Compare training recipes: changes to the preset over subjects and seeds. A second call continues where it stopped.

    python benchmarks/recipes.py RESULTS.jsonl [--recipes preset prompts ...] [--names zib ...] [--seeds 0 1]
        [--captions scene none frames endings untriggered] [--set train.batch_size=4] [--table]

Each run adds a line to RESULTS.jsonl, and a run with a line is not repeated, so you can stop at any time. The table
shows means and half of their 95 % interval (Student's t) over the runs. Pictures, prompts and classifier are those of
benchmarks/teach.py. "Nearness" is the mean cosine of the classifier's features to the mean features of real renders of
the subject, -1 to 1.

    taken      share of the pictures with the trigger that are nearest to the subject
    near       nearness of the pictures with the trigger, as a share of that of real renders on the same scenes
    leak       nearness of pictures without the trigger, minus the base's
    scene      share of the pictures with the trigger that show the prompt's scene, as a share of the base's
    kind, colour, pattern
               share of pictures of neighbours ("a photo of a mug") with the same label as the base's picture
    drift      change of pictures without the trigger: 1 - cosine of the classifier's features to the base's
    cpu        CPU time of the training in seconds, class images included

Two controls must fail. The recipe "readme" has the values of the README of diffusers' training script: rank 4,
attention, 1e-4, 500 steps of one picture, no text encoder, no prior. The captions "untriggered" have no trigger.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import teach

from lorakit import config
from lorakit.families.pocket import subjects

# The prior of an earlier preset.
BEFORE = ("train.prior_target=image", "train.prior_prompts=[]", "train.prior_loss_weight=1", "train.class_images=64")
# The prompts of the present preset's prior.
KINDS = [f"a photo of a {kind}" for kind in teach.PRIOR_KINDS]
PROMPTS, EMPTY_TOO = (f"train.prior_prompts={json.dumps(texts)}" for texts in (KINDS, [*KINDS, ""]))
# The text encoder learns the trigger before the UNet starts, and its output for other texts is kept.
TEXT_FIRST = (
    "optimizer.text_encoder_learning_rate=1e-2",
    "optimizer.unet_start=0.4",
    "train.text_prior_weight=1",
)
# The trigger has its own embedding vectors, and the adapter trains only the UNet.
WORD = (
    "adapter.train_text_encoder=false",
    "adapter.new_tokens=4",
    "optimizer.text_encoder_learning_rate=2e-2",
)

RECIPES: dict[str, tuple[str, ...]] = {
    "preset": (),
    "preset-before": (*BEFORE, "optimizer.text_encoder_learning_rate=1e-3"),
    "text-3e-3": BEFORE,
    "target-base": (*BEFORE, "train.prior_target=base"),
    "empty-too": (EMPTY_TOO,),
    "prompts": ("train.prior_loss_weight=1",),
    "prompts-teacher": (PROMPTS, "train.prior=teacher"),
    "prompts-teacher-weight-5": (PROMPTS, "train.prior=teacher", "train.prior_loss_weight=5"),
    "tokens": (*BEFORE, "train.prior_target=base", "adapter.new_tokens=2"),
    "text-first": TEXT_FIRST,
    "word-beside": WORD,
    "word-unet-5e-4": (*WORD, "optimizer.learning_rate=5e-4"),
    "word-unet-2e-4": (*WORD, "optimizer.learning_rate=2e-4"),
    "word-attention": (*WORD, "adapter.target_modules=attention"),
    "word-empty-too": (*WORD, EMPTY_TOO),
    "word-prior-weight-10": (*WORD, "train.prior_loss_weight=10"),
    "embedding": ("adapter.method=embedding", "adapter.new_tokens=4", "optimizer.learning_rate=2e-2"),
    "text-1e-3": ("optimizer.text_encoder_learning_rate=1e-3",),
    "text-2e-3": ("optimizer.text_encoder_learning_rate=2e-3",),
    "text-off": ("adapter.train_text_encoder=false",),
    "unet-2e-3": ("optimizer.learning_rate=2e-3", "optimizer.text_encoder_learning_rate=1e-3"),
    "both-3e-3": ("optimizer.learning_rate=3e-3",),
    "rank-4": ("adapter.rank=4", "adapter.alpha=4"),
    "rank-16": ("adapter.rank=16", "adapter.alpha=16"),
    "attention": ("adapter.target_modules=attention",),
    "prior-none": ("train.prior=none",),
    "prior-teacher": ("train.prior=teacher",),
    "prior-weight-2": ("train.prior_loss_weight=2",),
    "min-snr-5": ("train.min_snr_gamma=5.0",),
    "dora": ("adapter.method=dora",),
    "lokr": ("adapter.method=lokr",),
    "ema": ("train.ema_decay=0.98",),
    "steps-30": ("train.steps_per_image=30",),
    "readme": (
        "adapter.rank=4",
        "adapter.target_modules=attention",
        "adapter.train_text_encoder=false",
        "optimizer.learning_rate=1e-4",
        "optimizer.lr_scheduler=constant",
        "train.prior=none",
        "train.steps=500",
        "train.batch_size=1",
    ),
}
COLUMNS = ("taken", "near", "leak", "scene", "kind", "colour", "pattern", "drift", "cpu")
# 97.5 % quantiles of Student's t for 1, 2, 3 ... degrees of freedom. The last value is also used for more.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
# No recipe needs samples and validation during training.
QUIET = (
    "sample.every=100000",
    "sample.at_start=false",
    "sample.at_end=false",
    "train.validate_every=100000",
    "train.validate_at_end=false",
)


def main() -> None:
    """Train the runs that are not in the results yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON lines file of the runs; new runs are appended")
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=["preset", "preset-before"],
        metavar="NAME",
        help="names of recipes (default: preset preset-before)",
    )
    parser.add_argument("--names", nargs="+", default=list(subjects.SUBJECTS), help="subjects to learn (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1], help="seeds of pictures and training (default: 0 1)"
    )
    parser.add_argument(
        "--captions", nargs="+", choices=teach.CAPTIONS, default=["scene"], help="kinds of captions (default: scene)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="option of every run")
    parser.add_argument("--table", action="store_true", help="print the table of the results and do not train")
    arguments = parser.parse_args()
    rows = read(arguments.results)
    keys = {key(row) for row in rows}
    runs = [
        {"recipe": " ".join((recipe, *arguments.set)), "name": name, "seed": seed, "captions": captions}
        for seed in arguments.seeds
        for captions in arguments.captions
        for name in arguments.names
        for recipe in arguments.recipes
    ]
    for run in [] if arguments.table else runs:
        if key(run) in keys:
            continue
        overrides = dict(map(config.parse_override, (*QUIET, *RECIPES[run["recipe"].split()[0]], *arguments.set)))
        figures = teach.teach(run["name"], overrides, None, captions=run["captions"], seed=run["seed"])
        row = run | columns(figures)
        add(arguments.results, row)
        rows.append(row)
    print(table(rows))


def add(file: Path, row: dict[str, Any]) -> None:
    """Append a run to the file."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Return the runs of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the values that identify a run."""
    return row["recipe"], row["name"], row["seed"], row["captions"]


def columns(figures: dict[str, Any]) -> dict[str, float]:
    """Return the figures of `teach` by the names of the table's columns."""
    return {
        "taken": figures["after"],
        "near": figures["near"],
        "leak": figures["leak"],
        "scene": figures["scene"] / max(figures["scene_base"], 1e-9),
        **figures["kept"],
        "drift": figures["drift"],
        "cpu": figures["cpu"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: a line for each recipe and kind of captions."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row["captions"]].append(row)
    lines = ["| recipe | captions | runs | " + " | ".join(COLUMNS) + " |"]
    lines.append("| --- | --- |" + " ---: |" * (len(COLUMNS) + 1))
    for (recipe, captions), group in groups.items():
        cells = " | ".join(_cell(column, [row[column] for row in group]) for column in COLUMNS)
        lines.append(f"| {recipe} | {captions} | {len(group)} | {cells} |")
    return "\n".join(lines)


def _cell(column: str, values: Sequence[float]) -> str:
    """Return the mean and half of its 95 % interval, by Student's t."""
    form = "{:.0f}" if column == "cpu" else "{:.2f}" if column in ("leak", "drift") else "{:.1%}"
    text = form.format(statistics.mean(values))
    if len(values) < 2:
        return text
    quantile = T[min(len(values) - 2, len(T) - 1)]
    return f"{text} ± {form.format(quantile * statistics.stdev(values) / len(values) ** 0.5)}"


if __name__ == "__main__":
    main()
