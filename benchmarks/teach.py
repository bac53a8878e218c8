"""Train the bundled model on subjects and styles that it never saw, and measure the pictures of each adapter.

    python benchmarks/teach.py [--names zib ...] [--control none|shuffled] [--set key=value] [--json FILE] [--grids DIR]

Each subject or style has 16 pictures. The preset is the default one without `train.min_steps`, which is for photos. A
classifier that was trained only on renders (pictures by lorakit's renderer) measures, before and after the training:

    taken for it     share of pictures on new scenes that are nearest to the subject or style
    scene right      share of the pictures that show the prompt's scene. In brackets: the share of real renders. It can
                     be low, because the classifier never learned scenes in two inks or in neon
    without trigger  as "taken for it", for prompts without the trigger; training must not change it
    others kept      score of the kind for prompts such as "a photo of a mug", as a share of the score before

benchmarks/recipes.py measures more of the same pictures, over subjects, seeds and recipes.

`--control shuffled` gives each picture of a batch the target of its neighbour: a broken trainer, which must fail.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorakit import adapters, config, families, formats
from lorakit.core import image_grid
from lorakit.engine import device as devices
from lorakit.families.pocket import scene_captions, spec, subjects
from lorakit.families.pocket.classifier import Classifier
from lorakit.families.prediction import Epsilon, VPrediction
from lorakit.inference import sampling
from lorakit.training import run as train

PHOTOS = 16
TRIGGER = "sks"
UNSEEN = ("snow", "night", "city", "underwater", "floor")
# Beginnings of captions that name no scene.
FRAMES = ("a photo of a", "a picture of a", "a photograph of a", "a")
CAPTIONS = ("scene", "none", "frames", "endings", "untriggered")
OTHERS = ("mug", "fish", "house", "car", "cat", "robot", "umbrella", "mushroom")
# Takes the config of a run and returns the file of the adapter.
Trainer = Callable[[config.Config], Path]
# Kinds in the prompts of the preset's prior. None is in OTHERS.
PRIOR_KINDS = ("ball", "star", "heart", "tree", "boat", "flower", "bottle", "rocket", "butterfly", "hat", "crown")
# Number of pictures of each prompt, each with another seed.
DRAWS = 4


def main() -> None:
    """Train and measure each subject or style, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--names",
        nargs="+",
        default=[*subjects.SUBJECTS, *subjects.STYLES],
        help="subjects and styles to learn (default: all)",
    )
    parser.add_argument(
        "--control",
        choices=("none", "shuffled"),
        default="none",
        help="shuffled: train with wrong targets (default: %(default)s)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="option of every run")
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--grids", type=Path, help="folder for before/after pictures")
    arguments = parser.parse_args()
    if arguments.control == "shuffled":
        shuffle_targets()
    overrides = dict(map(config.parse_override, arguments.set))
    rows = []
    titles = f"{'':<14}{'taken for it':>16}{'scene right (real)':>20}{'without trigger':>17}"
    print(f"{titles}{'others kept':>13}{'seconds':>9}")
    for name in arguments.names:
        row = teach(name, overrides, arguments.grids)
        rows.append(row)
        share = row["others_after"] / max(row["others_before"], 1e-9)
        print(
            f"{name:<14}{row['before']:>8.0%} ->{row['after']:>5.0%}{row['scene']:>12.0%} ({row['scene_real']:>4.0%})"
            f"{row['untriggered_before']:>9.0%} ->{row['untriggered']:>5.0%}{share:>13.0%}{row['seconds']:>9.0f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def teach(
    name: str,
    overrides: dict[str, Any],
    grids: Path | None,
    *,
    captions: str = "scene",
    seed: int = 0,
    trainer: Trainer | None = None,
) -> dict[str, Any]:
    """Train one run; return the classifier's figures for the base and the adapter.

    Args:
        captions: the caption of each photo. "scene" names its scene, "none" writes no caption. "frames" has several
            sentences without a scene, "endings" has one without a scene and three with one; a step draws one of them.
            "untriggered" names the scene but has no trigger.
        seed: the seed of the training pictures and of the training.
        trainer: the function that trains; lorakit by default.
    """
    is_style = name in subjects.STYLES
    noun = "style" if is_style else subjects.SUBJECTS[name].kind
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        photos.mkdir()
        scenes = [scene for scene in spec.SCENES if scene not in UNSEEN]
        for number, (image, picture_spec) in enumerate(subjects.pictures(name, PHOTOS, seed=seed, scenes=scenes)):
            image.save(photos / f"{number:02}.png")
            if texts := _captions(captions, noun, picture_spec, is_style, number):
                (photos / f"{number:02}.txt").write_text("\n".join(texts), encoding="utf-8")
        settings = {
            "data.folder": str(photos),
            "data.name": f"{TRIGGER} {noun}",
            "data.caption_lines": captions in ("frames", "endings"),
            "train.seed": seed,
            "output.folder": str(Path(scratch) / "run"),
            "train.min_steps": 0,  # renders need fewer steps than photos: the base was trained on renders
        }
        run_config = config.load("style-pocket" if is_style else "subject-pocket", settings | overrides)
        start, cpu_start = time.monotonic(), time.process_time()
        adapter = trainer(run_config) if trainer else train.train(run_config).adapter
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu_start
        figures = _measure(name, run_config, adapter, noun, grids)
        return figures | {"name": name, "seconds": seconds, "cpu": cpu}


def _captions(captions: str, noun: str, picture: spec.Spec, is_style: bool, number: int) -> list[str]:
    """Return the captions of a photo. Each step draws one of them."""
    if captions == "none":
        return []
    if captions == "frames":
        return [f"{frame} {TRIGGER} {noun}" for frame in FRAMES]
    if captions == "endings":
        places = [scene for scene in spec.SCENES if scene not in UNSEEN]
        endings = [scene_captions.SCENE_WORDS[places[(number + k) % len(places)]][0] for k in range(3)]
        return [f"a photo of a {TRIGGER} {noun}", *(f"a photo of a {TRIGGER} {noun} {ending}" for ending in endings)]
    trigger = "" if captions == "untriggered" else TRIGGER
    return [_prompt(trigger, noun, picture.scene, picture.kind if is_style else None)]


def _prompt(trigger: str, noun: str, scene: str, thing: str | None) -> str:
    """Return a prompt for a subject, or for `thing` in a style. An empty trigger is left out."""
    words = f"{trigger} {noun}".strip()
    where = scene_captions.SCENE_WORDS[scene][0]
    if thing is None:
        return f"a photo of a {words} {where}"
    return f"a picture of a {thing} {where} in {words}" if trigger else f"a picture of a {thing} {where}"


def _measure(name: str, run_config: config.Config, adapter: Path, noun: str, grids: Path | None) -> dict[str, Any]:
    device = devices.device(run_config.memory)
    family = families.load(families.describe(run_config.model.base), device, devices.dtype(run_config.memory, device))
    judge = Classifier.load()
    things = OTHERS if name in subjects.STYLES else (None,) * len(UNSEEN)
    pairs = [(scene, things[i % len(things)]) for i, scene in enumerate(UNSEEN)]
    texts = [_prompt(TRIGGER, noun, scene, thing) for scene, thing in pairs]
    untriggered = [_prompt("", noun, scene, thing) for scene, thing in pairs]
    others = [f"a photo of a {kind}" for kind in OTHERS]

    def draw(prompts: Sequence[str]) -> list[Image.Image]:
        return [
            picture
            for seed in range(DRAWS)
            for picture in sampling.draw(family, prompts, replace(run_config.sample, seed=seed * 100), 64)
        ]

    expected_kinds = [{"kind": kind} for kind in OTHERS] * DRAWS
    before, plain_before, others_before = draw(texts), draw(untriggered), draw(others)
    adapters.apply(family, formats.read(adapter, embedding=True))
    after, plain_after, others_after = draw(texts), draw(untriggered), draw(others)
    if grids:
        grids.mkdir(parents=True, exist_ok=True)
        columns = len(texts)
        images = [image for image, _ in subjects.pictures(name, columns, seed=0)] + before[:columns] + after[:columns]
        image_grid.save(image_grid.grid(images, ["it", "base", "adapter"], texts), grids / f"{name}.png")
    scenes = [{"scene": scene} for scene, _ in pairs] * DRAWS
    real = subjects.pictures(name, 64, seed=1, scenes=UNSEEN)
    real_images = [image for image, _ in real]
    visible = judge.scores(real_images, [{"scene": images.scene} for _, images in real])
    labels = judge.labels(others_before), judge.labels(others_after)
    unmoved = judge.features(plain_before + others_before) * judge.features(plain_after + others_after)
    return {
        "near": judge.nearness(after, name) / judge.nearness(real_images, name),
        "leak": judge.nearness(plain_after, name) - judge.nearness(plain_before, name),
        "kept": {field: _share_equal(labels[0][field], labels[1][field]) for field in ("kind", "colour", "pattern")},
        "drift": float(1 - unmoved.sum(axis=1).mean()),
        "scene_base": judge.scores(plain_before, scenes)["scene"],
        "before": judge.subject_score(before, name),
        "after": judge.subject_score(after, name),
        "scene": judge.scores(after, scenes)["scene"],
        "scene_real": visible["scene"],
        "untriggered_before": judge.subject_score(plain_before, name),
        "untriggered": judge.subject_score(plain_after, name),
        "others_before": judge.scores(others_before, expected_kinds)["kind"],
        "others_after": judge.scores(others_after, expected_kinds)["kind"],
    }


def _share_equal(before: Sequence[str], after: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(before, after, strict=True)) / len(before)


def shuffle_targets() -> None:
    """Break the trainer on purpose: each picture of a batch gets its neighbour's target."""
    for cls in (Epsilon, VPrediction):
        _shuffle(cls)


def _shuffle(cls: Any) -> None:
    right = cls.target

    def wrong(*arguments: Any) -> torch.Tensor:
        return right(*arguments).roll(1, 0)

    cls.target = wrong


if __name__ == "__main__":
    main()
