"""The tab "lorakit" of AUTOMATIC1111's web UI and of Forge: starts lorakit's front end beside it and shows it.

No `from __future__ import annotations` here: old gradio looks at the annotation `gr.Request` itself.
"""

import atexit
import html
import importlib.util
from pathlib import Path

import gradio as gr
import lorakit_child
from modules import call_queue, paths_internal, script_callbacks, sd_models, shared, ui_extra_networks

SECTION = ("lorakit", "lorakit")
WORK = Path(paths_internal.data_path) / "lorakit"


def host_name() -> str:
    """As `lorakit install-adapter --into` has it."""
    return "forge" if importlib.util.find_spec("modules_forge") else "a1111"


def base_folders() -> list:
    """Where the host has its checkpoints."""
    folders = [Path(sd_models.model_path), getattr(shared.cmd_opts, "ckpt_dir", None)]
    return [Path(folder) for folder in folders if folder and Path(folder).is_dir()]


def photo_folders() -> list:
    """What may be read: the folders of the settings, the host's LoRA files, and where photos usually are."""
    lines = str(getattr(shared.opts, "lorakit_photos", "") or "").splitlines()
    folders = [Path(line.strip()).expanduser() for line in lines if line.strip()]
    return [*folders, WORK, Path(shared.cmd_opts.lora_dir), *filter(Path.is_dir, [Path.home() / "Pictures"])]


def free_memory() -> None:
    """Take the host's checkpoint off the card, after the picture that is being drawn."""
    with call_queue.queue_lock:
        if getattr(sd_models.model_data, "sd_model", None) is not None:
            sd_models.unload_model_weights()


def after_runs(files: list) -> None:
    """Put the checkpoint back, and let the host know the new files."""
    with call_queue.queue_lock:
        model = getattr(sd_models.model_data, "sd_model", None)
        if model is not None:
            sd_models.send_model_to_device(model)
    for page in ui_extra_networks.extra_pages if files else ():
        if page.name == "lora":
            page.refresh()


front_end = lorakit_child.FrontEnd(Path(paths_internal.data_path), WORK / "runs", [], [])
watcher = lorakit_child.Watcher(WORK / "runs", host_name(), Path(shared.cmd_opts.lora_dir), free_memory, after_runs)


def show(request: gr.Request) -> str:
    """Start lorakit, and frame it in the page that asks."""
    headers = request.headers  # with no get() in A1111's gradio
    origin = headers["origin"] if "origin" in headers else f"http://{headers['host']}"
    front_end.bases, front_end.photos = base_folders(), photo_folders()
    try:
        return lorakit_child.frame(origin, front_end.start(origin))
    except (lorakit_child.Failed, OSError) as problem:
        return f"<pre>{html.escape(str(problem))}</pre>"


def stop() -> str:
    """End the front end; runs go on."""
    front_end.stop()
    return "<p>lorakit's front end is stopped. A run that was started goes on.</p>"


def messages() -> str:
    """What came of finished runs."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in watcher.messages)
    return f"<ul>{lines}</ul>" if lines else "<p>No run has finished since the web UI was started.</p>"


def tabs() -> list:
    """The tab."""
    with gr.Blocks(analytics_enabled=False) as page:
        with gr.Row():
            start_button = gr.Button("Start lorakit", variant="primary", elem_id="lorakit_start")
            stop_button = gr.Button("Stop", elem_id="lorakit_stop")
            news_button = gr.Button("Finished adapters", elem_id="lorakit_news")
        news = gr.HTML("")
        place = gr.HTML(
            "<p>lorakit runs as a program of its own. The checkpoint is taken off the card while it trains; finished "
            "adapters come into the Lora tab by themselves.</p>"
        )
        start_button.click(show, inputs=[], outputs=[place])
        stop_button.click(stop, inputs=[], outputs=[place])
        news_button.click(messages, inputs=[], outputs=[news])
    return [(page, "lorakit", "lorakit_tab")]


def settings() -> None:
    """Settings -> lorakit."""
    about = "Folders of photos that lorakit may read, one a line"
    shared.opts.add_option("lorakit_photos", shared.OptionInfo("", about, gr.Textbox, {"lines": 3}, section=SECTION))


def close() -> None:
    """End what was started."""
    watcher.close()
    front_end.stop()


script_callbacks.on_ui_tabs(tabs)
script_callbacks.on_ui_settings(settings)
script_callbacks.on_script_unloaded(close)
atexit.register(close)
watcher.start()
