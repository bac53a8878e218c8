"""The part of the photo page that writes captions with a model, edits many captions at once, and undoes changes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from lorakit import config as configuration
from lorakit.config import Config
from lorakit.core.errors import LorakitError
from lorakit.data import caption_edits, concepts, photo_folder
from lorakit.data.caption_edits import CaptionWriter
from lorakit.data.photo_folder import Photo
from lorakit.ui import commands, widgets
from lorakit.ui.tasks import Progress, polled
from lorakit.ui.texts import Say
from lorakit.ui.widgets import ACT, FOLLOW
from lorakit.ui.workspace import Workspace

# Suggested captioners. The user may type another one. See docs/captions.md.
MODELS = [
    "Salesforce/blip-image-captioning-base",
    "florence-community/Florence-2-base",
    "HuggingFaceTB/SmolVLM-500M-Instruct",
    "SmilingWolf/wd-vit-tagger-v3",
]
TOOLS = ("trigger", "front", "behind", "replace")
# Number of changes that the preview shows.
ROWS = 30
# component -> value
Values = dict[Any, Any]
# The options of the section `data` that `lorakit caption` gets.
OPTIONS = ("name", "kind", "concepts", "exclude", "edits", "class_folder")


@dataclass(frozen=True)
class Change:
    """One edit of all captions.

    Attributes:
        tool: one of TOOLS.
        words: text to add, or to search for.
        replacement: text that replaces `words`.
    """

    tool: str
    words: str = ""
    replacement: str = ""

    def text(self, text: str, photo: Photo, config: Config) -> str:
        """Apply the edit to a caption, or to a line of a caption."""
        words = " ".join(self.words.split())
        if self.tool == "trigger":
            return caption_edits.trigger_first(text, concepts.of_photo(photo, config.data))
        if self.tool == "replace":
            return caption_edits.replace(text, words, " ".join(self.replacement.split()))
        return caption_edits.add(text, words, in_front=self.tool == "front")


class CaptionTools:
    """Builds this part of the page and handles its events."""

    def __init__(self, workspace: Workspace, t: gr.I18n):
        self.workspace = workspace
        self._processes: dict[str, subprocess.Popen[str]] = {}
        with gr.Accordion(t("captions.title"), open=False, elem_id="captions"):
            with gr.Row():
                with gr.Column(min_width=280):
                    gr.Markdown(t("captions.by_model"), elem_classes="lk-section")
                    self.model = gr.Dropdown(
                        MODELS,
                        value=MODELS[0],
                        allow_custom_value=True,
                        label=t("captions.model"),
                        info=t("captions.model_help"),
                        elem_id="captions-model",
                    )
                    self.prompt = gr.Textbox(label=t("captions.prompt"), info=t("captions.prompt_help"))
                    self.without = gr.Textbox(label=t("captions.without"), info=t("captions.without_help"))
                    self.overwrite = gr.Checkbox(False, label=t("captions.overwrite"))
                    self.fetch = gr.Checkbox(False, label=t("captions.fetch"), elem_id="captions-fetch")
                    with gr.Row():
                        self.write = gr.Button(t("captions.write"), variant="primary", elem_id="captions-write")
                        self.stop = gr.Button(t("captions.stop"), min_width=80)
                with gr.Column(min_width=280):
                    gr.Markdown(t("captions.all_at_once"), elem_classes="lk-section")
                    self.tool = gr.Radio(
                        [(t(f"captions.tool.{tool}"), tool) for tool in TOOLS],
                        value=TOOLS[0],
                        label=t("captions.tool"),
                        elem_id="captions-tool",
                    )
                    self.words = gr.Textbox(label=t("captions.words"), visible=False, elem_id="captions-words")
                    self.replacement = gr.Textbox(
                        label=t("captions.replacement"), info=t("captions.replacement_help"), visible=False
                    )
                    with gr.Row():
                        self.look = gr.Button(t("captions.preview"), elem_id="captions-preview")
                        self.apply = gr.Button(
                            t("captions.apply"), variant="primary", interactive=False, elem_id="captions-apply"
                        )
                    self.undo = gr.Button(t("captions.undo"), size="sm", elem_id="captions-undo")
            self.previewed = gr.State(("", Change(TOOLS[0])))
            self.message = widgets.html(elem_id="captions-message")
            self.changes = widgets.html(elem_id="captions-changes")

    @property
    def inputs(self) -> set[Any]:
        """The inputs of the handlers."""
        fields = {self.model, self.prompt, self.without, self.overwrite, self.fetch}
        return fields | {self.tool, self.words, self.replacement, self.previewed}

    def plan(self, path: str, change: Change, config: Config) -> list[tuple[Photo, str]]:
        """The photos whose captions the edit changes, with their new captions.

        Raises:
            LorakitError: the folder is outside of the roots, or `photo_folder.scan` raises it.
        """
        folder = photo_folder.scan(self.workspace.roots.resolve(path), config.data.class_folder, config.data.exclude)
        return caption_edits.plan(folder.photos, lambda text, photo: change.text(text, photo, config))

    def preview(self, path: str, change: Change, config: Config | None, say: Say) -> tuple[str, str, Any]:
        """Show the effect of an edit. Return a message, a table of the changes, and an update of the apply button."""
        off = gr.update(interactive=False)
        if problem := self._problem(path, change, config, say):
            return widgets.problem(problem), "", off
        try:
            plan = self.plan(path, change, config or Config())
        except LorakitError as error:
            return widgets.problem(say.explain(str(error))), "", off
        if not plan:
            return widgets.quiet(say("captions.no_change")), "", off
        rows = [[photo.relative, photo.caption or "", text] for photo, text in plan[:ROWS]]
        head = [say("captions.photo"), say("captions.before"), say("captions.after")]
        more = widgets.quiet(say("captions.more", count=len(plan) - ROWS)) if len(plan) > ROWS else ""
        message = widgets.quiet(say("captions.changes", count=len(plan)))
        return message, widgets.table(head, rows) + more, gr.update(interactive=True)

    def change_all(
        self, path: str, change: Change, config: Config | None, say: Say, progress: Progress = lambda count, total: None
    ) -> str:
        """Edit the captions. Return a message."""
        if problem := self._problem(path, change, config, say):
            return widgets.problem(problem)
        try:
            plan = self.plan(path, change, config or Config())
            folder = self.workspace.roots.resolve(path)
            with CaptionWriter(folder, photo_folder.scan(folder).photos) as writer:
                for count, (photo, text) in enumerate(plan, 1):
                    writer.write(photo, text)
                    progress(count, len(plan))
        except LorakitError as error:
            return widgets.problem(say.explain(str(error)))
        return widgets.good(say("captions.changed", count=len(plan)))

    @staticmethod
    def _problem(path: str, change: Change, config: Config | None, say: Say) -> str:
        if not path:
            return say("photos.empty")
        if change.tool == "trigger":
            named = config is not None and (config.data.name or config.data.concepts == "folders")
            return "" if named else say("captions.no_name")
        return "" if change.words.strip() else say("captions.no_words")

    def undo_last(self, path: str, say: Say) -> str:
        """Undo the last change of the folder's captions. Return a message."""
        if not path:
            return widgets.problem(say("photos.empty"))
        try:
            result = caption_edits.undo(self.workspace.roots.resolve(path))
        except LorakitError as error:
            return widgets.problem(say.explain(str(error)))
        parts = [widgets.good(say("captions.undone", count=len(result.restored)))]
        if result.changed_since:
            names = ", ".join(result.changed_since[:8])
            parts.append(widgets.problem(say("captions.changed_since", count=len(result.changed_since), names=names)))
        return "".join(parts)

    def write_all(
        self, path: str, wishes: dict[str, Any], config: Config | None, say: Say, progress: Progress = lambda c, t: None
    ) -> str:
        """Caption the folder's photos with a model. Return messages about the result.

        Args:
            wishes: values of the widgets model, prompt, without, overwrite and fetch.
        """
        if not path:
            return widgets.problem(say("photos.empty"))
        try:
            folder = str(self.workspace.roots.resolve(path))
            if folder in self._processes:
                return widgets.problem(say("captions.busy"))
            if any(job.state == "running" for job in self.workspace.queue.jobs()):
                return widgets.problem(say("captions.run_first"))
            arguments = self._arguments(folder, wishes, config)
            try:
                result = commands.caption(
                    arguments, progress, lambda process: self._processes.update({folder: process})
                )
            finally:
                self._processes.pop(folder, None)
        except LorakitError as error:
            return widgets.problem(say.explain(str(error)))
        counts = {"count": len(result["captions"]), "others": result["had_one"]}
        parts = [
            widgets.good(say("captions.stopped", **counts) if result["stopped"] else say("captions.written", **counts))
        ]
        for name, reason in result["failed"].items():
            parts.append(widgets.problem(f"{name}: {say.translate(reason)}"))
        return "".join(parts)

    def _arguments(self, folder: str, wishes: dict[str, Any], config: Config | None) -> list[str]:
        model = str(wishes["model"] or "").strip()
        if Path(model).is_absolute() or Path(model).exists():
            model = str(self.workspace.roots.resolve(model))
        arguments = [
            folder,
            f"--with={model}",
            f"--prompt={wishes['prompt'] or ''}",
            f"--without={wishes['without'] or ''}",
        ]
        arguments += [f"--{name}" for name in ("overwrite", "fetch") if wishes[name]]
        if config is not None:
            pairs = {f"data.{name}": getattr(config.data, name) for name in OPTIONS}
            pairs |= {"memory.device": config.memory.device, "memory.mixed_precision": config.memory.mixed_precision}
            arguments += [f"--set={key}={configuration.toml_value(value)}" for key, value in pairs.items()]
        return arguments

    def end(self, path: str) -> None:
        """Ask the captioner of the folder to stop. Captions that it has written are kept."""
        for folder, process in list(self._processes.items()):
            if path and folder == str(self.workspace.roots.resolve(path)):
                process.terminate()

    def wire(
        self, folder: gr.Dropdown, inputs: set[Any], config_of: Callable[[Values], Config | None]
    ) -> list[Callable[..., Any]]:
        """Connect the events to the handlers. Return the listeners to the end of each event that changes captions.

        Args:
            folder: the field with the folder of photos.
            inputs: the components that `config_of` reads.
            config_of: returns the config for the values of the components, or None if it is invalid.
        """
        tasks, every = self.workspace.tasks, self.inputs | inputs | {folder}

        def preview(data: Values, say: Say, progress: Progress) -> tuple[Any, ...]:
            change = Change(data[self.tool], data[self.words] or "", data[self.replacement] or "")
            return *self.preview(data[folder] or "", change, config_of(data), say), (data[folder] or "", change)

        def change_all(data: Values, say: Say, progress: Progress) -> tuple[Any, ...]:
            path, change = data[self.previewed]
            message = self.change_all(path, change, config_of(data), say, progress)
            return message, "", gr.update(interactive=False)

        def undo(data: Values, say: Say, progress: Progress) -> tuple[Any, ...]:
            return self.undo_last(data[folder] or "", say), "", gr.update(interactive=False)

        def write(data: Values, say: Say, progress: Progress) -> list[str]:
            wishes = {name: data[getattr(self, name)] for name in ("model", "prompt", "without", "overwrite", "fetch")}
            return [self.write_all(data[folder] or "", wishes, config_of(data), say, progress)]

        def edit(tool: str) -> tuple[Any, ...]:
            fields = gr.update(visible=tool != "trigger"), gr.update(visible=tool == "replace")
            return "", gr.update(interactive=False), *fields

        fields = [self.tool.input, self.words.change, self.replacement.change, folder.change]
        gr.on(fields, edit, self.tool, [self.changes, self.apply, self.words, self.replacement], **FOLLOW)
        results = [self.message, self.changes, self.apply]
        polled(tasks, [(self.look.click, preview)], every, [*results, self.previewed], **ACT)
        self.stop.click(self.end, folder, None, **ACT)
        return [
            polled(tasks, [(self.apply.click, change_all), (self.undo.click, undo)], every, results, **ACT),
            polled(tasks, [(self.write.click, write)], every, [self.message], **ACT),
        ]
