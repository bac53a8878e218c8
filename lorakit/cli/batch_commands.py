"""Commands of many runs: batch."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lorakit.cli.terminal import complain, print_json, print_lines, remark
from lorakit.cli.train_commands import Command, add_set, read_overrides
from lorakit.core.errors import ConfigError
from lorakit.core.names import quote

STATUS = "status"
# Seconds between two looks at a queue that is waited for.
LOOK_EVERY = 1.0


def add(command: Command) -> None:
    """Add the commands of this page by `command(name, run, help)`."""
    batch = command("batch", run_batch, "train many adapters: a run for each row of a file, or folder of photos")
    batch.add_argument("jobs", metavar="JOBS", help="TOML file, or a folder of photo folders; `status` shows a batch")
    batch.add_argument("folder", nargs="?", metavar="RUNS", help="of `batch status`: the folder of the batch")
    batch.add_argument("--output", metavar="DIR", help="where the run folders go (default: runs/<name of JOBS>)")
    batch.add_argument("--preset", metavar="NAME", help="for all runs: a preset or a TOML file")
    batch.add_argument("--subject", metavar="'sks {folder}'", help="for all runs; {folder} is the name of each folder")
    batch.add_argument("--style", metavar="'sks style'", help="for all runs, likewise")
    batch.add_argument("--base", metavar="BASE", help="base model of all runs")
    batch.add_argument("--wait", action="store_true", help="return when all runs have ended")
    batch.add_argument("--ray", metavar="ADDRESS", help="on this Ray cluster; DIR is on a disk that all machines share")
    add_set(batch)


def run_batch(args: argparse.Namespace) -> int:
    """`lorakit batch`: 1 where a run has failed."""
    from lorakit.runs import batch

    source = Path(args.jobs)
    if args.jobs == STATUS and args.folder:
        return _show(Path(args.folder).resolve(), args.json)
    if args.folder or args.jobs == STATUS:
        raise ConfigError(["name the folder of the batch: lorakit batch status RUNS"])
    runs = (Path(args.output) if args.output else Path("runs") / source.stem).resolve()
    flags = {
        "data.name": args.subject or args.style,
        "data.kind": "style" if args.style else None,
        "model.base": args.base,
    }
    overrides = {key: value for key, value in flags.items() if value is not None} | read_overrides(args.set)
    rows = batch.read(source, args.preset, overrides, runs)
    batch.write_manifest(runs, rows)
    if args.ray:
        from lorakit.cli import ray_tasks

        ray_tasks.run(runs, rows, args.ray, remark if args.json else print_lines)
        return _show(runs, args.json)
    count = batch.enqueue(runs, rows)
    if not args.wait:
        rest = f", {len(rows) - count} are done or under way" if count < len(rows) else ""
        if not args.json:
            print_lines(f"{count} runs are queued{rest}; see: lorakit batch status {quote(runs)}")
            return 0
    else:
        _wait(runs)
    return _show(runs, args.json)


def _wait(runs: Path) -> None:
    from lorakit.runs.queue import Queue

    queue = Queue(runs)
    while any(job.state in ("waiting", "running") for job in queue.jobs()):
        time.sleep(LOOK_EVERY)


def _show(runs: Path, as_json: bool) -> int:
    """Print how the runs stand, and write the report over all."""
    from lorakit.runs import batch

    outcomes = batch.status(runs)
    report = batch.write_report(runs, outcomes)
    if as_json:
        print_json({"runs": batch.to_json(outcomes), "report": str(report)})
    else:
        print_lines(*batch.table(outcomes), f"report: {report}")
    for each in outcomes:
        if each.state == "failed":
            complain(f"{each.name}: {each.message}")
    return 1 if any(each.state == "failed" for each in outcomes) else 0
