"""The command line: thin. Every training option is a preset or `--set section.key=value`, so no flag repeats one.

What a command needs is imported when it runs, so `lorakit --help` loads neither torch nor diffusers.
Exit codes: 0 done, 1 the run or the check failed, 2 wrong usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from lorakit import __version__, config as configuration
from lorakit.cli import adapter_commands, threads
from lorakit.cli.terminal import Terminal, quiet_libraries
from lorakit.config.option import number
from lorakit.core.errors import LorakitError
from lorakit.runs import memory_estimate

# Kept for one release under their old names.
ALIASES = {"options": ["knobs"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. User mistakes are told in a line each, without a traceback."""
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        _tolerate_any_character(stream)
    try:
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv[:1] == ["ui"]:
            return run_ui(argv[1:])
        args = parser().parse_args(argv)
        return int(args.run(args))
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except Exception as error:
        if os.environ.get("LORAKIT_TRACEBACK"):
            raise
        if isinstance(error, LorakitError):
            _complain(str(error))
            return 2 if isinstance(error, configuration.ConfigError) else 1
        if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it to ask would cost seconds
            _complain(memory_estimate.advice("this command"))
            return 1
        _complain(f"internal error: {type(error).__name__}: {_first_line(error)}; traceback in {_log(error)}")
        return 1


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="lorakit",
        description="Teach Stable Diffusion a subject or a style from your photos, and get a checked adapter.",
        epilog="lorakit COMMAND --help says more. First try: lorakit demo",
    )
    top.add_argument("--version", action="version", version=f"lorakit {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, aliases=ALIASES.get(name, []), help=help, description=help[0].upper() + help[1:] + "."
        )
        made.set_defaults(run=run)
        if name != "ui":
            made.add_argument("--json", action="store_true", help="report as JSON on stdout")
        return made

    demo = command("demo", run_demo, "the whole main job on the bundled model and pictures")
    demo.add_argument("--subject", default="zib", metavar="NAME", help="bundled subject (default: zib)")
    _add_set(demo)
    _add_output(demo)

    check = command("check", run_check, "what is in a folder of photos, what is wrong with it, what a run would cost")
    _add_run_options(check)

    train = command("train", run_train, "train an adapter from a folder of photos")
    _add_run_options(train)
    _add_output(train)
    train.add_argument(
        "--init-from", metavar="FILE", help="start from this adapter's weights (a new run, not a resume)"
    )

    resume = command("resume", run_resume, "go on with a run exactly where it stopped")
    resume.add_argument("folder", metavar="RUN", help="run folder, e.g. runs/2026-01-31-sks-toy")

    sample = command("sample", run_sample, "draw pictures with an adapter")
    sample.add_argument("adapter", metavar="ADAPTER", help="adapter file or PEFT folder")
    sample.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; may be repeated")
    sample.add_argument("--strength", type=_strengths, default=(1.0,), metavar="0,0.5,1", help="one row for each")
    sample.add_argument("--base", default="pocket", metavar="FOLDER", help="base model (default: the bundled one)")
    sample.add_argument("--size", type=_side, metavar="PIXELS", help="side of the pictures (default: as trained)")
    _add_set(sample)
    _add_output(sample)

    inspect = command("inspect", run_inspect, "what a file is: adapter or base, method, rank, trigger, who can read it")
    inspect.add_argument("file", metavar="FILE", help="a safetensors file, a PEFT folder or a base model folder")
    inspect.add_argument(
        "--targets",
        default="",
        metavar="a1111,comfyui",
        help="fail where one of these programs does not read all of it",
    )

    adapter_commands.add(command)
    command("doctor", run_doctor, "this machine: device, precision, attention, extras, and what each lacks")
    options = command("options", run_options, "every option that --set takes, with its default and bounds")
    options.add_argument("--markdown", action="store_true", help="as docs/options.md")
    command("ui", lambda _: run_ui([]), "the front end in the browser")
    return top


def _add_run_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("photos", nargs="?", metavar="PHOTOS", help="folder of photos; it is only ever read")
    made.add_argument(
        "--preset", metavar="NAME", help=f"one of {', '.join(configuration.preset_names())}, or a TOML file"
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--subject", metavar="'sks toy'", help="a rare word for the subject, and what it is")
    what.add_argument("--style", metavar="'sks style'", help="a rare word for the style")
    made.add_argument("--base", metavar="BASE", help="base model: a file, a folder or a hub id (default: bundled)")
    _add_set(made)


def _add_set(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any of `lorakit options`"
    )


def _add_output(made: argparse.ArgumentParser) -> None:
    made.add_argument("--output", metavar="DIR", help="where to write (default: runs/<time>-<name>)")


# -- commands -----------------------------------------------------------------------------------------------------


def run_demo(args: argparse.Namespace) -> int:
    """`lorakit demo`."""
    threads.use_the_free()
    from lorakit.cli import demo

    folder, overrides = Path(args.output) if args.output else None, _overrides(args.set)
    result = _unless_stopped(lambda: demo.demo(args.subject, _terminal(args), folder=folder, overrides=overrides))
    if result is None:
        return 130
    if args.json:
        _print_json(result.to_json())
    return 0


def run_check(args: argparse.Namespace) -> int:
    """`lorakit check`: the photos, then the plan. No model is loaded."""
    threads.use_the_free()
    from lorakit import families
    from lorakit.data import checks
    from lorakit.runs import plan

    config = resolve(args, _terminal(args))
    info = families.describe(config.model)
    report = checks.check(config.data, info)
    planned = None if report.errors else plan.make(config, info, report)
    if args.json:
        _print_json({"check": report.to_json(), "plan": planned.to_json() if planned else None})
    else:
        _print(report.to_text())
        if planned:
            _print("", "the plan", *(f"  {line}" for line in planned.lines()))
    return 1 if report.errors else 0


def run_train(args: argparse.Namespace) -> int:
    """`lorakit train`: the main job."""
    threads.use_the_free()
    terminal = _terminal(args)
    config = resolve(args, terminal)
    if not config.data.name:
        raise configuration.ConfigError(["say what the photos show: --subject 'sks toy' or --style 'sks style'"])
    from lorakit.runs.preflight import look

    seen = look(config, terminal.say)  # before what models take is imported, for seconds
    from lorakit.training import run as train

    return _trained(args, terminal, lambda: train.train(config, terminal=terminal, seen=seen))


def run_resume(args: argparse.Namespace) -> int:
    """`lorakit resume`."""
    threads.use_the_free()
    terminal = _terminal(args)
    from lorakit.training import run as train

    return _trained(args, terminal, lambda: train.resume(args.folder, terminal=terminal))


def _trained(args: argparse.Namespace, terminal: Terminal, job: Callable[[], Any]) -> int:
    """Run a training job and say what came of it."""
    result = _unless_stopped(job)
    if result is None:
        return 130
    terminal.say(f"adapter: {result.adapter}")
    if result.best:
        terminal.say(f"best by validation: {result.best}")
    terminal.say(f"report: {result.folder / 'report.html'}")
    if args.json:
        _print_json(
            {
                "folder": str(result.folder),
                "adapter": str(result.adapter),
                "exports": {name: str(path) for name, path in result.exports.items()},
                "best": str(result.best) if result.best else None,
                "steps": result.steps,
                "findings": [vars(finding) for finding in result.findings],
            }
        )
    return 0


def _unless_stopped(job: Callable[[], Any]) -> Any:
    """What a training job gives, or None where the user stopped it, which is then said."""
    from lorakit.training.run import Stopped

    try:
        return job()
    except Stopped as stop:
        _complain(str(stop))
        return None


def run_sample(args: argparse.Namespace) -> int:
    """`lorakit sample`: a grid with a row for each strength and a column for each prompt, and each picture."""
    threads.use_the_free()
    from lorakit.inference import sampling

    adapter = Path(args.adapter)
    config = sampling.recorded(adapter, _overrides(args.set))
    files = sampling.from_file(
        adapter,
        dataclasses.replace(config.model, base=args.base),
        args.prompt or config.sample.prompts,
        args.strength,
        config.sample,
        folder=Path(args.output) if args.output else None,
        size=args.size,
        memory=config.memory,
    )
    if args.json:
        _print_json({"grid": str(files[0]), "files": [str(file) for file in files[1:]]})
    else:
        _print(str(files[0]))
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """`lorakit inspect`: 1 where a program named in `--targets` does not read all of the file."""
    from lorakit.formats import inspect

    report = inspect.inspect(Path(args.file))
    failures = report.failures(args.targets.split(","))
    if args.json:
        _print_json(report.to_json() | {"failures": failures})
    else:
        _print(report.to_text())
    if failures:
        _complain("\n".join(failures))
    return 1 if failures else 0


def run_doctor(args: argparse.Namespace) -> int:
    """`lorakit doctor`: 1 where something keeps lorakit from working here."""
    from lorakit.cli import doctor

    lines = doctor.examine()
    if args.json:
        _print_json(doctor.to_json(lines))
    else:
        _print(doctor.to_text(lines))
    return 0 if doctor.to_json(lines)["ready"] else 1


def run_options(args: argparse.Namespace) -> int:
    """`lorakit options`."""
    if args.json:
        _print_json([describe_option(option) for option in configuration.options()])
    elif args.markdown:
        _print(options_page().rstrip("\n"))
    else:
        for option in configuration.options():
            known = describe_option(option)
            _print(f"{option.key} = {known['default']}  ({known['values']})", f"    {option.help}")
    return 0


def run_ui(arguments: Sequence[str]) -> int:
    """`lorakit ui`: the front end has options of its own (`lorakit ui --help`)."""
    if not _has("gradio"):
        raise LorakitError("the front end needs gradio: pip install 'lorakit[ui]'")
    # By name: the front end and the command line do not know each other.
    return int(import_module("lorakit.ui.app").main(arguments))


# -- from arguments to a config -----------------------------------------------------------------------------------


def resolve(args: argparse.Namespace, terminal: Terminal) -> configuration.Config:
    """The config that the arguments of `check` and `train` ask for: preset, then flags, then `--set`.

    Raises:
        ConfigError: with every problem at once.
        LorakitError: no preset was named and the base, which decides it, cannot be read.
    """
    flags = {
        "data.folder": args.photos,
        "data.name": args.subject or args.style,
        "data.kind": "subject" if args.subject else "style" if args.style else None,
        "model.base": args.base,
        "output.folder": getattr(args, "output", None),
        "train.init_from": getattr(args, "init_from", None),
    }
    overrides = {key: value for key, value in flags.items() if value is not None} | _overrides(args.set)
    preset = args.preset
    if preset is None:
        from lorakit.runs.quickstart import default_preset

        preset, reason = default_preset(overrides.get("model.base", "pocket"), overrides.get("data.kind", "subject"))
        terminal.say(f"preset: {preset} ({reason})")
    config = configuration.load(preset, overrides)
    if not config.data.folder:
        raise configuration.ConfigError(["name the folder of photos: lorakit check PHOTOS, lorakit train PHOTOS"])
    return config


def describe_option(option: configuration.Option) -> dict[str, Any]:
    """An option in plain values: key, type in words, default, bounds or choices, help."""
    import types
    import typing

    kind = option.type
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    choices = option.choices or (typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ())
    if typing.get_origin(kind) is tuple:
        values = f"list of {', '.join(choices)}" if choices else "list of texts"
    else:
        values = ", ".join(choices) if choices else names[kind]
    if option.low is not None:
        values += (
            f", {number(option.low)} to {number(option.high)}"
            if option.high is not None
            else f", {option.low:g} or more"
        )
    if option.above is not None:
        values += f", above {option.above:g}"
    default = "unset" if option.default is None else json.dumps(option.default, ensure_ascii=False)
    return {"key": option.key, "values": values, "default": default, "help": option.help}


def options_page() -> str:
    """docs/options.md: every option, section by section, with what config.py says of it."""
    lines = [
        "# Options",
        "",
        "Made from `lorakit/config.py` by `lorakit options --markdown`; do not edit it by hand.",
        "",
    ]
    lines += ["Any of them may stand in a preset (`[train]`, `steps = 200`) or behind `--set` (`train.steps=200`)."]
    for section in configuration.SECTIONS:
        purpose = (configuration.section_type(section).__doc__ or "").splitlines()[0]
        lines += ["", f"## {section}", "", purpose, "", "| Option | Default | Values | |", "| --- | --- | --- | --- |"]
        for option in configuration.options():
            if option.section == section:
                known = describe_option(option)
                lines.append(f"| `{option.key}` | `{known['default']}` | {known['values']} | {option.help} |")
    return "\n".join(lines) + "\n"


def _overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Every `--set` read; all that are malformed are reported together."""
    problems, read = [], {}
    for text in texts:
        try:
            key, value = configuration.parse_override(text)
            read[key] = value
        except configuration.ConfigError as error:
            problems += error.problems
    if problems:
        raise configuration.ConfigError(problems)
    return read


def _strengths(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between, as in 0,0.5,1")
    return values


def _side(text: str) -> int:
    if not text.isdecimal() or int(text) % 8 or not 64 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a multiple of 8 from 64 to 4096")
    return int(text)


# -- what is written ----------------------------------------------------------------------------------------------


def _terminal(args: argparse.Namespace) -> Terminal:
    """Lines go to stdout, and to stderr where stdout carries JSON."""
    return Terminal(sys.stderr if args.json else sys.stdout)


def _print(*lines: str) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()


def _print_json(value: Any) -> None:
    _print(json.dumps(value, indent=2, ensure_ascii=True))


def _complain(text: str) -> None:
    """Each line to stderr, prefixed. A closed stderr is no reason to fail differently."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        for line in text.splitlines() or [""]:
            print(f"lorakit: {line}", file=sys.stderr)
        sys.stderr.flush()


def _tolerate_any_character(stream: TextIO) -> None:
    """A terminal that does not know a character (LC_ALL=C) shows a question mark instead of ending the program."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _log(error: BaseException) -> Path:
    """Keep the traceback of an unexpected error in a file; where."""
    handle, name = tempfile.mkstemp(prefix="lorakit-error-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(name)


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
