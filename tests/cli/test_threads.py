"""A command uses as many threads as there are idle cores, or the number in OMP_NUM_THREADS."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from lorakit.cli import threads


@pytest.mark.parametrize(
    ("busy", "of", "free"),
    [(0, 2, 2), (3.5, 2, 2), (50, 2, 1), (100, 2, 1), (0, 1, 1), (30, 8, 6), (99, 64, 1), (12.5, 8, 7)],
)
def test_idle_cores_are_counted_and_at_least_one_is_used(busy, of, free):
    assert threads.idle_cores(busy, of) == free


def test_the_idle_cores_become_threads(monkeypatch):
    monkeypatch.setenv(threads.THREADS, "")
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: 50.0 if seconds == threads.SAMPLE_SECONDS else 0.0)
    threads.use_idle_cores()
    assert os.environ[threads.THREADS] == "4"
    assert threads.of_user() == ""


def test_a_number_of_threads_of_the_user_is_not_changed(monkeypatch):
    monkeypatch.setenv(threads.THREADS, "3")
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    threads.use_idle_cores()
    assert os.environ[threads.THREADS] == threads.of_user() == "3"


@pytest.mark.slow
def test_torch_uses_this_number_of_threads():
    script = (
        "import os; os.environ['OMP_NUM_THREADS'] = ''; from lorakit.cli import threads; threads.use_idle_cores(); "
        "import torch; number = int(os.environ['OMP_NUM_THREADS']); "
        "print(torch.get_num_threads() == number <= threads.available_cores())"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "True\n"
