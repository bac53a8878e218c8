"""lorakit: teach Stable Diffusion a subject or a style from photos, and get a checked adapter that works everywhere.

`import lorakit` is light: what needs torch is loaded when it is first used.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Config", "ConfigError", "attach", "load_preset", "resume", "train"]

_LAZY = {
    "Config": "lorakit.config:Config",
    "ConfigError": "lorakit.config:ConfigError",
    "load_preset": "lorakit.config:load",
    "attach": "lorakit.adapters:attach",
    "train": "lorakit.training.run:train",
    "resume": "lorakit.training.run:resume",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _LAZY[name].partition(":")
    return getattr(import_module(module), attribute)
