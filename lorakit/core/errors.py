"""Errors for the user."""

from collections.abc import Iterable
from pathlib import Path

from lorakit.core.messages import Message, join
from lorakit.core.names import quote


class LorakitError(Exception):
    """An error that the user can fix.

    Its text says in one line what is wrong, where, and what to do. The command line prints it without a traceback and
    exits with a non-zero code.

    Args:
        text: the message, or its template if values follow: `LorakitError("{file} is empty", path.name)`.
    """

    def __init__(self, text: str = "", /, *values: object):
        super().__init__(Message(text, *values) if values else text)


class ConfigError(LorakitError):
    """The user's options are wrong. `problems` has one line for each problem.

    Args:
        problems: the lines, or the template of a single line, whose values follow.
    """

    def __init__(self, problems: str | Iterable[str], /, *values: object):
        self.problems: list[str] = [Message(problems, *values)] if isinstance(problems, str) else list(problems)
        super().__init__(join("\n", self.problems))


class MissingFile(ConfigError):
    """A file that the user named does not exist."""


class StopRequested(Exception):
    """A stop was requested and the work was interrupted. The run turns it into `Stopped`."""


class Stopped(Exception):
    """The run was stopped on request, after it saved what it had.

    Attributes:
        folder: the run folder.
        step: optimizer steps done.
        adapter: the adapter of that step, or None if none was exported.
    """

    def __init__(self, folder: Path, step: int, adapter: Path | None = None):
        self.folder, self.step, self.adapter = folder, step, adapter
        when = Message("stopped after step {step}", step) if step else "stopped before the first step"
        super().__init__(Message("{when}; go on with: lorakit resume {folder}", when, quote(folder)))
