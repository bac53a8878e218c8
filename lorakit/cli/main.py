"""The command line: parses arguments, runs one command and returns its exit code.

Presets and `--set section.key=value` set every training option. Only the most common options also have a flag.
Each command imports its libraries when it runs, so `lorakit --help` loads neither torch nor diffusers.
Exit codes: 0 success, 1 the run or the check failed or a file is missing, 2 wrong usage or configuration,
130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import takewhile
from typing import Any, NoReturn, TextIO

from lorakit import __version__, config as configuration
from lorakit.cli import (
    adapter_commands,
    base_commands,
    batch_commands,
    caption_commands,
    rate_probe,
    threads,
    train_commands,
    tune_commands,
)
from lorakit.cli.imports import quick_imports
from lorakit.cli.terminal import complain, open_streams, print_event, print_json, print_lines, quiet_libraries
from lorakit.config.option import NEAR, format_bound, suggest
from lorakit.core import install
from lorakit.core.errors import LorakitError, MissingFile
from lorakit.core.events import Event
from lorakit.core.messages import Message
from lorakit.runs import launch

# Old names of commands, accepted for one more release.
ALIASES = {"options": ["knobs"]}
# Help of `--json` for commands that write each event and not only a report.
JSON_HELP = dict.fromkeys(
    ("train", "resume", "caption"), "write each event to stdout as a line of JSON; the last one is the result"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Print errors without a traceback, unless LORAKIT_TRACEBACK is set."""
    code = _run(argv)
    if code and launch.world().count > 1:
        # Threads of torch.distributed may still wait for other processes. They would block or abort a normal exit.
        sys.stdout.flush()
        os._exit(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    open_streams()
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        _tolerate_any_character(stream)
    args = argparse.Namespace()

    def fail(text: str) -> None:
        complain(text)
        if getattr(args, "has_events", False) and args.json:
            print_event(Event("error", None, {"message": text}))

    try:
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv[:1] == ["ui"]:
            return run_ui(argv[1:])
        if not argv:
            parser().print_help(sys.stderr)
            return 2
        args.words = _with_full_names(argv)
        _, unread = parser().parse_known_args(args.words, args)
        if unread:
            args.refuse(unread)
        return int(args.run(args))
    except BrokenPipeError:
        # The reader (`| head`) has ended. Without this, Python reports another error when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        fail("interrupted")
        return 130
    except Exception as error:
        if os.environ.get("LORAKIT_TRACEBACK"):
            raise
        if isinstance(error, LorakitError):
            fail(str(error))
            is_misuse = isinstance(error, configuration.ConfigError) and not isinstance(error, MissingFile)
            return 2 if is_misuse else 1
        if type(error).__name__ == "OutOfMemoryError":  # compared by name, because importing torch takes seconds
            from lorakit.runs import memory_estimate

            fail(memory_estimate.advice("this command"))
            return 1
        fail(
            Message(
                "internal error: {type}: {problem}; traceback in {file}",
                type(error).__name__,
                _first_line(error),
                _log(error),
            )
        )
        return 1


class Parser(argparse.ArgumentParser):
    """A parser whose errors suggest a correction. The parsers of the commands have this class too."""

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """End with an error about unknown arguments, and suggest this command's own flags.

        By default argparse reports them from the top parser, which does not have these flags.
        """
        self.error(f"unrecognized arguments: {' '.join(words)}{self._advice(words[0])}")

    def _advice(self, word: str) -> str:
        if not word.startswith("-"):
            return "; put quotes around a path or a text with spaces"
        name = word.partition("=")[0]
        own = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=NEAR)
        keys = [option.key for option in configuration.every_option()]
        last_parts = [key.partition(".")[2] for key in keys]
        near = difflib.get_close_matches(name.strip("-").replace("-", "_"), last_parts, n=1, cutoff=NEAR)
        choices = [f"--set {key}=..." for key, last in zip(keys, last_parts, strict=True) if last in near]
        return (f" (did you mean {own[0]}?)" if own else "") + (f"; use {' or '.join(choices)}" if choices else "")

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser`."""
        if match := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message):
            message += suggest(match[1], re.split(r"[', ]+", match[2].strip("'")))
        super().error(message)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(
        prog="lorakit",
        description="Teach Stable Diffusion a subject or a style from your photos, and get a checked adapter.",
        epilog="See lorakit COMMAND --help for its options. Start with: lorakit demo",
    )
    top.add_argument("--version", action="version", version=f"lorakit {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(
            name, aliases=ALIASES.get(name, []), help=help, description=help[0].upper() + help[1:] + "."
        )
        subparser.set_defaults(run=run, refuse=subparser.refuse)
        if name != "ui":
            subparser.add_argument(
                "--json", action="store_true", help=JSON_HELP.get(name, "write the report to stdout as JSON")
            )
        return subparser

    train_commands.add(command)
    adapter_commands.add(command)
    base_commands.add(command)
    batch_commands.add(command)
    tune_commands.add(command)
    rate_probe.add(command)
    caption_commands.add(command)
    command("doctor", run_doctor, "check the device, precision, attention, packages and extras of this machine")
    options = command("options", run_options, "list the options of --set with their defaults and bounds")
    options.add_argument("--markdown", action="store_true", help="print the list as in docs/options.md")
    command("ui", lambda _: run_ui([]), "start the front end in the browser")
    return top


def _with_full_names(argv: Sequence[str]) -> list[str]:
    """Join the words of a name or prompt in single quotes, because cmd.exe passes them as separate arguments."""
    result, rest = list[str](), list(argv)
    while rest:
        word = rest.pop(0)
        if re.match(r"(--subject=|--style=|--prompt=|data\.name=)'", word) or (
            result[-1:] in (["--subject"], ["--style"], ["--prompt"]) and word.startswith("'")
        ):
            parts = [word, *takewhile(lambda part: not part.startswith("--"), rest)]
            end = next((at for at, part in enumerate(parts) if re.search(r"[^=]'$", part)), 0)
            word, rest = " ".join([word, *rest[:end]]), rest[end:]
        result.append(word)
    return result


# -- commands -----------------------------------------------------------------------------------------------------


def run_doctor(args: argparse.Namespace) -> int:
    """`lorakit doctor`. The exit code is 1 if lorakit cannot work on this machine."""
    threads.use_idle_cores()  # as for training, so that the report shows the same number of threads
    from lorakit.cli import doctor

    lines = doctor.examine()
    if args.json:
        print_json(doctor.to_json(lines))
    else:
        print_lines(doctor.to_text(lines))
    return 0 if doctor.to_json(lines)["ready"] else 1


def run_options(args: argparse.Namespace) -> int:
    """`lorakit options`."""
    if args.json:
        print_json([describe_option(option) for option in configuration.every_option()])
    elif args.markdown:
        print_lines(options_page().rstrip("\n"))
    else:
        for option in configuration.every_option():
            described = describe_option(option)
            print_lines(f"{option.key} = {described['default']}  ({described['values']})", f"    {option.help}")
    return 0


def run_ui(arguments: Sequence[str]) -> int:
    """`lorakit ui`. The front end parses its own options (`lorakit ui --help`)."""
    if not _has("gradio"):
        raise LorakitError("the front end needs gradio; {hint}", install.hint("ui"))
    # Imported by name, because the packages ui and cli may not import each other.
    with quick_imports():
        app = import_module("lorakit.ui.app")
    return int(app.main(arguments))


# -- from arguments to a config -----------------------------------------------------------------------------------


def describe_option(option: configuration.Option) -> dict[str, Any]:
    """The key, allowed values, default and help of an option, as texts."""
    import types
    import typing

    kind = option.type
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    names: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    names |= {dict[str, str]: "table of texts"}
    names |= {dict[str, Any]: "table", dict[str, int]: "table of whole numbers", dict[str, float]: "table of numbers"}
    choices = option.choices or (typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ())
    if typing.get_origin(kind) is tuple:
        values = (
            f"list of {', '.join(choices)}"
            if choices
            else f"list of {'whole numbers' if typing.get_args(kind)[0] is int else 'texts'}"
        )
    else:
        values = ", ".join(choices) if choices else names[kind]
        values += ", module:Class" if option.import_path else f", {option.numbered}:1" * bool(option.numbered)
    if option.low is not None:
        values += (
            f", {format_bound(option.low)} to {format_bound(option.high)}"
            if option.high is not None
            else f", {option.low:g} or more"
        )
    if option.above is not None:
        values += f", above {option.above:g}"
    default = option.automatic or "unset" if option.default is None else json.dumps(option.default, ensure_ascii=False)
    return {"key": option.key, "values": values, "default": default, "help": option.help}


def options_page() -> str:
    """The text of docs/options.md: a table of options for each section, from config/schema.py."""
    lines = [
        "# Options",
        "",
        "Made from `lorakit/config/schema.py` by `lorakit options --markdown`; do not edit it by hand.",
        "",
    ]
    lines += ["Write an option into a preset (`[train]`, `steps = 200`), or give it as `--set train.steps=200`."]
    header = ["| Option | Default | Values | Effect |", "| --- | --- | --- | --- |"]
    for section in configuration.SECTIONS:
        purpose = (configuration.section_type(section).__doc__ or "").splitlines()[0]
        lines += ["", f"## {section}", "", purpose, "", *header]
        for option in configuration.every_option():
            if option.section == section:
                described = describe_option(option)
                lines.append(f"| `{option.key}` | `{described['default']}` | {described['values']} | {option.help} |")
    return "\n".join(lines) + "\n"


# -- output and errors --------------------------------------------------------------------------------------------


def _tolerate_any_character(stream: TextIO) -> None:
    """Write "?" for a character that the stream cannot encode, e.g. under LC_ALL=C, instead of raising."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _log(error: BaseException) -> str:
    """Write the traceback of an unexpected error into a file. Return its path, or a text if no file can be written."""
    try:
        handle, name = tempfile.mkstemp(prefix="lorakit-error-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
        return name
    except OSError:
        return "no file: none can be written"


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
