"""Fixtures: front ends in their own processes, and a browser."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class FrontEnd:
    """`lorakit ui` in its own process. The constructor returns when it serves its page at `address`."""

    def __init__(self, room: Path, *arguments: str):
        self.room = room
        command = [sys.executable, "-m", "lorakit", "ui", "--runs", str(room / "runs"), "--root", str(room), *arguments]
        # Without torch's compiler, each process that the front end starts imports a second faster.
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "TORCHDYNAMO_DISABLE": "1"}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=room,
            # A background job of a shell ignores SIGINT, and so do its children. These tests can be such a job.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if "http://" in line:
                break
        assert self.process.poll() is None, "".join(self.lines)
        self.address = self.lines[-1].split()[-1]
        # The process would block if nobody read its pipe.
        self.reader = threading.Thread(target=self._drain, daemon=True)
        self.reader.start()

    def _drain(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def close(self) -> None:
        """Kill the front end and all processes that it started."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.room) in part for part in process.info["cmdline"] or []):
                process.kill()
        self.reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> None:
        """End the front end by SIGINT, like Ctrl-C. Runs continue."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(600)


@pytest.fixture(scope="module")
def front_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., FrontEnd]]:
    """Return a function that starts a front end. The fixture kills all front ends and their processes at the end."""
    pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")
    started: list[FrontEnd] = []

    def start(room: Path | None = None, *arguments: str) -> FrontEnd:
        started.append(FrontEnd(room or tmp_path_factory.mktemp("ui"), *arguments))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """The system's Chromium, headless."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'lorakit[test]'")
    binary = next((path for path in CHROMIUM if Path(path).exists()), None)
    if binary is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield browser
        browser.close()
