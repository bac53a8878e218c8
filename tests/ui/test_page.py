"""The page by plain HTTP: its size, its language, and its answers to values of a wrong type."""

import gzip
import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from gradio.context import Context

from lorakit.ui import app, texts
from lorakit.ui.server import Server
from lorakit.ui.workspace import Workspace

CHINESE = "zh-TW,zh;q=0.9"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def server(room: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")
        # Gradio counts the components of a process; the ids of a second page are longer, and so is the page.
        patch.setattr(Context, "id", 0)
        server = app.serve(Workspace(room / "runs", [room]), app.parser().parse_args([]), block=False)
        yield server
        server.close()


def ask(server: Server, path: str, payload: object = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of a GET request, or of a POST request with this payload."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = None if payload is None else json.dumps(payload)
    named |= {} if payload is None else {"Content-Type": "application/json"}
    connection.request("GET" if payload is None else "POST", path, body, named)
    answer = connection.getresponse()
    result = answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return result


def test_the_page_is_small(server: Server):
    _, page, _ = ask(server, "/")
    assert len(page) < 500_000, "one language, and no description of events that are the page's own"
    _, small, headers = ask(server, "/", Accept_Encoding="gzip")
    assert headers["content-encoding"] == "gzip" and len(small) < 100_000 and gzip.decompress(small) == page


@pytest.mark.parametrize(
    ("accepted", "cookie", "locale"),
    [("en", "", "en"), (CHINESE, "", "zh-TW"), (CHINESE, "lorakit-language=en", "en"), ("en", "other=1", "en"),
     ("en", "a=b; lorakit-language=zh-TW", "zh-TW"), ("de", "lorakit-language=xx", "en"), ("zh-CN", "", "zh-CN")],
)  # fmt: skip
def test_a_language_chosen_on_the_page_overrides_the_browsers(server: Server, accepted: str, cookie: str, locale: str):
    text = ask(server, "/", Accept_Language=accepted, Cookie=cookie)[1].decode()
    assert f'navigator, "language", {{value: "{locale}"}}' in text and re.search(rf'<html\s+lang="{locale}"', text)
    config = json.loads(ask(server, "/config", Accept_Language=accepted, Cookie=cookie)[1])
    assert list(config["i18n_translations"]) == [locale], "a language that is not shown does not travel"
    assert re.findall(r'"i18n_translations":\s*{"([^"]+)"', text) == [locale] and text.count('"tab.train":') == 1


def function_with(server: Server, kind: str) -> tuple[int, list[str], int]:
    """Find an event with an input of this kind; return its number, the kinds of its inputs, and this input's index."""
    config = json.loads(ask(server, "/config")[1])
    kinds = {component["id"]: component["type"] for component in config["components"]}
    for event in config["dependencies"]:
        inputs = [kinds[number] for number in event["inputs"]]
        if event["backend_fn"] and kind in inputs and "browserstate" not in inputs:
            return event["id"], inputs, inputs.index(kind)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("dropdown", {"a": 1}), ("number", "many"), ("number", True), ("checkbox", "yes"), ("checkboxgroup", 3),
     ("checkboxgroup", [[1]]), ("textbox", ["a"]), ("radio", {}), ("file", "/etc/passwd"), ("dropdown", [])],
)  # fmt: skip
@pytest.mark.parametrize("language", ["en", "zh-TW"])
def test_a_value_of_another_type_gets_a_line(server: Server, kind: str, value: object, language: str):
    number, inputs, place = function_with(server, kind)
    data = [value if n == place else None for n in range(len(inputs))]
    payload = {"fn_index": number, "data": data, "session_hash": "x"}
    status, body, _ = ask(server, "/gradio_api/run/predict", payload, Accept_Language=language)
    say = texts.sayer(texts.language_of(language))
    place_name = next(name for name in ("Dropdown", "Number", "CheckboxGroup", "Checkbox", "Textbox", "Radio", "File")
                      if name.lower() == kind)  # fmt: skip
    assert status == 422
    assert json.loads(body)["error"] == say("task.wrong_type", names=f"{place_name} {place + 1}")


@pytest.mark.parametrize("language", texts.LANGUAGES)
def test_an_error_of_the_system_gets_a_line(server: Server, room: Path, language: str):
    """The queue cannot make its folder. The same happens if the disk is full, or the folder is for reading only."""
    (room / "runs" / ".queue").write_text("")
    (room / "photos").mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(room / "photos" / "0.png")
    locale = texts.source(language).about.locale
    payload = {"data": ["photos", "sks toy"]}
    status, body, _ = ask(server, "/gradio_api/run/start", payload, Accept_Language=locale)
    reason = f"File exists: {room / 'runs' / '.queue'}"
    assert status == 500 and json.loads(body)["error"] == texts.sayer(language)("task.system", reason=reason)


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("theme", "background"), [("", "#ffffff"), (".dark ", "#292524")])
def test_the_lines_of_a_chart_stand_out(theme: str, background: str):
    """WCAG 2 asks for a contrast of 3 between parts of a picture."""
    style = (Path(app.__file__).parent / "style.css").read_text(encoding="utf-8")
    (rules,) = re.findall(rf"^{re.escape(theme)}\.lk-charts \.lk-chart {{([^}}]*)}}", style, re.MULTILINE)
    colours = dict(re.findall(r"(--lk-t\d): (#[0-9a-f]{6})", rules))
    assert sorted(colours) == [f"--lk-t{number}" for number in range(1, 5)]
    for colour in colours.values():
        low, high = sorted((luminance(colour), luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_events_of_the_page_are_not_offered_to_programs(server: Server):
    information = json.loads(ask(server, "/gradio_api/info")[1])
    assert not [name for name in information["named_endpoints"] if re.search(r"_\d+$|lambda", name)]
    assert not information["unnamed_endpoints"]


def test_no_event_shows_its_progress(server: Server):
    """Gradio updates the state of each component with progress at each event, and looks for it in the whole page."""
    events = json.loads(ask(server, "/config")[1])["dependencies"]
    private = [event for event in events if event["backend_fn"] and event["api_visibility"] == "private"]
    assert len(private) > 100 and [event for event in private if event["show_progress_on"] != []] == []


def test_no_script_declares_a_name_of_gradio(server: Server):
    """A script that declares one of these names does not run."""
    reserved = "element|trigger|props|server|upload|watch"
    scripts = [c["props"].get("js_on_load") or "" for c in json.loads(ask(server, "/config")[1])["components"]]
    assert len([script for script in scripts if script]) > 3
    assert not [
        s for s in scripts if re.search(rf"\b(?:const|let|var|function)\s+(?:[\w$, ={{}}]*\b)?({reserved})\b\s*=", s)
    ]


def test_no_font_of_one_language_is_named_for_all():
    assert not re.search(r"(CJK|PingFang|Hiragino|YaHei|JhengHei)", app._theme().font)
