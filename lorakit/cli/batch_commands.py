"""Commands for several runs: batch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from lorakit.cli.terminal import complain, print_json, print_lines, remark
from lorakit.cli.train_commands import Command, add_set, read_overrides
from lorakit.core.errors import ConfigError, LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import quote

STATUS = "status"
# Interval in seconds at which `--wait` reads the queue.
LOOK_EVERY = 1.0


def add(command: Command) -> None:
    """Add the commands of this module by `command(name, run, help)`."""
    batch = command("batch", run_batch, "train an adapter for each row of a TOML file, or for each folder of photos")
    batch.add_argument("jobs", metavar="JOBS", help="TOML file, folder of photo folders, or `status` to show a batch")
    batch.add_argument("folder", nargs="?", metavar="RUNS", help="folder of the batch to show (only after `status`)")
    batch.add_argument("--output", metavar="DIR", help="folder for the run folders (default: runs/<name of JOBS>)")
    batch.add_argument("--preset", metavar="NAME", help="preset or TOML file of all runs")
    batch.add_argument(
        "--subject",
        metavar="'sks {folder}'",
        help="trigger and class of all runs; {folder} becomes the name of the photo folder",
    )
    batch.add_argument("--style", metavar="'sks style'", help="trigger of all runs, if they train styles")
    batch.add_argument("--base", metavar="BASE", help="base model of all runs")
    batch.add_argument("--wait", action="store_true", help="wait until all runs have ended")
    batch.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="address of a Ray cluster to train on; DIR must be on a disk that all machines share",
    )
    batch.add_argument(
        "--results",
        metavar="URL",
        help="folder or fsspec URL for copies of the results, e.g. s3://... (needs --wait or --ray)",
    )
    add_set(batch)


def run_batch(args: argparse.Namespace) -> int:
    """`lorakit batch`. The exit code is 1 if a run failed, or if its results could not be copied."""
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
    if args.results and not (args.ray or args.wait):
        raise ConfigError(["--results copies the results of each run at its end: give --wait or --ray too"])
    rows = batch.read(source, args.preset, overrides, runs)
    send = _Sender(runs, args.results)
    batch.write_manifest(runs, rows)
    if args.ray:
        from lorakit.cli import ray_tasks

        ray_tasks.run(runs, rows, args.ray, remark if args.json else print_lines, send)
        return send.all(_show(runs, args.json))
    count = batch.enqueue(runs, rows)
    if not args.wait:
        rest = Message(", {count} are done or in progress", len(rows) - count) if count < len(rows) else ""
        if not args.json:
            print_lines(
                Message(
                    "runs in the queue: {count}{rest}; see: lorakit batch status {folder}", count, rest, quote(runs)
                )
            )
            return 0
    else:
        _wait(runs, [row.name for row in rows], send)
    return send.all(_show(runs, args.json))


class _Sender:
    """Copies the results of a run to `--results`, if given. Errors are printed and counted, not raised."""

    def __init__(self, runs: Path, url: str | None):
        from lorakit.runs.results import Results

        self.runs, self.results, self.failures = runs, Results(url) if url else None, 0

    def __call__(self, name: str) -> None:
        try:
            if self.results:
                self.results.send(self.runs, name)
        except LorakitError as error:
            self.failures += 1
            complain(str(error))

    def all(self, code: int) -> int:
        """Copy the report on all runs. Return 1 if any copy failed, else `code`."""
        for name in ("batch.json", "report.html"):
            self(name)
        return 1 if self.failures else code


def _wait(runs: Path, names: list[str], end: Callable[[str], object]) -> None:
    """Wait until the queue is empty. Call `end` once for each of the runs `names`, when its job has ended."""
    from lorakit.runs.queue import Queue

    queue, left = Queue(runs), names
    while True:
        busy = {Path(job.folder).name for job in queue.jobs() if job.state in ("waiting", "running")}
        for name in left:
            if name not in busy:
                end(name)
        left = [name for name in left if name in busy]
        if not busy:
            return
        time.sleep(LOOK_EVERY)


def _show(runs: Path, as_json: bool) -> int:
    """Print the state of each run and write the report on all. Return 1 if a run failed, else 0."""
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
