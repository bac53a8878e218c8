"""Check lorakit on a GPU: correctness, speed, and measured memory against the prediction.

    python benchmarks/gpu.py                 # correctness, then times; at most 8 minutes
    python benchmarks/gpu.py --second        # complete runs, memory, variants and compiled blocks; at most 10 minutes
    python benchmarks/gpu.py --rehearse      # all parts on a CPU with narrow models; shows only that they run

Each part runs in its own process with a time limit, so a part that fails or hangs does not affect the others. Each
figure is written at once, as a line of JSON in `results.jsonl`. The output folder also contains `log.txt` (the output
of the parts), `table.txt` (the figures as a table) and `step-times.png`. It is small enough to attach to an issue.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

# Part -> time limit in seconds. The most important parts are first.
FIRST = {"card": 60, "tests": 150, "bits": 100, "sd15": 80, "sdxl": 120, "profile": 60}
SECOND = {"runs-sd15": 100, "runs-sdxl": 240, "memory": 120, "variants": 90, "compile": 150}
MARK = "ROW "


class Results:
    """The files `results.jsonl` and `log.txt` of a folder. Each line is written at once."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.start = folder, time.monotonic()

    def row(self, part: str, name: str, value: Any, **more: Any) -> None:
        """Write a figure to `results.jsonl` and print it."""
        line = {"part": part, "name": name, "value": value, **more, "at_s": round(time.monotonic() - self.start, 1)}
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"[{part}] {name}: {value} {more.get('unit', '')}", flush=True)

    def log(self, part: str, line: str) -> None:
        """Write a line of a part's output to `log.txt`."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"[{part}] {line.rstrip()[:2000]}\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all figures so far."""
        file = self.folder / "results.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def run_part(part: str, limit: float, command: list[str], results: Results) -> None:
    """Run a part until it ends or reaches its time limit. Figures that it printed before are never lost."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )

    def read() -> None:
        for line in process.stdout or ():
            if line.startswith(MARK):
                figure = json.loads(line[len(MARK) :])
                results.row(part, figure.pop("name"), figure.pop("value"), **figure)
            else:
                results.log(part, line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        state = "ended" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        state = f"stopped at its limit of {limit:.0f} s"
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(10)
    if process.stdout is not None and not reader.is_alive():
        process.stdout.close()
    results.row(part, "part", state, seconds=round(time.monotonic() - began, 1))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as text, one per line."""
    lines = []
    for row in rows:
        more = {key: value for key, value in row.items() if key not in ("part", "name", "value", "unit", "at_s")}
        text = ", ".join(f"{key} {value}" for key, value in more.items() if not isinstance(value, (list, dict)))
        lines.append(
            f"{row['part']:<9} {row['name']:<48} {row['value']!s:>14} {row.get('unit', ''):<10} {text}".rstrip()
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the step times as bars, if there are any."""
    import plot

    steps = [row for row in rows if row.get("unit") == "ms a step" and row["value"] > 0]
    if steps:
        plot.draw_bars({"card": steps}, "ms a step").save(file)


def main() -> None:
    """Run the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--second", action="store_true", help="run the second half of the parts")
    parser.add_argument("--parts", default="", help=f"parts to run, separated by commas: {', '.join(FIRST | SECOND)}")
    parser.add_argument("--budget", type=float, help="time limit in seconds (default: 470; with --second 600)")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU with narrow models")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-results"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        import gpu_parts

        gpu_parts.run(args.part, rehearse=args.rehearse)
        return
    limits = FIRST | SECOND
    default = [*limits] if args.rehearse else [*(SECOND if args.second else FIRST)]
    parts = args.parts.split(",") if args.parts else default
    if unknown := [part for part in parts if part not in limits]:
        raise SystemExit(f"no part is called {unknown[0]!r}; parts: {', '.join(limits)}")
    budget = args.budget or (7200 if args.rehearse else 600 if args.second else 470)
    results = Results(args.output)
    for part in parts:
        left = budget - (time.monotonic() - results.start) - 5
        if left < 15:
            results.row(part, "part", "skipped: no time left")
            continue
        limit = min(left, limits[part] * (8 if args.rehearse else 1))
        command = [sys.executable, __file__, "--part", part, *(["--rehearse"] if args.rehearse else [])]
        run_part(part, limit, command, results)
    text = table(results.rows())
    (args.output / "table.txt").write_text(text, encoding="utf-8")
    draw(results.rows(), args.output / "step-times.png")
    print(f"\n{text}\n{args.output}: results.jsonl, table.txt, log.txt, step-times.png")


if __name__ == "__main__":
    main()
