"""`tune` searches rate, rank and length; each trial is a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from short_run import noise

from lorakit import config
from lorakit.cli import main as cli, tune_commands
from lorakit.cli.tune_commands import Search
from lorakit.core.errors import LorakitError

HAS_OPTUNA = importlib.util.find_spec("optuna") is not None


def command(base: Path, folder: Path, count: int) -> list[str]:
    """Return the arguments of `tune` on `count` photos."""
    (folder / "photos").mkdir()
    noise(folder / "photos", count)
    settings = {"train.steps": 8, "data.resolution": 64, "memory.device": "cpu", "train.validate_at_end": True}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    start = ["tune", str(folder / "photos"), "--subject", "sks toy", "--base", str(base)]
    return [*start, *words, "--output", str(folder / "tune")]


@pytest.mark.skipif(HAS_OPTUNA, reason="optuna is installed")
def test_without_optuna_the_extra_is_named(tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tiny_sd1, tmp_path, 1)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "tune needs optuna; install it with: " in line and "optuna>=" in line


def test_only_drift_above_the_limit_worsens_the_score(tmp_path: Path) -> None:
    search = Search(config.load("subject-pocket"), 100, tmp_path, 0.1, str, lambda: False)
    assert search.score(0.5, 0.1) == 0.5 and search.score(0.5, 0.3) == pytest.approx(0.6)


@pytest.mark.parametrize("words", [["--trials", "0"], ["--drift", "-0.1"], ["--drift", "nan"], ["--drift", "inf"]])
def test_trials_and_drift_have_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main([*command(tmp_path, tmp_path, 0), *words]) == 2
    assert capsys.readouterr().err == "lorakit: --trials must be 1 or more, and --drift 0 or more\n"


@pytest.mark.skipif(not HAS_OPTUNA, reason="optuna is not installed (the extra `tune`)")
def test_a_search_without_a_folder_or_a_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LorakitError, match=r"cannot write to .*; give another --output"):
        tune_commands._study(tmp_path / "file" / "tune", 0)
    search = Search(config.load("subject-pocket"), 100, tmp_path, 0.1, str, lambda: False)
    with pytest.raises(LorakitError, match="no trial is complete: run the same command again to continue the search"):
        tune_commands._tell(tune_commands._study(tmp_path, 0), search, False)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_OPTUNA, reason="optuna is not installed (the extra `tune`)")
def test_the_trial_of_the_lowest_score_is_named_and_the_search_goes_on(tiny_sd1, tmp_path, capsys) -> None:
    words = command(tiny_sd1, tmp_path, 10)
    assert cli.main([*words, "--trials", "1"]) == 0
    output = capsys.readouterr().out
    assert "lowest score: " in output and "The score does not measure likeness: " in output
    assert cli.main([*words, "--trials", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["runs"]) == 3 and all(each["source"] == "held-out photos" for each in result["runs"])
    ended = {each["name"]: each for each in result["runs"] if each["state"] == "done"}
    assert result["lowest"] in ended
    lowest = config.load(tmp_path / "tune" / "lowest-score.toml")
    assert lowest.optimizer.learning_rate == result["options"]["optimizer.learning_rate"]
    assert (lowest.adapter.rank, lowest.output.folder) == (result["options"]["adapter.rank"], "")
    (tmp_path / "small").mkdir()
    assert cli.main(command(tiny_sd1, tmp_path / "small", 3)) == 2
    assert "tune judges runs by held-out photos: give 10 photos or more" in capsys.readouterr().err
