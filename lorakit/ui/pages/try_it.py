"""The page that draws pictures with an adapter: prompts, strength, seed, and the base model for comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lorakit.core.errors import LorakitError
from lorakit.core.registry import FORMATS
from lorakit.runs import quickstart
from lorakit.runs.queue import Job
from lorakit.runs.run_folder import RunFolder
from lorakit.ui import commands, form, widgets
from lorakit.ui.pages import viewer
from lorakit.ui.tasks import Progress, Steps, Values, polled
from lorakit.ui.texts import Say
from lorakit.ui.widgets import ACT, FOLLOW, say_for
from lorakit.ui.workspace import Workspace

# Folder below the runs for the pictures, seconds between polls, and largest number of sets of pictures on the page.
TRIES, EVERY, MAX_TRIES = "tries", 1.0, 20
CELL = 320


class TryPage:
    """Builds the page and handles its events."""

    def __init__(self, workspace: Workspace, t: gr.I18n):
        self.workspace = workspace
        gr.Markdown(t("try.lead"), elem_classes="lk-lead")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=280), gr.Group():
                more: dict[str, Any] = {"allow_custom_value": True, "value": None}
                self.adapter = gr.Dropdown([], label=t("try.adapter"), elem_id="try-adapter", **more)
                self.prompts = gr.Textbox(lines=3, label=t("compare.prompts"), elem_id="try-prompts")
                self.base = gr.Dropdown([], label=t("option.model.base"), info=t("try.base_help"), **more)
            with gr.Column(scale=2, min_width=280), gr.Group():
                self.strength = gr.Slider(0, 1.5, 1, step=0.05, label=t("try.strength"), elem_id="try-strength")
                self.with_base = gr.Checkbox(True, label=t("try.with_base"), elem_id="try-with-base")
                self.seed = gr.Number(0, precision=0, minimum=0, label=t("try.seed"), elem_id="try-seed")
                self.steps = gr.Number(0, precision=0, minimum=0, label=t("try.steps"), elem_id="try-steps")
        self.draw = gr.Button(t("try.draw"), variant="primary", elem_id="try-draw")
        self.message = widgets.html(elem_id="try-message")
        self.count = widgets.html()  # changes with the number of sets of pictures
        self.pictures = widgets.html(elem_id="try-pictures")

    def wire(self, tab: gr.Tab) -> None:
        """Connect the events to the handlers.

        Call it outside of the tab, because a timer in a tab ticks only while the tab is open.
        """
        timer = gr.Timer(EVERY, active=False)
        inputs = {self.adapter, self.prompts, self.base, self.strength, self.with_base, self.seed, self.steps}

        def visit(adapter: str | None, request: gr.Request) -> list[object]:
            bases = ["", *map(str, self.workspace.bases())]
            return [self.choices(adapter), gr.update(choices=bases), *self.look(say_for(request))]

        def pictures(data: Values, say: Say, progress: Progress) -> list[str]:
            return [self.drawings(say, progress)]

        def draw(data: Values, say: Say, progress: Steps) -> tuple[str, object]:
            strengths = [0.0, data[self.strength]] if data[self.with_base] else [data[self.strength]]
            settings = {"sample.seed": data[self.seed], "sample.steps": data[self.steps]}
            name, prompts, base = (data[field] or "" for field in (self.adapter, self.prompts, self.base))
            problem = self.start(name, prompts, base, strengths, settings, say, progress)
            return (problem, gr.skip()) if problem else (self.status(say)[0], gr.Timer(active=True))

        def look(request: gr.Request) -> list[object]:
            return self.look(say_for(request))

        tab.select(visit, self.adapter, [self.adapter, self.base, self.message, self.count, timer], **FOLLOW)
        polled(self.workspace.tasks, [(self.draw.click, draw)], inputs, [self.message, timer], **ACT)
        timer.tick(look, None, [self.message, self.count, timer], **FOLLOW)
        polled(self.workspace.tasks, [(self.count.change, pictures)], set(), [self.pictures])

    def choices(self, adapter: str | None) -> object:
        """An update of the field of the adapter. The newest one is chosen if the field is empty."""
        names = self.adapters()
        return gr.update(choices=names, value=adapter or next(iter(names), None))

    def adapters(self) -> list[str]:
        """The adapter files of all runs, newest first, then their checkpoints, as paths below the runs."""
        checkpoints = [path.parent for path in self.workspace.runs.glob("*/checkpoints/step-*/complete")]
        newest = sorted(checkpoints, key=lambda path: -path.stat().st_mtime)
        return [path.relative_to(self.workspace.runs).as_posix() for path in (*self.workspace.adapters(), *newest)]

    def start(
        self,
        name: str,
        prompts: str,
        base: str,
        strengths: Sequence[float],
        settings: dict[str, int | None],
        say: Say,
        progress: Steps = lambda count, total, doing="": None,
    ) -> str:
        """Add a job that draws the pictures to the queue. Return an error message as HTML, or ""."""
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not name:
            return widgets.problem(say("adapter.none"))
        if not lines:
            return widgets.problem(say("try.no_prompt"))
        try:
            adapter, own_base = self._file(name, progress)
            model = form.resolve_path(quickstart.BASE, base, self.workspace.roots) if base else own_base
        except LorakitError as problem:
            return widgets.problem(say.explain(str(problem)))
        target = self.workspace.unused(TRIES)
        arguments = ["sample", str(adapter), "--output", str(target)]
        arguments.append("--strength=" + ",".join(f"{strength:g}" for strength in dict.fromkeys(strengths)))
        arguments += [f"--prompt={line}" for line in lines] + (["--base", model] if model else [])
        arguments += [f"--set={key}={int(value)}" for key, value in settings.items() if value]
        self.workspace.queue.command(arguments, target)
        self.workspace.queue.start()
        return ""

    def _file(self, name: str, progress: Steps) -> tuple[Path, str]:
        """The adapter file, and the base of its run or "". A checkpoint is exported the first time.

        Raises:
            LorakitError: there is no such file, or the export failed.
        """
        path = self.workspace.roots.resolve(self.workspace.runs / name)
        if not path.exists():
            raise LorakitError("{name}: there is no such file", name)
        run = next((parent for parent in path.parents if parent.parent == self.workspace.runs), None)
        base = ""
        if run is not None and RunFolder(run).config_file.is_file():
            base = quickstart.base_of(RunFolder(run).config_file)
        if run is None or path.parent != RunFolder(run).checkpoints:
            return path, base
        place = run / "exports" / path.name
        files = list(place.glob("*.safetensors"))
        files = files or commands.export(path, next(iter(FORMATS)), place, progress=progress)
        return files[0], base

    def look(self, say: Say) -> list[object]:
        """The progress of the drawing as HTML, a comment that counts the sets, and the timer that polls again."""
        line, going = self.status(say)
        return [line, f"<!-- {len(self._sets())} -->", gr.Timer(active=going)]

    def status(self, say: Say) -> tuple[str, bool]:
        """The state of the last job as HTML, and whether it waits or runs."""
        jobs = self.workspace.queue.jobs()
        own = [job for job in jobs if Path(job.folder).parent == self.workspace.runs / TRIES]
        if not own:
            return "", False
        job = own[-1]
        if job.state == "waiting":
            ahead = [Path(one.folder).name for one in jobs if one.number < job.number and _is_going(one)]
            return widgets.quiet(say("try.waiting", names=", ".join(ahead)) if ahead else say("state.waiting")), True
        if job.state == "running":
            return drawing_line(self.workspace, job, say), True
        if job.state != "done":
            why = say.explain(self.workspace.why(job.number)) or say(f"state.{job.state}")
            return widgets.problem(why), False
        return "", False

    def _sets(self) -> list[Path]:
        """The folders with finished sets of pictures, newest first."""
        grids = sorted((self.workspace.runs / TRIES).glob("*/grid.png"), reverse=True)
        return [grid.parent for grid in grids]

    def drawings(self, say: Say, progress: Progress = lambda count, total: None) -> str:
        """HTML with the newest sets of pictures. A set has a row for each strength and a column for each prompt."""
        text, folders = "", self._sets()[:MAX_TRIES]
        for number, folder in enumerate(folders, 1):
            progress(number, len(folders))
            text += self._drawing(folder, say)
        return text

    def _drawing(self, folder: Path, say: Say) -> str:
        rows: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("??-strength-*.png")):
            rows.setdefault(path.stem.partition("-strength-")[2], []).append(path)
        first = next(iter(rows.values()), [])
        cells, heads = "", viewer.heads(first)
        adapter = str(viewer.recipe_of(first[0]).get("adapter", "")) if first else ""
        title = " · ".join(part for part in (adapter, _time_of(folder)) if part)
        for row, (strength, paths) in enumerate(sorted(rows.items(), key=lambda one: float(one[0]))):
            name = say("try.at", strength=strength) if float(strength) else say("compare.base")
            pictures = "".join(
                f"<td>{viewer.button(self.workspace, path, name, row, column, side=CELL)}</td>"
                for column, path in enumerate(paths)
            )
            cells += f"<tr><th scope=row>{escape(name)}</th>{pictures}</tr>"
        return (
            f"<section class=lk-scroll tabindex=0 data-pictures><h2>{escape(title)}</h2>"
            f"<table class=lk-compare>{heads}<tbody>{cells}</tbody></table></section>"
        )


def drawing_line(workspace: Workspace, job: Job, say: Say) -> str:
    """The progress of a running job that draws pictures, as HTML."""
    seconds = widgets.ago(job.pid_start or time.time(), say)
    count, total = workspace.queue.pictures(job.number)
    if not total:
        return widgets.quiet(say("try.loading", time=seconds))
    return widgets.quiet(say("try.progress", count=count, total=total, time=seconds))


def _time_of(folder: Path) -> str:
    """The time in the name of a folder of `Workspace.unused`. Another name as it is."""
    try:
        return f"{datetime.strptime(folder.name, '%Y-%m-%d-%H%M%S-%f'):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return folder.name


def _is_going(job: Job) -> bool:
    return job.state in ("waiting", "running")
