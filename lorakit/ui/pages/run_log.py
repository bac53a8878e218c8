"""The curves and the log on the page of runs."""

from __future__ import annotations

import functools
import time
from html import escape
from pathlib import Path

from lorakit.core.messages import from_json
from lorakit.runs import charts
from lorakit.runs.run_folder import LIVE, LogReader, RunFolder, State
from lorakit.ui.texts import Say

# Number of lines of the log that the page shows.
LOG_LINES = 200
# Text for the event of a run's end, which has no message.
ENDED = "done and checked"


def curves(run: RunFolder, state: State, say: Say, view: tuple[float, float]) -> str:
    """The curves of a run as HTML, or "" if it has none yet.

    Args:
        view: smoothing and start, see `charts.run_charts`.
    """
    try:
        size = run.log_file.stat().st_size
    except OSError:
        return ""
    labels = tuple(say(f"chart.{key}") for key in charts.ENGLISH)
    figures = "".join(_drawing(run.log_file, labels, view).charts(size, state.state in LIVE))
    title = escape(say("run.curves"))
    return (
        f"<style>{charts.STYLE}</style><h2>{title}</h2><div class=lk-charts tabindex=0>{figures}</div>"
        if figures
        else ""
    )


class _Drawing:
    """The charts of a growing log. They are redrawn so rarely that drawing takes at most a twentieth of the time."""

    def __init__(self, log: Path, labels: tuple[str, ...], view: tuple[float, float]):
        self.smoothing, self.start = view
        self.labels = dict(zip(charts.ENGLISH, labels, strict=True))
        self.log, self.size, self.due, self.figures = _reader(log, "step", "validation"), -1, 0.0, list[str]()

    def charts(self, size: int, grows: bool) -> list[str]:
        """The charts as SVG.

        Args:
            size: current size of the log in bytes.
            grows: whether the run is live. If not, the charts are redrawn at once.
        """
        start = time.monotonic()
        if size != self.size and (start >= self.due or not grows):
            self.size, self.figures = (
                size,
                charts.run_charts(self.log.events(), labels=self.labels, smoothing=self.smoothing, start=self.start),
            )
            self.due = start + 20 * (time.monotonic() - start)
        return self.figures


_drawing = functools.lru_cache(maxsize=8)(_Drawing)


@functools.lru_cache(maxsize=16)
def _reader(log: Path, *kinds: str) -> LogReader:
    return LogReader(log, *kinds)


def _messages(log: Path) -> list[tuple[str, str]]:
    """The last messages in the log as (mark, message). The mark of warnings and errors is "! "."""
    events = _reader(log, "message", "warning", "error", "done").events()[-LOG_LINES:]
    marks = {"warning": "! ", "error": "! "}
    return [(marks.get(e["event"], ""), from_json(str(e.get("message", ENDED)), e)) for e in events]


def log(run: RunFolder, output: str, say: Say) -> str:
    """The messages of a run and the last lines of its process, `output`, as HTML."""
    lines = _messages(run.log_file) if run.log_file.is_file() else []
    parts = []
    if lines:
        text = escape("\n".join(mark + say.translate(line) for mark, line in lines))
        parts.append(f"<details open><summary>{escape(say('run.log'))}</summary><pre tabindex=0>{text}</pre></details>")
    if output:
        parts.append(
            f"<details><summary>{escape(say('run.output'))}</summary><pre tabindex=0>{escape(output)}</pre></details>"
        )
    return "".join(parts)
