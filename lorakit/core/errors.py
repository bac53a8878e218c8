"""Errors for the person who can fix them."""

from collections.abc import Iterable
from pathlib import Path

from lorakit.core.names import quote


class LorakitError(Exception):
    """A mistake or a condition that the user can do something about.

    Its text says in one line what is wrong, where, and what to do. The command line prints it without a traceback and
    exits with a code that is not 0.
    """


class ConfigError(LorakitError):
    """Something is wrong with what the user asked for. `problems` holds one line for each thing that is wrong."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class MissingFile(ConfigError):
    """A file that the user named is not there."""


class StopRequested(Exception):
    """Somebody asked the run to stop, and work was broken off for it; the run turns it into `Stopped`."""


class Stopped(Exception):
    """The run was stopped on request, after it saved what it had.

    Attributes:
        folder: the run folder.
        step: optimizer steps done.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step
        when = f"after step {step}" if step else "before the first step"
        super().__init__(f"stopped {when}; go on with: lorakit resume {quote(folder)}")
