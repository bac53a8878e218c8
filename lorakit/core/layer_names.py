"""The canonical name of a layer, which is the same whatever library or file it comes from.

`families` names the layers of a base by it, `adapters` those of a loaded model and `formats` those of a file. These
rooms do not import each other, so the rule is here. The tables of other programs' names are in `formats/keys.py`.
"""

from __future__ import annotations


def canonical(component: str, module: str) -> str:
    """Canonical layer name of a module path: it begins with the component and always has CLIP's `text_model.`.

    transformers calls the same module `encoder.layers.0` or `text_model.encoder.layers.0`, by its version and class;
    published checkpoints, and every program that reads adapters, have the longer name.
    """
    if component.startswith("text_encoder") and not module.startswith(("text_model.", "text_projection")):
        module = f"text_model.{module}"
    return f"{component}.{module}"
