"""The endpoints for other programs, called by plain HTTP and by Gradio's client."""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.core import atomic
from lorakit.runs import quickstart
from lorakit.runs.queue import Queue
from lorakit.runs.run_folder import RunFolder
from lorakit.ui import app
from lorakit.ui.server import Server
from lorakit.ui.workspace import Workspace

NAMES = ["start", "stop", "resume", "runs", "run", "captions", "samples"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos, and an interrupted run on them with a checkpoint and two pictures."""
    room = tmp_path_factory.mktemp("api")
    photos = room / "photos"
    photos.mkdir()
    for number in range(3):
        Image.effect_noise((64, 64), 50).convert("RGB").save(photos / f"{number}.png")
    config = quickstart.config_for_answers({quickstart.PHOTOS: str(photos), quickstart.NAME: "sks toy"}, "quick")
    run = RunFolder.create(replace(config, output=replace(config.output, folder=str(room / "runs" / "one"))))
    picture = Image.new("RGB", (32, 32), "teal")
    picture.info["lorakit"] = json.dumps({"prompt": "sks toy", "seed": 3})
    run.save_samples(2, [picture], ["sks toy"])
    (run.checkpoints / "step-000002").mkdir()
    (run.checkpoints / "step-000002" / "complete").touch()
    run.event("message", message="hello")
    run.update(state="stopped", step=2, steps=6)
    run.unlock()
    return room


@pytest.fixture(scope="module")
def server(room: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")
        patch.setattr(Queue, "start", lambda queue: None)  # these tests do not train
        server = app.serve(Workspace(room / "runs", [room]), app.parser().parse_args([]), block=False)
        yield server
        server.close()


def call(server: Server, name: str, *values: object) -> object:
    """Return the endpoint's answer, or the line of its error."""
    request = urllib.request.Request(
        f"{server.address}/gradio_api/run/{name}",
        json.dumps({"data": values}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["data"][0]
    except urllib.error.HTTPError as error:
        assert error.code == 422
        return json.load(error)["error"]


def test_the_endpoints_are_named_and_described(server: Server):
    with urllib.request.urlopen(f"{server.address}/gradio_api/info") as answer:
        endpoints = json.load(answer)["named_endpoints"]
    assert list(endpoints) == [f"/{name}" for name in NAMES]
    parameters = [parameter["parameter_name"] for parameter in endpoints["/start"]["parameters"]]
    assert parameters == ["photos", "name", "base", "quality", "options"]


def test_runs_are_listed_and_one_is_described(server: Server):
    assert {"run": "one", "state": "stopped", "step": 2}.items() <= call(server, "runs")[0].items()
    run = call(server, "run", "one")
    assert run["checkpoints"] == [2] and run["log"] == ["hello"] and "sks toy" in run["config"]


def test_pictures_have_their_recipes(server: Server):
    answer = call(server, "samples", "one", 2)
    assert answer["steps"] == [2] and answer["pictures"][0]["recipe"] == {"prompt": "sks toy", "seed": 3}
    picture = Image.open(io.BytesIO(base64.b64decode(answer["pictures"][0]["png"])))
    assert picture.getpixel((1, 1)) == (0, 128, 128)


def test_captions_are_read_and_written(server: Server, room: Path):
    assert call(server, "captions", str(room / "photos")) == {"0.png": "", "1.png": "", "2.png": ""}
    assert call(server, "captions", "photos", {"1.png": "sks toy on grass"})["1.png"] == "sks toy on grass"
    assert (room / "photos" / "1.txt").read_text() == "sks toy on grass\n"
    assert call(server, "captions", "photos", {"1.png": "a cat \ud83d"})["1.png"] == "a cat \ufffd"
    # If one name is wrong, no caption is written.
    assert call(server, "captions", "photos", {"0.png": "a", "9.png": "b"}) == "9.png: no such photo"
    assert not (room / "photos" / "0.txt").exists()


def test_a_run_is_queued_taken_out_and_resumed_by_gradios_client(server: Server, room: Path):
    from gradio_client import Client

    client = Client(server.address, verbose=False)
    name = client.predict("photos", "sks cat", options={"train.steps": 7}, api_name="/start")["run"]
    assert name.endswith("-sks-cat") and client.predict(api_name="/runs")[0]["run"] == name
    (toml,) = (room / "runs" / ".queue").glob("*.toml")
    assert "steps = 7" in toml.read_text()
    assert client.predict(name, api_name="/stop") == {"run": name, "state": "cancelled"}
    assert client.predict("one", 9, api_name="/resume") == {"run": "one", "state": "waiting"}
    assert "one is in the queue already" in call(server, "resume", "one")
    assert client.predict("one", api_name="/stop")["state"] == "cancelled"


@pytest.mark.parametrize(
    ("name", "values", "line"),
    [
        ("start", ["/etc", "x"], "/etc is outside of"),
        ("start", ["photos", "x", "pocket", "perfect"], "quality = 'perfect': must be one of quick, balanced, best"),
        ("start", ["photos", "x", "pocket", "quick", {"train.stepz": 3}], "train.stepz"),
        ("start", ["photos", "x", "pocket", "quick", {"train.steps": "many"}], "train.steps = 'many'"),
        ("start", ["photos", "x", "pocket", "quick", [1]], "options: must be an object"),
        ("start", [7, "x"], "photos: must be a text"),
        ("start", ["none", "x"], "none"),
        ("run", ["../one"], "'../one' is no run"),
        ("run", ["two"], "'two' is no run"),
        ("run", ["half of an emoji: \ud83d"], "'half of an emoji: \ufffd' is no run"),
        ("run", ["\0"], "is no run"),
        ("stop", ["x" * 5000], "is not a run folder"),
        ("start", ["x" * 5000, "x"], "x"),
        ("start", ["\0", "x"], "enter the path of a folder"),
        ("stop", ["two"], "is not a run folder"),
        ("resume", ["one", True], "steps: must be a whole number"),
        ("samples", ["one", "last"], "step: must be a whole number"),
        ("samples", ["two"], "is not a run folder"),
        ("captions", ["/etc"], "/etc is outside of"),
        ("captions", ["photos", {"0.png": 3}], "0.png: a caption must be text"),
    ],
)
def test_wrong_values_are_refused_with_one_line(server: Server, name: str, values: list[object], line: str):
    answer = call(server, name, *values)
    assert isinstance(answer, str) and line in answer and "Traceback" not in answer


def answer_to(server: Server, path: str, body: bytes, language: str = "en") -> tuple[int, dict[str, object]]:
    """Return the status and the JSON answer of a POST request."""
    headers = {"Content-Type": "application/json", "Accept-Language": language}
    try:
        request = urllib.request.Request(f"{server.address}{path}", body, headers)
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


PREFIX = "/gradio_api"
NO_EVENT = "there is no such event or endpoint"
UNKNOWN = b'{"data": [], "fn_index": 9999, "session_hash": "a"}'


@pytest.mark.parametrize(
    ("path", "body", "status", "line"),
    [
        ("/run/captions", b"{}", 422, "the request is wrong at body.data: Field required"),
        ("/run/captions", b'{"data": "x"}', 422, "the request is wrong at body.data: Input should be a valid list"),
        ("/run/captions", b"[]", 422, "the request is wrong at body: Input should be a valid dictionary or object"),
        ("/run/captions", b"{", 422, "the request is wrong at body.1: JSON decode error"),
        ("/run/captions", b"NaN", 422, "the request is wrong at body: Input should be a valid dictionary or object"),
        ("/run/captions", b"", 422, "the request is wrong at body: Field required"),
        ("/run/captions", b'{"data": [[]], "batched": true}', 422, "photos: must be a text"),
        ("/run/captions", b'{"data": [7], "fn_index": -1}', 404, NO_EVENT),
        ("/run/nothing", b'{"data": []}', 404, NO_EVENT),
        ("/run/predict", UNKNOWN, 404, NO_EVENT),
        ("/queue/join", b'{"session_hash": "a"}', 422, "the request is wrong at body.data: Field required"),
        ("/queue/join", b'{"data": []}', 400, "Session hash not found."),
        ("/queue/join", UNKNOWN, 404, NO_EVENT),
        ("/call/captions", b"{}", 422, "the request is wrong at body.data: Field required"),
        ("/call/nothing", b'{"data": []}', 404, NO_EVENT),
        ("/call/v2/captions", b"{}", 422, "the request is wrong at body: No value provided for required argument"),
        ("/call/v2/captions", b'{"x": 1}', 422, "the request is wrong at body: Parameter `x` is not a valid key-word"),
        ("/call/v2/nothing", b"{}", 404, NO_EVENT),
        ("/component_server", b'{"session_hash": "a", "component_id": 0, "fn_name": "x", "data": 1}', 404, NO_EVENT),
        ("/cancel", b"{}", 422, "the request is wrong at body.session_hash: Field required"),
    ],
)
def test_malformed_requests_are_refused_with_one_line(server: Server, path: str, body: bytes, status: int, line: str):
    code, answer = answer_to(server, f"{PREFIX}{path}", body)
    text = answer.get("error") or answer["detail"]
    assert code == status and isinstance(text, str) and text.startswith(line) and "\n" not in text


def test_malformed_requests_are_refused_in_the_language_of_the_request(server: Server):
    for path, body in (("/run/captions", b"{}"), ("/run/nothing", b'{"data": []}')):
        code, answer = answer_to(server, f"{PREFIX}{path}", body, "ja")
        assert code in (404, 422) and not str(answer["error"]).isascii()


WRONG_DETAILS = {
    "step": "x",
    "act": "crop",
    "photo": "0.png",
    "box": [1],
    "file": 3,
    "name": {},
    "settings": 3,
    "run": [],
}


@pytest.mark.parametrize("details", [None, {}, "x", [1], WRONG_DETAILS], ids=str)
def test_no_event_of_the_page_fails_without_its_values(server: Server, details: object):
    """Each event of the page gets no values, no number of which fits, and wrong details.

    An event that reads no details answers in one way to all of them, so it gets one kind.
    """
    with urllib.request.urlopen(f"{server.address}/config") as answer:
        events = json.load(answer)["dependencies"]
    reads_details = [event for event in events if event["collects_event_data"]]
    assert reads_details
    failures = []
    for event in events if details is None else reads_details:
        for values in ([], [None] * len(event["inputs"]), ["x"] * (len(event["inputs"]) + 1)):
            body = {"data": values, "fn_index": event["id"], "session_hash": "s", "event_data": details}
            code, text = answer_to(server, f"{PREFIX}/run/predict", json.dumps(body).encode())
            failures += [(event["api_name"], values[:1], text)] if code not in (200, 404, 422) else []
    assert not failures


def test_a_run_that_has_ended_needs_more_steps(server: Server, room: Path):
    file = room / "runs" / "one" / "state.json"
    text = file.read_text()
    atomic.write(file, text.replace('"stopped"', '"done"'))
    assert call(server, "resume", "one") == "one has ended at step 2: give more steps than that"
    atomic.write(file, text)
