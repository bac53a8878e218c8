"""The functions of ComfyUI that the nodes use. Each function imports ComfyUI's modules itself."""

from __future__ import annotations

import logging
from pathlib import Path

from . import child

# The base that lorakit ships. It is small enough to train without a GPU. ComfyUI cannot draw with it.
BUNDLED = "pocket (lorakit's own, for a first try)"
# Longest side of a cell of a grid in pixels.
CELL = 256

log = logging.getLogger("lorakit")


def checkpoints():
    """Return the names of the bases that the user can choose."""
    import folder_paths

    return [*folder_paths.get_filename_list("checkpoints"), BUNDLED]


def loras():
    """Return the names of the host's LoRA files."""
    import folder_paths

    return folder_paths.get_filename_list("loras")


def full_path(kind, name):
    """Return the path of one of the host's files."""
    import folder_paths

    if name == BUNDLED:
        return "pocket"
    return folder_paths.get_full_path_or_raise(kind, name)


def work_folder(*parts):
    """Return a folder of lorakit's in the host's output folder, which the host does not empty when it restarts."""
    import folder_paths

    return Path(folder_paths.get_output_directory(), "lorakit", *parts)


def interrupted():
    """Return whether the user cancelled."""
    import comfy.model_management

    return comfy.model_management.processing_interrupted()


def run(arguments):
    """Run a command of lorakit and return its stdout. After a cancel, raise the host's exception for it."""
    import comfy.model_management

    try:
        return child.run(arguments, interrupted)
    except child.Failed:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


def free_memory():
    """Unload the host's models, because lorakit's process needs the memory of the card."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def say(text, node):
    """Write a line to the log, and show it on the node if the host can."""
    log.info("%s", text)
    try:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node)
    except (ImportError, AttributeError):  # an older ComfyUI
        pass


def load(base, model, clip):
    """Return the given model and CLIP; load a missing one from the base with the host's loader."""
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
    """Return model and CLIP with an adapter on them, which the host's own loader applies."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_lora_for_models(
        model, clip, comfy.utils.load_torch_file(path, safe_load=True), strength, strength
    )


def images(pictures):
    """Return pictures of one size as the host's IMAGE."""
    import numpy
    import torch

    return torch.from_numpy(numpy.stack([numpy.asarray(p.convert("RGB"), dtype=numpy.float32) for p in pictures]) / 255)


def sheet(rows):
    """Return one picture of all rows. Cells are at most CELL wide and high; empty cells are grey."""
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
    """Read a picture and rotate it by its EXIF orientation."""
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def blank():
    """Return a grey picture for an output without pictures."""
    from PIL import Image

    return Image.new("RGB", (64, 64), (228, 228, 225))
