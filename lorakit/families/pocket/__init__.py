"""pocket: a small base model that ships with lorakit. It is not a family: it is described and loaded as `sd`.

`weights/` has the model. The modules draw the small world that it was trained on: `scenes` renders a picture from a
`spec`, `subjects` and `styles` are trained in the demo, `classifier` labels pictures. The training code is in
`tools/pocket`. Importing this package loads neither torch nor Pillow.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Folder of the bundled pipeline, in the layout that `StableDiffusionPipeline.from_pretrained` reads."""
    return Path(__file__).resolve().parent / "weights"
