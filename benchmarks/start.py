"""Time a run from the command to its first step, with an empty cache and with a full one.

    python benchmarks/start.py [--quick] [--json FILE]

Each run is a process that trains the bundled model on 16 random pictures for one step. Seconds are counted from the
start of the process to its first line about the base, and to the events of its log. `--quick` skips the second run,
which uses the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import step as step_benchmark

# Event of the log -> name of the row for the first such event.
MOMENTS = {"sample": "until the first pictures", "step": "first step"}


def main() -> None:
    """Measure, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="skip the run with a full cache")
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    args = parser.parse_args()
    rows = [common.row("lorakit --help", seconds(["--help"], {}), "s")]
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch)
        (room / "photos").mkdir()
        photos = step_benchmark.random_photos(room / "photos", 64)
        rows.append(common.row("lorakit check", seconds(["check", str(photos), "--subject", "sks toy"], {}), "s"))
        for cached in (False,) if args.quick else (False, True):
            title = "everything cached" if cached else "nothing cached"
            result = one_run(photos, room / f"run-{cached}", room / "cache")
            rows += [common.row(f"{title}: {moment}", value, "s") for moment, value in result.items()]
    common.finish(rows, args.json)


def seconds(arguments: list[str], environment: dict[str, str]) -> float:
    """Return the seconds of a lorakit command."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "lorakit", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | environment)
    return time.perf_counter() - start


def one_run(photos: Path, folder: Path, cache: Path) -> dict[str, float]:
    """Train one run and return event -> seconds since the start of the process."""
    sets = {"train.steps": 1, "data.cache": "disk", "train.class_images": 16, "sample.steps": 4}
    changes = [f"--set={key}={value}" for key, value in sets.items()]
    command = [sys.executable, "-m", "lorakit", "train", str(photos), "--subject", "sks toy", "--output", str(folder)]
    times: dict[str, float] = {}
    start = time.time()
    with subprocess.Popen(
        [*command, *changes], stdout=subprocess.PIPE, text=True, env=os.environ | {"LORAKIT_CACHE": str(cache)}
    ) as run:
        for line in run.stdout or ():
            if line.startswith("base: "):
                times.setdefault("until the line about the base", time.time() - start)
    if run.returncode:
        raise SystemExit(run.returncode)
    run_seconds = time.time() - start
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] in MOMENTS:
            times.setdefault(MOMENTS[event["event"]], event["time"] - start)
    return times | {"whole run, checked": run_seconds}


if __name__ == "__main__":
    main()
