"""The page that compares the pictures of a run's checkpoints, and draws grids of prompts and strengths on request."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from lorakit import config as configuration
from lorakit.config import sample_prompts
from lorakit.config.photo_edits import NO_EDIT, PhotoEdit
from lorakit.core import atomic, foreign_json, names
from lorakit.core.errors import LorakitError
from lorakit.core.registry import FORMATS
from lorakit.data import photo_folder
from lorakit.data.decode import Unreadable, decode
from lorakit.runs import quickstart, run_folder
from lorakit.runs.run_folder import RunFolder
from lorakit.ui import commands, widgets
from lorakit.ui.pages import viewer
from lorakit.ui.pages.try_it import drawing_line
from lorakit.ui.tasks import Progress, Steps, Values, polled
from lorakit.ui.texts import Say
from lorakit.ui.widgets import ACT, EACH, FOLLOW, Details, say_for
from lorakit.ui.workspace import Workspace, is_adapter

CELL = 320
# Largest number of photos in the search for the nearest one, and the side in pixels at which pictures are compared.
MAX_PHOTOS, LOOK = 200, 16
CHOICE = "choice.json"
# Folder for the requested grids in a run folder, and seconds between polls for them.
GRIDS, EVERY = "compare", 1.0

TAKE = """
element.addEventListener('click', ({target}) => {
  if (target.dataset.take) trigger('select', {step: Number(target.dataset.take)});
});
"""


class ComparePage:
    """Builds the page and handles its events."""

    def __init__(self, workspace: Workspace, t: gr.I18n):
        self.workspace = workspace
        gr.Markdown(t("compare.lead"), elem_classes="lk-lead")
        self.run = gr.Dropdown(choices=[], label=t("compare.run"), filterable=False, elem_id="compare-run")
        self.table = widgets.html(elem_id="compare-table", js_on_load=TAKE)
        with gr.Row(equal_height=False, visible=False) as self.choice:
            self.step = gr.Dropdown(
                choices=[], label=t("compare.mark_which"), filterable=False, min_width=220, elem_id="compare-step"
            )
            formats = list(FORMATS)
            self.format = gr.Radio(formats, value=formats[0], label=t("adapter.format"), elem_id="compare-format")
            with gr.Column(min_width=160):
                self.mark = gr.Button(t("compare.mark"), elem_id="compare-mark")
                self.export = gr.Button(t("compare.export"), variant="primary", elem_id="compare-export")
        self.message = widgets.html(elem_id="compare-message")
        self.file = gr.File(label=t("adapter.file"), visible=False, elem_id="compare-file")
        with gr.Accordion(t("compare.draw"), open=False, elem_id="compare-draw"):
            gr.Markdown(t("compare.draw_lead"))
            with gr.Row(equal_height=False):
                self.files = gr.CheckboxGroup(choices=[], label=t("compare.files"), elem_id="compare-files")
                self.prompts = gr.Textbox(lines=3, label=t("compare.prompts"), elem_id="compare-prompts")
                self.strengths = gr.Textbox("0, 0.5, 1", label=t("compare.strengths"), elem_id="compare-strengths")
            self.draw = gr.Button(t("compare.draw"), variant="primary", elem_id="compare-go")
            self.drawing = widgets.html(elem_id="compare-drawing")
        self.count = widgets.html()  # changes with the number of grids
        self.grids = widgets.html(elem_id="compare-grids")

    def wire(self, tab: gr.Tab) -> None:
        """Connect the events to the handlers.

        Call it outside of the tab, because a timer in a tab ticks only while the tab is open.
        """
        timer = gr.Timer(EVERY, active=False)
        grid_outputs = [self.drawing, self.count, timer]
        outputs = [self.table, self.choice, self.step, self.files, self.prompts, self.message, self.file]

        def runs(run_name: str | None) -> Any:
            commands.EXPORTER.prepare()
            names = self.runs()
            return gr.update(choices=names, value=run_name if run_name in names else next(iter(names), None))

        def show(data: Values, say: Say, progress: Progress) -> list[Any]:
            return self.show(data[self.run], say)

        def grid_status(name: str | None, request: gr.Request) -> list[Any]:
            return self.grid_status(name, say_for(request))

        def mark(data: Values, say: Say, progress: Progress) -> tuple[str, str]:
            return self.mark_best(data[self.run], data[self.step], say), self.table_of(data[self.run], say)

        def export(data: Values, say: Say, progress: Steps) -> tuple[str, Any]:
            return export_step(self.workspace, data[self.run], data[self.step], data[self.format], say, progress)

        def draw(data: Values, say: Say, progress: Progress) -> tuple[str, Any]:
            values = data[self.run], data[self.files], data[self.prompts], data[self.strengths]
            return self.draw_grids(*values, say, progress)

        def grids(data: Values, say: Say, progress: Progress) -> list[str]:
            return [self.grids_of(data[self.run], say, progress) if data[self.run] else ""]

        tasks = self.workspace.tasks
        visit = tab.select(runs, self.run, self.run, **FOLLOW)
        shows = polled(tasks, [(visit.then, show), (self.run.input, show)], {self.run}, outputs)
        shows(grid_status, self.run, grid_outputs, **FOLLOW)
        timer.tick(grid_status, self.run, grid_outputs, **FOLLOW)
        polled(tasks, [(shows, grids), (self.count.change, grids)], {self.run}, [self.grids])
        polled(tasks, [(self.mark.click, mark)], {self.run, self.step}, [self.message, self.table], **ACT)
        export_inputs = {self.run, self.step, self.format}

        def choose(event: Details) -> int:
            return int(event.step)

        take = self.table.select(choose, None, self.step, **EACH)
        polled(
            tasks, [(self.export.click, export), (take.then, export)], export_inputs, [self.message, self.file], **ACT
        )
        draw_inputs = {self.run, self.files, self.prompts, self.strengths}
        polled(tasks, [(self.draw.click, draw)], draw_inputs, [self.drawing, timer], **ACT)

    def runs(self) -> list[str]:
        """The names of the runs with pictures, newest first."""
        return [path.name for path, _ in run_folder.list_runs(self.workspace.runs) if RunFolder(path).sample_grids()]

    def show(self, name: str | None, say: Say) -> list[Any]:
        """The outputs of the page for one run."""
        if not name:
            hidden = gr.update(visible=False)
            none = gr.update(choices=[], value=None)
            unknown = gr.update(choices=[], value=[])
            return [widgets.quiet(say("compare.none")), hidden, none, unknown, "", "", hidden]
        run = RunFolder(self.workspace.run(name))
        if not run.sample_grids():  # the run was deleted while the page was open
            hidden = gr.update(visible=False)
            return [widgets.problem(say("error.gone")), hidden, gr.skip(), gr.skip(), "", "", hidden]
        steps = [step for step in run.sample_grids() if step and file_of_step(run, step)]
        files = [path.name for path in sorted(run.path.glob("*.safetensors")) if is_adapter(path)]
        files += [path.parent.name for path in sorted(run.checkpoints.glob("step-*/complete"))]
        marked, adapter = marked_step(run), run_folder.read(run.path).adapter
        recipes = _recipes(run, max(run.sample_grids()))
        prompts = "\n".join(sample_prompts.from_recipe(recipe) for recipe in recipes if recipe.get("prompt"))
        return [
            self.table_of(name, say),
            gr.update(visible=bool(steps)),
            gr.update(
                choices=[(say("compare.step", step=step), step) for step in steps],
                value=marked if marked in steps else steps[-1] if steps else None,
            ),
            gr.update(choices=files, value=[name for name in files if name == adapter] or files[:1]),
            prompts,
            "",
            gr.update(visible=False),
        ]

    def table_of(self, name: str, say: Say) -> str:
        """An HTML table of pictures with a row for each checkpoint and a column for each prompt. The base is first."""
        run = RunFolder(self.workspace.run(name))
        grids = run.sample_grids()
        if not grids:
            return widgets.quiet(say("compare.none"))
        marked, photos = marked_step(run), _photos_of(run, self.workspace)
        prompts = [str(recipe.get("prompt", "")) for recipe in _recipes(run, max(grids))]
        head = "".join(f"<th scope=col>{escape(prompt)}</th>" for prompt in prompts)
        rows: list[str] = []
        for step in grids:
            title = say("compare.step", step=step) if step else say("compare.base")
            star = f"<br>★ <small>{escape(say('compare.marked'))}</small>" if step == marked else ""
            cells = "".join(
                self._cell(path, title, (len(rows), column), photos, say)
                for column, path in enumerate(run.sample_pictures(step))
            )
            head_cell = f"<th scope=row>{escape(title)}{star}{take_button(run, step, say)}</th>"
            rows.append(f"<tr{' class=lk-marked' if star else ''}>{head_cell}{cells}</tr>")
        return (
            "<div class=lk-scroll tabindex=0 data-pictures><table class=lk-compare>"
            f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )

    def _cell(
        self, path: Path, title: str, place: tuple[int, int], looks: Sequence[tuple[Path, np.ndarray]], say: Say
    ) -> str:
        content = viewer.button(self.workspace, path, title, *place, side=CELL)
        if looks and (look := _look(path, path.stat().st_mtime_ns)) is not None:
            alike, nearest = max(((float(look @ other), photo) for photo, other in looks), key=lambda pair: pair[0])
            text = escape(say("compare.nearest", percent=round(100 * max(0.0, alike))))
            small = self.workspace.thumbnails.get(nearest, 96)
            photo = f'<img src="{small.address}" alt="{escape(nearest.name)}">'
            content += f"<span class=lk-nearest>{photo}<small>{text}</small></span>"
        return f"<td>{content}</td>"

    def mark_best(self, name: str, step: int | None, say: Say) -> str:
        """Store the step that the user has marked as the best. Return a message."""
        if step is None:
            return widgets.problem(say("compare.none"))
        run = RunFolder(self.workspace.run(name))
        if not run.path.is_dir():
            return widgets.problem(say("error.gone"))
        if file_of_step(run, int(step)) is None:
            return widgets.problem(say("compare.not_there", step=step))
        atomic.write(self.workspace.run(name) / CHOICE, json.dumps({"step": int(step), "time": round(time.time())}))
        return widgets.good(say("compare.marked_done", step=step))

    def draw_grids(
        self,
        name: str | None,
        files: Sequence[str],
        prompts: str,
        strengths: str,
        say: Say,
        progress: Progress = lambda count, total: None,
    ) -> tuple[str, gr.Timer]:
        """Add a job for each adapter to the queue. Return a message, and the timer that polls for the grids."""
        if not name:
            return widgets.problem(say("compare.none")), gr.skip()
        run = RunFolder(self.workspace.run(name))
        for strength in strengths.replace(",", " ").split():
            if not re.fullmatch(r"-?\d*\.?\d+", strength):
                return widgets.problem(say("compare.strength", text=strength)), gr.skip()
        try:
            adapters = list[Path]()
            for file in files:
                progress(len(adapters) + 1, len(files))
                adapters.append(self._adapter(run, file))
            base = quickstart.base_of(run.config_file)
        except LorakitError as problem:
            return widgets.problem(say.explain(str(problem))), gr.skip()
        for number, adapter in enumerate(adapters):
            target = run.path / GRIDS / f"{datetime.now():%Y-%m-%d-%H%M%S}-{number + 1}-{adapter.stem}"
            arguments = ["sample", str(adapter), f"--strength={','.join(strengths.replace(',', ' ').split()) or 1}"]
            arguments += ["--output", str(target), "--base", base]
            arguments += [f"--prompt={line.strip()}" for line in prompts.splitlines() if line.strip()]
            self.workspace.queue.command(arguments, target)
        if not adapters:
            return widgets.problem(say("adapter.none")), gr.skip()
        self.workspace.queue.start()
        return widgets.quiet(say("compare.drawing", state=say("state.waiting"))), gr.Timer(active=True)

    def grid_status(self, name: str | None, say: Say) -> list[Any]:
        """The progress of the drawing as HTML, a comment that counts the grids, and the timer that polls again."""
        if not name:
            return ["", "", gr.Timer(active=False)]
        folder = self.workspace.run(name) / GRIDS
        jobs = [job for job in self.workspace.queue.jobs() if Path(job.folder).parent == folder]
        going = [job for job in jobs if job.state in ("waiting", "running")]
        text = ""
        if going:
            text = widgets.quiet(say("compare.drawing", state=say(f"state.{going[0].state}")))
            if going[0].state == "running":
                text = drawing_line(self.workspace, going[0], say)
        elif jobs and jobs[-1].state != "done":
            text = widgets.problem(say.explain(self.workspace.why(jobs[-1].number)) or say(f"state.{jobs[-1].state}"))
        return [text, f"<!-- {escape(name)} {len(_grids(self.workspace, name))} -->", gr.Timer(active=bool(going))]

    def _adapter(self, run: RunFolder, name: str) -> Path:
        """The adapter file for the name of a file or a checkpoint. A checkpoint is exported the first time.

        Raises:
            LorakitError: there is no such checkpoint, or the export failed.
        """
        if name.endswith(".safetensors"):
            return self.workspace.roots.resolve(run.path / Path(name).name)
        if not re.fullmatch(r"step-\d+", name):
            raise LorakitError("{name!r} is no checkpoint", name)
        place = run.path / "exports" / name
        kind = next(iter(FORMATS))
        files = list(place.glob("*.safetensors"))
        files = files or commands.export(run.checkpoints / name, kind, place)
        return files[0]

    def grids_of(self, name: str, say: Say, progress: Progress = lambda count, total: None) -> str:
        """HTML with all requested grids of a run, newest first."""
        figures, files = "", _grids(self.workspace, name)
        for row, path in enumerate(files):
            progress(row + 1, len(files))
            picture = viewer.button(self.workspace, path, path.parent.name, row, 0, side=1024)
            figures += f"<figure>{picture}<figcaption>{escape(path.parent.name)}</figcaption></figure>"
        title = escape(say("compare.grids"))
        return f"<h2>{title}</h2><div class=lk-grids data-pictures>{figures}</div>" if figures else ""


def _grids(workspace: Workspace, name: str) -> list[Path]:
    """The requested grids of a run, newest first."""
    return sorted((workspace.run(name) / GRIDS).glob("*/grid.png"), reverse=True)


def marked_step(run: RunFolder) -> int | None:
    """The step that the user has marked, or None."""
    try:
        return int(foreign_json.loads((run.path / CHOICE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def file_of_step(run: RunFolder, step: int) -> Path | None:
    """The exported adapter if the step is the run's last one, else the step's checkpoint, or None if there is none."""
    state = run_folder.read(run.path)
    exported = run.path / Path(state.adapter).name
    if state.adapter and step == state.step and exported.exists():
        return exported
    checkpoint = run.checkpoints / names.step_name(step)
    return checkpoint if (checkpoint / "complete").is_file() else None


def export_step(
    workspace: Workspace,
    name: str | None,
    step: int | None,
    kind: str,
    say: Say,
    progress: Steps = lambda count, total, doing="": None,
) -> tuple[str, Any]:
    """Export the adapter of a step. Return a message, and an update of the download component.

    Args:
        kind: format; "" keeps the format of the run's file, and exports a checkpoint in the first of `FORMATS`.
    """
    hidden = gr.update(visible=False)
    if not name:
        return widgets.problem(say("compare.none")), hidden
    run = RunFolder(workspace.run(name))
    try:
        source = file_of_step(run, int(step or 0))
        if source is None:
            return widgets.problem(say("compare.not_there", step=step)), hidden
        own = _own_file(run, source, kind)
        place = workspace.unused(f"{run.path.name}/exports")
        files = [own] if own else commands.export(source, kind or next(iter(FORMATS)), place, progress=progress)
        staged = workspace.offered(files)
    except LorakitError as problem:
        return widgets.problem(say.translate(str(problem))), hidden
    text = ", ".join(str(path.relative_to(run.path)) for path in files)
    return widgets.good(say("compare.exported", name=text)), gr.update(visible=bool(staged), value=staged or None)


def _own_file(run: RunFolder, source: Path, kind: str) -> Path | None:
    """The file or folder that the run itself wrote in a format ("": any) beside `source`, or None."""
    if source.parent != run.path or not kind:
        return source if source.parent == run.path else None
    endings = [spec.ending for spec in FORMATS.values() if source.name.endswith(spec.ending)]
    own = run.path / (source.name.removesuffix(max(endings, key=len, default="")) + FORMATS[kind].ending)
    return own if own.exists() else None


def take_button(run: RunFolder, step: int, say: Say) -> str:
    """HTML with the button that downloads a step's adapter (see `TAKE`), or with the reason if it no longer exists."""
    if not step:
        return ""
    if file_of_step(run, step):
        return f"<br><button type=button data-take={step}>{escape(say('compare.take'))}</button>"
    count = sum(1 for _ in run.checkpoints.glob("step-*/complete"))
    return f"<br><small>{escape(say('compare.gone', count=count))}</small>"


def _recipes(run: RunFolder, step: int) -> list[Mapping[str, object]]:
    """The recipe in the metadata of each picture of a step. It is empty if the file has none."""
    return [viewer.recipe_of(path) for path in run.sample_pictures(step)]


def _photos_of(run: RunFolder, workspace: Workspace) -> list[tuple[Path, np.ndarray]]:
    """The run's training photos with the vectors of `_look`, up to `MAX_PHOTOS`.

    Photos that have changed since the training are left out. The list is empty if the folder is outside of the roots.
    """
    try:
        config = configuration.load(run.config_file)
        photos = workspace.photos(str(quickstart.photo_folder(config)), config.data)
        files = foreign_json.loads_table(run.plan_file.read_text(encoding="utf-8")).get("files")
        if isinstance(files, dict):  # runs of older versions have no table
            photos = [
                photo for photo in photos if photo_folder.versions([photo])[photo.relative] == files.get(photo.relative)
            ]
    except (LorakitError, OSError, ValueError):
        return []
    looks = [
        (photo.path, _look(photo.path, photo.path.stat().st_mtime_ns, photo.edit)) for photo in photos[:MAX_PHOTOS]
    ]
    return [(path, look) for path, look in looks if look is not None]


@functools.lru_cache(maxsize=2048)
def _look(path: Path, changed: int, edit: PhotoEdit = NO_EDIT) -> np.ndarray | None:
    """A vector of the picture's middle square, with mean 0 and length 1. The dot product of two is their correlation.

    Args:
        changed: time of the file's last change, as a key of the cache.

    Returns:
        A float32 array of shape (3 * LOOK**2,), or None if the picture has one colour or cannot be read.
    """
    try:
        pixels = decode(path, at_least=4 * LOOK, edit=edit).pixels
    except Unreadable:
        return None
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    vector = np.asarray(square.resize((LOOK, LOOK), Image.Resampling.BOX), dtype=np.float32).ravel()
    vector -= vector.mean()
    length = float(np.linalg.norm(vector))
    return vector / length if length > 0 else None
