"""The scripts that measure run from end to end, on the smallest of models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def rows_of(file: Path) -> dict[str, dict]:
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert all(set(row) == {"name", "value", "unit", "ratio"} for row in rows)
    return {row["name"]: row for row in rows}


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_gpus_script_runs_on_a_cpu_at_reduced_size_and_its_rows_are_drawn(tmp_path: Path) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    printed = run("gpu.py", "--device", "cpu", "--quick", "--only", "sd15", "--json", str(file))
    rows = rows_of(file)
    for loop in ("script", "peft", "lorakit"):
        assert rows[f"sd15 narrow batch 1 {loop} step"]["value"] > 0 and f"{loop} rate" in printed
    run("plot.py", str(file), "--output", str(picture), "--unit", "ms")
    with Image.open(picture) as drawn:
        assert drawn.width > 400 and len(drawn.getcolors(2**24) or []) > 2


@pytest.mark.slow
def test_a_step_has_at_most_three_fifths_of_the_plain_loops_operations(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    run("host.py", "--only", "sd15", "--quick", "--rounds", "3", "--width", "16", "--json", str(file))
    rows = rows_of(file)
    plain, ours = (rows[f"sd15 {name} operations"]["value"] for name in ("peft, autocast", "lorakit"))
    assert ours <= 0.6 * plain and rows["sd15 lorakit operations"]["ratio"] == pytest.approx(plain / ours)
    whole = rows["sd15 bf16 peft, autocast step"]["value"]
    assert rows["sd15 bf16 lorakit, outside the graph step"]["value"] <= 0.5 * whole
