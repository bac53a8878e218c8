"""`probe-rate` finds a learning rate in one short run: the rates rise evenly, and other methods are refused."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from short_run import noise

from lorakit import config
from lorakit.cli import main as cli, rate_probe


def words(base: Path, folder: Path, *more: str) -> list[str]:
    """Return the arguments of `probe-rate` on three photos of noise."""
    (folder / "photos").mkdir(exist_ok=True)
    noise(folder / "photos", 3)
    start = ["probe-rate", str(folder / "photos"), "--subject", "sks toy", "--base", str(base)]
    settings = ["data.resolution=64", "memory.device=cpu", "optimizer.learning_rate=1e-2", *more]
    return [*start, *(word for setting in settings for word in ("--set", setting))]


@pytest.mark.slow
def test_the_rate_rises_evenly_and_the_proposal_follows(tiny_sd1, tmp_path, capsys) -> None:
    assert cli.main([*words(tiny_sd1, tmp_path), "--steps", "12", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rates, gains = ([row[name] for row in result["rates"]] for name in ("learning_rate", "gain"))
    assert len(rates) == rate_probe.LOOKS and rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(0.3)
    ratios = [second / first for first, second in itertools.pairwise(rates)]
    assert ratios == pytest.approx([3000 ** (1 / 11)] * 11)
    best = max(gains)
    assert best > 0 and result["proposal"] == pytest.approx(rates[gains.index(best)] / 3)
    # At the lowest rate, the adapter learns almost nothing in a step.
    assert abs(gains[0]) < best / 2
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["optimizer.name=prodigy"], "prodigy sets its learning rate itself: nothing to probe"),
        (["adapter.method=full"], "probe-rate is for adapters; adapter.method is full"),
    ],
)
def test_prodigy_and_full_training_cannot_be_probed(tmp_path, capsys, more, text) -> None:
    assert cli.main(words(Path("pocket"), tmp_path, *more)) == 2
    assert capsys.readouterr().err.endswith(f"lorakit: {text}\n")


def test_a_probe_needs_at_least_twelve_steps(tmp_path, capsys) -> None:
    assert cli.main([*words(Path("pocket"), tmp_path), "--steps", "11"]) == 2
    assert capsys.readouterr().err == "lorakit: --steps must be 12 or more\n"


def test_rates_of_text_encoders_rise_too_and_have_no_schedule() -> None:
    optimizer = config.load("subject-pocket", {"optimizer.unet_start": 0.4}).optimizer
    rates = rate_probe._rates(optimizer, 0.5)
    assert (rates.learning_rate, rates.text_encoder_learning_rate) == (5e-4, 1.5e-3)
    assert rates.unet_start == 0
    assert rates.text_encoder_2_learning_rate is None
    assert (rates.lr_scheduler, rates.warmup_ratio, rates.warmup_steps) == ("constant", 0.0, 0)


def test_each_rate_has_a_bar_and_no_gain_has_a_note() -> None:
    lines = list(rate_probe._lines([(1e-4, 0.05), (1e-3, 0.1), (1e-2, -2.0)], 1e-3 / 3))
    assert [line.count("#") for line in lines] == [0, 20, 40, 0, 0]
    assert lines[-1].startswith("proposal: optimizer.learning_rate = 0.00033, a third")
    assert "no rate reduced" in list(rate_probe._lines([(1e-4, -math.inf)], None))[-1]
