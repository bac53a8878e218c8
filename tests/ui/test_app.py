"""The server of the front end."""

import threading
import time

import pytest

pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from gradio import http_server

from lorakit.ui import app


class Slow(app._Server):
    """A server whose thread starts it once `gate` opens, or ends before."""

    def __init__(self, *, fails: bool = False):
        self.gate, self.started, self.reloader, self.fails = threading.Event(), False, None, fails

    def run(self, sockets: object = None) -> None:
        self.gate.wait()
        self.started = not self.fails


def test_a_slow_start_is_waited_for(monkeypatch):
    server, clock = Slow(), iter(range(0, 1_000_000, 100))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    opener = threading.Timer(0.2, server.gate.set)
    opener.start()
    server.run_in_thread()
    assert server.started
    opener.join()


def test_a_server_that_ends_before_it_starts_is_reported():
    server = Slow(fails=True)
    server.gate.set()
    with pytest.raises(http_server.ServerFailedToStartError, match="did not start"):
        server.run_in_thread()
