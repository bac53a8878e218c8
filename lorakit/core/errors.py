"""Errors for the person who can fix them."""

from collections.abc import Iterable


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
