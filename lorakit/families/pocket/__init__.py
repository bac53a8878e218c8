"""pocket: the Stable Diffusion in miniature that ships inside lorakit.

Importing this package costs nothing: no torch, no Pillow. The renderer, the judge and the training live in its modules.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Folder of the bundled pipeline, in the layout that `StableDiffusionPipeline.from_pretrained` reads."""
    return Path(__file__).resolve().parent / "weights"
