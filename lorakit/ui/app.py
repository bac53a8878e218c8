"""The command `lorakit ui`, and the functions that the events of the page call."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakit.ui import commands

# Without this, Gradio contacts its servers at import. The front end and its runs need no network, except to download a
# base that the user requests.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = commands.OFFLINE

with commands.without_proxies(), commands.without_stubs():
    import gradio as gr

from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from lorakit.config import Config
from lorakit.core.errors import LorakitError
from lorakit.runs import quickstart
from lorakit.ui import access, address, language, texts, widgets
from lorakit.ui.api import Api
from lorakit.ui.checked import HANDLERS, Page
from lorakit.ui.guard import Guard
from lorakit.ui.pages import viewer
from lorakit.ui.pages.adapter import AdapterPage
from lorakit.ui.pages.compare import ComparePage
from lorakit.ui.pages.photos import PAGE, PhotosPage
from lorakit.ui.pages.run_tools import RunTools
from lorakit.ui.pages.runs import RunsPage
from lorakit.ui.pages.train import TrainPage
from lorakit.ui.pages.try_it import TryPage
from lorakit.ui.server import Server
from lorakit.ui.tasks import Event, Progress, Values, polled
from lorakit.ui.texts import Say
from lorakit.ui.widgets import ACT, EACH, FOLLOW, Details, say_for
from lorakit.ui.workspace import Workspace

USER = "lorakit"
# Compression level of gzip. It reduces the page and its scripts to a quarter of their size in a few hundredths of a
# second.
COMPRESSION = 4
STYLE = Path(__file__).with_name("style.css")


def main(argv: Sequence[str] | None = None) -> int:
    """Start the front end and serve until it is interrupted. Return the exit code."""
    args = parser().parse_args(argv)
    for line in texts.PROBLEMS:
        print(f"lorakit: {line}", file=sys.stderr)
    try:
        access.require_password(args.host, args.share, args.password, args.public)
        access.require_origin(args.embed)
        roots = [Path(root) for root in args.root or default_roots()]
        workspace = Workspace(Path(args.runs), roots, [Path(folder) for folder in args.bases], args.notify)
        serve(workspace, args)
    except (LorakitError, OSError) as problem:
        print(f"lorakit: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `lorakit ui`."""
    options = argparse.ArgumentParser(prog="lorakit ui", description="Start the front end in the browser.")
    options.add_argument("--runs", default="runs", metavar="DIR", help="folder of the runs (default: runs)")
    options.add_argument(
        "--root",
        action="append",
        metavar="DIR",
        help="folder that the front end may read; may be repeated (default: the current folder and Pictures)",
    )
    options.add_argument(
        "--bases",
        action="append",
        default=[],
        metavar="DIR",
        help="folder of base models to suggest; may be repeated",
    )
    options.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; a password is required if other machines can reach it",
    )
    options.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    options.add_argument(
        "--share", action="store_true", help="open a public address through Gradio; requires a password"
    )
    options.add_argument(
        "--public",
        default="",
        metavar="URL",
        help="URL of the front end behind a reverse proxy, e.g. https://box.example/lorakit; requires a password",
    )
    options.add_argument(
        "--embed",
        default="",
        metavar="ORIGIN",
        help="origin whose pages may show the front end in a frame, e.g. http://127.0.0.1:7860",
    )
    options.add_argument("--end-with", type=int, default=0, metavar="PID", help="end when this process ends")
    options.add_argument(
        "--password",
        default=os.environ.get("LORAKIT_PASSWORD", ""),
        help=f"password of the user {USER!r}; set LORAKIT_PASSWORD instead if others can list processes",
    )
    options.add_argument(
        "--max-upload", type=int, default=500, metavar="MB", help="size of the largest uploaded file (default: 500)"
    )
    options.add_argument(
        "--notify",
        default="",
        metavar="TARGET",
        help="URL or command for output.notify of the runs, because pages cannot set it",
    )
    options.add_argument("--open", action="store_true", help="open the page in the browser")
    return options


def default_roots() -> list[Path]:
    """The current folder, and where the user's pictures usually are."""
    pictures = Path.home() / "Pictures"
    return [Path.cwd(), *([pictures] if pictures.is_dir() else [])]


def serve(workspace: Workspace, args: argparse.Namespace, *, block: bool = True) -> Server:
    """Start the server. With `block`, serve until it is interrupted; without it, return the running server.

    Raises:
        LorakitError: the server cannot listen at the address, or `--share` gets no public address.
    """
    t = language.Translations()
    # Gradio's default folder is shared by all users and is never deleted.
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.private("gradio"))
    server = Server(
        build(workspace, t),
        args.host,
        args.port,
        _guard(args),
        auth=(USER, args.password) if args.password else None,
        max_file_size=f"{args.max_upload}mb",
        footer_links=[],
        show_error=True,
        run_history=False,
        i18n=t,
        theme=_theme(),
        css_paths=STYLE,
        ssr_mode=False,
        pwa=False,
        app_kwargs={"exception_handlers": HANDLERS},
        root_path=args.public or os.environ.get("GRADIO_ROOT_PATH", ""),
    )
    server.start()
    if args.share:
        server.share(args.host)
    if args.open:
        server.open_browser()
    if block:
        server.wait(args.end_with)
    return server


def _guard(args: argparse.Namespace) -> list[Middleware]:
    """The middleware. On a loopback address it accepts only this machine's names, against DNS rebinding."""
    only_here = access.is_loopback(args.host) and not args.share
    hosts = {"localhost", "127.0.0.1", "[::1]", args.host} if only_here else set()
    guard = Middleware(Guard, hosts=hosts, public=args.public, max_upload=args.max_upload << 20, embed=args.embed)
    return [guard, Middleware(GZipMiddleware, compresslevel=COMPRESSION), Middleware(language.Language)]


def _theme() -> gr.themes.Base:
    """The theme. It uses the system's fonts, so that the browser downloads none.

    It names no font for Chinese or Japanese: the browser takes one of the page's language. A full stop after Latin
    letters has the form of the font.
    """
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "Cascadia Mono", "Menlo", "monospace"],
    ).set(
        # Gradio's grey has a contrast of 2.6 to 1 on white; text needs 4.5.
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        # Gradio's teal has a contrast of 2.5 to 1 with white.
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        checkbox_background_color_selected="*primary_700",
        checkbox_border_color_selected="*primary_700",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_500",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
    )


def build(workspace: Workspace, t: gr.I18n) -> gr.Blocks:
    """Build the page and wire its events."""
    with Page(title="lorakit", analytics_enabled=False) as page:
        head = f"<header class=lk-head><h1>lorakit</h1>{language.buttons()}</header>"
        widgets.html(head, js_on_load=address.SCRIPTS + language.SWITCH)
        gr.Markdown(t("app.tagline"), elem_classes="lk-tagline")
        # The browser stores both, so that a reload or a restart of the program keeps them. They are outside of the
        # tabs, because Gradio would read them again when a tab first opens and overwrite the values on the page.
        draft = gr.BrowserState(None, storage_key="lorakit-draft", secret="lorakit")
        run_name = gr.BrowserState(None, storage_key="lorakit-run", secret="lorakit")
        viewer.build(workspace)
        with gr.Tabs(elem_id="pages") as tabs:
            with gr.Tab(t("tab.photos"), id="photos") as photos_tab:
                photos = PhotosPage(workspace, t)
            with gr.Tab(t("tab.train"), id="train") as train_tab:
                train = TrainPage(workspace, t, draft)
            with gr.Tab(t("tab.run"), id="runs"):
                runs = RunsPage(workspace, t, run_name)
            with gr.Tab(t("tab.compare"), id="compare") as compare_tab:
                compare = ComparePage(workspace, t)
            with gr.Tab(t("tab.try"), id="try") as try_tab:
                try_page = TryPage(workspace, t)
            with gr.Tab(t("tab.adapter"), id="adapter") as adapter_tab:
                adapter = AdapterPage(workspace, t)
        reuses = _wire_reuse(runs.tools, train, photos.folder, tabs)
        _wire_train(train, [train_tab.select, photos.next_page.click], reuses, tabs, runs)
        _wire_photos(page, photos, photos_tab, train, tabs)
        Api(workspace).offer()
        runs.wire(page)
        compare.wire(compare_tab)
        try_page.wire(try_tab)
        adapter.wire(adapter_tab)
    return page


# -- events that involve several pages. Each handler takes one dict (component -> value), so that its signature does not
# -- depend on the number of options.


def _values(train: TrainPage, data: Values) -> list[Any]:
    return [data[train.widgets[key]] for key in train.keys]


def _wire_reuse(tools: RunTools, train: TrainPage, folder: gr.Dropdown, tabs: gr.Tabs) -> list[Callable[..., object]]:
    """Wire the events that fill the form with a run's settings. Return the listeners to the end of each."""

    def fill(name: str, settings: str, say: Say) -> list[object]:
        try:
            values = tools.answers_of(name or "", settings)
        except LorakitError as problem:
            text = widgets.problem(say.explain(str(problem)))
            return [*[gr.skip()] * (4 + len(train.keys)), gr.skip(), text, gr.skip()]
        remark = widgets.quiet(say("train.own_notify")) if tools.has_own_notify(name) else ""
        return [*train.restore({"values": values}), gr.Tabs(selected="train"), "", remark]

    def reuse(name: str, request: gr.Request) -> list[object]:
        return fill(name, "{}", say_for(request))

    def remedy(name: str, request: gr.Request, event: Details) -> list[object]:
        return fill(name, str(event.settings), say_for(request))

    every = [train.widgets[key] for key in train.keys]
    outputs = [folder, train.quality, train.marks, train.preset, *every, tabs, tools.message, train.message]
    events = [tools.reuse.click(reuse, tools.run_name, outputs, **ACT)]
    events.append(tools.remedies.select(remedy, tools.run_name, outputs, **ACT))
    return [event.then for event in events]


def _wire_train(
    train: TrainPage, visits: list[Any], reuses: list[Callable[..., object]], tabs: gr.Tabs, runs: RunsPage
) -> None:
    """Wire the events of the training page.

    Args:
        visits: events that open the page.
        reuses: listeners to the end of the events that fill the form, see `_wire_reuse`.
    """

    def answer(data: Values, request: gr.Request) -> list[Any]:
        data[train.requests].count_request()
        return train.answer(data[train.quality], data[train.marks], _values(train, data), say_for(request))

    def plan(data: Values, say: Say, progress: Progress) -> tuple[Any, Any]:
        number = data[train.requests].number
        result = train.plan(_values(train, data), say, progress)
        return result if number == data[train.requests].number else (gr.skip(), gr.skip())

    def difference(data: Values, request: gr.Request) -> str:
        return train.difference_of(data[train.preset], data[train.quality], _values(train, data), say_for(request))

    def apply(data: Values) -> list[Any]:
        return train.apply_preset(data[train.preset], data[train.quality], data[train.marks], _values(train, data))

    def begin(data: Values, say: Say, progress: Progress) -> tuple[Any, ...]:
        message, name = train.begin(_values(train, data), say, progress)
        if name is None:
            return message, gr.skip(), gr.skip(), gr.skip()
        # The button stays disabled until the next answer or visit, so that nobody starts the same run twice by
        # mistake.
        return message, name, gr.Tabs(selected="runs"), gr.update(interactive=False)

    every = [train.widgets[key] for key in train.keys]
    inputs = {*train.inputs, train.requests}
    # All events have one listener, so that a later answer waits for an earlier one and its result is shown last.
    answer_events = [widgets.answer_event(widget) for widget in every] + [train.quality.input, *visits]
    tasks = train.workspace.tasks

    def fetch(data: Values, say: Say, progress: Progress) -> list[str]:
        return [train.fetch_base(_values(train, data), say, progress)]

    fetched = polled(tasks, [(train.fetch.click, fetch)], inputs, [train.fetch_message], **ACT)
    widgets.clear_at(train.widgets[quickstart.BASE].input, train.fetch_message)
    with_preset = {*inputs, train.preset}
    gr.on([train.preset.input], difference, with_preset, train.difference, **FOLLOW)
    _wire_presets(train)
    apply_event = train.apply.click(apply, with_preset, [train.marks, *every], **ACT)
    apply_event.then(difference, with_preset, train.difference, **FOLLOW)
    answers = [gr.on(answer_events, answer, inputs, train.outputs, **FOLLOW)]
    answers += [after(answer, inputs, train.outputs, **FOLLOW) for after in (fetched, apply_event.then, *reuses)]
    polled(tasks, [(event.then, plan) for event in answers], inputs, [train.plan_card, train.start])
    begin_outputs = [train.message, runs.run_name, tabs, train.start]
    polled(tasks, [(train.start.click, begin)], inputs, begin_outputs, **ACT)


def _wire_presets(train: TrainPage) -> None:
    """Wire the buttons that save, import and export the user's own presets."""
    outputs = [train.preset_message, train.preset]

    def keep(data: Values, request: gr.Request) -> tuple[str, object]:
        return train.keep_preset(data[train.preset_name] or "", _values(train, data), say_for(request))

    def take(file: str | None, request: gr.Request) -> tuple[str, object]:
        return train.take_preset(file, say_for(request)) if file else ("", gr.skip())

    every = {train.widgets[key] for key in train.keys}
    train.save_preset.click(keep, {train.preset_name, *every}, outputs, **ACT)
    train.import_preset.upload(take, train.import_preset, outputs, **ACT)
    train.preset.change(lambda preset: train.export_of(preset or ""), train.preset, train.export_preset, **FOLLOW)


def _wire_photos(page: gr.Blocks, photos: PhotosPage, tab: gr.Tab, train: TrainPage, tabs: gr.Tabs) -> None:
    every = [train.widgets[key] for key in train.keys]
    inputs = {*train.inputs, photos.folder, photos.first, photos.upload, photos.requests}

    def config_of(data: Values) -> Config | None:
        answers = train.form_values(_values(train, data)) | {quickstart.PHOTOS: data[photos.folder] or ""}
        return train.config_of_photos(answers)

    def show(data: Values, say: Say, progress: Progress, offset: int = 0) -> list[Any]:
        data[photos.requests].count_request()
        first = data[photos.first] + offset
        return photos.show(data[photos.folder] or "", first, config_of(data), say, progress)

    def turn(data: Values, say: Say, progress: Progress) -> list[Any]:
        return show(data, say, progress, PAGE)

    def turn_back(data: Values, say: Say, progress: Progress) -> list[Any]:
        return show(data, say, progress, -PAGE)

    def checked(data: Values, say: Say, progress: Progress) -> list[Any]:
        number = data[photos.requests].number
        result = photos.checked(data[photos.folder] or "", data[photos.first], config_of(data), say, progress)
        return result if number == data[photos.requests].number else [gr.skip(), gr.skip()]

    def save_caption(request: gr.Request, event: Details) -> str:
        return photos.save_caption(event.file, event.text, event.before, say_for(request))

    tasks = photos.workspace.tasks
    restored = [photos.folder, train.quality, train.marks, train.preset, *every]

    def presets(request: gr.Request) -> object:
        return gr.update(choices=train.preset_choices(say_for(request)))

    # The choices come first, because a value stored in the browser may be one of them.
    loaded = page.load(presets, None, train.preset, **FOLLOW).then(train.restore, train.draft, restored, **FOLLOW)
    # The page accepts no answers before this, because the stored answers would overwrite them.
    ready = loaded.then(None, js="() => { document.body.dataset.ready = 'yes'; }")
    ready.then(None, js=address.OPEN_TAB)
    # Each event shows the folder first, and shows it again with the findings when the check ends.
    edits = photos.captions.wire(photos.folder, inputs, config_of)
    shows: list[Event] = [
        (listen, show) for listen in (*_wire_folder(photos, train, inputs, config_of), *edits, tab.select, loaded.then)
    ]
    shows += [(photos.previous.click, turn_back), (photos.next.click, turn)]
    look = polled(tasks, shows, inputs, photos.outputs)
    polled(tasks, [(look, checked)], inputs, photos.checked_outputs)
    # The message about a caption has its own component, so that no other event clears it.
    photos.cards.submit(save_caption, None, photos.caption_message, **EACH)
    photos.next_page.click(lambda: gr.Tabs(selected="train"), None, tabs, **ACT)


def _wire_folder(
    photos: PhotosPage,
    train: TrainPage,
    inputs: set[gr.components.Component],
    config_of: Callable[[Values], Config | None],
) -> list[Callable[..., object]]:
    """Wire the events that change the set of photos. Return the listeners to the end of each."""
    keys = (quickstart.PHOTOS, *quickstart.OF_PHOTOS)
    field, excluded, edits, more_folders, _ = (train.widgets[key] for key in keys)
    masked_loss = train.widgets[quickstart.MASKED_LOSS]

    def choose(data: Values) -> tuple[Any, ...]:
        if data[photos.folder] == data[field]:
            return *[gr.skip()] * 3, _draft(photos, train, data)
        others = photos.edits_elsewhere(data[edits] or "", data[more_folders] or "")
        return data[photos.folder], "", others, _draft(photos, train, data | {excluded: "", edits: others})

    def take_in(data: Values, say: Say, progress: Progress) -> tuple[Any, ...]:
        message, place = photos.take_in(data[photos.upload], data[photos.folder] or "", say, progress)
        if place is None:
            return message, gr.skip(), gr.skip(), None, gr.skip()
        return message, place, place, None, _draft(photos, train, data | {photos.folder: place})

    def edit(data: Values, event: Details) -> list[object]:
        changes = {excluded: data[excluded] or "", edits: data[edits] or ""}
        if event.act == "exclude":
            folder = data[photos.folder] or ""
            changes[excluded] = photos.exclude(folder, changes[excluded], event.photo, config_of(data))
        else:
            numbers = {"crop": "box", "paint": "points", "erase": "points"}.get(event.act)
            brush = (event.brush, event.ratio) if numbers == "points" else (0.0, 1.0)
            shape = getattr(event, numbers) if numbers else None
            changes[edits] = photos.edit(changes[edits], event.photo, event.act, shape, brush)
        masked = photos.uses_masks(data[edits] or "", changes[edits], data[masked_loss], config_of(data))
        changes |= {masked_loss: masked}
        return [*changes.values(), _draft(photos, train, data | changes)]

    opening_events = [photos.open.click, photos.folder.input]
    opened = gr.on(opening_events, choose, inputs, [field, excluded, edits, train.draft], **FOLLOW)
    for event in opening_events:
        widgets.clear_at(event, photos.message)
    widgets.clear_at(photos.upload.upload, photos.summary)  # it may refuse the folder that was open before
    upload_outputs = [photos.message, photos.folder, field, photos.upload, train.draft]
    uploaded = polled(photos.workspace.tasks, [(photos.upload.upload, take_in)], inputs, upload_outputs)
    edited = photos.cards.select(edit, inputs, [excluded, edits, masked_loss, train.draft], **EACH)
    return [opened.then, uploaded, edited.then, *_wire_concepts(photos, train, inputs)]


def _wire_concepts(
    photos: PhotosPage, train: TrainPage, inputs: set[gr.components.Component]
) -> list[Callable[..., object]]:
    """Wire the events that add and remove folders. Return the listeners to the end of both."""
    part = photos.concepts
    more_folders, concepts = train.widgets[quickstart.MORE_FOLDERS], train.widgets[quickstart.CONCEPTS]

    def add_folder(data: Values, request: gr.Request) -> list[object]:
        values = data[more_folders] or "", data[part.place] or "", data[part.name] or "", data[part.weight]
        message, lines = part.add(*values, say_for(request))
        if lines == values[0]:
            return [message, *[gr.skip()] * 5]
        changes = {concepts: "folders" if data[concepts] == "ask" else data[concepts], more_folders: lines}
        return [message, None, "", *changes.values(), _draft(photos, train, data | changes)]

    def remove_folder(data: Values, event: Details) -> list[object]:
        lines = part.remove(data[more_folders] or "", event.name)
        changes = {concepts: data[concepts] if lines else "ask", more_folders: lines}
        return [*changes.values(), _draft(photos, train, data | changes)]

    of_part = [
        part.message,
        part.place,
        part.name,
        concepts,
        more_folders,
        train.draft,
    ]  # In this order, because the change of a text triggers an event.
    added = part.add_button.click(add_folder, inputs | {part.place, part.name, part.weight}, of_part, **ACT)
    removed = part.list.select(remove_folder, inputs, of_part[3:], **ACT)
    return [added.then, removed.then]


def _draft(photos: PhotosPage, train: TrainPage, data: Values) -> dict[str, Any]:
    """The answers that the browser stores."""
    answers = train.form_values(_values(train, data)) | {quickstart.PHOTOS: data[photos.folder] or ""}
    return train.draft_of(data[train.quality], data[train.marks], answers)
