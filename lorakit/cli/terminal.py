"""Terminal output: lines and one progress bar, without the output of other libraries.

On a terminal the bar is redrawn in place. In a pipe or a file it is a line after every twentieth of the run. A failed
write never ends a run. If the reader or the terminal is closed, or the disk is full, the lines are dropped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from lorakit.core import messages
from lorakit.core.events import Event
from lorakit.core.messages import Message
from lorakit.core.names import printable
from lorakit.core.units import duration

# Shortest time between two redraws of the bar in seconds, and share of a run for each line in a pipe.
REDRAW_SECONDS = 0.1
SHARE_OF_A_LINE = 0.05
# Printed only with the first validation.
VALIDATION = "compare both figures with later ones: unlike the loss, they always use the same noise"

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "BITSANDBYTES_NOWELCOME": "1",
}
_LOGGERS = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
    "peft",
    "transformers",
    "xformers",
)


def quiet_libraries() -> None:
    """Silence the progress bars, logs and warnings of other libraries. Call it before they are imported.

    Environment variables of the user keep their values. Warnings stay on with `python -W` or PYTHONWARNINGS.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def open_streams() -> None:
    """Open the null device for each of stdin, stdout and stderr that is closed, e.g. by the shell or under pythonw.

    Otherwise a file that is opened later could get the number of the closed stream, and so the output of libraries.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123


def write(stream: TextIO, text: str) -> bool:
    """Write and flush. If that fails, return False and redirect the stream to the null device."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(_safe(text).encode(encoding, "replace").decode(encoding))
        stream.flush()
        return True
    except (OSError, ValueError):  # ValueError: the stream was closed
        # Without this, Python writes the rest of the buffer at exit and reports the error.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False


def _safe(text: str) -> str:
    """Escape control characters, except newlines, tabs, and a carriage return at the start or the end (for the bar)."""
    parts = re.split(r"(\A\r|\r\Z|[\n\t])", text)
    return "".join(part if part in ("\r", "\n", "\t") else printable(part) for part in parts)


def print_lines(*lines: str) -> None:
    """Write each line to stdout and flush."""
    write(sys.stdout, "".join(f"{line}\n" for line in lines))


def remark(*lines: str) -> None:
    """Write each line to stderr and flush."""
    write(sys.stderr, "".join(f"{line}\n" for line in lines))


def print_json(value: object) -> None:
    """Write a value to stdout as indented JSON in ASCII."""
    print_lines(json.dumps(value, indent=2, ensure_ascii=True))


def print_event(event: Event) -> None:
    """Write an event of a run to stdout as one line of JSON in ASCII, for the program that started this one."""
    print_lines(json.dumps(event.to_json(), ensure_ascii=True))


def complain(text: str) -> None:
    """Write each line of an error message to stderr, with the prefix of `messages.to_lines`."""
    write(sys.stderr, messages.to_lines(text))


def tell_step(number: int) -> None:
    """Write the number of the step that begins to stderr, for the program that started this one."""
    if os.environ.get(messages.KEYS):
        write(sys.stderr, f"{messages.STEP_LINE}{number}\n")


class Terminal:
    """Writes lines and a progress bar to one stream, and listens to the events of a run.

    Args:
        stream: stdout by default; the commands pass stderr if stdout carries JSON.
        clock: returns the time in seconds; tests replace it.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.stream = stream or sys.stdout
        self.clock = clock
        self.in_place = bool(getattr(self.stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"
        self.bar: Bar | None = None
        self._explanation = f" ({VALIDATION})"
        self._is_open = True

    def __call__(self, event: Event) -> None:
        """Show an event of a run as a line or on the progress bar."""
        if event.kind in ("message", "warning"):
            self.say(event.facts["message"], warning=event.kind == "warning")
        elif event.kind == "phase":
            self.close()
            if event.facts["phase"] == "training":
                self.bar = Bar(self, event.facts["steps"], event.step or 0, "training")
        elif event.kind == "work":
            self._work(**event.facts)
        elif event.kind == "progress" and self.bar is not None:
            self.bar.advance(event.step or 0, **event.facts)
        elif event.kind == "validation":
            mse, drift = event.facts["mse"], event.facts["prior_drift"]
            self.say(
                Message(
                    "step {step}: validation mse {mse:.4f}, prior drift {drift:.2%}{explanation}",
                    event.step,
                    mse,
                    drift,
                    self._explanation,
                )
            )
            self._explanation = ""

    def _work(self, doing: str, position: int, total: int) -> None:
        """Show the progress of work before or after training."""
        if self.bar is None or self.bar.what != doing:
            self.close()
            self.bar = Bar(self, total, 0, doing)
        self.bar.advance(position)

    def close(self) -> None:
        """End the bar, if there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, line: str = "", *, warning: bool = False) -> None:
        """Write one line above the bar. A warning starts with "warning: "."""
        redraw = self.bar is not None and self.bar.clear()
        self.write(("warning: " if warning else "") + line + "\n")
        if redraw and self.bar is not None:
            self.bar.draw()

    @contextmanager
    def progress(self, total: int, start: int = 0, what: str = "training") -> Iterator[Bar]:
        """Show a bar from `start` to `total`. Lines that `say` writes meanwhile appear above it."""
        self.bar = bar = Bar(self, total, start, what)
        try:
            yield bar
        finally:
            self.close()

    def write(self, text: str) -> None:
        """Write and flush. Never raises: after a failed write, all further text is dropped."""
        self._is_open = self._is_open and write(self.stream, text)


class Bar:
    """A progress bar."""

    def __init__(self, terminal: Terminal, total: int, start: int, what: str):
        self.terminal, self.total, self.position, self.what = terminal, total, start, what
        self._facts: list[str] = []
        self._draw_time = -1e9
        self._line_step = start
        self._width = 0

    def advance(
        self,
        position: int,
        loss: float | None = None,
        learning_rate: float | None = None,
        *,
        images_per_second: float | None = None,
        memory_mib: float | None = None,
        eta_s: float | None = None,
    ) -> None:
        """Move the bar to `position`. `loss` is the smoothed loss. Values that are None are not shown."""
        self.position = position
        figures = {
            "loss {:.4f}": loss,
            "lr {:.1e}": learning_rate,
            "{:.1f} images/s": images_per_second,
            "{:.0f} MiB": memory_mib,
        }
        self._facts = [form.format(value) for form, value in figures.items() if value is not None]
        if eta_s is not None and position < self.total:
            self._facts.append(f"{duration(eta_s)} left")
        self._show()

    def clear(self) -> bool:
        """Remove the bar from the screen. Return whether it was drawn."""
        if not self._width:
            return False
        self.terminal.write("\r" + " " * self._width + "\r")
        self._width = 0
        return True

    def draw(self) -> None:
        """Draw the bar in place, cut to the width of the terminal."""
        columns = shutil.get_terminal_size().columns - 1
        text = self.line()[:columns]
        room = columns - len(text) - 4
        if room >= 10:
            filled = round(min(room, 40) * self.position / max(self.total, 1))
            text = f"[{'#' * filled}{'.' * (min(room, 40) - filled)}] {text}"
        self.terminal.write("\r" + text + " " * max(0, self._width - len(text)))
        self._width, self._draw_time = len(text), self.terminal.clock()

    def line(self) -> str:
        """The current state as one line."""
        return "  ".join([f"{self.what} {self.position}/{self.total}", *self._facts])

    def close(self) -> None:
        """Leave the last state on the screen and end the line."""
        if self.terminal.in_place and self._width:
            self.draw()
            self.terminal.write("\n")
            self._width = 0
        elif not self.terminal.in_place and self.position > self._line_step:
            self._say_line()

    def _show(self) -> None:
        if self.terminal.in_place:
            if self.terminal.clock() - self._draw_time >= REDRAW_SECONDS or self.position == self.total:
                self.draw()
        elif (
            self.position - self._line_step >= SHARE_OF_A_LINE * self.total
            or self.position >= self.total > self._line_step
        ):
            self._say_line()

    def _say_line(self) -> None:
        self._line_step = self.position
        self.terminal.write(self.line() + "\n")
