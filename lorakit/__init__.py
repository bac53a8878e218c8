"""lorakit: train LoRA adapters for Stable Diffusion from photos, and check that the files work everywhere.

`import lorakit` is light: what needs torch is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.adapters import apply, attach
    from lorakit.config import Config, load as load_config
    from lorakit.core.errors import ConfigError, LorakitError, Stopped
    from lorakit.core.events import Event
    from lorakit.formats.inspect import inspect
    from lorakit.formats.reading import read as load_adapter
    from lorakit.formats.saving import save_adapter
    from lorakit.inference.sampling import sample
    from lorakit.runs.preflight import preflight
    from lorakit.runs.publish import push_to_hub
    from lorakit.training.run import Result, resume, train

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ConfigError",
    "Event",
    "LorakitError",
    "Result",
    "Stopped",
    "apply",
    "attach",
    "inspect",
    "load_adapter",
    "load_config",
    "preflight",
    "push_to_hub",
    "resume",
    "sample",
    "save_adapter",
    "train",
]

_LAZY = {
    "Config": "lorakit.config:Config",
    "ConfigError": "lorakit.core.errors:ConfigError",
    "Event": "lorakit.core.events:Event",
    "LorakitError": "lorakit.core.errors:LorakitError",
    "Result": "lorakit.training.run:Result",
    "Stopped": "lorakit.core.errors:Stopped",
    "apply": "lorakit.adapters:apply",
    "attach": "lorakit.adapters:attach",
    "inspect": "lorakit.formats.inspect:inspect",
    "load_adapter": "lorakit.formats.reading:read",
    "load_config": "lorakit.config:load",
    "preflight": "lorakit.runs.preflight:preflight",
    "push_to_hub": "lorakit.runs.publish:push_to_hub",
    "resume": "lorakit.training.run:resume",
    "sample": "lorakit.inference.sampling:sample",
    "save_adapter": "lorakit.formats.saving:save_adapter",
    "train": "lorakit.training.run:train",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    import gc
    from importlib import import_module

    module, _, attribute = _LAZY[name].partition(":")
    collects = gc.isenabled()
    gc.disable()  # imports leave no garbage, and looking for it took an eighth of their time
    try:
        return getattr(import_module(module), attribute)
    finally:
        if collects:
            gc.enable()


def __dir__() -> list[str]:
    """The public names, whether loaded or not."""
    return sorted([*globals(), *_LAZY])
