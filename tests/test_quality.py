"""Training teaches the bundled model a subject that it never saw, and a broken trainer fails this test."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from lorakit import adapters, config, families, formats
from lorakit.families.pocket import scene_captions, subjects
from lorakit.families.pocket.classifier import Classifier
from lorakit.families.prediction import VPrediction
from lorakit.inference import sampling
from lorakit.runs.run_folder import RunFolder
from lorakit.training import run as train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("copied_modules", "unchecked")]
SUBJECT = "zib"
TRAINED_SCENES = ("beach", "meadow", "table", "brick")
NEW_SCENES = ("snow", "city", "underwater")
# After correct training nearly all six pictures show the subject; after training with shuffled targets only a few do.
LEARNED, LUCK = 0.6, 0.4


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, (image, scene) in enumerate(subjects.photos(SUBJECT, 16, scenes=TRAINED_SCENES)):
        image.save(folder / f"{number:02}.png")
        text = f"a photo of a sks toy {scene_captions.SCENE_WORDS[scene][0]}"
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


def prompts(words: str) -> list[str]:
    return [f"a photo of a {words} {scene_captions.SCENE_WORDS[scene][0]}" for scene in NEW_SCENES] * 2


@functools.cache
def judge() -> Classifier:
    """Return the classifier, loaded once."""
    return Classifier.load()


def share_of_the_subject(adapter: Path | None, words: str = "sks toy") -> float:
    """Return the share of six pictures on new scenes that the classifier takes for the subject."""
    family = families.load(families.describe("pocket"), "cpu", torch.float32)
    if adapter:
        adapters.apply(family, formats.read(adapter))
    images = sampling.draw(family, prompts(words), config.SampleConfig(steps=8, guidance=4.0), 64)
    return judge().subject_score(images, SUBJECT)


@pytest.fixture(scope="module")
def base_share() -> float:
    """Share of the subject before training."""
    return share_of_the_subject(None)


def trained(photos: Path, folder: Path, **changes: object) -> train.Result:
    """Train a run that is shorter than the preset's and has a higher learning rate."""
    settings = {
        "data.folder": str(photos),
        "data.name": "sks toy",
        "optimizer.learning_rate": 3e-3,
        "train.steps": 40,
        "train.holdout": 0.0,
        "train.validate_every": 100,
        "train.validate_at_end": False,
        "train.save_every": 40,
        "sample.every": 100,
        "sample.at_start": False,
        "sample.at_end": False,
        "output.folder": str(folder),
    }
    settings |= {f"train.{name}": value for name, value in changes.items()}
    return train.train(config.load("subject-pocket", settings))


def test_the_subject_is_learned_with_its_trigger_and_the_loss_goes_down(photos, base_share, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    result = trained(photos, tmp_path / "run", class_images=16)
    losses = [event["loss"] for event in RunFolder(result.folder).events("step")]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
    after = share_of_the_subject(result.adapter)
    assert after >= base_share + LEARNED, (base_share, after)
    assert share_of_the_subject(result.adapter, "toy") < after - 0.2


def test_a_broken_trainer_teaches_nothing(photos, base_share, tmp_path, monkeypatch):
    """Each picture of a batch gets its neighbour's target. The run ends without an error and learns nothing.

    It has no prior, so that the prior cannot be the reason. With the right targets, this run's share is 1.
    """
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    right = VPrediction.target  # the bundled base has v-prediction
    monkeypatch.setattr(VPrediction, "target", lambda *arguments: right(*arguments).roll(1, 0))
    result = trained(photos, tmp_path / "run", prior="none", batch_size=4)
    assert share_of_the_subject(result.adapter) < base_share + LUCK
