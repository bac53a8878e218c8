"""Tests of the command that makes the model: a short run that is killed and then continues."""

from __future__ import annotations

import contextlib
import io
import signal
from pathlib import Path

import program
import pytest
import torch
from waiting import wait_for

from tools.pocket import denoiser, make, workers
from tools.pocket.recipe import SMOKE


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A short run that is killed with SIGKILL. A second run, in this process, continues it."""
    base = tmp_path_factory.mktemp("pocket")
    work, output = base / "work", base / "weights"
    command = ["--smoke", "--processes", "1", "--work", str(work), "--output", str(output)]
    first = program.start(command, base / "first", "tools.pocket.make")
    wait_for((work / "vae.state").exists)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (work / "unet.pt").exists()
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        make.main(command)
    assert "render: done before" in lines.getvalue()
    return work, output


@pytest.mark.slow
def test_a_smoke_run_gives_a_working_pipeline(smoke_run: tuple[Path, Path]) -> None:
    from diffusers import StableDiffusionPipeline

    _, output = smoke_run
    pipe = StableDiffusionPipeline.from_pretrained(str(output))
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a mug", num_inference_steps=2).images[0].size == (64, 64)
    assert (output / "classifier.safetensors").exists()


@pytest.mark.slow
def test_a_second_run_repeats_no_work(smoke_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    work, output = smoke_run
    make.make(SMOKE, work, output, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.endswith("done before") for line in lines)


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_weights_as_an_uninterrupted_one(
    smoke_run: tuple[Path, Path], tmp_path: Path
) -> None:
    work, _ = smoke_run
    for name in (
        "mean.npy",
        "deviation.npy",
        "states.npy",
        "empty.npy",
        "latents.npz",
        "vae.pt",
        "text.pt",
        "tokenizer",
    ):
        (tmp_path / name).symlink_to(work / name)
    stopped = 0

    class Stopped(Exception):
        pass

    step = workers.Run.step

    def stop_half_way(self: workers.Run, loss: torch.Tensor) -> None:
        nonlocal stopped
        step(self, loss)
        if self.position == self.total // 2:
            stopped += 1
            self.save()
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.Run, "step", stop_half_way)
        with pytest.raises(Stopped):
            denoiser.train(workers.Worker(), SMOKE, tmp_path)
    assert stopped == 1
    denoiser.train(workers.Worker(), SMOKE, tmp_path)
    uninterrupted, resumed = (torch.load(folder / "unet.pt", weights_only=True) for folder in (work, tmp_path))
    for name, value in uninterrupted.items():
        assert torch.equal(value, resumed[name]), name


def test_bad_arguments_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make.main(["--stages", "paint"])
    assert "unknown stage paint; there are render, tokenizer" in capsys.readouterr().err
