"""The part of the photo page that adds further folders, each as a concept with a name and a weight."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import gradio as gr

from lorakit.config import DataConfig
from lorakit.core.errors import LorakitError
from lorakit.data import concepts, photo_folder
from lorakit.data.photo_folder import Photo
from lorakit.ui import form, widgets
from lorakit.ui.texts import Say
from lorakit.ui.workspace import Workspace

MAX_WEIGHT = 100
REMOVE = """
element.addEventListener('click', ({target}) => {
  if (target.dataset.remove) trigger('select', {name: target.dataset.remove});
});
"""


class ConceptFolders:
    """Builds this part of the page. Its handlers edit the text of the option `data.more_folders`."""

    def __init__(self, workspace: Workspace, t: gr.I18n):
        self.workspace = workspace
        with gr.Accordion(t("concepts.title"), open=False, elem_id="concepts"):
            gr.Markdown(t("concepts.lead"), elem_classes="lk-lead")
            self.list = widgets.html(elem_id="concepts-list", js_on_load=REMOVE)
            with gr.Row(equal_height=False):
                self.place = gr.Dropdown(
                    choices=[str(path) for path in workspace.roots.photo_folders()],
                    value=None,
                    allow_custom_value=True,
                    label=t("photos.folder"),
                    elem_id="concepts-folder",
                    scale=3,
                )
                self.name = gr.Textbox(
                    label=t("option.data.name"), info=t("help.data.name"), elem_id="concepts-name", scale=2
                )
                self.weight = gr.Number(
                    1,
                    precision=0,
                    minimum=1,
                    maximum=MAX_WEIGHT,
                    label=t("concepts.weight"),
                    info=t("concepts.weight_help"),
                    elem_id="concepts-weight",
                )
            self.add_button = gr.Button(t("concepts.add"), elem_id="concepts-add")
            self.message = widgets.html(elem_id="concepts-message")

    def add(self, lines: str, path: str, name: str, weight: float | None, say: Say) -> tuple[str, str]:
        """Add a folder. Return a message and the new text of `data.more_folders`, which is unchanged after an error."""
        folders = dict(form.table_of("data.more_folders", lines))
        name = " ".join(name.split())
        if not name or not path:
            return widgets.problem(say("concepts.incomplete")), lines
        if name.casefold() in {concepts.split_name(key)[1].casefold() for key in folders}:
            return widgets.problem(say("concepts.exists", name=name)), lines
        try:
            place = self.workspace.roots.resolve(path)
            count = len(photo_folder.scan(place).photos)
        except LorakitError as problem:
            return widgets.problem(say.translate(str(problem))), lines
        weight = min(MAX_WEIGHT, max(1, int(weight or 1)))
        folders[f"{weight}_{name}"] = str(place)
        return widgets.good(say("concepts.added", name=name, count=count)), form.table_text(folders)

    def remove(self, lines: str, name: str) -> str:
        """Remove a folder. Return the new text of `data.more_folders`."""
        folders = form.table_of("data.more_folders", lines)
        return form.table_text({key: path for key, path in folders.items() if key != name})

    def rows(self, photos: Sequence[Photo], config: DataConfig, say: Say) -> str:
        """An HTML table of the folders with names, weights and numbers of photos, or "" if there is only one folder."""
        if not config.more_folders:
            return ""
        rows = [_row(config.name or "—", 1, config.folder, len(photos) - _count(photos, *config.more_folders), "")]
        for key, path in config.more_folders.items():
            weight, name = concepts.split_name(key)
            label = escape(say("concepts.remove"))
            button = (
                f'<button type=button class=lk-choice data-remove="{escape(key)}" '
                f'aria-label="{label}: {escape(name)}">{label}</button>'
            )
            rows.append(_row(name, weight, path, _count(photos, key), button))
        head = [say("concepts.name"), say("concepts.weight"), say("plan.photos"), say("photos.folder"), ""]
        cells = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
        table = f"<table class=lk-table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        return f"<div class=lk-scroll tabindex=0>{table}</div>"


def _count(photos: Sequence[Photo], *keys: str) -> int:
    return sum(photo.relative.partition("/")[0] in keys for photo in photos)


def _row(name: str, weight: int, path: str, count: int, button: str) -> str:
    place = f'<span title="{escape(path)}">{escape(Path(path).name)}</span>'
    cells = [escape(name), f"× {weight}", str(count), place, button]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
