"""The last line of `--json` on stdout when a run ends early."""

import json
from pathlib import Path

import pytest

from lorakit.cli import main as cli
from lorakit.core.errors import LorakitError
from lorakit.core.events import Event
from lorakit.runs.run_folder import RunFolder
from lorakit.training import run as training

STOP = training.Stopped(Path("runs/a"), 13)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (STOP, {"event": "stopped", "step": 13, "message": str(STOP), "folder": str(Path("runs/a").absolute())}),
        (LorakitError("no room for \u00fc"), {"event": "error", "message": "no room for \u00fc"}),
        (KeyboardInterrupt(), {"event": "error", "message": "interrupted"}),
    ],
)
def test_a_run_that_ends_early_says_so_in_its_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, line: dict[str, object]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(training, "resume", refuse)
    monkeypatch.setattr(RunFolder, "require", lambda _: None)  # the run need not exist
    assert cli.main(["resume", "runs/a", "--json"]) in (1, 130)
    out = capsys.readouterr().out
    event = json.loads(out)
    assert {name: event[name] for name in event if name not in ("key", "values")} == line
    assert ("key" in event) == (error is STOP)
    assert out.isascii() and out.count("\n") == 1
    cli.main(["resume", "runs/a"])
    assert capsys.readouterr().out == ""


def test_nan_and_inf_are_null_in_json_and_paths_are_names() -> None:
    event = Event("validation", 3, {"mse": float("nan"), "bands": [0.5, float("inf")], "source": Path("folder/a")})
    assert event.to_json() == {"event": "validation", "step": 3, "mse": None, "bands": [0.5, None], "source": "a"}
