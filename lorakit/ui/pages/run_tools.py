"""Actions on a run: show and reuse its settings, name it, add a note, compare its loss, and put it aside."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

import gradio as gr

from lorakit import config as configuration
from lorakit.core import atomic, foreign_json
from lorakit.core.errors import LorakitError
from lorakit.runs import charts
from lorakit.runs.run_folder import LIVE, RunFolder, State, read
from lorakit.ui import form, widgets
from lorakit.ui.tasks import Progress, Values, polled
from lorakit.ui.texts import Say
from lorakit.ui.widgets import ACT, FOLLOW, say_for
from lorakit.ui.workspace import TRASH, Workspace

NOTE = "note.json"
MAX_TEXT = 2000
# Matches one setting in the advice about memory, e.g. `memory.base_storage = 'nf4'`.
SETTING = re.compile(r"\b([a-z]+\.[a-z_]+) = ('[^']*'|true|false|\d+)")
REMEDY = """
element.addEventListener('click', ({target}) => {
  if (target.dataset.remedy) trigger('select', {settings: target.dataset.remedy});
});
"""
# Asks for permission to show notifications, which browsers allow only on a click. runs.py sends the notifications.
NOTIFY = "() => { window.Notification?.requestPermission(); }"


class RunTools:
    """Builds this part of the run page and handles its events, except those of `reuse` and `remedies` (see app.py)."""

    def __init__(self, workspace: Workspace, t: gr.I18n, run_name: gr.BrowserState):
        self.workspace, self.run_name = workspace, run_name
        self.remedies = widgets.html(elem_id="run-remedies", js_on_load=REMEDY)
        with gr.Accordion(t("tools.title"), open=False, visible=False, elem_id="run-tools") as self.all:
            with gr.Row(equal_height=True):
                self.reuse = gr.Button(t("tools.again"), visible=False, elem_id="run-again")
                self.save_now = gr.Button(t("tools.save_now"), visible=False, elem_id="run-save-now")
                self.sample_now = gr.Button(t("tools.sample_now"), visible=False, elem_id="run-sample-now")
                self.first = gr.Button(t("tools.first"), visible=False, elem_id="run-first")
                self.earlier = gr.Button(t("tools.earlier"), visible=False, elem_id="run-earlier")
                self.later = gr.Button(t("tools.later"), visible=False, elem_id="run-later")
                self.notify = gr.Button(t("tools.notify"), visible=False, elem_id="run-notify")
                self.delete = gr.Button(t("tools.delete"), visible=False, variant="stop", elem_id="run-delete")
            with gr.Column(visible=False, elem_id="run-words") as self.words:
                with gr.Row(equal_height=False):
                    self.title = gr.Textbox(label=t("tools.name"), max_length=80, elem_id="run-title")
                    self.note = gr.Textbox(label=t("tools.note"), lines=2, max_length=MAX_TEXT, elem_id="run-note")
                self.keep = gr.Button(t("tools.keep"), elem_id="run-keep")
            self.message = widgets.html(elem_id="run-tools-message")
            self.other = gr.Dropdown([], label=t("tools.other"), filterable=False, elem_id="run-other")
            self.overlay = widgets.html(elem_id="run-overlay")
            self.settings = widgets.html(elem_id="run-settings")

    def wire(self, page: gr.Blocks) -> None:
        """Connect the events to the handlers."""

        def show(name: str, request: gr.Request) -> list[object]:
            return self.show(name or "", say_for(request))

        def overlay(data: Values, say: Say, progress: Progress) -> list[str]:
            return [self.overlay_of(data[self.run_name] or "", data[self.other] or "", say)]

        def keep(name: str, title: str, note: str, request: gr.Request) -> str:
            return self.keep_note(name or "", title or "", note or "", say_for(request))

        def with_words(act: Callable[[str, Say], str]) -> Callable[[str, gr.Request], str]:
            def handler(name: str, request: gr.Request) -> str:
                return act(name or "", say_for(request))

            return handler

        outputs = [self.title, self.note, self.message, self.other, self.overlay, self.settings, self.remedies]
        gr.on([page.load, self.run_name.change], show, self.run_name, outputs, **FOLLOW)
        self.notify.click(None, js=NOTIFY)
        both = {self.run_name, self.other}
        polled(self.workspace.tasks, [(self.other.input, overlay)], both, [self.overlay])
        self.keep.click(keep, [self.run_name, self.title, self.note], self.message, **ACT)
        acts = [(self.save_now, self.ask_save), (self.sample_now, self.ask_samples), (self.first, self.put_first)]
        acts += [(self.earlier, self.put_earlier), (self.later, self.put_later)]
        for button, act in [*acts, (self.delete, self.put_aside)]:
            button.click(with_words(act), self.run_name, self.message, **ACT)

    @property
    def parts(self) -> dict[str, gr.components.Component | gr.blocks.BlockContext]:
        """What is visible only for runs of some states, by the keys of `visible`."""
        return {
            "tools": self.all, "again": self.reuse, "save_now": self.save_now, "sample_now": self.sample_now,
            "first": self.first, "earlier": self.earlier, "later": self.later, "notify": self.notify,
            "delete": self.delete, "words": self.words,
        }  # fmt: skip

    def visible(self, name: str, state: State | None) -> dict[str, bool]:
        """Whether each of `parts` is of use for the run as it is now."""
        if state is None:
            return dict.fromkeys(self.parts, False)
        run, waits = RunFolder(self.workspace.run(name)), state.state == "waiting"
        trains, is_live = state.state == "running", state.state in LIVE
        return {"tools": True, "again": run.config_file.is_file(), "words": run.path.is_dir()} | {
            **dict.fromkeys(("save_now", "sample_now"), trains),
            **dict.fromkeys(("first", "earlier", "later"), waits),
            "notify": is_live or waits,
            "delete": not (is_live or waits),
        }

    def show(self, name: str, say: Say) -> list[object]:
        """The outputs for one run: title, note, empty message, other runs, empty chart, settings, remedies."""
        others = [other for other, _ in self.workspace.runs_and_jobs() if other != name]
        choices = gr.update(choices=["", *others], value="")
        try:
            run = RunFolder(self.workspace.run(name))
        except LorakitError:
            return ["", "", "", choices, "", "", ""]
        note = note_of(run.path)
        settings = run.config_file.read_text(encoding="utf-8") if run.config_file.is_file() else ""
        title = escape(say("tools.settings"))
        text = f"<h2>{title}</h2><pre tabindex=0>{escape(form.without_local(settings))}</pre>" if settings else ""
        return [note["title"], note["note"], "", choices, "", text, self.remedies_of(run, say)]

    def remedies_of(self, run: RunFolder, say: Say) -> str:
        """HTML with a button for each of the first three remedies in a run's message about too little memory."""
        try:
            message = read(run.path).message
        except LorakitError:
            return ""
        ways = [SETTING.findall(way) for way in message.split(", ")] if "not enough memory" in message else []
        buttons = []
        for way in [way for way in ways if way][:3]:
            label = " + ".join(f"{say(f'option.{key}')}: {value}" for key, value in way if key in form.fields())
            settings = escape(json.dumps(dict(way)))
            buttons.append(f'<button type=button data-remedy="{settings}">{escape(label)}</button>')
        head = escape(say("tools.remedies"))
        return f"<p class=lk-remedies>{head} {' '.join(buttons)}</p>" if buttons else ""

    def answers_of(self, name: str, settings: str = "{}") -> dict[str, object]:
        """The values of the form's widgets for a run's settings.

        Args:
            settings: overrides as a JSON object (option -> TOML value).

        Raises:
            LorakitError: there is no such run, or its settings cannot be read.
        """
        file = RunFolder(self.workspace.run(name)).config_file
        if not file.is_file():
            raise LorakitError("{name}: its settings are missing", name)
        changes = foreign_json.loads_table(settings)
        overrides = dict(configuration.parse_override(f"{key}={value}") for key, value in changes.items())
        return form.values(configuration.load(file, overrides))

    def has_own_notify(self, name: str) -> bool:
        """Whether a run has its own `output.notify`, different from that of the front end."""
        file = RunFolder(self.workspace.run(name)).config_file
        return configuration.load(file).output.notify not in ("", self.workspace.notify)

    def overlay_of(self, name: str, other: str, say: Say) -> str:
        """HTML of a chart with the smoothed loss of two runs, or "" if no second run is chosen."""
        lines = []
        for run_name, colour in ((name, "accent"), (other, "ink")):
            if not run_name:
                return ""
            events = RunFolder(self.workspace.run(run_name)).events("step")
            points = [(float(event["step"]), event.get("smoothed_loss")) for event in events if "step" in event]
            finite = [(step, loss) for step, loss in points if isinstance(loss, float)]
            lines.append(charts.Line(run_name, sorted(dict(finite).items()), colour))
        figure = charts.chart(say("chart.loss"), lines)
        return f"<style>{charts.STYLE}</style><div class=lk-charts tabindex=0>{figure}</div>" if figure else ""

    def keep_note(self, name: str, title: str, note: str, say: Say) -> str:
        """Save the name and the note of a run. Its folder keeps its name. Return a message."""
        try:
            path = self.workspace.run(name)
            if not path.is_dir():
                return widgets.problem(say("error.gone"))
            words = {"title": " ".join(title.split())[:80], "note": note[:MAX_TEXT]}
            atomic.write(path / NOTE, json.dumps(words, ensure_ascii=False))
        except LorakitError as problem:
            return widgets.problem(say.translate(str(problem)))
        except OSError as error:
            return widgets.problem(widgets.system_error(error, say))
        return widgets.good(say("tools.kept"))

    def ask_save(self, name: str, say: Say) -> str:
        """Ask a run to save a checkpoint. Return a message."""
        return self._ask(name, "save", say)

    def ask_samples(self, name: str, say: Say) -> str:
        """Ask a run to draw sample pictures. Return a message."""
        return self._ask(name, "sample", say)

    def _ask(self, name: str, what: str, say: Say) -> str:
        try:
            path = self.workspace.run(name)
            if read(path).state not in LIVE:
                return widgets.problem(say("tools.not_running"))
            RunFolder(path).request(what)
        except LorakitError as problem:
            return widgets.problem(say.translate(str(problem)))
        return widgets.good(say("tools.soon"))

    def put_first(self, name: str, say: Say) -> str:
        """Move a waiting run to the front of the queue. Return a message."""
        return self._move(name, -len(self.workspace.queue.waiting()), say)

    def put_earlier(self, name: str, say: Say) -> str:
        """Move a waiting run one place forward in the queue. Return a message."""
        return self._move(name, -1, say)

    def put_later(self, name: str, say: Say) -> str:
        """Move a waiting run one place back in the queue. Return a message."""
        return self._move(name, 1, say)

    def _move(self, name: str, places: int, say: Say) -> str:
        queue = self.workspace.queue
        for job in queue.waiting():
            if Path(job.folder).name == name and queue.move(job.number, places):
                place = [other.number for other in queue.waiting()].index(job.number)
                return widgets.good(say("tools.place", place=place + 1) if place else say("tools.is_first"))
        return widgets.problem(say("tools.not_waiting"))

    def put_aside(self, name: str, say: Say) -> str:
        """Move an ended run into the hidden folder `TRASH` without deleting anything. Return a message."""
        try:
            path = self.workspace.run(name)
            state = dict(self.workspace.runs_and_jobs()).get(name)
            if state is None:
                return widgets.problem(say("error.gone"))
            if state.state in (*LIVE, "waiting"):
                return widgets.problem(say("tools.still_runs"))
            target = self.workspace.runs / TRASH / name
            target.parent.mkdir(exist_ok=True)
            if path.is_dir():
                path.rename(target)
            else:  # the run ended before it created its folder
                target.mkdir()
        except LorakitError as problem:
            return widgets.problem(say.translate(str(problem)))
        except OSError as error:
            return widgets.problem(widgets.system_error(error, say))
        return widgets.good(say("tools.deleted", place=str(target)))


def note_of(path: Path) -> dict[str, str]:
    """The name and the note that the user gave to a run, each "" if there is none."""
    try:
        words = foreign_json.loads_table((path / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        words = {}
    return {key: str(words.get(key, "")) for key in ("title", "note")}
