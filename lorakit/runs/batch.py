"""Run many trainings with one command, one run for each row of a TOML file or each subfolder. One report covers all.

    [options]                       options of every run
    train.steps = 800

    [[run]]                         one run, or a grid of runs if an option has a list of values
    data.folder = "photos/anna"
    data.name = "sks woman"
    adapter.rank = [8, 16]

Every run has a folder named after its row. The same command can be given again: it resumes unfinished runs and leaves
finished runs unchanged. This module does not import torch.
"""

from __future__ import annotations

import itertools
import json
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lorakit import config as configuration
from lorakit.config import Config
from lorakit.core import atomic, foreign_json
from lorakit.core.errors import ConfigError, LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import DEVICE, columns, is_device, pad, slug
from lorakit.core.units import duration
from lorakit.data import photo_folder
from lorakit.runs import quickstart, run_folder
from lorakit.runs.queue import Queue
from lorakit.runs.run_folder import RunFolder

MANIFEST = "batch.json"
COLUMNS: tuple[str, ...] = ("run", "state", "steps", "time", "lowest error", "prior drift", "self-check")
# Placeholder for the folder's name in options of a folder of photo folders.
FOLDER = "{folder}"


@dataclass(frozen=True)
class Row:
    """One run of a batch: its name, which is also the name of its folder, and its complete config."""

    name: str
    config: Config


@dataclass(frozen=True)
class Outcome:
    """The state and the results of one run of a batch.

    Attributes:
        state: of its run folder; "waiting" before there is one.
        seconds: from its beginning to its last line.
        lowest_step, lowest_mse: the validation with the lowest error, on `source`.
        prior_drift: at the last validation.
        passed: of the self-check, None before it.
    """

    name: str
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    lowest_step: int | None = None
    lowest_mse: float | None = None
    source: str = ""
    prior_drift: float | None = None
    passed: bool | None = None
    message: str = ""


def read(source: Path, preset: str | None, overrides: Mapping[str, object], runs: Path) -> list[Row]:
    """The rows of a TOML file, or of a folder of photo folders.

    Args:
        preset, overrides: preset and options for all runs; options in the file override them.
        runs: parent folder of the run folders.

    Raises:
        ConfigError: at least one row is invalid; the message lists every problem with its row.
    """
    tables = list(_of_folder(source) if source.is_dir() else _of_file(source))
    rows, problems = dict[str, Row](), list[str]()
    for name, table in tables:
        if not (grid := list(_grid(table))):
            problems.append(Message("{name}: a list of values has none in it, which makes no run", name))
        for suffix, own_options in grid:
            if is_device(f"{name}{suffix}"):
                problems.append(Message(DEVICE, "name", f"{name}{suffix}"))
            own = slug(f"{name}{suffix}") or "run"
            options = {key: _named(value, name) for key, value in {**overrides, **own_options}.items()}
            if own in rows:
                problems.append(Message("{own}: two rows have this name; give each another `name`", own))
            if "output.folder" in own_options:
                problems.append(
                    Message("{own}: output.folder is where the batch puts it: give --output, and the run a `name`", own)
                )
            try:
                kind = str(options.get("data.kind", "subject"))
                base = (
                    str(options.pop("preset", preset) or "")
                    or quickstart.default_preset(quickstart.model_of(options), kind)[0]
                )
                config = configuration.load(base, options)
                photo_folder.scan(photo_folder.require(config.data.folder))
                output = replace(config.output, folder=str(runs / own))
                rows[own] = Row(own, configuration.with_absolute_paths(replace(config, output=output)))
            except LorakitError as error:
                problems += [Message("{name}: {problem}", own, problem) for problem in str(error).splitlines()]
    if problems or not rows:
        what = "batch takes a folder of folders of photos" if source.is_dir() else "it has no [[run]]"
        raise ConfigError(problems or [Message("{source}: there is no run in it: {what}", source, what)])
    return list(rows.values())


def _of_folder(source: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        if not folder.name.startswith("."):
            yield folder.name, {"data.folder": str(folder)}


def _of_file(source: Path) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        content = tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("{file}: {problem}", source, getattr(error, "strerror", None) or error) from None
    runs, options = content.get("run", []), content.get("options", {})
    wrong = sorted(content.keys() - {"preset", "options", "run"})
    wrong += ["options"] * (not isinstance(options, dict))
    if wrong or not (isinstance(runs, list) and all(isinstance(run, dict) for run in runs)):
        what = (wrong or ["run"])[0]
        raise ConfigError("{source}: {what}: a batch has preset, [options], and [[run]] for each run", source, what)
    shared = _flat(options) | ({"preset": content["preset"]} if "preset" in content else {})
    for number, run in enumerate(runs, 1):
        own = _flat(run)
        name, folders = str(own.pop("name", "")), own.get("data.folder", "")
        several = folders if isinstance(folders, list) and folders else [folders]
        for folder in map(str, several):
            place = {"data.folder": str(source.parent / folder)} if folder else {}
            parts = [name, Path(folder).name] if len(several) > 1 else [name or Path(folder).name]
            yield "-".join(filter(None, parts)) or str(number), shared | own | place


def _flat(table: Mapping[str, object]) -> dict[str, object]:
    """Convert the file's tables to dotted options. A table that is the value of an option stays a table."""
    keys = {option.key for option in configuration.options()}
    flat: dict[str, object] = {}
    for section, value in table.items():
        if isinstance(value, dict) and section not in keys:
            flat |= {f"{section}.{key}": item for key, item in value.items()}
        else:
            flat[section] = value
    return flat


def _grid(table: Mapping[str, object]) -> Iterator[tuple[str, dict[str, object]]]:
    """Every combination of the lists among the values, with a suffix that distinguishes it from the others."""
    lists = {option.key for option in configuration.options() if typing.get_origin(option.type) is tuple}
    axes = {
        key: value
        for key, value in table.items()
        if isinstance(value, list) and (key not in lists or (value and all(isinstance(item, list) for item in value)))
    }
    for values in itertools.product(*axes.values()):
        options = dict(zip(axes, values, strict=True))
        yield "".join(f"-{key.rpartition('.')[2]}-{value}" for key, value in options.items()), {**table, **options}


def _named(value: object, name: str) -> object:
    return value.replace(FOLDER, name) if isinstance(value, str) else value


def write_manifest(runs: Path, rows: Sequence[Row]) -> None:
    """Write the names of the batch's runs for `status`.

    Raises:
        LorakitError: the folder cannot be written.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        atomic.write(runs / MANIFEST, json.dumps({"rows": [row.name for row in rows]}, indent=1, ensure_ascii=False))
        for row in rows:
            if not (runs / row.name).exists():
                atomic.write(runs / f"{row.name}.toml", configuration.to_toml(row.config))
    except OSError as error:
        raise LorakitError(
            "cannot write to {path}: {why}; give another --output", runs, error.strerror or error
        ) from None


def command(runs: Path, name: str) -> tuple[str, ...] | None:
    """The arguments of lorakit that start or resume a run; None if the run is done."""
    folder = runs / name
    if not (folder / "config.toml").is_file():
        return "train", "--preset", str(runs / f"{name}.toml"), "--output", str(folder)
    return None if run_folder.read(folder).state == "done" else ("resume", str(folder))


def enqueue(runs: Path, rows: Sequence[Row]) -> int:
    """Add all unfinished runs to the folder's queue and start its worker. Return the number of jobs added."""
    queue, count = Queue(runs), 0
    busy = {Path(job.folder) for job in queue.jobs() if job.state in ("waiting", "running")}
    for row in rows:
        arguments = command(runs, row.name)
        if arguments is not None and runs / row.name not in busy:
            queue.command(arguments, runs / row.name)
            count += 1
    queue.start()
    return count


def status(runs: Path) -> list[Outcome]:
    """The outcome of each run of a batch, in the order of the rows.

    Raises:
        LorakitError: the folder contains no batch.
    """
    try:
        names = foreign_json.loads((runs / MANIFEST).read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        raise LorakitError("{runs} has no batch: begin one with lorakit batch JOBS --output {runs}", runs) from None
    return [outcome(runs / name) for name in names]


def outcome(folder: Path) -> Outcome:
    """The outcome of a run, read from its folder."""
    run = RunFolder(folder)
    if not run.state_file.is_file():
        return Outcome(folder.name)
    state, events = run_folder.read(folder), list(run.events())
    examined = [event for event in events if event["event"] == "validation"]
    lowest = min(examined, key=lambda event: event["mse"], default=None)
    passed = None
    if run.report_file.is_file():
        passed = bool(foreign_json.loads(run.report_file.read_text(encoding="utf-8"))["passed"])
    return Outcome(
        folder.name,
        state.state,
        state.step,
        state.steps,
        events[-1]["time"] - events[0]["time"] if events else 0.0,
        lowest["step"] if lowest else None,
        lowest["mse"] if lowest else None,
        lowest["source"] if lowest else "",
        examined[-1]["prior_drift"] if examined else None,
        passed,
        state.message,
    )


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """The outcomes as lines of a table."""
    rows = [COLUMNS, *(_cells(each) for each in outcomes)]
    widths = [max(columns(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(pad(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(each: Outcome) -> tuple[str, ...]:
    return (
        each.name,
        each.state,
        f"{each.step}/{each.steps}" if each.steps else "-",
        duration(each.seconds) if each.seconds else "-",
        "-" if each.lowest_mse is None else f"{each.lowest_mse:.4f} at {each.lowest_step} ({each.source})",
        "-" if each.prior_drift is None else f"{each.prior_drift:.2%}",
        {None: "-", True: "passed", False: "FAILED"}[each.passed],
    )


def write_report(runs: Path, outcomes: Sequence[Outcome]) -> Path:
    """Write report.html of a batch: the table, where each name links to the report of its run."""
    import jinja2

    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    file = runs / "report.html"
    atomic.write(file, template.render(columns=COLUMNS, rows=[(each, _cells(each)) for each in outcomes]))
    return file


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """Convert the outcomes to JSON values. Later versions only add keys."""
    return [asdict(each) for each in outcomes]


_PAGE = """<!doctype html><meta charset="utf-8"><title>lorakit batch</title>
<style>:root{color-scheme:light dark}body{font:15px system-ui;margin:2em}td,th{padding:.3em 1em .3em 0;text-align:left}
</style><h1>{{ rows|length }} runs</h1>
<table><tr>{% for column in columns %}<th>{{ column }}{% endfor %}<th></tr>
{% for each, cells in rows %}<tr><td>{% if each.passed is none %}{{ cells[0] }}{% else %}
<a href="{{ each.name }}/report.html">{{ cells[0] }}</a>{% endif %}
{% for cell in cells[1:] %}<td>{{ cell }}{% endfor %}<td>{{ each.message if each.state == "failed" }}</tr>
{% endfor %}</table>
"""
