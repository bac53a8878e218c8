"""Names a user may write, and where the code for each lives: `name -> "module:attribute"`.

This module imports nothing of lorakit and nothing heavy, so `--help` and the config check can read the names without
loading torch. A new model family, method, optimizer or export format is one file and one line here.
"""

from importlib import import_module
from typing import Any

# A family is recognised from the base's own config or keys; see lorakit.families.
FAMILIES = {
    "sd": "lorakit.families.sd.model:StableDiffusion",
    "sdxl": "lorakit.families.sdxl.model:StableDiffusionXL",
    "sd3": "lorakit.families.sd3.model:StableDiffusion3",
}

ADAPTERS = {
    "lora": "lorakit.adapters.lora:LORA",
    "rslora": "lorakit.adapters.lora:RSLORA",
    "dora": "lorakit.adapters.dora:DORA",
    "pissa": "lorakit.adapters.pissa:PISSA",
    "loha": "lorakit.adapters.loha:LOHA",
    "lokr": "lorakit.adapters.lokr:LOKR",
}

OPTIMIZERS = {
    "adamw": "lorakit.training.optimizers:adamw",
    "adamw8bit": "lorakit.training.optimizers:adamw8bit",
    "paged_adamw8bit": "lorakit.training.optimizers:paged_adamw8bit",
    "lion": "lorakit.training.optimizers:lion",
    "adafactor": "lorakit.training.optimizers:adafactor",
    "prodigy": "lorakit.training.optimizers:prodigy",
}

EXPORTS = {
    "kohya": "lorakit.formats.kohya",
    "diffusers": "lorakit.formats.diffusers",
    "peft": "lorakit.formats.peft",
}


def load(table: dict[str, str], name: str) -> Any:
    """The object behind `name` in one of the tables above (a module where the entry names no attribute).

    Raises:
        ValueError: `name` is not in the table.
    """
    if name not in table:
        raise ValueError(f"unknown name {name!r}; known: {', '.join(table)}")
    module, _, attribute = table[name].partition(":")
    loaded = import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
