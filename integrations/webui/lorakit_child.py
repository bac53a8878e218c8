"""Find lorakit's Python, start its front end as a separate process, and install the adapters of finished runs.

The host's Python and lorakit's share no package. This file uses only the standard library and runs on Python 3.9 and
newer.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The folder of lorakit, if this folder is a part of it or a link into it.
CHECKOUT = HERE.parents[1]
SCRIPTS = "Scripts/python.exe" if os.name == "nt" else "bin/python"
NEWEST, OLDEST = 14, 11
# Seconds between two checks of the runs, and time limit in seconds for the start of the front end.
POLL, PATIENCE = 1.0, 180.0
LAST_LINES = 15
LIVE = ("preparing", "running")
_ADDRESS = re.compile(r"local URL:\s+http://[^:/]+:(\d+)")


class Failed(RuntimeError):
    """lorakit is not installed, or did not start; the text is for the user."""


def source() -> str:
    """Return pip's source for lorakit: the folder that contains this file, or the package from the index."""
    return f"{CHECKOUT}[ui]" if (CHECKOUT / "lorakit" / "__init__.py").is_file() else "lorakit[ui]"


def install_steps() -> list[list[str]]:
    """Return the arguments of each `pip install` call, in order. PyPI's torch for Windows has no CUDA."""
    torch = ["torch<2.14", "--index-url", "https://download.pytorch.org/whl/cu130"]
    return [*([torch] if os.name == "nt" else []), [source()]]


def command() -> list[str]:
    """Return the first words of a command line that runs lorakit.

    Raises:
        Failed: lorakit is not installed; the text has the lines that install it.
    """
    if os.environ.get("LORAKIT_PYTHON"):
        if not Path(os.environ["LORAKIT_PYTHON"]).is_file():
            raise Failed(f"LORAKIT_PYTHON names {os.environ['LORAKIT_PYTHON']}, but there is no such file")
        return [os.environ["LORAKIT_PYTHON"], "-m", "lorakit"]
    for python in (HERE / "venv" / SCRIPTS, CHECKOUT / ".venv" / SCRIPTS):
        if python.is_file() and any(python.parents[1].glob("[Ll]ib/**/site-packages/lorakit*")):
            return [str(python), "-m", "lorakit"]
    program = shutil.which("lorakit")
    if program:
        return [program]
    python = " ".join(find_python() or ["python3.12"])
    at = HERE / "venv" / SCRIPTS
    lines = [f'{python} -m venv "{HERE / "venv"}"']
    for words in install_steps():
        quoted = " ".join(word if word.startswith(("--", "http")) else f'"{word}"' for word in words)
        lines.append(f'"{at}" -m pip install {quoted}')
    raise Failed(
        "lorakit is not installed. It needs Python 3.11 or newer, and its own environment:\n" + "\n".join(lines)
    )


def find_python() -> list[str] | None:
    """Return the command of a Python that is new enough for lorakit and can create an environment, or None."""
    if sys.version_info >= (3, OLDEST):
        return [sys.executable]
    for minor in range(NEWEST, OLDEST - 1, -1):
        name = shutil.which(f"python3.{minor}")
        for python in ([[name]] if name else []) + ([["py", f"-3.{minor}"]] if os.name == "nt" else []):
            try:  # the program may be a shim without a Python, and Debian's Python may have no ensurepip
                subprocess.run([*python, "-c", "import ensurepip"], capture_output=True, check=True)
                return python
            except (OSError, subprocess.CalledProcessError):
                continue
    return None


def environment(host: Path) -> dict[str, str]:
    """Return the environment of the process, without variables of the host's Python and Gradio.

    It names the host's folder, where lorakit finds text encoders and tokenizers.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "GRADIO_", "VIRTUAL_ENV"))}
    env["LORAKIT_HOSTS"] = os.pathsep.join(filter(None, [str(host), os.environ.get("LORAKIT_HOSTS", "")]))
    env["PYTHONUNBUFFERED"] = "1"
    return env


class FrontEnd:
    """lorakit's front end on a port of this machine.

    Args:
        host: the host's folder.
        runs: folder of the run folders.
        bases: folders of checkpoints.
        photos: folders of photos.
    """

    def __init__(self, host: Path, runs: Path, bases: Iterable[Path], photos: Iterable[Path]):
        self.host, self.runs, self.bases, self.photos = host, runs, list(bases), list(photos)
        self.process: subprocess.Popen[str] | None = None
        self.origin, self.port = "", 0
        self.lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._lock = threading.Lock()

    def arguments(self, origin: str, everywhere: bool) -> list[str]:
        """Return the arguments of `lorakit ui`."""
        rest = ["--runs", str(self.runs), "--embed", origin, "--end-with", str(os.getpid())]
        rest += [word for folder in self.photos for word in ("--root", str(folder))]
        rest += [word for folder in self.bases for word in ("--bases", str(folder))]
        return rest + (["--host", "0.0.0.0"] if everywhere else [])

    def start(self, origin: str) -> int:
        """Start the front end for the page of `origin`, unless it is running, and return its port.

        Raises:
            Failed: it did not start, or other machines could reach it and there is no password.
        """
        name = re.sub(r"^https?://|:\d+$", "", origin)
        everywhere = name not in ("127.0.0.1", "localhost", "[::1]")
        if everywhere and not os.environ.get("LORAKIT_PASSWORD"):
            raise Failed(
                "This page was opened from another machine, which can reach lorakit only over the network. Set a "
                "password of eight characters or more in the environment variable LORAKIT_PASSWORD and start again "
                "(user name: lorakit)."
            )
        with self._lock:
            if self.process is not None and self.process.poll() is None and self.origin == origin:
                return self.port
            self._end()
            self.lines.clear()
            self.runs.mkdir(parents=True, exist_ok=True)
            self.process = subprocess.Popen(
                [*command(), "ui", *self.arguments(origin, everywhere)],
                cwd=self.runs.parent,
                env=environment(self.host),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            )
            self.origin, self.port = origin, 0
            threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
            end = time.monotonic() + PATIENCE
            while not self.port:
                if self.process.poll() is not None or time.monotonic() > end:
                    self._end()
                    raise Failed("lorakit did not start:\n" + "\n".join(self.lines))
                time.sleep(0.05)
            return self.port

    def stop(self) -> None:
        """End the front end. A run continues, because it is a separate process."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Read the output of the front end, so that its pipe is never full."""
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                self.lines.append(line.rstrip())
                match = _ADDRESS.search(line)
                if match:
                    self.port = int(match[1])


def frame(origin: str, port: int) -> str:
    """Return HTML that shows lorakit's page in the host's page. The URL has the host name that the browser uses."""
    scheme, _, rest = origin.partition("://")
    url = f"http://{re.sub(r':[0-9]+$', '', rest)}:{port}/"
    link = f'<a href="{url}" target="_blank">in its own window</a>'
    if scheme == "https":
        return f"<p>This page is encrypted and cannot show lorakit's page, which is not. Open lorakit {link}.</p>"
    style = "width:100%;height:calc(100vh - 14rem);min-height:40rem;border:0"
    return f'<iframe src="{url}" title="lorakit" style="{style}" allow="clipboard-write"></iframe><p>{link}</p>'


class Watcher:
    """Watches the runs: frees the host's memory when a run begins, and installs the adapters of finished runs.

    Args:
        runs: folder of the run folders.
        program: the host's name for `lorakit install-adapter --into`.
        loras: the host's folder of LoRA files.
        before: called when a run begins.
        after: called with the names of new files, and with an empty list if the last run ended without one.
    """

    def __init__(
        self, runs: Path, program: str, loras: Path, before: Callable[[], object], after: Callable[[list[str]], object]
    ):
        self.runs, self.program, self.loras, self.before, self.after = runs, program, loras, before, after
        self.messages: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._live: set[Path] = set()
        self._done = {path: state.get("updated") for path, state in self.states().items() if state["state"] == "done"}
        self._end = threading.Event()

    def start(self) -> None:
        """Check the runs every second in a separate thread."""
        threading.Thread(target=self._loop, name="lorakit runs", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        self._end.set()

    def states(self) -> dict[Path, dict]:
        """Return run folder -> content of its state.json."""
        result = {}
        for file in self.runs.glob("*/state.json"):
            try:
                state = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(state, dict) and isinstance(state.get("state"), str):
                result[file.parent] = state
        return result

    def look(self) -> None:
        """Compare the runs with the last check."""
        states = self.states()
        live = {path for path, state in states.items() if state["state"] in LIVE and _is_alive(state)}
        if live - self._live:
            self.before()
        had, self._live = self._live, live
        files = []
        for path, state in states.items():
            if state["state"] == "done" and self._done.get(path) != state.get("updated"):
                self._done[path] = state.get("updated")
                files += self.install(path / str(state.get("adapter")))
        if files or (had and not live):
            self.after(files)

    def install(self, adapter: Path) -> list[str]:
        """Copy an adapter, its .json and its preview into the host's folder; return [name], or [] after an error."""
        line = [*command(), "install-adapter", str(adapter), "--into", self.program, "--at", str(self.loras)]
        line += ["--any-folder", "--json"]
        process = subprocess.run(
            line, capture_output=True, encoding="utf-8", errors="replace", env=environment(self.loras), check=False
        )
        if process.returncode:
            self.messages.append(process.stderr.strip())
            return []
        name = Path(json.loads(process.stdout)["adapter"]).name
        self.messages.append(f"{name} is in the Lora tab (press Refresh there)")
        self.messages.extend(text for text in process.stderr.splitlines() if " fits " in text)
        return [name]

    def _loop(self) -> None:
        while not self._end.wait(POLL):
            try:
                self.look()
            except Exception as error:
                self.messages.append(f"lorakit: {type(error).__name__}: {error}")


def _is_alive(state: dict) -> bool:
    """Return whether the process of a run may still exist. The state of a killed run stays `running`."""
    if os.name == "nt" or not isinstance(state.get("pid"), int) or state["pid"] <= 0:
        return time.time() - float(state.get("updated") or 0) < 3600
    try:
        os.kill(state["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
