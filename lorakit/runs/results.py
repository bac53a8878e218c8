"""Send results elsewhere: copy a run's results to a folder or a URL, and notify the user at the end of a run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from urllib.request import Request

import psutil

from lorakit.config.option import to_text
from lorakit.core.errors import LorakitError
from lorakit.core.events import json_value
from lorakit.core.messages import Message
from lorakit.runs.run_folder import State

# Seconds that a notification may take.
NOTIFY_SECONDS = 20.0
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class Results:
    """A folder or URL to which results go.

    Raises:
        LorakitError: fsspec cannot open it, or nothing can be written there.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url
        try:
            self._system, self._path = fsspec.core.url_to_fs(url)
            self._system.makedirs(self._path, exist_ok=True)
        except Exception as error:  # exception types depend on the protocol's library
            raise LorakitError("--results {url}: {reason}", url, _reason(error)) from None

    def send(self, runs: Path, name: str) -> None:
        """Copy all of a run but its checkpoints, and what it printed on a cluster; or a file of the batch.

        Raises:
            LorakitError: it cannot be written.
        """
        try:
            for file in _files(runs, name):
                target = f"{self._path}/{file.relative_to(runs).as_posix()}"
                self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._system.put_file(str(file), target)
        except Exception as error:
            raise LorakitError(
                "{name}: cannot be copied to {url} ({reason}); it stays in {runs}", name, self.url, _reason(error), runs
            ) from None


def _files(runs: Path, name: str) -> Iterator[Path]:
    for file in [runs / name, runs / f"{name}.log", *sorted((runs / name).rglob("*"))]:
        parts = file.relative_to(runs).parts
        if file.is_file() and parts[1:2] != ("checkpoints",) and not file.name.endswith(".lock"):
            yield file


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def notify_problem(target: str) -> str | None:
    """The reason why `output.notify` cannot be used on this machine, or None. No command is started and no request is
    sent."""
    if not target.strip():
        return None
    way = "give the address of a server, as https://..., or a command"
    try:
        if not ADDRESS.match(target):
            name = next(iter(_command(target)), "")
            if shutil.which(name):
                return None
            return Message("output.notify: there is no command {name} here; {way}", to_text(name), way)
        address = urlsplit(target)
        is_web = address.scheme.lower() in ("http", "https") and address.hostname and address.port != 0
        (address.hostname or "").encode("idna")
        if not is_web or address.username or re.search(r"[\s\0-\x1f]", target):
            reason = "no address of http:// or https:// without a user's name"
        elif (address.path + address.query).isascii():
            return None
        else:
            reason = "letters beyond ASCII behind the server's name are written as %XX"
    except UnicodeError:
        reason = "it is not a valid name of a server"
    except ValueError as error:  # quotes that do not close, a port that is none
        reason = "it is not a valid address" if "'" in str(error) else str(error).lower()
    return Message("output.notify: {reason}; {way}", reason, way)  # without the address, which may have a token


def notify(target: str, folder: Path, state: State) -> str | None:
    """Tell `output.notify` how a run ended. Return what went wrong, or None; it takes at most `NOTIFY_SECONDS`."""
    if not target.strip():
        return None
    outcome: list[str] = [Message("no answer within {seconds:g} s", NOTIFY_SECONDS)]

    def tell() -> None:
        try:
            (_post if ADDRESS.match(target) else _start)(target, folder.absolute(), state)
            outcome.clear()
        except Exception as error:  # no error of a notification may change the result of the run
            reason = getattr(error, "reason", None)
            cause = reason if isinstance(reason, Exception) else error
            if not isinstance(cause, TimeoutError):
                outcome[:] = [_reason(cause)]

    # In a thread: the time limit of a connection is one of each packet, and looking up a name has none.
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    thread.join(NOTIFY_SECONDS + 1)
    return next(
        (Message("output.notify: the notification was not sent ({reason})", reason) for reason in outcome), None
    )


class _Redirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """Only where it says that the POST has arrived: the others would be asked without it."""
        return super().redirect_request(req, fp, code, msg, headers, newurl) if code == 303 else None


def _post(address: str, folder: Path, state: State) -> None:
    text = f"lorakit: {folder.name}: {state.state}"
    names = ("state", "step", "steps", "loss", "adapter", "message")
    body = {"run": folder.name, **{name: getattr(state, name) for name in names}, "text": text, "content": text}
    headers = {"Content-Type": "application/json", "User-Agent": "lorakit"}
    request = Request(address, json.dumps(json_value(body)).encode(), headers)
    try:
        urllib.request.build_opener(_Redirect).open(request, timeout=NOTIFY_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _start(command: str, folder: Path, state: State) -> None:
    facts = {"RUN": str(folder), "STATE": state.state, "STEP": str(state.step), "MESSAGE": state.message}
    process = subprocess.Popen(
        [*_command(command), str(folder), state.state],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {f"LORAKIT_{name}": value.replace("\0", "") for name, value in facts.items()},
    )
    try:
        code = process.wait(NOTIFY_SECONDS)
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        process.wait()
        raise TimeoutError from None
    if code:
        raise OSError(f"the command ended with code {code}")


def _command(text: str) -> list[str]:
    """The words of a command; no shell reads them, so nothing in them is expanded but the user's own folder."""
    words = shlex.split(text, posix=os.name != "nt")
    return [str(Path(word).expanduser()) if word.startswith("~") else word for word in words]
