"""ComfyUI's services for the nodes. ComfyUI's modules are imported where they are used."""

from __future__ import annotations

import logging
from pathlib import Path

from . import child

# The base that lorakit ships: small enough for a first try without a card. ComfyUI cannot draw with it.
BUNDLED = "pocket (lorakit's own, for a first try)"
# Longest side of a cell of a grid.
CELL = 256

log = logging.getLogger("lorakit")


def checkpoints():
    """The names of the bases to choose from."""
    import folder_paths

    return [*folder_paths.get_filename_list("checkpoints"), BUNDLED]


def loras():
    """The names of the host's LoRA files."""
    import folder_paths

    return folder_paths.get_filename_list("loras")


def full_path(kind, name):
    """Where the host has a file."""
    import folder_paths

    if name == BUNDLED:
        return "pocket"
    return folder_paths.get_full_path_or_raise(kind, name)


def work_folder(*parts):
    """A folder of lorakit's in the host's output folder, where runs survive a restart."""
    import folder_paths

    return Path(folder_paths.get_output_directory(), "lorakit", *parts)


def interrupted():
    """Whether the person cancelled."""
    import comfy.model_management

    return comfy.model_management.processing_interrupted()


def run(arguments):
    """A command of lorakit to its end; cancelling is passed on to the host."""
    import comfy.model_management

    try:
        return child.run(arguments, interrupted)
    except child.Failed:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


def free_memory():
    """Unload the host's models: lorakit's process needs the card."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def say(text, node):
    """A line on the node, where the host can show one, and in its log."""
    log.info("%s", text)
    try:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node)
    except (ImportError, AttributeError):  # an older host
        pass


def load(base, model, clip):
    """The base as the host loads it, but for what is there already."""
    if model is not None and clip is not None:
        return model, clip
    if base == BUNDLED:
        from comfy_execution.graph_utils import ExecutionBlocker

        nothing = ExecutionBlocker("ComfyUI cannot draw with lorakit's own base; train on one of your checkpoints")
        return model or nothing, clip or nothing
    import comfy.sd
    import folder_paths

    embeddings = folder_paths.get_folder_paths("embeddings")
    path = full_path("checkpoints", base)
    patcher, encoder = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, embedding_directory=embeddings)[:2]
    return model or patcher, clip or encoder


def apply(model, clip, path, strength):
    """The models with an adapter on them, by the host's own loader."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_lora_for_models(
        model, clip, comfy.utils.load_torch_file(path, safe_load=True), strength, strength
    )


def images(pictures):
    """Pictures of one size as the host's IMAGE."""
    import numpy
    import torch

    return torch.from_numpy(numpy.stack([numpy.asarray(p.convert("RGB"), dtype=numpy.float32) for p in pictures]) / 255)


def sheet(rows):
    """Rows of pictures as one, each cell at most CELL wide and high; missing ones are grey."""
    from PIL import Image

    cells = [[picture.copy() for picture in row] for row in rows]
    for picture in (picture for row in cells for picture in row):
        picture.thumbnail((CELL, CELL))
    width = max(picture.width for row in cells for picture in row)
    height = max(picture.height for row in cells for picture in row)
    result = Image.new("RGB", (width * max(map(len, cells)), height * len(cells)), (228, 228, 225))
    for y, row in enumerate(cells):
        for x, picture in enumerate(row):
            result.paste(picture, (x * width, y * height))
    return result


def open_picture(path):
    """A picture, its file closed again and turned as its camera says."""
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def blank():
    """A grey picture, where there is none."""
    from PIL import Image

    return Image.new("RGB", (64, 64), (228, 228, 225))
