"""Tests of the number of processes of a run, and of the plan's lines about it."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from short_run import noise, run_config

from lorakit.cli import main as cli
from lorakit.config import Config
from lorakit.core.errors import LorakitError
from lorakit.runs import launch, nvidia
from lorakit.runs.preflight import Preflight, preflight

CARD = nvidia.Card("A card", "580.1", (9, 0))


@pytest.fixture(scope="module")
def settings(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("photos")
    return run_config(tiny_sd1, noise(folder, 20), folder.with_name("run"), 100)


def checked(settings: Config, processes: int, **more: bool) -> Preflight:
    return preflight(settings, processes=processes, **more)


def test_a_step_has_the_batches_of_all_processes_and_the_plan_reports_it(settings):
    result = checked(settings, 4)
    assert not result.problems and result.config.train.gradient_accumulation_steps == 4
    assert result.plan and result.plan.steps == 100
    assert any(
        line == "processes: 4, each with 1 of the 4 batches (8 photos) of a step; length and learning rate are per "
        "optimizer step and stay as they are"
        for line in result.plan.lines()
    )


def test_useless_processes_for_few_photos_are_a_warning(settings):
    (line,) = (line for line in checked(settings, 2).warnings if "of no use" in line)
    assert line.startswith("2 processes are of no use for 20 photos: 5 steps go through all of them, and the run is as")
    (line,) = (line for line in checked(settings, 40).warnings if "of no use" in line)
    assert line.startswith("40 processes are of no use for 20 photos: a step goes through all of them, and the run is")
    cards = replace(settings, memory=replace(settings.memory, device="auto"))
    assert launch._uselessness(checked(settings, 1).plan, cards, 2).startswith("2 GPUs are of no use for 20 photos: ")
    assert not [line for line in checked(settings, 1).warnings if "of no use" in line]


@pytest.mark.parametrize(
    ("gpus", "cards", "hidden", "problem"),
    [
        (0, 2, None, "--gpus 0: give the number of cards to train on"),
        (4, 2, None, "--gpus 4: this machine has 2 NVIDIA cards that torch may use"),
        (2, 2, "1", "--gpus 2: this machine has 1 NVIDIA card that torch may use"),
        (2, 0, None, "--gpus 2: this machine has no NVIDIA card that torch may use"),
        (2, 2, None, None),
        (1, 0, None, None),
    ],
)
def test_missing_gpus_are_refused(settings, monkeypatch, gpus, cards, hidden, problem):
    monkeypatch.setattr(nvidia, "cards", lambda: [CARD] * cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    memory = replace(settings.memory, device="auto")
    assert launch.gpus_problem(replace(settings, memory=memory), gpus) == problem


def test_check_and_train_refuse_missing_gpus(settings, tmp_path, capsys):
    arguments = [settings.data.folder, "--subject", "sks toy", "--base", settings.model.base, "--gpus", "9"]
    codes = [cli.main([command, *arguments]) for command in ("check", "train")]
    lines = [line for line in capsys.readouterr().err.splitlines() if "--gpus 9" in line]
    assert all(codes) and len(set(lines)) == 1 and len(lines) == 2


def test_gpus_that_contradict_the_launcher_are_refused(settings, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert launch.world() == launch.World(0, 0, 8)
    assert launch.gpus_problem(settings, 4) == "--gpus 4: the launcher started the processes (8); leave --gpus out"
    assert launch.gpus_problem(settings, 8) is None


WORLD = """
import os, sys
from lorakit.runs import launch
rank = launch.world().rank
open(os.path.join(sys.argv[1], str(rank)), "w").write(f"{launch.world()} {os.environ['MASTER_ADDR']}")
"""


def test_the_variables_of_accelerates_launcher_are_read(tmp_path):
    """accelerate's own command starts a program that prints the result of `launch.world`."""
    from accelerate.commands import launch as launcher

    program = tmp_path / "program.py"
    program.write_text(WORLD)
    words = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", str(program), str(tmp_path)]
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        launcher.launch_command(launcher.launch_command_parser().parse_args(words))
    finally:  # the launcher does not restore the signal handlers
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == f"{launch.World(rank, rank, 2)} 127.0.0.1"


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_mpirun_are_refused(settings, monkeypatch, name):
    """`accelerate launch --cpu` with a host file starts such processes too."""
    monkeypatch.setenv(name, "2")
    assert checked(settings, 1).problems == ()
    (problem,) = preflight(settings).problems
    assert problem.startswith("mpirun has started 2 processes, which are not connected: start them with torchrun")
    monkeypatch.setenv(name, "1")
    assert preflight(settings).problems == ()


def test_too_many_and_unevenly_divided_batches_are_refused(settings):
    assert "batches a step; the limit is 256: lower it" in checked(settings, 300).problems[0]
    shared, _ = launch.share(settings, 6)
    assert checked(shared, 4, resume=True).problems == (
        "a step of this run has 6 batches of 2, which 4 processes cannot share evenly: go on with 1 or 2 or 3 or 6",
    )
    assert not checked(shared, 3, resume=True).problems


def test_a_killed_first_process_is_reported_by_the_launcher(monkeypatch):
    """The launcher raises its own error, which contains the signal that killed the process."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher import api

    def killed(*settings: object):
        def run(*arguments: object) -> None:
            raise ChildFailedError("python", {0: ProcessFailure(0, 1, -9, "")})

        return run

    monkeypatch.setattr(api, "elastic_launch", killed)
    with pytest.raises(LorakitError) as refusal:
        launch.start(2, ["train"])
    assert str(refusal.value) == (
        "process 0 of 2 was killed (signal 9); checkpoints are intact, continue with: lorakit resume"
    )
