"""One run in several processes, see `processes`."""

from lorakit.training.parallel.processes import (
    SINGLE,
    EndedElsewhere,
    Group,
    Processes,
    ProcessLost,
    SilentFolder,
    Tasks,
    card_problem,
    join,
    share,
)

__all__ = [
    "SINGLE",
    "EndedElsewhere",
    "Group",
    "ProcessLost",
    "Processes",
    "SilentFolder",
    "Tasks",
    "card_problem",
    "join",
    "share",
]
