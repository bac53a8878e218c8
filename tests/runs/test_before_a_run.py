"""Tests of what a user reads before a run: its length, time and prior, and reasons that would stop it later."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lorakit import config, families
from lorakit.config import ConfigError
from lorakit.core import install, registry
from lorakit.data.photo_folder import Photo
from lorakit.runs import nvidia, plan
from lorakit.runs.preflight import preflight
from lorakit.runs.quickstart import config_for_answers


def plan_of(count: int, settings: config.Config, class_photos: int = 0) -> plan.Plan:
    """Return the plan for `count` photos on the bundled base."""
    items = [
        SimpleNamespace(photo=SimpleNamespace(relative=f"{n}.png", repeats=1), buckets=((64, 64),))
        for n in range(count)
    ]
    report: Any = SimpleNamespace(items=items, photos=[item.photo for item in items], chunks=1)
    report.class_photos = [Photo(Path(str(n)), str(n)) for n in range(class_photos)]
    return plan.make(settings, families.describe(settings.model), report)


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_matmul_speed", lambda: 1e10)


@pytest.mark.parametrize("preset", [name for name in config.preset_names() if "lowmem" not in name])
@pytest.mark.parametrize("count", [1, 3, 5, 30])
def test_no_preset_is_too_short_for_a_few_photos(preset: str, count: int) -> None:
    train = config.load(preset).train
    steps, words = plan.run_length(config.load(preset), [1] * count, count)
    assert steps == max(train.steps_per_image * count, train.min_steps) >= plan.MIN_STEPS
    assert ("raised to train.min_steps" in words) == (train.steps_per_image * count < train.min_steps)
    answered = config_for_answers({"data.kind": "subject", "model.base": "pocket"}, "balanced")
    assert answered.train.min_steps == 400 and plan.run_length(answered, [1] * count, count)[0] >= 400


def test_a_configured_length_is_not_raised() -> None:
    for own in ({"train.steps": 5}, {"train.epochs": 1}, {"train.steps_per_image": 1}):
        assert plan.run_length(config.load("subject-pocket", own), [1] * 5, 5)[0] == 5
    with pytest.raises(ConfigError, match=r"train.min_steps has no effect without train.steps_per_image: leave it out"):
        config.load(None, {"train.steps": 5, "train.min_steps": 9})


@pytest.mark.parametrize(
    ("changes", "own", "line"),
    [
        (
            {"train.prior_prompts": ()},
            0,
            'prior: class images (96), which the base draws of "a photo of a dog"; later runs use them again',
        ),
        (
            {"data.class_prompt": "a corgi"},
            0,
            'prior: class images (96), which the base draws of "a corgi" and of other prompts (11); '
            "later runs use them again",
        ),
        ({"train.prior": "teacher"}, 0, "prior: the base as teacher, which makes a step about twice as long"),
        ({}, 3, "prior: your own class images (3), none is drawn"),
        ({"train.prior": "none"}, 0, ""),
    ],
)
def test_the_prior_is_in_the_plan(changes: dict[str, object], own: int, line: str) -> None:
    settings = config.load("subject-pocket", {"data.name": "sks dog", "memory.device": "cpu"} | changes)
    lines = [text for text in plan_of(5, settings, own).lines() if text.startswith("prior")]
    assert len(lines) == bool(line) and all(text.startswith(line) for text in lines)


def test_a_resumed_runs_time_covers_the_remaining_steps() -> None:
    settings = config.load("subject-pocket", {"data.name": "sks dog", "memory.device": "cpu", "train.steps": 400})
    before = replace(plan_of(5, settings), seconds=4000.0)
    assert before.lines()[-1] == "time: about 67 min (estimate)"
    after = replace(before, first_step=360)
    assert after.lines()[-1] == "time: about 7 min (estimate), for the 40 steps left of 400"
    assert replace(after, seconds=None).lines()[-1] == "time: measured in the first steps"
    assert after.to_json()["seconds"] == 4000.0 and after.to_json()["first_step"] == 360


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        Image.effect_noise((96, 96), 60 + number).convert("RGB").save(folder / f"{number}.png")
    return folder


def problems(photos: Path, **changes: Any) -> tuple[list[str], list[str]]:
    settings = {"data.folder": str(photos), "data.name": "sks dog", "train.steps": 2, "data.resolution": 64}
    more = {key.replace("__", "."): value for key, value in changes.items()}
    result = preflight(config.load(None, settings | more))
    return list(result.problems), list(result.warnings)


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        (
            {"data__cache": "disk"},
            "latents: latents cannot be kept there (Not a directory); set data.cache = 'memory' or",
        ),
        ({"train__prior": "images"}, "class-images: Not a directory; set LORAKIT_CACHE"),
    ],
)
def test_an_unwritable_cache_is_a_problem(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], start: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    assert problems(photos)[0] == []
    lines, _ = problems(photos, **changes)
    assert len(lines) == 1 and f"{tmp_path / 'file'}/{start}" in lines[0]
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "other" / "deep"))
    assert problems(photos, **changes)[0] == [] and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("capabilities", "lacks"),
    [([(7, 5)], True), ([(6, 1), (7, 0)], True), ([(7, 5), (8, 6)], False), ([None], False), ([], False)],
)
def test_bf16_on_a_gpu_without_it_is_a_problem(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int] | None], lacks: bool
) -> None:
    monkeypatch.setattr(nvidia, "cards", lambda: [nvidia.Card("T4", "580", each) for each in capabilities])
    monkeypatch.setattr(plan, "guess_device", lambda option: "cpu" if option == "cpu" else "cuda")
    line = "memory.mixed_precision = 'bf16': this card does not compute in bf16; choose 'fp16' or 'fp32'"
    assert (line in problems(photos, memory__mixed_precision="bf16")[0]) == lacks
    assert line not in problems(photos, memory__mixed_precision="bf16", memory__device="cpu")[0]
    assert line not in problems(photos, memory__mixed_precision="fp16")[0]


@pytest.mark.parametrize(("side", "is_far"), [(64, False), (96, False), (128, True), (512, True)])
def test_a_size_far_from_the_bases_own_is_a_warning(photos: Path, side: int, is_far: bool) -> None:
    _, warnings = problems(photos, data__resolution=side)
    line = f"data.resolution = {side}: base pocket draws pictures of 64 pixels a side, and at a "
    assert any(warning.startswith(line) for warning in warnings) == is_far


@pytest.mark.parametrize(
    ("name", "kind", "is_new"),
    [
        ("sks dog", "subject", True),
        ("sks Mug", "subject", False),
        ("sks blue toy", "subject", False),
        ("sks", "style", False),
    ],
)
def test_a_class_that_the_bundled_base_does_not_know_is_a_warning(
    photos: Path, name: str, kind: str, is_new: bool
) -> None:
    _, warnings = problems(photos, data__name=name, data__kind=kind)
    line = "the bundled base is for trying things and knows no dog, only ball, star, heart, mug and the like; "
    assert any(warning.startswith(line) for warning in warnings) == is_new


def test_two_resolutions_in_one_text_are_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"'64,128': must be a whole number, or several as a list, \[768, 512\]"):
        config.load(None, dict([config.parse_override("data.resolution=64,128"), ("train.steps", 1)]))


def test_a_missing_tracker_is_named_with_the_tested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_metadata", lambda: ["tensorboard>=2.20; extra == 'tensorboard'", "numpy"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines = registry.missing_trackers(["tensorboard", "wandb"])
    assert "tensorboard>=2.20" in lines[0] and lines[1].endswith("wandb")


def test_a_report_explains_its_curves() -> None:
    text = (Path(plan.__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    assert "Prior drift: how far the adapter changes what the base" in text
