"""Simulate a power cut during a run."""

import pytest

from lorakit.training import checkpoint


class Cut(BaseException):
    """Simulates a power cut. It is a BaseException, so code that catches errors does not catch it."""


def interrupted_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise `Cut` in the next run directly after the checkpoint of `step`."""
    save = checkpoint.save

    def save_and_die(folder, at, *rest, **named):
        save(folder, at, *rest, **named)
        if at == step:
            raise Cut

    monkeypatch.setattr(checkpoint, "save", save_and_die)
