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


def test_a_run_that_has_ended_needs_more_steps(server: Server, room: Path):
    file = room / "runs" / "one" / "state.json"
    text = file.read_text()
    atomic.write(file, text.replace('"stopped"', '"done"'))
    assert call(server, "resume", "one") == "one has ended at step 2: give more steps than that"
    atomic.write(file, text)
