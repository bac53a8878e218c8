"""The page of photos: each photo of a folder with its trained part, its problems and its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lorakit.config import Config, photo_edits
from lorakit.config.photo_edits import NO_EDIT, WHOLE
from lorakit.core.errors import LorakitError
from lorakit.core.messages import abridge
from lorakit.data import buckets, checks, concepts, photo_folder
from lorakit.data.photo_folder import Photo
from lorakit.runs import quickstart
from lorakit.ui import form, widgets
from lorakit.ui.pages.captions import CaptionTools
from lorakit.ui.pages.concepts import ConceptFolders
from lorakit.ui.tasks import Progress
from lorakit.ui.texts import Say
from lorakit.ui.thumbnails import Thumbnail
from lorakit.ui.uploads import SUFFIXES
from lorakit.ui.workspace import Workspace

# Number of photos on a page.
PAGE = 48
# The script of the cards. It sends a caption only on its button or on Ctrl-Enter. It keeps unsaved text when new cards
# replace the fields, which may happen whenever a check ends. Gradio may also reuse a field, with its text, for another
# photo. `owner` maps each field to its photo and saved caption at the last call of `settle`, so that the script can
# tell. New cards may hide a button without replacing it, so the observer watches `hidden` too.
CAPTIONS = """
const unsaved = new Map();
const owner = new WeakMap();
let typing = null, mode = '', brush = 15;
const fields = () => [...element.querySelectorAll('textarea')];
const mark = (field) => {
  const button = field.nextElementSibling, hidden = !unsaved.has(field.dataset.file);
  if (button.hidden !== hidden) button.hidden = hidden;
};
const save = (field) => {
  if (!unsaved.delete(field.dataset.file)) return;
  mark(field);
  trigger('submit', {file: field.dataset.file, text: field.value, before: field.defaultValue});
  field.defaultValue = field.value;
};
element.addEventListener('input', ({target}) => {
  if (!target.dataset.photo) return;
  typing = target.dataset.file;
  unsaved.set(typing, {text: target.value, at: target.selectionEnd});
  mark(target);
});
element.addEventListener('focusout', ({target}) => setTimeout(() => { if (target.isConnected) typing = null; }));
element.addEventListener('click', ({target}) => {
  const button = target.closest('.lk-save');
  if (button) save(button.previousElementSibling);
  const choice = target.closest('[data-exclude]');
  if (choice) change({act: 'exclude', photo: choice.dataset.exclude});
  const edit = target.closest('[data-edit]');
  if (!edit) return;
  const [act] = edit.dataset.edit.split(':'), photo = edit.dataset.edit.slice(act.length + 1);
  if (!MODES.includes(act)) return change({act, photo});
  mode = mode === edit.dataset.edit ? '' : edit.dataset.edit;
  settle();
});
// Buttons that stay pressed. While one is, the pointer draws a box or a stroke on the photo.
const MODES = ['crop', 'paint', 'erase'];
element.addEventListener('input', ({target}) => { if (target.matches('.lk-brush')) brush = Number(target.value); });
// A change uses the values on the page, so the cards accept no other change until they are updated.
const change = (what) => {
  element.inert = true;
  setTimeout(() => { element.inert = false; }, 4000);
  trigger('select', what);
};
const percent = (frame, {clientX, clientY}) => {
  const {left, top, width, height} = frame.getBoundingClientRect();
  return [(clientX - left) / width, (clientY - top) / height].map((share) => 100 * Math.min(1, Math.max(0, share)));
};
const follow = (frame, event, move, end) => {
  event.preventDefault();
  frame.setPointerCapture(event.pointerId);
  frame.addEventListener('pointermove', move);
  const stop = (last) => {
    frame.removeEventListener('pointermove', move);
    for (const name of ['pointerup', 'pointercancel']) frame.removeEventListener(name, stop);
    end(last.type === 'pointerup');
  };
  for (const name of ['pointerup', 'pointercancel']) frame.addEventListener(name, stop);
};
const paint = (frame, event) => {
  const [act] = mode.split(':'), photo = mode.slice(act.length + 1), canvas = document.createElement('canvas');
  const width = canvas.width = frame.clientWidth, height = canvas.height = frame.clientHeight;
  const line = canvas.getContext('2d'), points = [];
  frame.append(canvas);
  Object.assign(line, {lineCap: 'round', lineJoin: 'round', lineWidth: brush / 100 * Math.max(width, height)});
  line.strokeStyle = act === 'paint' ? 'rgb(45 212 191)' : 'rgb(0 0 0)';
  const move = (next) => {
    const [x, y] = percent(frame, next), [before, above] = points.slice(-2);
    if (points.length && Math.hypot(x - before, y - above) < 1 || points.length > 3000) return;
    points.push(x, y);
    line.clearRect(0, 0, width, height);
    line.beginPath();
    line.moveTo(points[0] * width / 100, points[1] * height / 100);
    for (let at = 0; at < points.length; at += 2) line.lineTo(points[at] * width / 100, points[at + 1] * height / 100);
    line.stroke();
  };
  move(event);
  follow(frame, event, move, (whole) => {
    if (!whole) return canvas.remove();
    change({act, photo, points, brush, ratio: width / height});
  });
};
element.addEventListener('pointerdown', (event) => {
  if (event.target.closest('.lk-painting')) return paint(event.target.closest('.lk-painting'), event);
  const frame = event.target.closest('.lk-cropping');
  if (!frame) return;
  const [x, y] = percent(frame, event), part = document.createElement('b');
  let box = null;
  frame.append(part);
  const move = (next) => {
    const [x2, y2] = percent(frame, next);
    box = [Math.min(x, x2), Math.min(y, y2), Math.max(x, x2), Math.max(y, y2)];
    part.style = `left:${box[0]}%;top:${box[1]}%;width:${box[2] - box[0]}%;height:${box[3] - box[1]}%`;
  };
  follow(frame, event, move, (whole) => {
    part.remove();
    if (!whole || !box || box[2] - box[0] < 4 || box[3] - box[1] < 4) return;
    change({act: 'crop', photo: mode.slice(5), box});
    mode = '';
    settle();
  });
});
element.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey) && event.target.dataset.photo) save(event.target);
});
window.addEventListener('beforeunload', (event) => { if (unsaved.size) event.preventDefault(); });
const settle = () => {
  for (const button of element.querySelectorAll('[data-edit]')) {
    const pressed = button.dataset.edit === mode;
    if (!MODES.includes(button.dataset.edit.split(':')[0]) || button.ariaPressed === String(pressed)) continue;
    button.ariaPressed = String(pressed);
  }
  for (const frame of element.querySelectorAll('.lk-frame')) {
    const acts = [...frame.closest('.lk-card').querySelectorAll('[aria-pressed=true]')];
    const crops = acts.some((one) => one.dataset.edit.startsWith('crop:'));
    frame.classList.toggle('lk-cropping', crops);
    frame.classList.toggle('lk-painting', acts.length > 0 && !crops);
  }
  for (const slider of element.querySelectorAll('.lk-brush')) slider.value = brush;
  // Keep the drawn stroke until the new picture, which contains it, is loaded.
  for (const stroke of element.querySelectorAll('canvas')) {
    const image = stroke.parentElement.querySelector('img');
    if (stroke.dataset.src ??= image.src, stroke.dataset.src !== image.src) stroke.remove();
  }
  for (const field of fields()) {
    const file = field.dataset.file, own = file + '\\n' + field.defaultValue, moved = owner.get(field) !== own;
    owner.set(field, own);
    const {text, at} = unsaved.get(file) ?? {text: field.defaultValue};
    mark(field);
    if (field.value === text || !(moved || unsaved.has(file))) continue;
    field.value = text;
    if (file !== typing || at === undefined) continue;
    field.focus();
    field.setSelectionRange(at, at);
  }
};
const attributeFilter = ['data-file', 'hidden', 'src', 'class', 'aria-pressed'];
new MutationObserver(() => { element.inert = false; settle(); }).observe(
  element, {childList: true, subtree: true, attributeFilter});
settle();
"""


def cards(
    workspace: Workspace,
    photos: list[Photo],
    report: checks.Report | None,
    config: Config | None,
    left_out: set[str],
    say: Say,
) -> str:
    """HTML with a card for each photo.

    Args:
        left_out: relative paths of the photos that `data.exclude` excludes.
    """
    items = {item.relative: item for item in report.items} if report else {}
    thumbnails = workspace.thumbnails.several(photos)
    card_items = [
        _card(photo, thumbnail, items.get(photo.relative), report, config, photo.relative in left_out, say)
        for photo, thumbnail in zip(photos, thumbnails, strict=True)
    ]
    return f'<ul class="lk-cards">{"".join(card_items)}</ul>'


def _card(
    photo: Photo,
    thumbnail: Thumbnail,
    item: checks.Item | None,
    report: checks.Report | None,
    config: Config | None,
    left_out: bool,
    say: Say,
) -> str:
    name = escape(photo.relative)
    if thumbnail.problem:
        picture = f'<div class="lk-photo lk-broken" role="img" aria-label="{name}">✕</div>'
    else:
        crop = _crop(thumbnail, item, report, config, say) if item and report and config else ""
        image = f'<img src="{thumbnail.address}" alt="{name}">'
        ratio = thumbnail.size[0] / thumbnail.size[1]
        picture = f'<div class=lk-photo><span class=lk-frame style="--ratio:{ratio:.4f}">{image}{crop}</span></div>'
    facts = [f"{thumbnail.size[0]} × {thumbnail.size[1]}"] if not thumbnail.problem else []
    for bucket in item.buckets if item else ():
        facts.append(say("photos.trained_at", width=bucket.width, height=bucket.height))
    if item and item.cropped >= 0.005:
        facts.append(say("photos.cropped", share=round(100 * item.cropped)))
    problems = [thumbnail.problem] if thumbnail.problem else list(item.findings if item else [])
    lines = "".join(f"<li>{escape(say.explain(problem))}</li>" for problem in problems)
    named = config is not None and concepts.of_photo(photo, config.data).name
    hint = escape(say("photos.no_caption", text=item.text)) if item and named and not photo.caption else ""
    label = escape(say("photos.caption", name=photo.relative))
    mark = "left-out" if left_out else "bad" if thumbnail.problem else "warn" if problems else "fine"
    choice = escape(say("photos.bring_back") if left_out else say("photos.leave_out"))
    return (
        f'<li class="lk-card lk-{mark}">{picture}<div class="lk-body"><strong title="{name}">{name}</strong>'
        f"<small>{escape(' · '.join(facts))}</small>{f'<ul class=lk-findings>{lines}</ul>' if lines else ''}"
        f'<textarea rows="2" data-photo="{name}" data-file="{escape(str(photo.path))}" aria-label="{label}" '
        f'placeholder="{hint}">{escape(photo.caption or "")}</textarea>'
        f'<button type="button" class="lk-save" hidden>{escape(say("photos.save"))}</button>'
        f'<span class=lk-choices>{"" if thumbnail.problem else _edit_buttons(photo, say)}<button type="button" '
        f'class="lk-choice" data-exclude="{name}" aria-label="{choice}: {name}">{choice}</button></span></div></li>'
    )


def _edit_buttons(photo: Photo, say: Say) -> str:
    """HTML of the buttons that rotate, crop and mask a photo, and that undo these edits."""
    has_room = len(photo.edit.strokes) < photo_edits.MAX_STROKES
    signs = {"left": "↺", "right": "↻", "crop": say("edit.crop")}
    signs |= {act: say(f"edit.{act}") for act in ("paint", "erase")} if has_room else {}
    signs |= {"unpaint": say("edit.unpaint")} if photo.edit.strokes else {}
    signs |= {"reset": say("edit.reset")} if str(photo.edit) else {}
    name, brush = escape(photo.relative), escape(say("edit.brush"))
    slider = f'<input type=range class=lk-brush min=3 max=60 aria-label="{brush}: {name}" title="{brush}">'
    full = "" if has_room else f"<small>{escape(say('edit.full', count=photo_edits.MAX_STROKES))}</small>"
    return (
        slider
        + full
        + "".join(
            f'<button type="button" class="lk-choice" data-edit="{act}:{name}" title="{escape(say(f"edit.{act}"))}" '
            f'aria-label="{escape(say(f"edit.{act}"))}: {name}">{escape(sign)}</button>'
            for act, sign in signs.items()
        )
    )


def _crop(thumbnail: Thumbnail, item: checks.Item, report: checks.Report, config: Config, say: Say) -> str:
    """HTML of a frame over the picture around the trained part, or "" if that is more than 99.5 % of the picture."""
    width, height = thumbnail.size
    box = buckets.placements(thumbnail.size, config.data, report.multiple, item.relative)[0].box
    left, top, right, bottom = box[0] / width, box[1] / height, box[2] / width, box[3] / height
    if (right - left) * (bottom - top) > 0.995:
        return ""
    place = f"left:{left:.2%};top:{top:.2%};width:{right - left:.2%};height:{bottom - top:.2%}"
    hint = escape(say("photos.crop_hint"))
    return f'<i class=lk-crop style="{place}" title="{hint}"></i>'


def summary(report: checks.Report | None, count: int, say: Say) -> str:
    """HTML with the findings of the check: errors, warnings, then notes."""
    head = f"<p class=lk-count><strong>{escape(say('photos.count', count=count))}</strong></p>"
    if report is None:
        return head + f"<p class='lk-quiet lk-working'>{escape(say('photos.checking'))}</p>"
    parts = [head]
    for kind, lines in (("errors", report.errors), ("warnings", report.warnings), ("notes", report.notes)):
        if lines:
            line_items = "".join(f"<li>{escape(say.explain(line))}</li>" for line in abridge(lines))
            parts.append(
                f"<h2 class='lk-{kind}'>{escape(say(f'photos.{kind}'))}</h2><ul class='lk-{kind}'>{line_items}</ul>"
            )
    if not report.errors and not report.warnings:
        parts.append(f"<p class=lk-good>✓ {escape(say('photos.fine'))}</p>")
    return "".join(parts)


def _left_out(photos: list[Photo], config: Config | None) -> set[str]:
    return photo_folder.excluded(photos, config.data.exclude) if config else set()


class PhotosPage:
    """Builds the page and handles its events. Other pages read its field `folder`."""

    def __init__(self, workspace: Workspace, t: gr.I18n):
        self.workspace = workspace
        gr.Markdown(t("photos.lead"), elem_classes="lk-lead")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=280), gr.Group():
                self.folder = gr.Dropdown(
                    choices=[str(path) for path in workspace.roots.photo_folders()],
                    value=None,
                    allow_custom_value=True,
                    label=t("photos.folder"),
                    info=", ".join(map(str, workspace.roots.paths)),
                    elem_id="photos-folder",
                )
                self.open = gr.Button(t("photos.open"), variant="primary", elem_id="photos-open")
            with gr.Column(scale=2, min_width=280):
                self.upload = gr.File(
                    label=t("photos.upload"),
                    file_count="multiple",
                    file_types=list(SUFFIXES),
                    height=150,
                    elem_id="photos-upload",
                )
        self.message = widgets.html(elem_id="photos-message")
        self.caption_message = widgets.html(elem_id="photos-caption-message")
        self.summary = widgets.html(elem_id="photos-summary")
        self.concepts = ConceptFolders(workspace, t)
        self.captions = CaptionTools(workspace, t)
        self.cards = widgets.html(elem_id="photos-cards", js_on_load=CAPTIONS)
        with gr.Row(visible=False) as self.pager:
            self.previous = gr.Button(t("photos.previous"), size="sm", min_width=80)
            self.where = widgets.html()
            self.next = gr.Button(t("photos.next"), size="sm", min_width=80)
        self.next_page = gr.Button(t("photos.next_page"), variant="primary", visible=False, elem_id="photos-next")
        self.first = gr.State(0)
        self.requests = gr.State(widgets.RequestCounter())

    @property
    def outputs(self) -> list[Any]:
        """The outputs of `show`."""
        around = [self.pager, self.previous, self.where, self.next, self.next_page, self.first]
        return [self.summary, self.cards, *around, self.concepts.list]

    @property
    def checked_outputs(self) -> list[Any]:
        """The outputs of `checked`."""
        return [self.summary, self.cards]

    def show(
        self, path: str, first: int, config: Config | None, say: Say, progress: Progress = lambda count, total: None
    ) -> list[Any]:
        """The outputs for one page of photos, without waiting for the check. Findings appear only if it has ended."""
        hidden = gr.update(visible=False)
        nothing = ["", hidden, gr.skip(), "", gr.skip(), hidden, 0, ""]
        if not path:
            return [widgets.quiet(say("photos.empty")), *nothing]
        try:
            photos = self.workspace.photos(path, config.data if config else None)
            count = len(photos)
            first = min(max(0, first), (count - 1) // PAGE * PAGE)
            last = min(first + PAGE, count)
            # The thumbnails are made before the check starts, because the check uses all cores.
            self.workspace.thumbnails.several(photos[first:last], progress)
            report = self._report(config)
        except LorakitError as problem:
            return [widgets.problem(say.translate(str(problem))), *nothing]
        return [
            summary(report, count, say),
            cards(self.workspace, photos[first:last], report, config, _left_out(photos, config), say),
            gr.update(visible=count > PAGE),
            gr.update(interactive=first > 0),
            widgets.quiet(say("photos.page", first=first + 1, last=last, count=count)),
            gr.update(interactive=last < count),
            gr.update(visible=True),
            first,
            self.concepts.rows(photos, config.data, say) if config else "",
        ]

    def checked(
        self, path: str, first: int, config: Config | None, say: Say, progress: Progress | None = None
    ) -> list[Any]:
        """Wait for the check. Return the summary and the cards with its findings."""
        if not path:
            return [gr.skip(), gr.skip()]
        try:
            photos = self.workspace.photos(path, config.data if config else None)
            report = self.workspace.report(config, progress).result() if config is not None else None
        except LorakitError as problem:
            return [widgets.problem(say.translate(str(problem))), gr.skip()]
        page = photos[first : first + PAGE]
        left_out = _left_out(photos, config)
        return [summary(report, len(photos), say), cards(self.workspace, page, report, config, left_out, say)]

    def _report(self, config: Config | None) -> checks.Report | None:
        """Start the check if needed. Return its report, or None if it has not ended or there is no config."""
        if config is None:
            return None
        future = self.workspace.report(config)
        return future.result() if future.done() else None

    def take_in(
        self, files: list[str] | None, folder: str, say: Say, progress: Progress = lambda count, total: None
    ) -> tuple[str, str | None]:
        """Move uploaded files into a folder, see `Workspace.take_in`. Return messages, and the folder or None."""
        place, upload = self.workspace.take_in([Path(file) for file in files or []], folder, progress)
        parts = [widgets.good(say("photos.uploaded", count=upload.photo_count))] if upload.photo_count else []
        if upload.refused:
            parts.append(widgets.problem(say("photos.refused", problems="; ".join(map(say.translate, upload.refused)))))
        return "".join(parts), str(place) if place else None

    def exclude(self, path: str, lines: str, name: str, config: Config | None = None) -> str:
        """Exclude a photo, or include it if it is excluded. Return the new lines of `data.exclude`.

        To include a photo, all patterns that match it are removed.
        """
        patterns = [line for line in lines.splitlines() if line.strip()]
        try:
            photos = self.workspace.photos(path, config.data if config else None)
        except LorakitError:
            return lines
        if name in photo_folder.excluded(photos, patterns):
            return "\n".join(one for one in patterns if name not in photo_folder.excluded(photos, [one]))
        return "\n".join([*patterns, name])

    @staticmethod
    def edit(
        lines: str, name: str, act: str, numbers: Sequence[float] | None = None, brush: tuple[float, float] = (0, 1)
    ) -> str:
        """Edit a photo. Return the new text of `data.edits`.

        Args:
            act: left, right (rotate), crop, paint, erase, unpaint (undo the last stroke) or reset.
            numbers: left, top, right and bottom of a crop, or x and y of each point of a stroke, in percent of the
                picture on the page.
            brush: the stroke's width in percent of the longer side of the picture on the page, and this picture's
                aspect ratio (width / height).

        Raises:
            LorakitError: the numbers do not fit the edit.
        """
        length = len(numbers or WHOLE)
        if length != len(WHOLE) if act == "crop" else length % 2 or brush[1] <= 0:
            raise LorakitError("the request has numbers that do not fit {act}", act)
        edits = form.table_of(quickstart.EDITS, lines)
        try:
            edit = photo_edits.parse(edits.get(name, ""))
        except ValueError:
            edit = NO_EDIT
        if act == "crop":
            left, top, right, bottom = map(float, numbers or WHOLE)
            edit = edit.cropped((left, top, right, bottom))
        elif act in ("paint", "erase"):
            painted = edit.painted(act, float(brush[0]), list(map(float, numbers or ())), float(brush[1]))
            edit = painted if painted.is_valid() else edit
        elif act == "unpaint":
            edit = replace(edit, strokes=edit.strokes[:-1])
        else:
            edit = NO_EDIT if act == "reset" else edit.turned(90 if act == "right" else 270)
        return form.table_text({k: v for k, v in (edits | {name: str(edit)}).items() if v})

    def uses_masks(self, before: str, after: str, current: bool, config: Config | None) -> bool:
        """The value of `train.masked_loss` after an edit, with `before` and `after` as texts of `data.edits`.

        The first stroke switches it on. Undoing the last stroke switches it off, unless a photo has a mask file.
        """
        had, has = (
            any("paint" in edit or "erase" in edit for edit in form.table_of(quickstart.EDITS, lines).values())
            for lines in (before, after)
        )
        if has == had or config is None:
            return current or (has and not had)
        return has or any(photo.mask for photo in self.workspace.photos(config.data.folder, config.data))

    @staticmethod
    def edits_elsewhere(lines: str, more_folders: str) -> str:
        """The text of `data.edits` with only the photos of `more_folders`. Used when the folder on the page changes."""
        names = tuple(f"{key}/" for key in form.table_of(quickstart.MORE_FOLDERS, more_folders))
        edits = form.table_of(quickstart.EDITS, lines)
        return form.table_text({name: edit for name, edit in edits.items() if name.startswith(names)})

    def save_caption(self, file: str, text: str, before: str, say: Say) -> str:
        """Save the caption of a photo, even if the page now shows another folder. Return a message.

        Args:
            before: the caption that the page showed. If the file has another one, somebody else changed it.
        """
        try:
            former = self.workspace.caption_of(Path(file))
            target = self.workspace.save_caption(Path(file), text)
        except LorakitError as problem:
            return widgets.problem(say.translate(str(problem)))
        message = widgets.good(say("photos.saved", name=f"{target.parent.name}/{Path(file).name}"))
        if former and former not in (" ".join(before.split()), " ".join(text.split())):
            message += widgets.problem(say("photos.replaced", text=former, name=target.name))
        return message
