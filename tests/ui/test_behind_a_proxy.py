"""The page below a path of another server, behind a proxy like nginx in docs/front-end.md."""

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest
from PIL import Image
from waiting import SECONDS

PREFIX = "/lorakit"
# Hop-by-hop headers, which a proxy does not forward.
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class Proxy(BaseHTTPRequestHandler):
    """Removes the prefix from the path and forwards the request. Paths without the prefix get 404."""

    target = 0
    strays: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if not self.path.startswith(f"{PREFIX}/"):
            self.strays.append(self.path)
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        headers |= {"X-Forwarded-Host": self.headers["Host"], "X-Forwarded-Proto": "http"}
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=SECONDS)
        try:
            connection.request(self.command, self.path.removeprefix(PREFIX), body or None, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (http.client.HTTPException, OSError):  # Gradio's heartbeat is still open when the front end ends
            self.close_connection = True
            return
        finally:
            connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Write no log."""


@pytest.fixture
def proxy() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    Proxy.strays.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_page_works_below_a_path(front_end, chromium, proxy: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.effect_noise((96, 64), 80).convert("RGB").save(tmp_path / "photos" / "00.png")
    public = f"http://127.0.0.1:{proxy.server_port}{PREFIX}"
    served = front_end(tmp_path, "--public", public, "--password", "long enough")
    Proxy.target = urlsplit(served.address).port
    page = chromium.new_context(locale="en-US").new_page()
    page.set_default_timeout(SECONDS * 1000)
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(f"{public}/")
    page.locator("input[type=text]").fill("lorakit")
    page.locator("input[type=password]").fill("long enough")
    page.locator("button", has_text="Login").click()
    page.locator("body[data-ready]").wait_for()
    field = page.locator("#photos-folder input")
    field.fill(str(tmp_path / "photos"))
    field.press("Enter")
    # The thumbnail loads and a caption is saved, so the paths of pictures and events also have the prefix.
    page.wait_for_function("() => document.querySelector('.lk-card img')?.naturalWidth > 0")
    page.locator("textarea[data-photo='00.png']").fill("noise")
    page.locator(".lk-save").click()
    page.locator("#photos-caption-message").get_by_text("Caption of photos/00.png saved.").wait_for()
    assert (tmp_path / "photos" / "00.txt").read_text() == "noise\n"
    assert [url for url in addresses if not url.startswith((f"{public}/", "data:", "blob:"))] == []
    # The browser requests the icon itself.
    assert [path for path in Proxy.strays if path != "/favicon.ico"] == []
    page.context.close()
