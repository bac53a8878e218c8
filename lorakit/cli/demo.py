"""`lorakit demo`: train on bundled photos with the bundled base, sample, and print measurements of the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit import config as configuration
from lorakit.cli.imports import model_imports
from lorakit.cli.terminal import Terminal
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.units import duration

PHOTOS = 16
TRIGGER = "sks"
# Scenes of the before/after grid. They are in no training photo.
UNSEEN = ("snow", "night", "city", "underwater", "floor")
# Number of pictures of each unseen scene that the classifier scores. Each has its own seed.
PICTURES_PER_SCENE = 8


@dataclass(frozen=True)
class Outcome:
    """The files and measurements of the demo.

    Attributes:
        before, after: share (0 to 1) of the pictures of unseen scenes in which the classifier finds the subject, drawn
            without and with the adapter.
        seconds: total duration, from the first photo to the grid.
    """

    subject: str
    folder: Path
    photos: Path
    run: Path
    adapter: Path
    grid: Path
    before: float
    after: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON values. Paths are strings."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def demo(
    subject: str,
    terminal: Terminal,
    folder: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Write photos of a bundled subject, train the bundled base on them, and compare base and adapter on unseen scenes.

    Args:
        folder: output folder; by default runs/<time>-demo.
        overrides: options that override the preset subject-pocket, by dotted key.
        stop: see `training.run.train`.

    Raises:
        LorakitError: there is no such subject, the folder is not empty, or training failed.
        Stopped: a stop was requested.
    """
    from lorakit.families.pocket import scene_captions, subjects

    if subject not in subjects.SUBJECTS:
        raise LorakitError(
            "unknown subject {subject!r}; bundled subjects: {names}", subject, ", ".join(subjects.SUBJECTS)
        )
    folder = folder or Path("runs") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-demo"
    start = time.monotonic()
    noun = subjects.SUBJECTS[subject].kind
    settings = {
        "data.folder": str(folder / "photos"),
        "data.name": f"{TRIGGER} {noun}",
        "sample.prompts": tuple(
            f"a photo of a {TRIGGER} {noun} {scene_captions.SCENE_WORDS[scene][0]}" for scene in UNSEEN
        ),
        "output.folder": str(folder / "run"),
        "train.min_steps": 0,  # the base was trained on this style, so fewer steps are enough
    }
    config = configuration.load("subject-pocket", settings | dict(overrides or {}))
    photos = write_photos(subject, folder / "photos")
    begin = "demo: {count} photos of {subject}, a {noun} the base has never seen, in {folder}"
    terminal.say(Message(begin, PHOTOS, subject, noun, photos))
    with model_imports():
        from lorakit.training import run

    result = run.train(config, listeners=[terminal], stop=stop)
    terminal.say("comparing base and adapter on scenes that are in no photo")
    grid, before, after = compare(config, result.adapter, subject, folder, terminal)
    outcome = Outcome(
        subject, folder, photos, result.folder, result.adapter, grid, before, after, time.monotonic() - start
    )
    verdict = (
        "the bundled picture classifier finds {subject} in {before:.0%} of {count} pictures by the base, and in "
        "{after:.0%} of as many with the adapter"
    )
    terminal.say(Message(verdict, subject, before, len(UNSEEN) * PICTURES_PER_SCENE, after))
    terminal.say(Message("before and after: {file}", grid))
    terminal.say(f"adapter: {result.adapter}")
    terminal.say(f"report: {result.folder / 'report.html'}")
    terminal.say(Message("done in {time}", duration(outcome.seconds)))
    return outcome


def write_photos(subject: str, folder: Path) -> Path:
    """Write PNG files of the subject on all scenes except those of the comparison, each with a caption file.

    Raises:
        LorakitError: the folder is not empty.
    """
    from lorakit.families.pocket import scene_captions, spec, subjects

    if folder.exists() and any(folder.iterdir()):
        raise LorakitError("{folder} is not empty; give another folder with --output", folder)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [scene for scene in spec.SCENES if scene not in UNSEEN]
    noun = subjects.SUBJECTS[subject].kind
    for number, (image, scene) in enumerate(subjects.photos(subject, PHOTOS, seed=0, scenes=scenes), start=1):
        image.save(folder / f"{number:02}.png")
        text = f"a photo of a {TRIGGER} {noun} {scene_captions.SCENE_WORDS[scene][0]}"
        (folder / f"{number:02}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def compare(
    config: configuration.Config, adapter: Path, subject: str, folder: Path, terminal: Terminal
) -> tuple[Path, float, float]:
    """Draw the prompts without and with the adapter from the same seeds, and write the grid.

    Returns:
        The grid's file, and the shares `before` and `after` of `Outcome`.
    """
    import dataclasses

    from PIL import Image

    from lorakit import adapters, families, formats
    from lorakit.core import image_grid
    from lorakit.families.pocket.classifier import Classifier
    from lorakit.inference import sampling

    family, _ = families.load_as_configured(families.describe(config.model), config)

    columns = len(config.sample.prompts)
    total = columns * PICTURES_PER_SCENE

    def draw(position: int) -> list[Any]:
        images: list[Any] = []
        for seed in range(PICTURES_PER_SCENE):
            settings = dataclasses.replace(config.sample, seed=config.sample.seed + seed)
            images += sampling.draw(family, list(config.sample.prompts), settings, config.data.resolution)
            bar.advance(position + len(images))
        return images

    with terminal.progress(2 * total, what="comparing") as bar:
        base = draw(0)
        adapters.apply(family, formats.read(adapter))
        adapted = draw(total)
    file = folder / "before-after.png"
    photos = [Image.open(path).convert("RGB") for path in sorted(Path(config.data.folder).glob("*.png"))[:columns]]
    pictures = photos + base[:columns] + adapted[:columns]
    image_grid.save(image_grid.grid(pictures, ["photos", "base", "adapter"], config.sample.prompts), file)
    classifier = Classifier.load()
    return file, classifier.subject_score(base, subject), classifier.subject_score(adapted, subject)
