"""A listener that passes the metrics and pictures of a run to an experiment tracker of accelerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lorakit.core import image_grid
from lorakit.core.errors import LorakitError
from lorakit.core.registry import resolve
from lorakit.formats import metadata

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from lorakit.config import Config
    from lorakit.core.events import Event
    from lorakit.runs.run_folder import RunFolder

Value = TypeVar("Value")
# Tracker -> its argument for the name of the run. The other trackers only have the project's name.
RUN_NAME = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name"}
# Trackers that take one picture instead of a batch, and extra arguments of `log_images`.
ONE_PICTURE = {"aim", "clearml"}
PICTURE_OPTIONS: dict[str, dict[str, str]] = {"tensorboard": {"dataformats": "NHWC"}}


class Tracker:
    """Log the metrics of the events "step", "validation" and "progress", and the sample pictures.

    The project has the adapter's name, the run has its folder's name. The tracker gets the options that an adapter file
    contains: no path, no prompt. The tracker handles its own login; lorakit reads and writes no credentials.

    Args:
        name: one of `registry.TRACKERS`, or "module:Class" of an `accelerate.tracking.GeneralTracker`.

    Raises:
        LorakitError: the tracker does not start, say because nobody is logged in.
    """

    def __init__(self, name: str, config: Config, run: RunFolder):
        self.name, self.samples = name, run.samples
        try:
            self.tracker = self._start(config, run)
        except Exception as error:  # any package may be behind it, with any error
            raise LorakitError("output.trackers: {name} does not start: {problem}", name, _line(error)) from None

    def __call__(self, event: Event) -> None:
        """Log an event."""
        if event.kind in ("step", "validation", "progress"):
            figures = {f"{event.kind}/{name}": value for name, value in event.facts.items() if isinstance(value, float)}
            self._guard(lambda: self.tracker.log(figures, step=event.step))
        elif event.kind == "sample" and hasattr(self.tracker, "log_images"):
            picture = np.asarray(image_grid.read(self.samples / event.facts["file"]).convert("RGB"))
            pictures = picture if self.name in ONE_PICTURE else picture[None]
            options = PICTURE_OPTIONS.get(self.name, {})
            self._guard(lambda: self.tracker.log_images({"samples": pictures}, step=event.step, **options))

    def close(self) -> None:
        """Write the remaining values and close the tracker."""
        self._guard(self.tracker.finish)

    def _start(self, config: Config, run: RunFolder) -> GeneralTracker:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker_class = resolve(self.name) if ":" in self.name else LOGGER_TYPE_TO_CLASS[self.name]
        folders = [str(run.path / tracker_class.name)] if tracker_class.requires_logging_directory else []
        names = {RUN_NAME[self.name]: run.path.name} if self.name in RUN_NAME else {}
        tracker: GeneralTracker = tracker_class(run.adapter_name, *folders, **names)
        tracker.start()
        tables: Mapping[str, Mapping[str, Any]] = metadata.public_options(config)
        options = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
        simple = (bool, int, float)
        scalars = {key: value if isinstance(value, simple) else str(value) for key, value in options.items()}
        tracker.store_init_configuration(scalars)
        return tracker

    def _guard(self, log: Callable[[], Value]) -> Value:
        """Call `log`. An error of the tracker, say without a network, becomes an OSError, like that of a log file."""
        try:
            return log()
        except OSError:
            raise
        except Exception as error:  # any package may be behind it, with any error
            raise OSError(f"{self.name}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
