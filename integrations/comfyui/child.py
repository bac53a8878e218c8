"""Find lorakit, start it as a separate process, read its events and stop it.

ComfyUI's Python and lorakit's share only the pipe between them; docs/hosts.md of lorakit describes its messages.
This file uses only the standard library and runs on Python 3.9 and newer.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path

# A file in this folder with the path of lorakit's Python, for users who cannot set LORAKIT_PYTHON.
SETTING = Path(__file__).with_name("python.txt")
# The folder of lorakit, if this folder is a part of it or a link into it.
CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = "Scripts/python.exe" if os.name == "nt" else "bin/python"
# Seconds between two checks for a cancel, and time limit in seconds for a run to save after it.
POLL, PATIENCE = 0.2, 600.0
# Number of lines of stderr that become the message of an error without its own message.
LAST_LINES = 15

log = logging.getLogger("lorakit")


class Failed(RuntimeError):
    """lorakit is not installed, or a command failed; the text is for the user."""


def command() -> list[str]:
    """Return the first words of a command line that runs lorakit.

    Raises:
        Failed: lorakit is not installed; the text has the line that installs it.
    """
    if os.environ.get("LORAKIT_PYTHON"):
        return _of_python(os.environ["LORAKIT_PYTHON"], "LORAKIT_PYTHON")
    if SETTING.is_file():
        return _of_python(SETTING.read_text(encoding="utf-8").strip(), str(SETTING))
    spec = importlib.util.find_spec("lorakit")
    if spec is not None and spec.origin:  # a folder of that name that is no package has no origin
        return _of_python(sys.executable, "ComfyUI's Python")
    if (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / ".venv" / SCRIPTS).is_file():
        return _of_python(str(CHECKOUT / ".venv" / SCRIPTS), "lorakit's .venv")
    program = shutil.which("lorakit")
    if program:
        return [program]
    raise Failed(f"lorakit is not installed. Install it with this line, then queue again:\n{install_line()}")


def install_line() -> str:
    """Return a line for a terminal that installs lorakit where `command` finds it."""
    has_checkout = (CHECKOUT / "lorakit" / "__init__.py").is_file()
    folder = CHECKOUT if has_checkout else Path("FOLDER_OF_LORAKIT")
    python = sys.executable if sys.version_info >= (3, 11) else "python3.11"
    environment = folder / ".venv"
    line = f'"{python}" -m venv "{environment}" && "{environment / SCRIPTS}" -m pip install -e "{folder}"'
    return line if has_checkout else f"{line}\nand write the path of {environment / SCRIPTS} into {SETTING}"


def _of_python(python: str, source: str) -> list[str]:
    if not Path(python).is_file():
        raise Failed(f"{source} names {python}, but there is no such file: write the path of lorakit's Python there")
    # -P: a module in ComfyUI's folder must not shadow one of lorakit's.
    return [python, "-P", "-m", "lorakit"]


def environment():
    """Return ComfyUI's environment plus its folder, where lorakit finds CLIP's tokenizer. Checkpoints have none."""
    module = sys.modules.get("folder_paths")
    host = str(Path(module.__file__).parent) if getattr(module, "__file__", None) else ""
    hosts = os.pathsep.join(filter(None, [os.environ.get("LORAKIT_HOSTS"), host]))
    return {**os.environ, "PYTHONUTF8": "1", "LORAKIT_HOSTS": hosts}


def run(arguments, interrupted=lambda: False) -> str:
    """Run a command to its end and return its stdout.

    Raises:
        Failed: its exit code is not 0, or the user cancelled.
    """
    with Process(arguments) as process:
        text = "".join(process.lines(interrupted))
    if process.is_stopping:
        raise Failed("cancelled")
    if process.code:
        raise Failed("\n".join(filter(None, [process.complaint(), text.strip()])))
    return text


def follow(arguments, listen, interrupted) -> dict:
    """Run `train --json` or `resume --json`. Return its last event, which is `result` or `stopped`.

    Args:
        arguments: arguments of lorakit.
        listen: called with each event.
        interrupted: called often; once it returns True, the run saves its state and ends.

    Raises:
        Failed: the run ended with an error.
    """
    last = {}
    with Process(arguments) as process:
        for line in process.lines(interrupted):
            if not line.startswith("{"):  # output of one of lorakit's dependencies
                continue
            last = json.loads(line)
            if last["event"] == "start":
                process.run_folder = Path(last["folder"])
            listen(last)
    if last.get("event") in ("result", "stopped"):
        return last
    if process.is_stopping and process.run_folder is None:
        return {"event": "stopped", "message": "cancelled before the run began; no file was written"}
    raise Failed(last["message"] if last.get("event") == "error" else process.complaint())


class Process:
    """A process of lorakit. Leaving the context waits for its end; an exception in the context requests a stop.

    Attributes:
        code: exit code of the process.
        run_folder: folder of the run once it exists; from then on, a stop saves the run's state.
        is_stopping: whether a stop was requested.
    """

    def __init__(self, arguments):
        self.code = None
        self.run_folder = None
        self.is_stopping = False
        self._last_lines = collections.deque(maxlen=LAST_LINES)
        self._process = subprocess.Popen(
            [*command(), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=environment(),
        )
        self._queue = queue.Queue()
        self._readers = [
            threading.Thread(target=reader, daemon=True) for reader in (self._read_output, self._read_complaints)
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, at):
        if kind is not None:
            self.stop()
        try:
            self.code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.code = self._process.wait()
        for reader in self._readers:
            reader.join()
        self._process.stdout.close()
        self._process.stderr.close()

    def lines(self, interrupted):
        """Yield each line of stdout until the process ends. If `interrupted` returns True, request a stop."""
        waited = 0.0
        while True:
            try:
                line = self._queue.get(timeout=POLL)
            except queue.Empty:
                waited += POLL * self.is_stopping
                line = ""
            if line is None:
                return
            if line:
                yield line
            if not self.is_stopping and interrupted():
                self.stop()
            if waited > PATIENCE:
                self._process.kill()

    def stop(self):
        """Request that the run saves and ends. Terminate the process if the run has no folder yet."""
        if self._process.poll() is not None:
            return
        self.is_stopping = True
        try:
            (self.run_folder / "stop").touch()
        except (OSError, TypeError):  # TypeError: the run has no folder yet
            self._process.terminate()

    def complaint(self) -> str:
        """Return the error message of the process."""
        lines = [line[len("lorakit: ") :] for line in self._last_lines if line.startswith("lorakit: ")]
        return "\n".join(lines or self._last_lines) or f"lorakit ended with exit code {self.code}"

    def _read_output(self):
        for line in self._process.stdout:
            self._queue.put(line)
        self._queue.put(None)

    def _read_complaints(self):
        for line in self._process.stderr:
            self._last_lines.append(line.rstrip("\n"))
            log.info("%s", line.rstrip("\n"))
