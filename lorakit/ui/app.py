"""The front end's command and its wiring: which event calls what. `lorakit ui --help` lists the options."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Gradio asks its makers' servers for news at import otherwise. Nothing here needs a network.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gradio as gr

from lorakit import guide
from lorakit.errors import LorakitError
from lorakit.ui import access, texts, widgets
from lorakit.ui.adapter import AdapterPage
from lorakit.ui.compare import ComparePage
from lorakit.ui.desk import Desk
from lorakit.ui.photos import PAGE, PhotosPage
from lorakit.ui.runs import RunsPage
from lorakit.ui.train import TrainPage
from lorakit.ui.widgets import say_for

USER = "lorakit"
# Seconds between looks at the run folder.
EVERY = 1.0
STYLE = Path(__file__).with_name("style.css")
QUIET: dict[str, Any] = {"show_progress": "hidden"}


def main(argv: Sequence[str] | None = None) -> int:
    """Start the front end and serve until it is interrupted; the exit code."""
    args = parser().parse_args(argv)
    try:
        access.require_password(args.host, args.share, args.password)
        desk = Desk(Path(args.runs), [Path(root) for root in args.root or default_roots()])
        serve(desk, args)
    except (LorakitError, OSError) as problem:
        print(f"lorakit: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `lorakit ui`."""
    made = argparse.ArgumentParser(prog="lorakit ui", description="The front end in the browser.")
    made.add_argument("--runs", default="runs", metavar="DIR", help="where runs are written (default: runs)")
    made.add_argument(
        "--root",
        action="append",
        metavar="DIR",
        help="folder that may be read, with all below it; may be repeated (default: this folder, and Pictures)",
    )
    made.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs a password"
    )
    made.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    made.add_argument("--share", action="store_true", help="a public address through Gradio; needs a password")
    made.add_argument(
        "--password",
        default=os.environ.get("LORAKIT_PASSWORD", ""),
        help=f"ask for it, with the user name {USER!r}; better set in LORAKIT_PASSWORD, as others see command lines",
    )
    made.add_argument("--max-upload", type=int, default=500, metavar="MB", help="largest file taken in (default: 500)")
    made.add_argument("--open", action="store_true", help="open the browser")
    return made


def default_roots() -> list[Path]:
    """The current folder, and where the user's pictures usually are."""
    pictures = Path.home() / "Pictures"
    return [Path.cwd(), *([pictures] if pictures.is_dir() else [])]


def serve(desk: Desk, args: argparse.Namespace, *, block: bool = True) -> str:
    """Serve the front end; its address, where it does not block."""
    t = gr.I18n(**texts.tables())
    if args.port and not _is_free(args.host, args.port):
        raise LorakitError(f"port {args.port} of {args.host} is taken; choose another --port, or leave it out")
    _, address, _ = build(desk, t).launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        auth=(USER, args.password) if args.password else None,
        inbrowser=args.open,
        max_file_size=f"{args.max_upload}mb",
        app_kwargs={"middleware": _only_this_machine(args)},
        prevent_thread_lock=not block,
        footer_links=[],
        show_error=True,
        i18n=t,
        theme=_theme(),
        css_paths=STYLE,
        ssr_mode=False,
        pwa=False,
    )
    return str(address)


def _is_free(host: str, port: int) -> bool:
    """Whether something else listens there; Gradio's own words for it name a variable nobody set."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1" if host == "0.0.0.0" else host, port)) != 0


def _only_this_machine(args: argparse.Namespace) -> list[Any]:
    """Keeps out a page from elsewhere that gives its own name this machine's address (DNS rebinding)."""
    if not access.is_loopback(args.host) or args.share:
        return []
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return [Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", args.host])]


def _theme() -> gr.themes.Base:
    """The system's own fonts: nothing is fetched."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK TC", "PingFang TC", "sans-serif"],
        font_mono=["ui-monospace", "Cascadia Mono", "Menlo", "monospace"],
    ).set(
        # Gradio's own grey is too faint to read on white (2.6 to 1; 4.5 is wanted).
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
    )


def build(desk: Desk, t: gr.I18n) -> gr.Blocks:
    """The whole page, wired."""
    with gr.Blocks(title="lorakit", analytics_enabled=False) as page:
        widgets.html("<header class=lk-head><h1>lorakit</h1></header>")
        gr.Markdown(t("app.tagline"), elem_classes="lk-tagline")
        with gr.Tabs(elem_id="pages") as tabs:
            with gr.Tab(t("tab.photos"), id="photos"):
                photos = PhotosPage(desk, t)
            with gr.Tab(t("tab.train"), id="train") as train_tab:
                train = TrainPage(desk, t)
            with gr.Tab(t("tab.run"), id="runs"):
                runs = RunsPage(desk, t)
            with gr.Tab(t("tab.compare"), id="compare") as compare_tab:
                compare = ComparePage(desk, t)
            with gr.Tab(t("tab.adapter"), id="adapter"):
                adapter = AdapterPage(desk, t)
        # The answers, kept in the browser: a reload or a restarted app loses none.
        draft = gr.BrowserState({}, storage_key="lorakit-draft", secret="lorakit")
        _wire_train(train, [train_tab.select, photos.next_step.click], tabs, runs, draft)
        _wire_photos(page, photos, train, tabs, draft)
        _wire_runs(page, runs)
        compare.wire(page, compare_tab)
        adapter.wire()
    # One person's long look at five hundred photos must not keep another waiting.
    page.queue(default_concurrency_limit=16)
    return page


# -- wiring: each handler takes one dict, component -> value, so that the number of knobs is nobody's business ------


def _refresh(train: TrainPage) -> dict[str, Any]:
    """The event that follows any answer, as keyword arguments of a listener."""

    def refresh(data: dict[Any, Any], request: gr.Request) -> Iterator[tuple[Any, ...]]:
        values = [data[train.widgets[key]] for key in train.keys]
        yield from train.refresh(data[train.quality], data[train.marks], values, say_for(request))

    return {"fn": refresh, "inputs": set(train.inputs), "outputs": train.outputs}


def _keep(train: TrainPage, draft: gr.BrowserState) -> dict[str, Any]:
    """The event that keeps the answers in the browser."""

    def keep(data: dict[Any, Any]) -> dict[str, Any]:
        values = train.form_values([data[train.widgets[key]] for key in train.keys])
        return {"quality": data[train.quality], "preset": data[train.marks]["preset"], "values": values}

    return {"fn": keep, "inputs": set(train.inputs), "outputs": draft}


def _wire_train(train: TrainPage, visits: list[Any], tabs: gr.Tabs, runs: RunsPage, draft: gr.BrowserState) -> None:
    """`visits` are the events that bring somebody to the page."""
    inputs = set(train.inputs)

    def values_of(data: dict[Any, Any]) -> list[Any]:
        return [data[train.widgets[key]] for key in train.keys]

    def difference(data: dict[Any, Any], request: gr.Request) -> str:
        return train.difference_of(data[train.preset], data[train.quality], values_of(data), say_for(request))

    def apply(data: dict[Any, Any]) -> list[Any]:
        return train.apply_preset(data[train.preset], data[train.quality], data[train.marks], values_of(data))

    def begin(data: dict[Any, Any], request: gr.Request) -> tuple[Any, ...]:
        message, name = train.begin(values_of(data), say_for(request))
        if name is None:
            return message, gr.skip(), gr.skip(), gr.skip()
        # The button comes back with the next answer or visit: the same run is not started twice by mistake.
        return message, name, gr.Tabs(selected="runs"), gr.update(interactive=False)

    every = [train.widgets[key] for key in train.keys]
    # One listener for all: a later answer waits for an earlier one, which so cannot overwrite what came after it.
    answered = gr.on(
        [widget.input for widget in every] + [train.quality.input, *visits],
        **_refresh(train),
        trigger_mode="always_last",
        **QUIET,
    )
    answered.then(**_keep(train, draft), **QUIET)
    with_preset = {*inputs, train.preset}
    gr.on([train.preset.input], difference, with_preset, train.difference, **QUIET)
    applied = train.apply.click(apply, with_preset, [train.marks, *every], **QUIET)
    applied.then(**_refresh(train), **QUIET).then(**_keep(train, draft), **QUIET)
    applied.then(difference, with_preset, train.difference, **QUIET)
    train.start.click(begin, inputs, [train.message, runs.chosen, tabs, train.start], **QUIET)


def _wire_photos(page: gr.Blocks, photos: PhotosPage, train: TrainPage, tabs: gr.Tabs, draft: gr.BrowserState) -> None:
    field = train.widgets[guide.PHOTOS]
    inputs = {*train.inputs, photos.folder, photos.first, photos.upload}

    def show(data: dict[Any, Any], request: gr.Request, first: int = 0) -> Iterator[Any]:
        say, path = say_for(request), data[photos.folder] or ""
        shown = train.form_values([data[train.widgets[key]] for key in train.keys]) | {guide.PHOTOS: path}
        config = train.config_of_photos(shown)
        yield from photos.show(path, first, config, say)

    def show_under(data: dict[Any, Any], request: gr.Request) -> Iterator[Any]:
        # The message about the upload stays.
        for outputs in show(data, request):
            yield outputs[1:]

    def show_kept(data: dict[Any, Any], request: gr.Request) -> Iterator[Any]:
        # Nothing was kept: whoever is quicker than this event must not be overwritten by it.
        if data[draft]:
            yield from show(data, request)
        else:
            yield [gr.skip()] * len(photos.outputs)

    def turn(data: dict[Any, Any], request: gr.Request) -> Iterator[Any]:
        yield from show(data, request, data[photos.first] + PAGE)

    def turn_back(data: dict[Any, Any], request: gr.Request) -> Iterator[Any]:
        yield from show(data, request, data[photos.first] - PAGE)

    def take_in(data: dict[Any, Any], request: gr.Request) -> tuple[Any, ...]:
        message, place = photos.take_in(data[photos.upload], say_for(request))
        return (message, gr.skip() if place is None else gr.update(value=place), gr.update(value=None))

    def save_caption(folder: str, request: gr.Request, event: gr.EventData) -> str:
        return photos.save_caption(folder or "", event.photo, event.text, say_for(request))

    chosen = gr.on([photos.open.click, photos.folder.input], lambda path: path, photos.folder, field, **QUIET)
    chosen.then(**_keep(train, draft), **QUIET)
    chosen.then(show, inputs, photos.outputs, **QUIET)
    taken = photos.upload.upload(take_in, inputs, [photos.message, photos.folder, photos.upload], **QUIET)
    taken.success(lambda path: path, photos.folder, field, **QUIET).then(
        show_under, inputs, photos.outputs[1:], **QUIET
    ).then(**_keep(train, draft), **QUIET)
    photos.next.click(turn, inputs, photos.outputs, **QUIET)
    photos.previous.click(turn_back, inputs, photos.outputs, **QUIET)
    photos.cards.submit(save_caption, photos.folder, photos.message, **QUIET)
    photos.next_step.click(lambda: gr.Tabs(selected="train"), None, tabs, **QUIET)
    every = [train.widgets[key] for key in train.keys]
    loaded = page.load(train.restore, draft, [photos.folder, train.quality, train.marks, train.preset, *every], **QUIET)
    loaded.then(show_kept, {*inputs, draft}, photos.outputs, **QUIET)


def _wire_runs(page: gr.Blocks, runs: RunsPage) -> None:
    def poll(chosen: str, seen: dict[str, Any], request: gr.Request) -> list[Any]:
        return runs.poll(chosen or "", seen, say_for(request))

    def choose(event: gr.EventData) -> tuple[str, str]:
        return event.run, ""

    def with_words(act: Any) -> Any:
        def acted(chosen: str, request: gr.Request) -> str:
            return act(chosen or "", say_for(request))

        return acted

    look = {"fn": poll, "inputs": [runs.chosen, runs.seen], "outputs": runs.outputs}
    timer = gr.Timer(EVERY)
    timer.tick(**look, **QUIET)
    page.load(**look, **QUIET)
    runs.list.select(choose, None, [runs.chosen, runs.message], **QUIET).then(**look, **QUIET)
    for button, act in ((runs.stop, runs.ask_stop), (runs.resume, runs.go_on), (runs.cancel, runs.take_out)):
        button.click(with_words(act), runs.chosen, runs.message, **QUIET).then(**look, **QUIET)
    runs.work.click(lambda: runs.desk.queue.start(), None, None, **QUIET)
