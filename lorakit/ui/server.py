"""The HTTP server of the front end.

Gradio's `launch` sends a request to its own address, which fails with a proxy or on a busy machine. This server sends
none.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import Sequence

import fastapi
import gradio as gr
import psutil
import uvicorn
from gradio import networking
from starlette.middleware import Middleware

from lorakit.core.errors import LorakitError
from lorakit.runs import run_folder

FIRST_PORT, PORTS = 7860, 100
# Seconds that open connections have to finish when the server stops.
GRACE = 1
IN_USE = (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE))


class Server(uvicorn.Server):
    """Serves one page at `address` in a separate thread."""

    def __init__(
        self, page: gr.Blocks, host: str, port: int | None, middleware: Sequence[Middleware] = (), **options: object
    ):
        """Open the socket. `options` are passed to `gradio.mount_gradio_app`.

        Raises:
            LorakitError: see `listen`.
        """
        self.socket = listen(host, port)
        self.port: int = self.socket.getsockname()[1]
        name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
        self.address = f"http://{name}:{self.port}"
        parent = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=list(middleware))
        app = gr.mount_gradio_app(parent, page, "/", host, self.port, **options)
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE))
        self.should_exit = False
        self.thread = threading.Thread(target=self.run, args=([self.socket],), name="server", daemon=True)

    def start(self) -> None:
        """Start the thread and return when the server accepts requests. There is no timeout.

        Raises:
            LorakitError: the server ended before that.
        """
        self.thread.start()
        while not self.started:
            if not self.thread.is_alive() and not self.started:
                self.close()
                raise LorakitError("the server at {address} ended before it could serve", self.address)
            time.sleep(0.01)
        with contextlib.suppress(OSError, ValueError):  # stdout is closed
            print(f"* Running on local URL:  {self.address}", flush=True)

    def wait(self, parent: int = 0) -> None:
        """Serve until SIGINT (Ctrl-C), SIGTERM, or the end of the process `parent` unless 0."""
        with contextlib.suppress(ValueError):  # raised outside the main thread
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        begin = _start_of(parent)
        try:
            while self.thread.is_alive() and (not parent or run_folder.alive(parent, begin)):
                self.thread.join(0.5)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the server and close its socket."""
        self.should_exit = True
        if self.thread.is_alive():
            self.thread.join(5 * GRACE)
        self.socket.close()

    def share(self, host: str) -> None:
        """Open a public address through Gradio's tunnel. It works as long as this process runs.

        Raises:
            LorakitError: the tunnel cannot be opened.
        """
        try:
            public = networking.setup_tunnel(host, self.port, secrets.token_urlsafe(32), None, None)
        except Exception as error:
            raise LorakitError("no public address: {problem}; check the network, or leave out --share", error) from None
        with contextlib.suppress(OSError, ValueError):  # stdout is closed
            print(f"* Running on public URL: {public}", flush=True)

    def open_browser(self) -> None:
        """Open the page in the browser of this machine."""
        webbrowser.open(self.address)


def _start_of(pid: int) -> float:
    """Start time of a process in seconds since the epoch, or 0 if there is no such process."""
    try:
        return psutil.Process(pid).create_time() if pid else 0.0
    except psutil.Error:
        return 0.0


def listen(host: str, port: int | None) -> socket.socket:
    """Open a socket that listens on the port, or on the first free one from `FIRST_PORT` if `port` is None.

    Raises:
        LorakitError: the port is invalid, taken or reserved, or the address does not belong to this machine.
    """
    if port and not 0 < port < 2**16:
        raise LorakitError("--port {port}: must be between 1 and 65535", port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in [port] if port else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            return socket.create_server((host, number), family=family)
        except PermissionError:
            raise LorakitError(
                "port {number} is for the system's own programs; choose --port 1024 or above", number
            ) from None
        except socket.gaierror as error:
            raise LorakitError("--host {host}: {strerror}", host, error.strerror) from None
        except OSError as error:
            if error.errno not in IN_USE:
                raise LorakitError("--host {host}: {reason}", host, error.strerror or error) from None
    if port:
        raise LorakitError("port {port} of {host} is taken; choose another --port, or leave it out", port, host)
    raise LorakitError(
        "ports {first} to {last} of {host} are all taken; choose another --port",
        FIRST_PORT,
        FIRST_PORT + PORTS - 1,
        host,
    )
