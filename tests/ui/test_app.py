"""The server of the front end: its start, its address, its proxies."""

import argparse
import contextlib
import inspect
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

import gradio as gr
from gradio import component_meta

from lorakit.core.errors import LorakitError
from lorakit.families import hub
from lorakit.ui import app, commands, server as server_module
from lorakit.ui.server import Server, listen

DEAD = "127.0.0.1:9"


@pytest.fixture
def page() -> object:
    with gr.Blocks(analytics_enabled=False) as page:
        gr.HTML("hello")
    return page


@pytest.fixture
def server(page: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"socks5://{DEAD}" if "all" in name.lower() else f"http://{DEAD}")
    server = Server(page, "127.0.0.1", None)
    yield server
    server.close()


def test_the_front_end_uses_no_proxy_for_its_own_page(server: Server):
    server.start()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert b"hello" in direct.open(server.address).read()
    server.close()
    with contextlib.suppress(OSError):  # unless a server of another test has taken the port by now
        assert b"hello" not in direct.open(server.address).read()


def test_gradio_is_imported_without_the_environments_proxies(monkeypatch: pytest.MonkeyPatch):
    import httpx

    monkeypatch.setenv("ALL_PROXY", f"socks5://{DEAD}")
    with commands.without_proxies():
        httpx.Client().close()  # importing Gradio also creates a client
        assert "ALL_PROXY" not in os.environ
    assert os.environ["ALL_PROXY"] == f"socks5://{DEAD}"


def test_gradio_is_imported_without_parsing_its_sources(monkeypatch: pytest.MonkeyPatch):
    parsed = list[str]()
    monkeypatch.setattr(component_meta, "extract_class_source_code", lambda _, name: parsed.append(name) or ("", 1))
    with commands.without_stubs():
        component_meta.create_or_modify_pyi(gr.Button, "Button", [])
        assert inspect.getfile(Server) == server_module.__file__
    assert parsed == []
    with pytest.raises(ValueError, match="class source code"):
        component_meta.create_or_modify_pyi(gr.Button, "Button", [])
    assert parsed == ["Button"]


def test_a_base_behind_a_socks_proxy_names_the_missing_package():
    error = ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")
    assert "pip install socksio" in hub.refusal(hub.HubId("owner/name"), error)


class Slow(Server):
    """A server whose thread starts to serve when `gate` opens, or ends without a start."""

    def __init__(self, page: object, *, fails: bool = False):
        super().__init__(page, "127.0.0.1", None)
        self.gate, self.fails = threading.Event(), fails

    def run(self, sockets: object = None) -> None:
        self.gate.wait()
        self.started = not self.fails


def test_a_slow_start_is_waited_for(page: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    server, seconds = Slow(page), []
    # Each sleep stands for a minute: a start with a time limit would give up before the gate opens.
    monkeypatch.setattr("time.sleep", lambda _: (seconds.append(60), len(seconds) > 20 and server.gate.set()))
    server.start()
    server.close()
    assert server.started and f"URL:  {server.address}" in capsys.readouterr().out


def test_a_server_that_ends_before_it_starts_is_reported(page: object):
    server = Slow(page, fails=True)
    server.gate.set()
    with pytest.raises(LorakitError, match=r"127\.0\.0\.1:\d+ ended before it could serve"):
        server.start()


def test_the_first_free_port_is_used_and_a_used_port_is_named():
    first = listen("127.0.0.1", None)
    second = listen("127.0.0.1", None)
    busy = first.getsockname()[1]
    assert busy != second.getsockname()[1]
    with pytest.raises(LorakitError, match=rf"port {busy} of 127\.0\.0\.1 is taken; choose another --port"):
        listen("127.0.0.1", busy)
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [("no.such.host.invalid", None, "--host no.such.host.invalid: "), ("203.0.113.9", None, "--host 203.0.113.9: "),
     ("127.0.0.1", 70_000, "--port 70000: must be between 1 and 65535")],
)  # fmt: skip
def test_an_address_of_another_machine_is_named(host: str, port: int | None, message: str):
    with pytest.raises(LorakitError, match=message):
        listen(host, port)


def test_the_command_reports_a_failed_start_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert app.main(["--runs", str(tmp_path / "runs"), "--root", str(tmp_path), "--port", str(port)]) == 1
    assert f"lorakit: port {port} of 127.0.0.1 is taken" in capsys.readouterr().err
    assert isinstance(app.parser(), argparse.ArgumentParser)
