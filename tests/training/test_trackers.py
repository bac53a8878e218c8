"""Tests that trackers get the run's figures, only if configured, and no private data."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from accelerate.state import PartialState
from PIL import Image

from lorakit.config import Config, ConfigError, from_tables, load, to_toml
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.events import Events
from lorakit.training.trackers import Tracker

accelerate_tracking = pytest.importorskip("accelerate.tracking")


class Memory(accelerate_tracking.GeneralTracker):  # type: ignore[misc]
    """A user's own tracker that records its calls."""

    name = "memory"
    requires_logging_directory = False
    instances: ClassVar[list["Memory"]] = []

    def __init__(self, run_name: str):
        super().__init__()
        self.run_name, self.calls, self.options = run_name, [], dict[str, Any]()
        Memory.instances.append(self)

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.options = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finished")


class Offline(Memory):
    """A tracker whose service cannot be reached."""

    def start(self) -> None:
        if self.run_name == "nobody":
            raise RuntimeError("api_key not configured (no-tty)\ncall login")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        raise RuntimeError("connection lost")


def run_config(**options: Any) -> Config:
    private = {"data.folder": "album-of-mine", "data.name": "sks toy", "sample.prompts": ["a secret prompt"]}
    return from_tables({}, {"train.steps": 3, **private, **options})


def run_folder(path: Path, name: str = "sks-toy") -> Any:
    (path / "samples").mkdir()
    Image.fromarray(np.full((8, 16, 3), 77, dtype=np.uint8)).save(path / "samples" / "step-000002.png")
    return SimpleNamespace(path=path, samples=path / "samples", adapter_name=name)


def emit(events: Events) -> None:
    for step in (1, 2):
        events.emit("step", step, loss=0.5 / step, learning_rate=1e-4)
    events.emit("validation", 2, mse=0.25, source="held-out photos", photos=2, bands=[])
    events.emit("progress", 2, images_per_second=3.5)
    events.emit("message", message="a line")
    events.emit("sample", 2, file="step-000002.png")


@pytest.fixture(autouse=True)
def new_accelerate_state() -> None:
    """Reset accelerate's state, because a test of failed connections leaves half of it."""
    PartialState._reset_state()


def test_tensorboard_has_figures_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Events(Tracker("tensorboard", run_config(), run_folder(tmp_path))) as events:
        emit(events)
    board = EventAccumulator(str(tmp_path / "tensorboard" / "sks-toy")).Reload()
    figures = {name: [(one.step, one.value) for one in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert figures["step/loss"] == [(1, 0.5), (2, 0.25)]
    assert figures["validation/mse"] == [(2, 0.25)]
    assert figures["progress/images_per_second"] == [(2, 3.5)]
    assert "validation/photos" not in figures
    (picture,) = board.Images("samples")
    assert (picture.step, picture.width, picture.height) == (2, 16, 8)
    private = [file for file in tmp_path.rglob("*") if file.is_file() and b"secret" in file.read_bytes()]
    assert private == []


def test_a_custom_tracker_gets_the_same_figures(tmp_path: Path) -> None:
    config = run_config(**{"output.trackers": [f"{__name__}:Memory"]})
    with Events(*(Tracker(name, config, run_folder(tmp_path)) for name in config.output.trackers)) as events:
        emit(events)
    tracker = Memory.instances[-1]
    assert tracker.run_name == "sks-toy"
    *calls, (step, pictures), end = tracker.calls
    assert calls[0] == (1, {"step/loss": 0.5, "step/learning_rate": 1e-4})
    assert step == 2 and pictures["samples"].shape == (1, 8, 16, 3) and (pictures["samples"] == 77).all()
    assert end == "finished"
    assert tracker.options["optimizer.learning_rate"] == 1e-4 and tracker.options["output.formats"] == "('kohya',)"
    text = str(tracker.options)
    assert "secret" not in text and "album" not in text


def test_an_unreachable_service_is_only_a_warning(tmp_path: Path) -> None:
    lines: list[str] = []
    tracker = Tracker(f"{__name__}:Offline", run_config(), run_folder(tmp_path))
    with Events(tracker, lambda event: lines.append(str(event.facts.get("message", event.kind)))) as events:
        emit(events)
    warnings = [line for line in lines if "cannot be written" in line]
    assert warnings == [
        f"a log of the run cannot be written ({tracker.name}: connection lost); the run goes on without it"
    ]


def test_a_tracker_that_fails_to_start_ends_the_run_in_one_line(tmp_path: Path) -> None:
    name = f"{__name__}:Offline"
    with pytest.raises(LorakitError) as error:
        Tracker(name, run_config(), run_folder(tmp_path, "nobody"))
    assert str(error.value) == f"output.trackers: {name} does not start: api_key not configured (no-tty)"


def test_all_trackers_of_accelerate_are_available_and_off() -> None:
    assert set(registry.TRACKERS) == set(accelerate_tracking.LOGGER_TYPE_TO_CLASS) - {"memory"}
    assert Config().output.trackers == ()
    assert load(None, {"train.steps": 1}).output.trackers == ()


@pytest.mark.parametrize("name", [*registry.TRACKERS, "my_boards.live:Board"])
def test_a_missing_package_is_refused_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    (line,) = registry.missing_trackers([name])
    if ":" in name:
        assert line == "output.trackers = 'my_boards.live:Board': the package my_boards is not installed"
    else:
        package = name.replace("_", "-")
        version = r'"{0}>=[0-9.]+"' if name == "tensorboard" else "{0}"  # lorakit's own extra has the version
        command = rf"\S+ -m pip install {version.format(package)}"
        assert re.fullmatch(f"output.trackers = {name!r} needs {name}; install it with: {command}", line)


def test_unknown_trackers_are_refused_and_old_configs_are_read(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"choose from tensorboard, wandb, .* or write module:Class \(did you mean wandb"
    ):
        load(None, {"train.steps": 1, "output.trackers": ["wanb"]})
    file = tmp_path / "config.toml"
    file.write_text(to_toml(run_config()).replace("trackers = []", "tensorboard = true"), encoding="utf-8")
    assert load(file).output.trackers == ("tensorboard",)
    file.write_text(to_toml(run_config()).replace("trackers = []", "tensorboard = false"), encoding="utf-8")
    assert load(file) == run_config()
