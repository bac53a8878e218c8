"""A listener that writes the figures of a run for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core.events import Event

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes every figure of the events "step" and "validation" into `<run>/tensorboard`."""

    def __init__(self, run: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: SummaryWriter = SummaryWriter(str(run / "tensorboard"))

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if event.kind in ("step", "validation"):
            for name, value in event.facts.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{event.kind}/{name}", value, event.step)
        elif event.kind == "progress":
            self.writer.flush()

    def close(self) -> None:
        """Write out what is left."""
        self.writer.close()
