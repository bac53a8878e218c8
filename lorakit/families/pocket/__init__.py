"""pocket: a small base model that ships inside lorakit. It is not a family: it is described and loaded as `sd`.

`weights/` has the model. The modules draw the small world that it was trained on: `scenes` renders a picture from a
`spec`, `subjects` and `styles` are what the demo trains, `classifier` says what a picture shows. The training itself is
in `tools/pocket`. Importing this package costs nothing: no torch, no Pillow.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Folder of the bundled pipeline, in the layout that `StableDiffusionPipeline.from_pretrained` reads."""
    return Path(__file__).resolve().parent / "weights"
