"""What is due between steps, and what is left out where an option says so."""

from pathlib import Path

import pytest
import short_run

from lorakit.runs import plan, report
from lorakit.runs.folder import RunFolder
from lorakit.training import run as train


@pytest.mark.parametrize(
    ("changes", "grids", "validations"),
    [
        ({}, [], []),
        ({"sample__at_start": True, "train__validate_at_end": True}, [0], [3]),
        ({"sample__at_end": True, "sample__every": 2, "train__validate_every": 1}, [2, 3], [1, 2]),
    ],
)
def test_grids_and_validations_come_when_asked_for(
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    grids: list[int],
    validations: list[int],
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    photos = short_run.noise(tmp_path / "photos", 2)
    changes = {"sample__prompts": ("a toy",), **changes}
    result = train.train(short_run.chosen(tiny_sd1, photos, tmp_path / "run", 3, **changes))
    folder = RunFolder(result.folder)
    assert [event["step"] for event in folder.events("sample")] == grids
    assert {picture.name for picture in (result.folder / "samples").glob("*.png")} == {
        f"step-{step:06d}.png" for step in grids
    }
    assert [event["step"] for event in folder.events("validation")] == validations
    assert (result.best is None) == (not validations) == (report.best_step(folder) is None)
    assert "sks toy" in (result.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("every", "steps", "expected"), [(0, 100, 20), (0, 3, 1), (0, 101, 21), (7, 100, 7)])
def test_an_interval_of_zero_is_a_fifth_of_the_run(every: int, steps: int, expected: int) -> None:
    assert plan.interval(every, steps) == expected
