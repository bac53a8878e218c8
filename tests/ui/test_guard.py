"""Requests that the server refuses before the page gets them, sent by plain HTTP."""

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.core.errors import LorakitError
from lorakit.ui import access, app
from lorakit.ui.server import Server
from lorakit.ui.workspace import Workspace

FORM = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc\r\n--cut--\r\n'
UPLOAD = {"Content-Type": "multipart/form-data; boundary=cut"}
PUBLIC = "https://box.example"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Workspace]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")
        room = tmp_path_factory.mktemp("guard")
        workspace = Workspace(room / "runs", [room])
        arguments = ["--public", PUBLIC, "--password", "long enough", "--max-upload", "1"]
        server = app.serve(workspace, app.parser().parse_args(arguments), block=False)
        yield server, workspace
        server.close()


def ask(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text, {name.lower(): value for name, value in answer.getheaders()}


def login(server: Server, password: str) -> tuple[int, str, dict[str, str]]:
    body = f"username=lorakit&password={password.replace(' ', '+')}".encode()
    return ask(server, "POST", "/login", body, **{"Content-Type": "application/x-www-form-urlencoded"})


def test_another_host_name_is_refused_with_a_remedy(served):
    server, _ = served
    status, text, _ = ask(server, "GET", "/", Host="evil.example")
    assert (
        status == 400 and "lorakit: the host name evil.example is not accepted" in text and "--public https://" in text
    )
    for host in ("localhost", f"127.0.0.1:{server.port}", "box.example"):
        assert ask(server, "GET", "/", Host=host)[0] == 200, host


def test_other_sites_can_neither_frame_the_page_nor_upload(served):
    server, workspace = served
    _, _, headers = ask(server, "GET", "/")
    assert headers["x-frame-options"] == "SAMEORIGIN" and "frame-ancestors 'self'" in headers["content-security-policy"]
    cookie = login(server, "long enough")[2]["set-cookie"].partition(";")[0]
    for origin, code in (("https://evil.example", 403), ("null", 403), (PUBLIC, 200), (server.address, 200)):
        status, text, _ = ask(server, "POST", "/gradio_api/upload", FORM, Origin=origin, Cookie=cookie, **UPLOAD)
        assert status == code, (origin, text)
    private = workspace.private("gradio")
    assert private.stat().st_mode & 0o077 == 0 and private.parent.stat().st_mode & 0o077 == 0


def test_an_upload_has_a_limit_in_sum(served):
    server, _ = served
    status, text, _ = ask(server, "POST", "/gradio_api/upload", b"", Content_Length=str(21 << 20), **UPLOAD)
    assert status == 413 and "may have 20 MB" in text
    assert ask(server, "POST", "/gradio_api/upload", b"", Transfer_Encoding="chunked", **UPLOAD)[0] == 411


def test_wrong_passwords_have_to_wait(served, capsys: pytest.CaptureFixture[str]):
    server, _ = served
    codes = [login(server, f"guess {number}")[0] for number in range(7)]
    assert codes[:5] == [400] * 5 and codes[-1] == 429
    assert "too many wrong passwords; try again in" in login(server, "long enough")[1]
    assert "wrong password from 127.0.0.1 (5)" in capsys.readouterr().err


def test_a_public_address_needs_a_password_and_is_an_address(tmp_path: Path):
    with pytest.raises(LorakitError, match=r"--public https://box\.example lets others in: set a password"):
        access.require_password("127.0.0.1", False, "", PUBLIC)
    with pytest.raises(LorakitError, match=r"--public box\.example: give the whole address"):
        access.require_password("127.0.0.1", False, "long enough", "box.example")
