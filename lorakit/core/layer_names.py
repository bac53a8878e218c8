"""The canonical name of a layer, which does not depend on a library or a file format.

`families` uses it for the layers of a base, `adapters` for those of a loaded model and `formats` for those of a file.
These rooms do not import each other, so the rule is here. The tables of other programs' names are in `formats/keys.py`.
"""

from __future__ import annotations


def canonical(component: str, module: str) -> str:
    """Canonical layer name of a module path: it starts with the component and always includes CLIP's `text_model.`.

    transformers calls the same module `encoder.layers.0` or `text_model.encoder.layers.0`, depending on version and
    class. Published checkpoints, and every program that reads adapters, use the longer name.
    """
    if component.startswith("text_encoder") and not module.startswith(("text_model.", "text_projection")):
        module = f"text_model.{module}"
    return f"{component}.{module}"
