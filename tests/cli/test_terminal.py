"""The output to a terminal and to a pipe. An error of the output never ends a run."""

import ast
import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli import terminal
from lorakit.cli.terminal import Terminal
from lorakit.core.events import Event
from lorakit.core.units import duration


class Screen(io.StringIO):
    """A terminal that records its output."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def visible(self) -> list[str]:
        """Return the lines that a terminal shows. After a carriage return, text overwrites the line."""
        lines = []
        for text in self.getvalue().split("\n"):
            line: list[str] = []
            for part in text.split("\r"):
                line[: len(part)] = part
            lines.append("".join(line).rstrip())
        return lines


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")


def ticking(step: float = 1.0):  # type: ignore[no-untyped-def]
    """Return a clock that advances by `step` seconds with each call."""
    now = iter(range(10**9))
    return lambda: next(now) * step


def test_a_line_and_a_warning() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream)
    terminal.say("device: cpu")
    terminal.say("one photo is small", warning=True)
    assert stream.getvalue() == "device: cpu\nwarning: one photo is small\n"


def test_a_pipe_gets_a_line_for_each_twentieth_of_the_steps() -> None:
    stream = io.StringIO()
    with Terminal(stream).progress(400) as bar:
        for step in range(1, 401):
            bar.advance(step, 0.5, 1e-3, images_per_second=12.34, memory_mib=512.4, eta_s=400 - step)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[0] == "training 20/400  loss 0.5000  lr 1.0e-03  12.3 images/s  512 MiB  6 min left"
    assert lines[-1] == "training 400/400  loss 0.5000  lr 1.0e-03  12.3 images/s  512 MiB"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_run_that_ends_early_prints_its_last_step() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Terminal(stream).progress(100) as bar:
        bar.advance(3, 0.5)
        raise RuntimeError
    assert stream.getvalue() == "training 3/100  loss 0.5000\n"


def test_a_resumed_run_counts_from_its_first_new_step() -> None:
    stream = io.StringIO()
    with Terminal(stream).progress(100, 90) as bar:
        for step in range(91, 101):
            bar.advance(step)
    assert stream.getvalue().splitlines() == ["training 95/100", "training 100/100"]


def test_on_a_terminal_the_bar_stays_on_one_line() -> None:
    screen = Screen()
    with Terminal(screen, ticking()).progress(4, what="class images") as bar:
        for step in range(1, 5):
            bar.advance(step)
    assert screen.visible() == ["[########################################] class images 4/4", ""]
    assert "\x1b" not in screen.getvalue()


def test_the_bar_is_redrawn_at_a_limited_rate() -> None:
    screen = Screen()
    with Terminal(screen, ticking(0.01)).progress(1000) as bar:
        for step in range(1, 1001):
            bar.advance(step)
    assert screen.getvalue().count("\r") < 150
    assert screen.visible()[0].endswith("training 1000/1000")


def test_lines_appear_above_the_bar() -> None:
    screen = Screen()
    terminal = Terminal(screen, ticking())
    with terminal.progress(4) as bar:
        bar.advance(1)
        terminal.say("step 1: validation mse 0.1")
        terminal.say("out of memory", warning=True)
        bar.advance(2)
    above, warned, visible, rest = screen.visible()
    assert (above, warned, rest) == ("step 1: validation mse 0.1", "warning: out of memory", "")
    assert visible.endswith("training 2/4")


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_no_line_of_the_bar_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Screen()
    with Terminal(screen, ticking()).progress(4000) as bar:
        bar.advance(1000, 0.5, 1e-3, images_per_second=12.34, memory_mib=512.4, eta_s=1000)
        bar.advance(2000, 0.5)
    assert max(len(line) for line in screen.visible()) < columns
    assert screen.visible()[0].split("] ")[-1].startswith("training 2000/4000"[: columns - 1])


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    with Terminal(screen).progress(1) as bar:
        bar.advance(1)
    assert screen.getvalue() == "training 1/1\n"


def test_the_events_of_a_run_are_lines_and_a_bar() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream)
    facts = {"loss": 0.5, "learning_rate": 1e-3, "images_per_second": 2.0, "memory_mib": 64.0, "eta_s": 30.0}
    for event in (
        Event("message", None, {"message": "device: cpu"}),
        Event("phase", None, {"phase": "encoding the photos"}),
        Event("phase", 0, {"phase": "training", "steps": 20}),
        Event("step", 10, {"loss": 0.4}),
        Event("progress", 10, facts),
        Event("validation", 10, {"mse": 0.25, "prior_drift": 0.01}),
        Event("warning", None, {"message": "no room for samples"}),
        Event("validation", 20, {"mse": 0.2, "prior_drift": 0.02}),
        Event("progress", 20, facts),
        Event("phase", 20, {"phase": "checking the exported file"}),
        Event("progress", 20, facts),
    ):
        terminal(event)
    assert stream.getvalue().splitlines() == [
        "device: cpu",
        "training 10/20  loss 0.5000  lr 1.0e-03  2.0 images/s  64 MiB  30 s left",
        "step 10: validation mse 0.2500, prior drift 1.00% (compare both figures with later ones: unlike the loss, "
        "they always use the same noise)",
        "warning: no room for samples",
        "step 20: validation mse 0.2000, prior drift 2.00%",
        "training 20/20  loss 0.5000  lr 1.0e-03  2.0 images/s  64 MiB",
    ]


class Gone(io.StringIO):
    def __init__(self, code: int):
        super().__init__()
        self.code = code

    def write(self, text: str) -> int:
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF])
def test_a_terminal_that_goes_away_does_not_end_the_run(code: int) -> None:
    terminal = Terminal(Gone(code))
    terminal.say("nobody reads this")
    with terminal.progress(1) as bar:
        bar.advance(1, 1.0)
    assert bar.position == 1
    closed = io.StringIO()
    terminal = Terminal(closed)
    closed.close()
    terminal.say("nor this")


def test_a_character_outside_of_the_encoding_becomes_a_question_mark() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Terminal(stream).say("sks лиса")
    assert raw.getvalue() == b"sks ????\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1 s"),
        (45.4, "45 s"),
        (89, "89 s"),
        (90, "2 min"),
        (600, "10 min"),
        (5399, "1 h 30 min"),
        (7500, "2 h 5 min"),
        (86400 * 2, "2.0 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_libraries_print_no_warnings_and_no_tqdm_bars() -> None:
    script = (
        "from lorakit.cli.terminal import quiet_libraries; quiet_libraries()\n"
        "import logging, warnings, tqdm\n"
        "for _ in tqdm.tqdm(range(3)): pass\n"
        "logging.getLogger('bitsandbytes').warning('loud')\n"
        "logging.getLogger('transformers.models').warning('loud')\n"
        "warnings.warn('loud', FutureWarning)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (process.stdout, process.stderr) == ("", "")


def test_warnings_are_shown_with_the_option_of_python() -> None:
    script = (
        "from lorakit.cli.terminal import quiet_libraries; quiet_libraries(); import warnings; warnings.warn('loud')"
    )
    process = subprocess.run(
        [sys.executable, "-W", "default", "-c", script], capture_output=True, text=True, check=True
    )
    assert "loud" in process.stderr


def test_a_verbosity_of_the_user_is_not_changed() -> None:
    script = "import os, lorakit.cli.terminal as t; t.quiet_libraries(); print(os.environ['TRANSFORMERS_VERBOSITY'])"
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "info"}
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert process.stdout == "info\n"
    assert logging.getLogger("lorakit").level == logging.NOTSET


def test_control_characters_are_escaped():
    stream = io.StringIO()
    terminal = Terminal(stream)
    terminal.say("a\x1b[31m\x07\u202e\rb\udce9\tc\nd")
    assert stream.getvalue() == "a\\x1b[31m\\x07\\u202e\\rb\\xe9\tc\nd\n"


def test_commands_do_not_use_print() -> None:
    """`print` raises if the terminal is gone or the disk is full; `terminal.write` does not."""
    folder = Path(terminal.__file__).parent
    calls = [node for file in folder.glob("*.py") for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    names = {node.func.id for node in calls if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "print" not in names and "print_lines" in names


def test_work_before_training_has_its_own_bar() -> None:
    screen = Screen()
    terminal = Terminal(screen, ticking())
    for position in (12, 24):
        terminal(Event("work", None, {"doing": "drawing the class images", "position": position, "total": 42}))
    terminal(Event("work", None, {"doing": "encoding the class images", "position": 5, "total": 42}))
    terminal(Event("phase", 0, {"phase": "training", "steps": 4}))
    lines = screen.visible()
    assert [line.split("] ")[-1] for line in lines[:2]] == [
        "drawing the class images 24/42", "encoding the class images 5/42",
    ]  # fmt: skip
