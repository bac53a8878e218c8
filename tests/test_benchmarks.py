"""The benchmarks run to their end on small models."""

import json
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> Any:
    """Import a script with this command line in `sys.argv`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return import_module(name)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the models of the GPU benchmarks one layer per block."""
    parts = script(monkeypatch, "gpu_parts")
    monkeypatch.setattr(parts.common, "unet_config", parts.shallow)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_gpu_loops_run_on_a_cpu_and_plot_draws_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    script(monkeypatch, "gpu_loops", "--device", "cpu", "--quick", "--only", "sd15", "--json", str(file)).main()
    printed, rows = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    assert all(set(row) == {"name", "value", "unit", "ratio"} for row in rows)
    named = {row["name"]: row for row in rows}
    for loop in ("script", "peft", "lorakit"):
        assert named[f"sd15 narrow batch 1 {loop} step"]["value"] > 0 and f"{loop} rate" in printed
    script(monkeypatch, "plot", str(file), "--output", str(picture), "--unit", "ms").main()
    with Image.open(picture) as images:
        assert images.width > 400 and len(images.getcolors(2**24) or []) > 2


@pytest.mark.slow
def test_figures_of_a_stopped_and_of_a_failed_part_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = script(monkeypatch, "gpu")
    results = gpu.Results(tmp_path)
    line = (
        """print('ROW {"name": "sd15 b1 lorakit", "value": 9.5, "unit": "ms a step", "first_step_s": 3}', flush=True)"""
    )
    gpu.run_part("slow", 2, [sys.executable, "-c", f"import time; {line}; print('more'); time.sleep(60)"], results)
    gpu.run_part("wrong", 60, [sys.executable, "-c", "1 / 0"], results)
    named = {(row["part"], row["name"]): row["value"] for row in results.rows()}
    assert named == {
        ("slow", "sd15 b1 lorakit"): 9.5,
        ("slow", "part"): "stopped at its limit of 2 s",
        ("wrong", "part"): "failed with 1",
    }
    assert "ZeroDivisionError" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "9.5 ms a step  first_step_s 3" in gpu.table(results.rows())
    gpu.draw(results.rows(), tmp_path / "steps.png")
    with Image.open(tmp_path / "steps.png") as picture:
        assert picture.width > 400
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "card,moon", "--output", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="no part is called 'moon'; parts: card, tests, bits, sd15"):
        gpu.main()


@pytest.mark.slow
def test_parts_of_the_gpu_benchmark_run_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This test runs the two fastest parts; `gpu.py --rehearse` runs all."""
    gpu, parts = script(monkeypatch, "gpu"), script(monkeypatch, "gpu_parts")
    assert parts.PARTS.keys() == (gpu.FIRST | gpu.SECOND).keys()
    machine = parts.Machine(True)
    monkeypatch.setattr(parts.common, "unet_config", parts.common.unet_config)  # a rehearsal replaces it
    for part in ("card", "profile"):
        parts.run(part, rehearse=machine.rehearse)
    printed = capsys.readouterr().out
    rows = [json.loads(line[4:]) for line in printed.splitlines() if line.startswith("ROW ")]
    assert not [row for row in rows if "FAILED" in row["name"]]
    named = {row["name"]: row for row in rows}
    assert named["attention is right, forward and backward"]["value"] is True
    assert named["sd15 b1 busy"]["kernels"] > 500


@pytest.mark.slow
def test_the_table_of_scale_has_the_bytes_of_an_adapters_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = script(monkeypatch, "scale")
    monkeypatch.setattr(scale, "SIDES", {"sd15": ("sd1", 64)})
    # At rank 4, diffusers' script for SD1.5 trains 797,184 weights.
    assert f"{797_184 * 4 * 4 / 1e6:.1f} MB" in scale.table()[2]


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("option", "loops"),
    [
        ("--stream", ["resident", "streamed"]),
        ("--convolutions", ["lorakit", "cudnn.benchmark", "channels first"]),
    ],
)
def test_gpu_loops_compare_streaming_and_convolutions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, loops: list[str]
) -> None:
    script(monkeypatch, "gpu_loops", "--device", "cpu", "--quick", "--only", "sd15", option).main()
    printed = capsys.readouterr().out
    assert [loop for loop in loops if f"sd15 narrow batch 1 {loop} step" not in printed] == []


@pytest.mark.slow
def test_a_step_has_at_most_three_fifths_of_the_plain_loops_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    host = script(monkeypatch, "host")
    plain, ours = host.counted("sd15", Namespace(width=16, side=8, rank=4))
    assert plain["name"] == "sd15 peft, autocast operations" and ours["name"] == "sd15 lorakit operations"
    assert ours["value"] <= 0.6 * plain["value"] and ours["ratio"] == pytest.approx(plain["value"] / ours["value"])


def test_plot_names_the_units_if_no_row_has_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"name": "a", "value": 1.0, "unit": "ms", "ratio": null}]', encoding="utf-8")
    plot = script(monkeypatch, "plot", str(file), "--output", str(tmp_path / "x.png"), "--unit", "GiB")
    with pytest.raises(SystemExit, match="no row is in 'GiB'; units: ms"):
        plot.main()


def test_recipes_shows_means_over_runs_and_repeats_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    row = {"taken": 1.0, "near": 0.8, "leak": 0.1, "scene": 1.0, "kind": 1.0, "colour": 0.5, "pattern": 1.0}
    row |= {"drift": 0.02, "cpu": 90.0, "recipe": "preset", "name": "zib", "captions": "scene"}
    rows = [row | {"seed": seed, "near": near} for seed, near in ((0, 0.8), (1, 0.9))]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    recipes = script(monkeypatch, "recipes", str(file), "--recipes", "preset", "--names", "zib", "--seeds", "0", "1")
    monkeypatch.setattr(recipes.teach, "teach", None)  # a training would fail; the results contain both runs
    recipes.main()
    # Half of the interval of two runs is 12.71 standard errors: 12.71 x 0.0707 / sqrt(2).
    assert "| preset | scene | 2 | 100.0% ± 0.0% | 85.0% ± 63.5% | 0.10 ± 0.00 |" in capsys.readouterr().out
