"""Run `lorakit ARGUMENTS` in a process that is forked from this one. A new process takes seven seconds to import."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


class Fork:
    """Runs `job()` in a forked child, whose exit code is the return value. Its output goes to `log`."""

    def __init__(self, job: Callable[[], int], log: Path):
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python warns about forks with several threads. The child does not need pytest's other threads.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self._be_child(job, log)

    @staticmethod
    def _be_child(job: Callable[[], int], log: Path) -> None:
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = job()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 600) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} did not end")
            time.sleep(0.02)
        return code


def start(arguments: Sequence[str], log: Path, module: str = "lorakit") -> Fork | subprocess.Popen[bytes]:
    """Start `python -m MODULE ARGUMENTS`. With CUDA or on Windows, where a fork is impossible, it is a new process."""
    if torch.cuda.is_available() or not hasattr(os, "fork"):
        with log.open("ab") as file:
            command = [sys.executable, "-u", "-m", module, *arguments]
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    main = importlib.import_module("lorakit.cli.main" if module == "lorakit" else module).main
    return Fork(lambda: main(arguments) or 0, log)
