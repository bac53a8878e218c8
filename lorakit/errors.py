"""What went wrong, for the person who can mend it."""


class LorakitError(Exception):
    """A mistake or a condition that the user can do something about.

    Its text says in one line what is wrong, where, and what to do. The command line prints it without a traceback and
    exits with a code that is not 0.
    """
