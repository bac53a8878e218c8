"""The tab "lorakit" in AUTOMATIC1111's web UI and in Forge. It starts lorakit's front end and shows it.

This file has no `from __future__ import annotations`, because old versions of Gradio need the class `gr.Request` there.
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
    """Return the host's name for `lorakit install-adapter --into`."""
    return "forge" if importlib.util.find_spec("modules_forge") else "a1111"


def base_folders() -> list:
    """Return the host's folders of checkpoints."""
    folders = [Path(sd_models.model_path), getattr(shared.cmd_opts, "ckpt_dir", None)]
    return [Path(folder) for folder in folders if folder and Path(folder).is_dir()]


def photo_folders() -> list:
    """Return the folders that lorakit may read: those in the settings, its own, the host's LoRA files, and Pictures."""
    lines = str(getattr(shared.opts, "lorakit_photos", "") or "").splitlines()
    folders = [Path(line.strip()).expanduser() for line in lines if line.strip()]
    return [*folders, WORK, Path(shared.cmd_opts.lora_dir), *filter(Path.is_dir, [Path.home() / "Pictures"])]


def free_memory() -> None:
    """Unload the host's checkpoint from the card, as soon as the host has finished its present picture."""
    with call_queue.queue_lock:
        if getattr(sd_models.model_data, "sd_model", None) is not None:
            sd_models.unload_model_weights()


def after_runs(files: list) -> None:
    """Move the checkpoint back to the card, and refresh the host's list of LoRA files."""
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
    """Start lorakit and return HTML that shows it in the page of the request."""
    headers = request.headers  # it has no get() in A1111's Gradio
    origin = headers["origin"] if "origin" in headers else f"http://{headers['host']}"
    front_end.bases, front_end.photos = base_folders(), photo_folders()
    try:
        return lorakit_child.frame(origin, front_end.start(origin))
    except (lorakit_child.Failed, OSError) as problem:
        return f"<pre>{html.escape(str(problem))}</pre>"


def stop() -> str:
    """End the front end. Runs continue."""
    front_end.stop()
    return "<p>lorakit's front end is stopped. A run that was started continues.</p>"


def messages() -> str:
    """Return the messages about finished runs as HTML."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in watcher.messages)
    return f"<ul>{lines}</ul>" if lines else "<p>No run has finished since the web UI was started.</p>"


def tabs() -> list:
    """Build the tab."""
    with gr.Blocks(analytics_enabled=False) as page:
        with gr.Row():
            start_button = gr.Button("Start lorakit", variant="primary", elem_id="lorakit_start")
            stop_button = gr.Button("Stop", elem_id="lorakit_stop")
            news_button = gr.Button("Finished adapters", elem_id="lorakit_news")
        news = gr.HTML("")
        place = gr.HTML(
            "<p>lorakit runs as a separate program. While it trains, the checkpoint is unloaded from the GPU. Finished "
            "adapters appear in the Lora tab.</p>"
        )
        start_button.click(show, inputs=[], outputs=[place])
        stop_button.click(stop, inputs=[], outputs=[place])
        news_button.click(messages, inputs=[], outputs=[news])
    return [(page, "lorakit", "lorakit_tab")]


def settings() -> None:
    """Add the page "lorakit" to the host's settings."""
    about = "Folders of photos that lorakit may read, one per line"
    shared.opts.add_option("lorakit_photos", shared.OptionInfo("", about, gr.Textbox, {"lines": 3}, section=SECTION))


def close() -> None:
    """End the watcher and the front end."""
    watcher.close()
    front_end.stop()


script_callbacks.on_ui_tabs(tabs)
script_callbacks.on_ui_settings(settings)
script_callbacks.on_script_unloaded(close)
atexit.register(close)
watcher.start()
