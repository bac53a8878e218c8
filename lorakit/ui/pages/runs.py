"""The page of runs: the state, charts, pictures and log of each run, and the buttons that stop and resume it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lorakit.core import foreign_json
from lorakit.core.errors import LorakitError
from lorakit.core.messages import KEY_LINE, Message, from_json
from lorakit.runs.run_folder import LIVE, RunFolder, State, read
from lorakit.ui import address, widgets
from lorakit.ui.pages import compare, run_log, viewer
from lorakit.ui.pages.run_tools import RunTools, note_of
from lorakit.ui.tasks import Steps, Values, polled
from lorakit.ui.texts import Say
from lorakit.ui.widgets import ACT, EACH, FOLLOW, Details, say_for
from lorakit.ui.workspace import Workspace

# Seconds between two reads of the run folders: while a run is live or waits, and otherwise.
EVERY, EVERY_IDLE = 1.0, 5.0
# Number of lines of the process's own output that the page shows.
OUTPUT_LINES = 60
# Seconds without a write after which the page shows the time of a run's last write.
SILENT = 20
SAMPLE_SIDE, RESULT_SIDE = 640, 320
# Message for a run whose process ended without a message.
ENDED_SILENTLY = (
    "its process ended without a message: it was killed, the machine was restarted, or its memory ran "
    "out; Resume continues from the last checkpoint"
)
# Names of the checks of an exported file in the run's report.
CHECKS = ("{format} file", "{format} in diffusers", "{format} unet", "{format} text encoder", "{format} weights")
RESUMABLE = ("interrupted", "stopped", "failed", "done")
CHOOSE = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-run]');
  if (button) trigger('select', {run: button.dataset.run});
});
const states = new Map(), lives = (state) => state === 'preparing' || state === 'running';
const tell = () => {
  for (const button of element.querySelectorAll('[data-run]')) {
    const before = states.get(button.dataset.run), text = button.innerText.replace(/\\s+/g, ' ');
    states.set(button.dataset.run, button.dataset.state);
    if (!lives(before) || lives(button.dataset.state)) continue;
    document.title = `${text} · lorakit`;
    if (window.Notification?.permission === 'granted') new Notification('lorakit', {body: text});
  }
};
new MutationObserver(tell).observe(element, {childList: true, subtree: true});
"""

# Scrolls the log to its end after each change, unless the user has scrolled up.
FOLLOW_LOG = """
let follows = true;
const isAtEnd = (log) => log.scrollHeight - log.scrollTop - log.clientHeight < 8;
element.addEventListener('scroll', ({target}) => { follows = isAtEnd(target); }, true);
const scroll = () => {
  const log = element.querySelector('pre');
  if (log && follows) log.scrollTop = log.scrollHeight;
};
new MutationObserver(scroll).observe(element, {childList: true, subtree: true, characterData: true});
new ResizeObserver(scroll).observe(element);  // a log in a hidden tab has no height, so scroll when its tab opens
"""


class RunsPage:
    """Builds the page and handles its events. `run_name` is the name of the run on display, stored in the browser."""

    def __init__(self, workspace: Workspace, t: gr.I18n, run_name: gr.BrowserState):
        self.workspace, self.run_name = workspace, run_name
        # Hash of each part of the page in the browser, so that only changes are sent.
        self.screen_hashes = gr.State({})
        self.timer = gr.Timer(EVERY, render=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=260):
                self.list = widgets.html(elem_id="runs-list", js_on_load=CHOOSE)
                self.cards = widgets.html(elem_id="card-line")
                self.work = gr.Button(t("run.work"), visible=False, size="sm", elem_id="queue-start")
            with gr.Column(scale=3, min_width=320):
                self.status = widgets.html(elem_id="run-status")
                with gr.Row():
                    self.stop = gr.Button(t("run.stop"), variant="stop", visible=False, elem_id="run-stop")
                    self.resume = gr.Button(t("run.resume"), variant="primary", visible=False, elem_id="run-resume")
                    self.steps = gr.Number(
                        label=t("run.steps"), precision=0, minimum=0, value=0, visible=False, elem_id="run-steps"
                    )
                    self.cancel = gr.Button(t("run.cancel"), visible=False, elem_id="run-cancel")
                    self.download = gr.DownloadButton(t("run.download"), visible=False, elem_id="run-download")
                self.message = widgets.html(elem_id="run-message")
                self.tools = RunTools(workspace, t, run_name)
                self.samples = widgets.html(elem_id="run-samples", js_on_load=compare.TAKE)
                self.taking = widgets.html(elem_id="run-taking")
                self.file = gr.File(label=t("adapter.file"), visible=False, elem_id="run-file")
                with (
                    gr.Accordion(t("run.view"), open=False, visible=False, elem_id="run-view") as self.view,
                    gr.Row(equal_height=False),
                ):
                    self.smoothing = gr.Slider(
                        0, 0.99, 0, step=0.01, label=t("run.smoothing"), info=t("run.smoothing_help")
                    )
                    self.start = gr.Radio(
                        [(t("run.all_steps"), 0.0), (t("run.last_half"), 0.5), (t("run.last_tenth"), 0.9)],
                        value=0.0,
                        label=t("run.zoom"),
                        elem_id="run-zoom",
                    )
                self.curves = widgets.html(elem_id="run-curves")
                self.log = widgets.html(elem_id="run-log", js_on_load=FOLLOW_LOG)

    def wire(self, page: gr.Blocks) -> None:
        """Connect the events to the handlers.

        After every action the same listener reads the files. With two listeners, the answers could overlap, and
        `screen_hashes` would not match the page.
        """

        self.tools.wire(page)

        def poll(
            run_name: str, screen_hashes: dict[str, Any], smoothing: float, start: float, request: gr.Request
        ) -> list[Any]:
            linked_name = "" if screen_hashes else address.run_in(request)  # only for the first answer
            name, *others = self.poll(
                linked_name or run_name or "", screen_hashes, say_for(request), (smoothing or 0.0, start or 0.0)
            )
            return [name if isinstance(name, str) or not linked_name else linked_name, *others]

        def choose(event: Details) -> tuple[str, str, int]:
            return event.run, "", 0  # reset the number of steps, which belongs to the previous run

        def with_words(act: Callable[[str, Say], str]) -> Callable[[str, gr.Request], str]:
            def handler(run_name: str, request: gr.Request) -> str:
                return act(run_name or "", say_for(request))

            return handler

        self.timer.render()  # not in the page's tab, whose components exist only after it was opened
        looks = [self.timer.tick, page.load, self.run_name.change, self.message.change, self.tools.message.change]
        looks += [self.smoothing.release, self.start.input]
        gr.on(looks, poll, [self.run_name, self.screen_hashes, self.smoothing, self.start], self.outputs, **FOLLOW)
        self.list.select(choose, None, [self.run_name, self.message, self.steps], **EACH)
        for button, act in ((self.stop, self.ask_stop), (self.cancel, self.take_out)):
            button.click(with_words(act), self.run_name, self.message, **ACT)

        def go_on(run_name: str, steps: float | None, request: gr.Request) -> str:
            return self.go_on(run_name or "", say_for(request), int(steps or 0))

        self.resume.click(go_on, [self.run_name, self.steps], self.message, **ACT)
        self._wire_files()
        self.work.click(lambda: self.workspace.queue.start(), None, None, **ACT)

    def _wire_files(self) -> None:
        """Connect the buttons that download a checkpoint's file."""
        step = gr.State(0)

        def choose(event: Details) -> int:
            return int(event.step)

        def take(data: Values, say: Say, progress: Steps) -> tuple[str, object]:
            return compare.export_step(self.workspace, data[self.run_name], data[step], "", say, progress)

        inputs, outputs = {self.run_name, step}, [self.taking, self.file]
        event = self.samples.select(choose, None, step, **EACH)
        polled(self.workspace.tasks, [(event.then, take)], inputs, outputs, **ACT)
        self.run_name.change(lambda: ("", gr.update(visible=False, value=None)), None, outputs, **FOLLOW)

    @property
    def outputs(self) -> list[Any]:
        """The outputs of `poll`."""
        return [
            self.run_name, self.screen_hashes, self.list, self.work, self.status, self.stop, self.resume, self.steps,
            self.cancel, self.download, self.samples, self.curves, self.log, self.message, self.cards, self.view,
            self.timer, *self.tools.parts.values(),
        ]  # fmt: skip

    def poll(
        self, run_name: str, screen_hashes: dict[str, Any], say: Say, view: tuple[float, float] = (0.0, 0.0)
    ) -> list[Any]:
        """Read the files and return the outputs. A part with the same hash as in `screen_hashes` is not sent again.

        Args:
            run_name: run on display. If it does not exist, a running one or the first one is shown.
            screen_hashes: part of the page -> hash of its content in the browser.
            view: smoothing and start of the charts, see `charts.run_charts`.
        """
        runs = self.workspace.runs_and_jobs()
        names = [name for name, _ in runs]
        if run_name not in names:
            live = [name for name, state in runs if state.state in LIVE]
            current_name = (live or names or [""])[0]
        else:
            current_name = run_name
        waiting = sum(state.state == "waiting" for _, state in runs)
        idle = waiting > 0 and not self.workspace.queue.is_working()
        titles = {name: note_of(self.workspace.runs / name)["title"] for name in names}
        parts = {"list": _list(runs, titles, current_name, idle, say), "work": idle, "cards": self._cards(say)}
        parts |= self._run(current_name, dict(runs).get(current_name), say, view)
        parts |= self.tools.visible(current_name, dict(runs).get(current_name))
        moves = any(state.state in (*LIVE, "waiting") for _, state in runs)
        parts["timer"] = EVERY if moves else EVERY_IDLE
        hashes: dict[str, object] = {part: hash(str(value)) for part, value in parts.items()}
        # A button's message is removed when the run changes its state.
        state = f"{current_name} {dict(runs)[current_name].state}" if current_name else ""
        outdated = screen_hashes.get("state", state) != state
        hashes["state"] = state
        updates = {
            part: value if screen_hashes.get(part) != hashes[part] else gr.skip() for part, value in parts.items()
        }
        visible = {
            part: gr.update(visible=updates[part]) if isinstance(updates[part], bool) else updates[part]
            for part in ("work", "stop", "steps", "cancel", "view", *self.tools.parts)
        }
        if isinstance(updates["timer"], float):
            updates["timer"] = gr.update(value=updates["timer"])
        if isinstance(updates["resume"], str):  # the button's variant, or "" to hide it
            variant = updates["resume"]
            updates["resume"] = gr.update(visible=bool(variant), variant=variant or "primary")
        if isinstance(updates["download"], str):
            has_ended = bool(current_name) and dict(runs)[current_name].state == "done"
            updates["download"] = gr.update(
                visible=bool(updates["download"]),
                value=updates["download"] or None,
                variant="primary" if has_ended else "secondary",
            )
        return [
            gr.skip() if current_name == run_name else current_name,
            gr.skip() if hashes == screen_hashes else hashes,
            updates["list"], visible["work"], updates["status"], visible["stop"], updates["resume"], visible["steps"],
            visible["cancel"], updates["download"], updates["samples"], updates["curves"], updates["log"],
            "" if outdated else gr.skip(), updates["cards"], visible["view"],
            updates["timer"], *(visible[part] for part in self.tools.parts),
        ]  # fmt: skip

    def _cards(self, say: Say) -> str:
        """HTML with the memory, load and temperature of each card, or "" if no card reports them."""
        lines = []
        for card in self.workspace.cards.latest():
            has_memory = card.used is not None and card.total is not None
            facts = [f"{widgets.memory(card.used or 0, say)} / {widgets.memory(card.total or 0, say)}"] * has_memory
            facts += [say("card.load", percent=card.load)] if card.load is not None else []
            facts += [f"{card.temperature} °C"] if card.temperature is not None else []
            lines.append(widgets.quiet(" · ".join([card.name, *facts])))
        return "".join(lines)

    def _run(self, name: str, state: State | None, say: Say, view: tuple[float, float]) -> dict[str, Any]:
        hidden: dict[str, Any] = dict.fromkeys(("stop", "steps", "cancel", "view"), False) | {
            "resume": "",
            "download": "",
        }
        if state is None:
            return hidden | {"status": widgets.quiet(say("run.none")), "samples": "", "curves": "", "log": ""}
        run = RunFolder(self.workspace.run(name))
        begun = run.state_file.is_file()
        resumable = state.state in RESUMABLE and begun and any(run.checkpoints.glob("step-*"))
        buttons = hidden | {
            "stop": state.state in LIVE and begun and not run.stop_requested,
            "resume": ("secondary" if state.state == "done" else "primary") if resumable else "",
            "steps": resumable,
            "cancel": state.state == "waiting",
        }
        output, curves = self._output(name), run_log.curves(run, state, say, view) if begun else ""
        download, remark = self._download(run, state, say)
        return buttons | {
            "status": _status(name, replace(state, message=self._reason(name, state)), run, say) + remark,
            "download": download,
            "samples": _samples(self.workspace, run, state, say),
            "view": bool(curves),
            "curves": curves,
            "log": run_log.log(run, output, say),
        }

    def _reason(self, name: str, state: State) -> str:
        """The run's message. For a failed or interrupted run without one, the errors of its job."""
        if state.message or state.state not in ("failed", "interrupted"):
            return state.message
        jobs = [job for job in self.workspace.queue.jobs() if Path(job.folder).name == name]
        return (self.workspace.why(jobs[-1].number) if jobs else "") or ENDED_SILENTLY

    def _output(self, name: str) -> str:
        """The last lines that the run's process printed."""
        jobs = [job for job in self.workspace.queue.jobs() if Path(job.folder).name == name]
        lines = self.workspace.queue.log(jobs[-1].number).splitlines() if jobs else []
        return "\n".join([line for line in lines if not line.startswith(KEY_LINE)][-OUTPUT_LINES:])

    def ask_stop(self, name: str, say: Say) -> str:
        """Ask the run to stop. Return a message."""
        try:
            path = self.workspace.run(name)
            read(path)
            RunFolder(path).request_stop()
        except LorakitError as problem:
            return widgets.problem(say.translate(str(problem)))
        return widgets.good(say("run.stop_asked"))

    def go_on(self, name: str, say: Say, steps: int = 0) -> str:
        """Add the continuation of a run to the queue. Return a message.

        Args:
            steps: new number of steps of the whole run; 0 keeps the number.
        """
        try:
            path = self.workspace.run(name)
            if read(path).state == "done" and steps <= read(path).step:
                return widgets.problem(say("run.steps_needed"))
            self.workspace.queue.resume(path, steps)
        except LorakitError as problem:
            return widgets.problem(say.translate(str(problem)))
        self.workspace.queue.start()
        return widgets.good(say("run.resumed", name=name))

    def take_out(self, name: str, say: Say) -> str:
        """Remove a waiting run from the queue. Return a message."""
        for job in self.workspace.queue.waiting():
            if Path(job.folder).name == name and self.workspace.queue.cancel(job.number):
                return widgets.good(say("run.cancelled", name=name))
        return widgets.problem(say("error.gone"))

    def _download(self, run: RunFolder, state: State, say: Say) -> tuple[str, str]:
        """The adapter where the browser may download it from, and why it is not there or not there yet."""
        adapter = run.path / Path(state.adapter).name
        if not state.adapter or not adapter.is_file():
            return "", ""
        try:
            staged = self.workspace.staged_soon(adapter)
        except LorakitError as problem:
            return "", widgets.problem(say.translate(str(problem)))
        return (str(staged), "") if staged else ("", widgets.quiet(say("run.copying", name=adapter.name)))


def _list(runs: list[tuple[str, State]], titles: dict[str, str], run_name: str, idle: bool, say: Say) -> str:
    if not runs:
        return ""
    items, places = [], iter(range(1, len(runs) + 1))
    for name, state in runs:
        title = escape(titles[name] or name)
        place = f"{next(places)}." if state.state == "waiting" else ""
        share = f"{100 * state.step // state.steps} %" if state.steps else ""
        current = " aria-current=true" if name == run_name else ""
        items.append(
            f'<li><button type="button" data-run="{escape(name)}" title="{escape(name)}" '
            f"data-state={state.state}{current}>"
            f"<span>{title}</span>"
            f"<span>{widgets.badge(state.state, say)} <small>{place}{share}</small></span></button></li>"
        )
    waiting = sum(state.state == "waiting" for _, state in runs)
    warning = widgets.problem(say("run.idle_queue", count=waiting)) if idle else ""
    return f"<h2>{escape(say('run.list'))}</h2>{warning}<ul class=lk-runs>{''.join(items)}</ul>"


def _status(name: str, state: State, run: RunFolder, say: Say) -> str:
    share = state.step / state.steps if state.steps else 0.0
    live = state.state in LIVE
    numbers = [
        (say("run.step"), f"{state.step} / {state.steps}" if state.steps else "", ""),
        (say("run.loss"), f"{state.loss:.4f}" if state.loss is not None else "", ""),
        (say("run.rate"), f"{state.learning_rate:.2e}" if state.learning_rate is not None else "", ""),
        (say("run.speed"), f"{state.images_per_second:.1f}" if state.images_per_second is not None else "", ""),
        (say("run.memory"), widgets.memory(state.memory_mib * 2**20, say) if state.memory_mib is not None else "", ""),
        (say("run.left"), widgets.duration(state.eta_s, say) if live and state.eta_s is not None else "", ""),
        (say("run.adapter"), state.adapter, ""),
    ]
    lines = [say.translate(state.message)] if state.message and not live else []
    if state.state == "preparing" and state.doing:
        lines.append(_doing(state, say))
    if live and run.stop_requested:
        lines.append(say("run.stop_asked"))
    if live and time.time() - state.updated > SILENT:
        lines.append(say("run.updated", ago=widgets.ago(state.updated, say)))
    text = "".join(f"<p>{escape(line)}</p>" for line in lines) + _findings(run, say)
    bar = (
        f'<div class="lk-bar" role="progressbar" aria-label="{escape(say("run.step"))}" aria-valuemin="0" '
        f'aria-valuemax="{state.steps}" aria-valuenow="{state.step}"><i style="width:{share:.1%}"></i></div>'
        if state.steps
        else ""
    )
    return (
        f'<section class=lk-panel data-state="{state.state}" data-step="{state.step}"><h2>{escape(name)} '
        f"{widgets.badge(state.state, say)}</h2>{bar}{widgets.facts(numbers)}{text}</section>"
    )


def _doing(state: State, say: Say) -> str:
    """The current work of the run before training, with its progress."""
    doing = say.translate(state.doing)
    return say("run.doing", doing=doing, position=state.position, total=state.total) if state.total else doing


def _findings(run: RunFolder, say: Say) -> str:
    """HTML with the findings of the run's report on the exported files and on what it learned, or ""."""
    try:
        report = foreign_json.loads_table(run.report_file.read_text(encoding="utf-8"))
        items = "".join(
            f"<li class=lk-{'fine' if one['passed'] else 'bad'}><b>{'✓' if one['passed'] else '✕'}</b> "
            f"{escape(_finding(str(one['name']), from_json(str(one['detail']), one), say))}</li>"
            for one in report["findings"]
        )
        lessons = [from_json(str(one["message"]), one) for one in report.get("lessons", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    checks = f"<h3>{escape(say('run.checks'))}</h3><ul class=lk-readers>{items}</ul>" if items else ""
    lines = "".join(f"<li>{escape(say.translate(line))}</li>" for line in lessons)
    return checks + (f"<h3>{escape(say('run.lessons'))}</h3><ul class=lk-warnings>{lines}</ul>" if lines else "")


def _finding(name: str, detail: str, say: Say) -> str:
    """Translate a finding of the report."""
    export, _, part = name.partition(" ")
    template = next((template for template in CHECKS if part and template.endswith(f" {part}")), "")
    return say.translate(Message("{name}: {detail}", Message(template, export) if template else name, detail))


def _samples(workspace: Workspace, run: RunFolder, state: State, say: Say) -> str:
    grids = run.sample_grids()
    steps = {*grids, *(int(path.parent.name[5:]) for path in run.checkpoints.glob("step-*/complete"))}
    if not steps:
        return widgets.quiet(say("run.no_samples")) if state.state in LIVE else ""
    figures, result = [], "" if state.state in LIVE else _result(workspace, run, max(grids, default=0), state.step, say)
    for row, step in enumerate(sorted(steps, reverse=True)):
        title = say("compare.step", step=step) if step else say("compare.base")
        picture = ""
        if step in grids:
            picture = viewer.button(workspace, grids[step], title, row, 0, side=SAMPLE_SIDE, wait=False)
        text = escape(title) + compare.take_button(run, step, say)
        figures.append(f"<figure>{picture}<figcaption>{text}</figcaption></figure>")
    title = escape(say("run.samples"))
    return f"{result}<h2>{title}</h2><div class=lk-samples tabindex=0 data-pictures>{''.join(figures)}</div>"


def _result(workspace: Workspace, run: RunFolder, last: int, end: int, say: Say) -> str:
    """HTML with the last pictures above those of the base, or "" if one of them is missing.

    Args:
        last: step of the last pictures.
        end: step at which the run ended.
    """
    rows = []
    for row, step in enumerate((last, 0)):
        title = say("compare.step", step=step) if step else say("compare.base")
        cells = "".join(
            f"<td>{viewer.button(workspace, path, title, row, column, side=RESULT_SIDE, wait=False)}</td>"
            for column, path in enumerate(run.sample_pictures(step))
        )
        rows.append(f"<tr><th scope=row>{escape(title)}</th>{cells}</tr>" if cells else "")
    if last == 0 or not all(rows):
        return ""
    heads = viewer.heads(run.sample_pictures(last))
    table = f"<table class=lk-compare>{heads}<tbody>{''.join(rows)}</tbody></table>"
    older = widgets.quiet(say("run.result_step", step=last, end=end)) if last < end else ""
    return f"<h2>{escape(say('run.result'))}</h2>{older}<div class=lk-scroll tabindex=0 data-pictures>{table}</div>"
