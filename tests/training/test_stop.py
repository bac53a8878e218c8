"""Tests that every part of a run stops promptly and loses no finished work."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import program
import pytest
import torch
from safetensors.torch import load_file
from short_run import noise, run_config

from lorakit import config
from lorakit.cli.signals import stop_on_signals
from lorakit.core.errors import Stopped
from lorakit.core.events import Event
from lorakit.runs import run_folder
from lorakit.training import checkpoint, run

STEPS = 4
# Two steps without samples and validations, for tests of a stop before the first step.
BRIEF = {"train__steps": 2, "sample__at_start": False, "sample__at_end": False, "train__validate_at_end": False}


class StopAt:
    """A listener and stop function that requests a stop from the first event that satisfies `condition`."""

    def __init__(self, condition: Callable[[Event], bool]):
        self.condition, self.is_requested, self.events = condition, False, list[Event]()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.is_requested = self.is_requested or self.condition(event)

    def stop(self) -> bool:
        return self.is_requested

    def lines(self) -> list[str]:
        return [event.facts["message"] for event in self.events if event.kind == "message"]


def says(start: str) -> Callable[[Event], bool]:
    return lambda event: event.kind == "message" and event.facts["message"].startswith(start)


def at(kind: str, step: int) -> Callable[[Event], bool]:
    return lambda event: (event.kind, event.step) == (kind, step)


pytestmark = pytest.mark.usefixtures("short_validation", "copied_modules")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four photos, with a separate cache for each test."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    (folder := tmp_path / "photos").mkdir()
    return noise(folder, 4)


@pytest.fixture(scope="module")
def straight(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    (photos := folder / "photos").mkdir()
    return run.train(settings(tiny_sd1, noise(photos, 4), folder / "run"))


def settings(base: Path, photos: Path, folder: Path, **changes: Any) -> config.Config:
    changes_of_test = {"train__validate_every": 2, "train__save_every": 2, "sample__every": 2, "train__prior": "none"}
    changes_of_test |= {"sample__at_start": True, "sample__at_end": True, "train__validate_at_end": True}
    return run_config(base, photos, folder, STEPS, **changes_of_test | changes)


def stopped(run_config: config.Config, condition: Callable[[Event], bool]) -> tuple[Stopped, StopAt]:
    """Train until the run stops; check its state and its one message; return the error and the listener."""
    listener = StopAt(condition)
    with pytest.raises(Stopped) as caught:
        run.train(run_config, listeners=[listener], stop=listener.stop)
    state = run_folder.read(caught.value.folder)
    assert (state.state, state.message) == ("stopped", str(caught.value))
    assert sum(line.startswith("stopping: ") for line in listener.lines()) == 1
    return caught.value, listener


def kinds(folder: Path, kind: str) -> list[int]:
    return [event["step"] for event in run_folder.RunFolder(folder).events(kind)]


def resumed(folder: Path) -> tuple[run.Result, list[str]]:
    listener = StopAt(lambda event: False)
    result = run.resume(folder, listeners=[listener])
    assert run_folder.status(folder) == "done" and all(finding.passed for finding in result.findings)
    return result, listener.lines()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_stop_while_photos_are_encoded(tiny_sd1, photos, tmp_path, monkeypatch):
    """The photos encoded so far are in the cache, and the resumed run encodes only the rest."""
    run_config = settings(tiny_sd1, photos, tmp_path / "run", data__cache="disk", **BRIEF)
    encoded = []

    def stop() -> bool:
        encoded.append(len(list((tmp_path / "cache" / "latents").rglob("*.safetensors"))))
        return encoded[-1] == 2

    with pytest.raises(Stopped, match="stopped before the first step; go on with: lorakit resume"):
        run.train(run_config, stop=stop)
    assert encoded == [0, 1, 2]
    assert not checkpoint.complete(tmp_path / "run" / "checkpoints")
    result, lines = resumed(tmp_path / "run")
    assert any(line.startswith("latents: 2 from the cache, 2 encoded") for line in lines)
    assert result.steps == 2 and kinds(tmp_path / "run", "step") == [1, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_stop_while_texts_are_encoded(tiny_sd1, photos, tmp_path):
    stop, listener = stopped(settings(tiny_sd1, photos, tmp_path / "run", **BRIEF), says("latents: "))
    assert stop.step == 0
    assert listener.lines()[-1] == "stopping: class images and latents that are complete are kept"
    assert resumed(tmp_path / "run")[0].steps == 2


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_stop_while_class_images_are_drawn(tiny_sd1, photos, tmp_path):
    """Pictures of the first text are in the cache, and the run stops without drawing those of the second."""
    (photos / "0.txt").write_text("a sks toy in the snow", encoding="utf-8")
    class_images = {"train__prior": "images", "train__class_images": 6}
    run_config = settings(tiny_sd1, photos, tmp_path / "run", **BRIEF | class_images)
    cache = tmp_path / "cache" / "class-images"
    with pytest.raises(Stopped) as stop:
        run.train(run_config, stop=lambda: len(list(cache.rglob("*.png"))) == 3)
    assert stop.value.step == 0 and len(list(cache.rglob("*.png"))) == 3
    _, lines = resumed(tmp_path / "run")
    assert [line for line in lines if line.startswith("class images: ")] == [
        "class images: 3 of 6 in the cache, 3 to draw"
    ]


@pytest.mark.slow
def test_a_stop_while_samples_are_drawn_before_the_first_step(tiny_sd1, photos, tmp_path):
    stop, listener = stopped(settings(tiny_sd1, photos, tmp_path / "run"), at("checkpoint", 0))
    assert stop.step == 0 and "stopping: the samples are not finished" in listener.lines()
    assert not list((tmp_path / "run").glob("*.safetensors")), "an adapter without a step is not exported"
    assert not kinds(tmp_path / "run", "sample")
    resumed(tmp_path / "run")
    assert kinds(tmp_path / "run", "sample") == [0, 2, STEPS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("condition", "step"),
    [(at("sample", 0), 1), (at("progress", 2), 2), (at("checkpoint", 2), 2), (at("step", STEPS), STEPS)],
    ids=["step", "validation", "samples", "last validation"],
)
def test_a_stop_while_training(tiny_sd1, straight, photos, tmp_path, condition, step):
    """A stopped and resumed run has the weights and validations of an uninterrupted one, bit by bit."""
    stop, _ = stopped(settings(tiny_sd1, photos, tmp_path / "run"), condition)
    assert stop.step == step and str(stop).startswith(f"stopped after step {step}; go on with: ")
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run" / "checkpoints")) == step
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 1
    result, _ = resumed(tmp_path / "run")
    one, two = load_file(result.adapter), load_file(straight.adapter)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for kind in ("validation", "sample"):
        assert kinds(tmp_path / "run", kind) == kinds(straight.folder, kind)
    curves = [[e["smoothed_loss"] for e in run_folder.RunFolder(r.folder).events("step")] for r in (result, straight)]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_a_stop_during_the_self_check(tiny_sd1, photos, tmp_path):
    def checking(event: Event) -> bool:
        return event.kind == "phase" and event.facts["phase"] == "checking the exported file"

    stop, _ = stopped(settings(tiny_sd1, photos, tmp_path / "run"), checking)
    assert stop.step == STEPS
    result, _ = resumed(tmp_path / "run")
    assert kinds(tmp_path / "run", "sample") == [0, 2, STEPS] and result.adapter.is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_stop_file_ends_encoding(tiny_sd1, photos, tmp_path):
    folder = run_folder.RunFolder(tmp_path / "run")

    def touch(event: Event) -> None:
        if says("latents: ")(event):
            folder.request_stop()

    with pytest.raises(Stopped) as caught:
        run.train(settings(tiny_sd1, photos, folder.path, **BRIEF), listeners=[touch])
    assert caught.value.step == 0
    assert resumed(folder.path)[0].steps == 2


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_stopped_resume_reports_its_step(tiny_sd1, photos, tmp_path):
    stopped(settings(tiny_sd1, photos, tmp_path / "run"), at("checkpoint", 2))
    listener = StopAt(says("latents: "))
    with pytest.raises(Stopped, match="stopped after step 2"):
        run.resume(tmp_path / "run", listeners=[listener], stop=listener.stop)
    assert run_folder.read(tmp_path / "run").step == 2


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_library_does_not_change_signal_handlers(tiny_sd1, photos, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    during = []
    run.train(
        settings(tiny_sd1, photos, tmp_path / "run", train__steps=1),
        listeners=[lambda event: during.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))],
    )
    assert set(during) == {before}


def test_the_second_ctrl_c_interrupts_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err == "lorakit: stopping and saving; press Ctrl-C again to end at once\n"


@pytest.mark.slow
def test_ctrl_c_while_class_images_are_drawn_ends_the_process(photos, tmp_path):
    """The bundled base would draw for minutes to make these 2,000 pictures."""
    folder = tmp_path / "run"
    command = ["train", str(photos), "--output", str(folder), "--subject", "sks toy"]
    command += ["--set=train.prior=images", "--set=train.class_images=2000", "--set=memory.device=cpu"]
    process = program.start(command, tmp_path / "output")
    log = folder / "log.jsonl"
    for _ in range(6000):
        if log.exists() and "class images: " in log.read_text(encoding="utf-8"):
            break
        assert process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, output = process.wait(600), (tmp_path / "output").read_text()
    assert code == 130, output
    assert len(list((tmp_path / "cache").rglob("*.png"))) < 100
    assert "Traceback" not in output
    assert "lorakit: stopping and saving" in output
    assert f"lorakit: stopped before the first step; go on with: lorakit resume {folder}" in output
    assert json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"] == "stopped"


def test_a_closed_terminal_is_a_request_to_stop_unless_it_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup does this
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)
