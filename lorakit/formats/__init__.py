"""Adapter files: kohya, diffusers and PEFT; reading, writing, checking and editing them.

May import: core, config, data, engine, adapters, families.
Used by: inference, runs, training, cli, ui.

Importing this package is light; `read` and `save` load torch when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.formats.reading import read
    from lorakit.formats.saving import save

__all__ = ["read", "save"]

_LAZY = {"read": "lorakit.formats.reading:read", "save": "lorakit.formats.saving:save"}


def __getattr__(name: str) -> Any:
    """Import a public function on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'lorakit.formats' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(import_module(module), attribute)
