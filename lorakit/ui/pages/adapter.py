"""The page that describes a file, lists the programs that can read it, and converts it to another format."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lorakit import config as configuration
from lorakit.core.errors import LorakitError
from lorakit.core.registry import FORMATS
from lorakit.formats import inspect
from lorakit.formats.facts import health
from lorakit.ui import commands, form, widgets
from lorakit.ui.tasks import Progress, Steps, Values, polled
from lorakit.ui.texts import Say
from lorakit.ui.widgets import ACT, FOLLOW
from lorakit.ui.workspace import Workspace


class AdapterPage:
    """Builds the page and handles its events."""

    def __init__(self, workspace: Workspace, t: gr.I18n):
        self.workspace = workspace
        gr.Markdown(t("adapter.lead"), elem_classes="lk-lead")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=280), gr.Group():
                self.path = gr.Dropdown(
                    choices=self.adapters(),
                    value=None,
                    allow_custom_value=True,
                    label=t("adapter.path"),
                    info=", ".join(map(str, workspace.roots.paths)),
                    elem_id="adapter-path",
                )
                self.inspect = gr.Button(t("adapter.inspect"), variant="primary", elem_id="adapter-inspect")
            with gr.Column(scale=2, min_width=280):
                self.upload = gr.File(
                    label=t("adapter.upload"), file_count="single", height=150, elem_id="adapter-upload"
                )
        self.report = widgets.html(elem_id="adapter-report")
        # The path of the last inspected file. An upload is outside of the roots, so a request may not give its path.
        self.inspected = gr.State("")
        with gr.Row(equal_height=False, visible=False) as self.converting:
            self.format = gr.Radio(
                choices=list(FORMATS), value=next(iter(FORMATS)), label=t("adapter.format"), elem_id="adapter-format"
            )
            precisions = form.fields()[f"{configuration.SECTIONS[-1]}.dtype"].choices
            self.dtype = gr.Radio(choices=list(precisions), value=precisions[0], label=t("adapter.dtype"))
            self.rank = gr.Number(
                value=0,
                minimum=0,
                precision=0,
                label=t("adapter.new_rank"),
                info=t("adapter.new_rank_help"),
                elem_id="adapter-rank",
            )
            self.others = gr.Dropdown(
                choices=self.adapters(),
                value=[],
                multiselect=True,
                allow_custom_value=True,
                label=t("adapter.others"),
                info=t("adapter.others_help"),
                scale=2,
                min_width=480,
                elem_id="adapter-others",
            )
            self.convert = gr.Button(t("adapter.convert"), variant="primary", elem_id="adapter-convert")
        self.message = widgets.html(elem_id="adapter-message")
        self.file = gr.File(label=t("adapter.file"), visible=False, elem_id="adapter-file")

    def wire(self, tab: gr.Tab) -> None:
        """Connect the events to the handlers."""

        def look(data: Values, say: Say, progress: Progress) -> list[Any]:
            return self.look(data[self.path] or "", None, say)

        def look_upload(data: Values, say: Say, progress: Progress) -> list[Any]:
            return self.look("", data[self.upload], say)

        def convert(data: Values, say: Say, progress: Steps) -> tuple[str, Any]:
            rank, others = max(0, int(data[self.rank] or 0)), data[self.others] or []
            return self.write(data[self.inspected], data[self.format], data[self.dtype], rank, say, progress, others)

        outputs = [self.report, self.inspected, self.converting, self.message, self.file]
        tasks, convert_inputs = self.workspace.tasks, {self.inspected, self.format, self.dtype, self.rank, self.others}
        events = [(self.inspect.click, look), (self.path.input, look), (self.upload.upload, look_upload)]
        polled(tasks, events, {self.path, self.upload}, outputs)
        polled(tasks, [(self.convert.click, convert)], convert_inputs, [self.message, self.file], **ACT)

        def visit() -> object:
            commands.EXPORTER.prepare()
            return [gr.update(choices=self.adapters())] * 2

        tab.select(visit, None, [self.path, self.others], **FOLLOW)

    def adapters(self) -> list[str]:
        """The adapter files of all runs, newest first."""
        return [str(path) for path in self.workspace.adapters()]

    def look(self, path: str, upload: str | None, say: Say) -> list[Any]:
        """Describe a file below the roots, or an uploaded file. Return the outputs of the page."""
        hidden = gr.update(visible=False)
        if not path and not upload:
            return [widgets.problem(say("adapter.none")), "", hidden, "", hidden]
        try:
            file = Path(upload) if upload else self.workspace.roots.resolve(path)
            report = inspect.inspect(file)
        except LorakitError as problem:
            return [widgets.problem(say.translate(_without_place(str(problem), upload))), "", hidden, "", hidden]
        convertible = gr.update(visible=bool(report.format))
        return [report_card(report, say), str(file), convertible, "", hidden]

    def write(
        self,
        inspected: str,
        kind: str,
        dtype: str,
        rank: int,
        say: Say,
        progress: Steps = lambda count, total, doing="": None,
        others: Sequence[str] = (),
    ) -> tuple[str, Any]:
        """Convert the inspected file. Return a message, and an update of the download component.

        Args:
            rank: largest rank of a layer in the new file; 0 keeps the ranks.
            others: adapters to combine it with: "path" or "path=strength".
        """
        hidden = gr.update(visible=False)
        if not inspected:
            return widgets.problem(say("adapter.none")), hidden
        if rank and others:
            return widgets.problem(say("adapter.one_at_a_time")), hidden
        try:
            resolve = self.workspace.roots.resolve
            others = [f"{resolve(path)}={strength}" for path, strength in map(configuration.split_strength, others)]
            place = self.workspace.unused("converted")
            files = commands.export(Path(inspected), kind, place, dtype, rank, progress, others)
            staged = self.workspace.offered(files)
        except LorakitError as problem:
            return widgets.problem(say.translate(str(problem))), hidden
        names = ", ".join(str(path) for path in files)
        return widgets.good(say("adapter.converted", name=names)), gr.update(visible=bool(staged), value=staged or None)


def report_card(report: inspect.Report, say: Say) -> str:
    """HTML with the kind of the file, the programs that can read it, and the text of `lorakit inspect`."""
    size = widgets.memory(report.bytes, say)
    rank = ", ".join(sorted({f"{r:g}" for component in report.components.values() for r in component.ranks}))
    trigger, noun = health.trigger_and_class(report.trigger, report.metadata)
    figures = widgets.facts(
        [
            (
                say("file.family"),
                say.translate(report.only) or report.family or "",
                say.translate(report.family_evidence),
            ),
            (say("file.method"), report.method, ""),
            (say("file.rank"), rank, ""),
            (say("file.trigger"), trigger, ""),
            (say("file.class"), noun, ""),
            (say("adapter.format"), report.format, report.dtype),
        ]
    )
    readers = "".join(
        f"<li class=lk-{'fine' if reading.complete else 'bad'}><b>{'✓' if reading.complete else '✕'} "
        f"{escape(reading.title)}</b> {escape(say.translate(reading.line()))}</li>"
        for reading in report.readers.values()
    )
    section = f"<h3>{escape(say('adapter.readers'))}</h3><ul class=lk-readers>{readers}</ul>" if readers else ""
    return (
        f"<section class=lk-panel><h2>{escape(report.name)}</h2>"
        f"<p>{escape(say.translate(report.description))} · {escape(size)}</p>"
        f"{figures}{section}<details><summary>lorakit inspect</summary><pre tabindex=0>{escape(report.to_text())}</pre>"
        "</details></section>"
    )


def _without_place(problem: str, upload: str | None) -> str:
    """Replace the path of an uploaded file by its name, because a page must not show folders of the server."""
    return problem.replace(upload, Path(upload).name) if upload else problem
