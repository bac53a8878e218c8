"""Commands of a training run: demo, check, train, resume and import-config. Also builds a config from arguments."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import config as configuration
from lorakit.cli import threads
from lorakit.cli.imports import model_imports
from lorakit.cli.signals import stop_on_signals
from lorakit.cli.terminal import Bar, Terminal, complain, print_event, print_json, print_lines
from lorakit.config import sample_prompts
from lorakit.core import atomic
from lorakit.core.errors import LorakitError, Stopped, StopRequested
from lorakit.core.events import Event, Listener
from lorakit.core.messages import Message
from lorakit.core.names import quote
from lorakit.runs import launch
from lorakit.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from lorakit.data.checks import Report
    from lorakit.runs.preflight import Preflight

# A function that adds a command with this name, function and help, and returns its parser.
Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]

# Seconds after which the check of the photos shows its progress.
BAR_AFTER = 3.0

# More unreadable photos than this probably have one cause, for example a missing package.
EXCLUSION_LIMIT = 5


def add(command: Command) -> None:
    """Add the commands of this module by `command(name, run, help)`."""
    demo = command("demo", run_demo, "train an adapter on bundled photos with the bundled model")
    demo.add_argument("--subject", default="zib", metavar="NAME", help="bundled subject (default: zib)")
    add_set(demo)
    _add_output(demo)

    check = command("check", run_check, "check photos and show the plan")
    add_run_options(check)
    _add_output(check)

    train = command("train", run_train, "train an adapter from a folder of photos")
    train.set_defaults(has_events=True)
    add_run_options(train)
    _add_gpus(check, "number of GPUs of this machine that the run will use")
    _add_gpus(train, "number of GPUs of this machine to train on (docs/scale.md)")
    _add_output(train)

    importing = command(
        "import-config", run_import_config, "convert a config of kohya or OneTrainer to a lorakit config"
    )
    importing.add_argument("file", metavar="FILE", help="TOML or JSON file of the other program")
    importing.add_argument("--output", metavar="FILE", help="file to write (default: <name>-lorakit.toml beside FILE)")

    resume = command("resume", run_resume, "continue a run exactly where it stopped")
    resume.set_defaults(has_events=True)
    resume.add_argument("folder", metavar="RUN", help="run folder, e.g. runs/2026-01-31-sks-toy")
    resume.add_argument(
        "--from",
        dest="checkpoint",
        default="",
        metavar="STEP",
        help="checkpoint to continue from: its step or its name, e.g. 120 or step-000120 (default: the last)",
    )
    resume.add_argument("--steps", metavar="COUNT", help="new number of steps of the whole run")
    _add_gpus(resume, "number of GPUs of this machine to train on")
    add_set(resume)


def _add_gpus(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("--gpus", type=int, metavar="COUNT", help=help)


def add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("photos", nargs="?", metavar="PHOTOS", help="folder of photos; it is not changed")
    command.add_argument(
        "--preset", metavar="NAME", help=f"preset ({', '.join(configuration.preset_names())}) or TOML file"
    )
    name = command.add_mutually_exclusive_group()
    name.add_argument("--subject", metavar="'sks toy'", help="trigger (a rare word) and class of the subject")
    name.add_argument("--style", metavar="'sks style'", help="trigger (a rare word) of the style")
    command.add_argument(
        "--prompt", action="append", metavar="TEXT", help="prompt of a sample picture; may be repeated"
    )
    add_prompts(command)
    command.add_argument("--base", metavar="BASE", help="base model: a file, a folder or a hub id (default: bundled)")
    command.add_argument("--init-from", metavar="FILE", help="adapter with the initial weights of a new run")
    add_model(command)


def add_prompts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prompts",
        action="append",
        metavar="FILE",
        help="file with one prompt a line, or prompts in kohya's JSON or TOML; may be repeated",
    )


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--vae", metavar="VAE", help="VAE instead of the base's own: a folder, a file or a hub id")
    add_set(command)


def add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="value of an option (list: lorakit options); may be repeated",
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", metavar="DIR", help="output folder (default: runs/<time>-<name>)")


# -- commands ---------------------------------------------------------------------------------------------------------


def run_demo(args: argparse.Namespace) -> int:
    """`lorakit demo`."""
    threads.use_idle_cores()
    from lorakit.cli import demo

    folder, overrides = Path(args.output) if args.output else None, read_overrides(args.set)
    terminal = _terminal(args)
    try:
        with stop_on_signals() as stop:
            result = demo.demo(args.subject, terminal, folder, overrides, stop=stop)
    except Stopped as stopped:
        terminal.close()
        complain(str(stopped))
        return 130
    if args.json:
        print_json(result.to_json())
    return 0


def run_check(args: argparse.Namespace) -> int:
    """`lorakit check`. Checks the photos and shows the plan. Loads no model. Returns 1 if there is a problem."""
    threads.use_idle_cores()
    from lorakit.runs.preflight import preflight

    terminal = _terminal(args)
    with _progress_of_photos(terminal) as check:
        result = preflight(resolve(args, terminal), check=check, processes=args.gpus)
    if result.problems:  # before the table and the warnings, which may follow from them
        complain("\n".join([*result.problems, *exclusion(result)]))
    if args.json:
        print_json(result.to_json())
    elif text := result.to_text():
        print_lines(text)
    return 1 if result.problems else 0


def run_train(args: argparse.Namespace) -> int:
    """`lorakit train`. With `--gpus`, this process starts one training process for each GPU."""
    if launch.world().rank:
        return _follow()
    if args.gpus is not None and _launches(args.gpus, resolve(args, Terminal(io.StringIO()))):
        return launch.start(args.gpus, args.words)
    threads.use_idle_cores()
    terminal = _terminal(args)
    from lorakit.runs.preflight import preflight

    # Checked before the slow imports of torch and diffusers.
    with _progress_of_photos(terminal) as check:
        result = preflight(resolve(args, terminal), check=check, fetch=True)
    ready = result.or_raise(exclusion(result))
    for line in ready.lines():
        terminal.say(line)
    with model_imports():
        from lorakit.training import run

    return _trained(args, terminal, partial(run.start, ready))


def run_resume(args: argparse.Namespace) -> int:
    """`lorakit resume`."""
    if launch.world().rank:
        return _follow()
    folder, changes = RunFolder(args.folder), read_overrides(args.set)
    folder.require()
    file = folder.config_file
    if args.gpus is not None and _launches(args.gpus, configuration.load(file, changes)):
        return launch.start(args.gpus, args.words)
    threads.use_idle_cores()
    terminal = _terminal(args)
    with model_imports():
        from lorakit.training import run

    changes = read_overrides([*args.set, *([f"train.steps={args.steps}"] if args.steps else [])])
    return _trained(
        args, terminal, partial(run.resume, args.folder, from_checkpoint=args.checkpoint, overrides=changes)
    )


def _launches(gpus: int, config: configuration.Config) -> bool:
    """Whether this process starts the training processes and does not train itself.

    Raises:
        ConfigError: the run cannot have this number of processes on this machine.
    """
    if problem := launch.gpus_problem(config, gpus):
        raise configuration.ConfigError([problem])
    return gpus > 1 and launch.world().count == 1


def _follow() -> int:
    """Train as a process after the first and return the exit code. The first process reports results and errors."""
    threads.use_idle_cores()
    with model_imports():
        from lorakit.training import run

    try:
        with stop_on_signals() as stop:
            run.follow(stop=stop)
        return 0
    except StopRequested:
        return 130
    except Exception:
        if os.environ.get("LORAKIT_TRACEBACK"):
            raise
        return 1


def run_import_config(args: argparse.Namespace) -> int:
    """`lorakit import-config`."""
    from lorakit.config import foreign, importing

    source = Path(args.file)
    target = Path(args.output) if args.output else source.with_name(f"{source.stem}-lorakit.toml")
    if target.exists():
        raise configuration.ConfigError([Message("{file} exists already: name another file with --output", target)])
    tables = foreign.read(source)
    try:
        text, rest, notes = importing.convert(tables)
    except configuration.ConfigError as error:
        raise configuration.ConfigError("{file}: {problem}", source, error) from None
    try:
        atomic.write(target, text)
    except OSError as error:
        raise LorakitError(
            "cannot write {file}: {reason}; give another --output", target, error.strerror or error
        ) from None
    if args.json:
        print_json({"config": str(target), "without_twin": rest, "notes": notes})
        return 0
    if rest:
        print_lines("left out, because lorakit has no such option:", *(f"  {line}" for line in rest))
    if notes:
        print_lines("filled in or joined:", *(f"  {line}" for line in notes))
    print_lines(
        Message("written: {file}", target), Message("check it with: lorakit check --preset {file}", quote(target))
    )
    return 0


@contextmanager
def _progress_of_photos(terminal: Terminal) -> Iterator[partial[Report]]:
    """Yield `checks.check` with a progress bar, which appears after `BAR_AFTER` seconds."""
    from lorakit.data import checks

    began = terminal.clock()

    def progress(count: int, total: int) -> None:
        if terminal.bar is None and terminal.clock() - began > BAR_AFTER and count < total:
            terminal.bar = Bar(terminal, total, count, "photos")
        if terminal.bar is not None:
            terminal.bar.advance(count)

    try:
        yield partial(checks.check, progress=progress)
    finally:
        terminal.close()


def _trained(args: argparse.Namespace, terminal: Terminal, job: Callable[..., Any]) -> int:
    """Run a training job with listeners and a stop function, report its result, and return the exit code."""
    listeners: list[Listener] = [terminal, *([print_event] if args.json else [])]
    try:
        with stop_on_signals() as stop:
            result = job(listeners=listeners, stop=stop)
    except Stopped as stopped:
        terminal.close()
        if stopped.adapter is not None:
            terminal.say(Message("adapter of step {step}: {path}", stopped.step, stopped.adapter))
        complain(str(stopped))
        if args.json:
            where = {"message": str(stopped), "folder": str(stopped.folder.absolute())}
            where |= {"adapter": str(stopped.adapter)} if stopped.adapter else {}
            print_event(Event("stopped", stopped.step, where))
        return 130
    terminal.say(f"adapter: {result.adapter}")
    terminal.say(f"report: {result.folder / 'report.html'}")
    terminal.say("done and checked")
    if args.json:
        facts = {
            "folder": str(result.folder),
            "adapter": str(result.adapter),
            "exports": {name: str(path) for name, path in result.exports.items()},
            "steps": result.steps,
            "findings": [vars(finding) for finding in result.findings],
        }
        print_event(Event("result", result.steps, facts))
    return 0


# -- from arguments to a config ---------------------------------------------------------------------------------------


def resolve(args: argparse.Namespace, terminal: Terminal) -> configuration.Config:
    """Build the config from the arguments of `check` and `train`. Flags override the preset; `--set` overrides flags.

    Raises:
        ConfigError: an argument or an option is invalid; the error lists all problems.
        LorakitError: the base determines the preset, because `--preset` is not given, and the base cannot be read.
    """
    flags = {
        "data.folder": args.photos,
        "data.name": args.subject or args.style,
        "data.kind": "subject" if args.subject else "style" if args.style else None,
        "model.base": args.base,
        "sample.prompts": read_prompts(args),
        "model.vae": args.vae,
        "output.folder": getattr(args, "output", None),
        "train.init_from": args.init_from,
    }
    overrides = {key: value for key, value in flags.items() if value is not None} | read_overrides(args.set)
    preset = args.preset
    if preset is None:
        from lorakit.runs.quickstart import default_preset, model_of

        preset, reason = default_preset(model_of(overrides), overrides.get("data.kind", "subject"))
        terminal.say(f"preset: {preset} ({reason})")
    elif preset in configuration.preset_names() and not preset.endswith("-pocket") and "model.base" not in overrides:
        raise configuration.ConfigError("--preset {preset} needs a base model: give it with --base", preset)
    config = configuration.load(preset, overrides)
    if not config.data.folder:
        raise configuration.ConfigError(["name the folder of photos: lorakit check PHOTOS, lorakit train PHOTOS"])
    return config


def exclusion(result: Preflight) -> list[str]:
    """Advice to exclude the unreadable photos. Empty if they are more than `EXCLUSION_LIMIT`, or all photos."""
    items = result.report.items if result.report else []
    names = [item.relative for item in items if not item.readable]
    if not 0 < len(names) <= EXCLUSION_LIMIT or len(names) == len(items):
        return []
    value = json.dumps([*result.config.data.exclude, *names], ensure_ascii=False)
    return [Message("or leave these photos out: --set {option}", quote(f"data.exclude={value}"))]


def read_prompts(args: argparse.Namespace) -> list[str] | None:
    """The texts of `--prompt`, then those in the files of `--prompts`. None if there are none.

    Raises:
        ConfigError: a file cannot be read.
    """
    texts = [*(args.prompt or ()), *(text for file in args.prompts or () for text in sample_prompts.read_file(file))]
    return texts or None


def read_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """The key and value of every `--set`.

    Raises:
        ConfigError: an assignment is malformed; the error lists all such assignments.
    """
    problems, read = [], {}
    for text in assignments:
        try:
            key, value = configuration.parse_override(text)
            read[key] = value
        except configuration.ConfigError as error:
            problems += error.problems
    if problems:
        raise configuration.ConfigError(problems)
    return read


def _terminal(args: argparse.Namespace) -> Terminal:
    """A terminal on stdout, or on stderr if stdout carries JSON."""
    return Terminal(sys.stderr if args.json else sys.stdout)
