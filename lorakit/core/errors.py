"""Errors for the person who can fix them."""

from collections.abc import Iterable
from pathlib import Path

from lorakit.core.messages import Message, join
from lorakit.core.names import quote


class LorakitError(Exception):
    """A mistake or a condition that the user can do something about.

    Its text says in one line what is wrong, where, and what to do. The command line prints it without a traceback and
    exits with a code that is not 0.

    Args:
        text: the message, or its template where values are given: `LorakitError("{file} is empty", path.name)`.
    """

    def __init__(self, text: str = "", /, *values: object):
        super().__init__(Message(text, *values) if values else text)


class ConfigError(LorakitError):
    """Something is wrong with what the user asked for. `problems` holds one line for each thing that is wrong.

    Args:
        problems: the lines, or the template of the only one, whose values follow.
    """

    def __init__(self, problems: str | Iterable[str], /, *values: object):
        self.problems: list[str] = [Message(problems, *values)] if isinstance(problems, str) else list(problems)
        super().__init__(join("\n", self.problems))


class MissingFile(ConfigError):
    """A file that the user named does not exist."""


class StopRequested(Exception):
    """A stop was requested and the work was interrupted. The run raises `Stopped` for it."""


class Stopped(Exception):
    """The run was stopped on request, after it saved what it had.

    Attributes:
        folder: the run folder.
        step: optimizer steps done.
        adapter: the adapter of that step, or None where none was exported.
    """

    def __init__(self, folder: Path, step: int, adapter: Path | None = None):
        self.folder, self.step, self.adapter = folder, step, adapter
        when = Message("stopped after step {step}", step) if step else "stopped before the first step"
        super().__init__(Message("{when}; go on with: lorakit resume {folder}", when, quote(folder)))
