"""Tests of samples, validations and checkpoints between steps, and of the options that disable them."""

from pathlib import Path
from typing import Any

import pytest
import short_run
import torch

from lorakit.inference import sampling
from lorakit.runs import nvidia, plan
from lorakit.runs.run_folder import RunFolder
from lorakit.training import run as train


def run(base: Path, room: Path, **changes: object) -> train.Result:
    """Train three steps on two photos."""
    (room / "photos").mkdir()
    photos = short_run.noise(room / "photos", 2)
    return train.train(
        short_run.run_config(base, photos, room / "run", 3, **{"sample__prompts": ("a toy",), **changes})
    )


@pytest.mark.slow
@pytest.mark.usefixtures("short_validation")
@pytest.mark.parametrize(
    ("changes", "grids", "validations"),
    [
        ({}, [], []),
        ({"sample__at_start": True, "train__validate_at_end": True}, [0], [3]),
        ({"sample__at_end": True, "sample__every": 2, "train__validate_every": 1}, [2, 3], [1, 2]),
    ],
)
def test_samples_and_validations_follow_the_options(
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    grids: list[int],
    validations: list[int],
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvidia, "is_expected", lambda: not changes)
    result = run(tiny_sd1, tmp_path, memory__device="auto", **changes)
    folder = RunFolder(result.folder)
    lines = [event["message"] for event in folder.events("warning")]
    assert any("does not see the graphics card" in line for line in lines) == (not changes)
    assert [event["step"] for event in folder.events("sample")] == grids
    assert {picture.name for picture in (result.folder / "samples").glob("*.png")} == {
        f"step-{step:06d}.png" for step in grids
    }
    assert [event["step"] for event in folder.events("validation")] == validations
    assert [path.name for path in result.folder.glob("*.safetensors")] == [result.adapter.name]
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "sks toy" in page and ("Validation error (MSE)" in page) == bool(validations)


@pytest.mark.parametrize(("every", "steps", "expected"), [(0, 100, 20), (0, 3, 1), (0, 101, 21), (7, 100, 7)])
def test_an_interval_of_zero_is_a_fifth_of_the_run(every: int, steps: int, expected: int) -> None:
    assert plan.interval(every, steps) == expected


def test_too_little_memory_for_samples_does_not_end_the_run(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, left = sampling.draw_part, [1]

    def full_once(*args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError
        return draw(*args, **options)

    monkeypatch.setattr(sampling, "draw_part", full_once)
    result = run(tiny_sd1, tmp_path, sample__at_start=True, sample__at_end=True)
    assert [event["message"] for event in RunFolder(result.folder).events("warning")] == [
        "step 0: not enough memory to draw samples; training goes on without them"
    ]
