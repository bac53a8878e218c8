"""A power cut in the middle of a run."""

import pytest

from lorakit.training import checkpoint


class Cut(BaseException):
    """Stands for a power cut: nothing that catches errors catches it."""


def interrupted_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run die right after the checkpoint of `step`."""
    save = checkpoint.save

    def save_and_die(folder, at, *rest, **named):
        save(folder, at, *rest, **named)
        if at == step:
            raise Cut

    monkeypatch.setattr(checkpoint, "save", save_and_die)
