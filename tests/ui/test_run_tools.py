"""The tools for a run on its page: settings, names and notes, remedies, queue and trash."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit import config as configuration  # noqa: E402
from lorakit.core.errors import LorakitError  # noqa: E402
from lorakit.runs import memory_estimate, quickstart  # noqa: E402
from lorakit.runs.run_folder import RunFolder  # noqa: E402
from lorakit.training import checkpoint  # noqa: E402
from lorakit.training.loop import Milestones  # noqa: E402
from lorakit.ui import app, language, texts  # noqa: E402
from lorakit.ui.pages.runs import RunsPage  # noqa: E402
from lorakit.ui.pages.train import TrainPage  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402

SAY = texts.sayer("en")
T = language.Translations()


@pytest.fixture
def page(tmp_path: Path) -> RunsPage:
    with gr.Blocks():
        return RunsPage(Workspace(tmp_path / "runs", [tmp_path]), T, gr.BrowserState())


@pytest.fixture
def run(page: RunsPage, tmp_path: Path) -> RunFolder:
    (tmp_path / "photos").mkdir()
    answers = {quickstart.PHOTOS: str(tmp_path / "photos"), quickstart.NAME: "sks toy"}
    config = quickstart.config_for_answers(answers, "quick", changed={"adapter.rank": 7, "train.steps": 9})
    run = RunFolder.create(replace(config, output=replace(config.output, folder=str(page.workspace.runs / "one"))))
    run.update(state="running", step=2, steps=9)
    run.unlock()
    return run


def list_of(page: RunsPage) -> str:
    return page.poll("one", {}, SAY)[2]


def test_a_runs_settings_fill_the_form(page: RunsPage, run: RunFolder, tmp_path: Path):
    with gr.Blocks():
        train = TrainPage(page.workspace, T, gr.BrowserState())
    values = page.tools.answers_of("one", '{"memory.base_storage": "\'nf4\'", "train.batch_size": "1"}')
    folder, _, marks, preset, *widgets = train.restore({"values": values})
    filled = dict(zip(train.keys, widgets, strict=True))
    assert folder == str(tmp_path / "photos") and filled[quickstart.NAME] == "sks toy" and preset == ""
    assert (filled["adapter.rank"], filled["train.steps"], filled["memory.base_storage"]) == (7, "9", "nf4")
    # They stay like options that the user has changed.
    draft = train.answer("balanced", marks, widgets, SAY)[5]
    assert draft["values"]["adapter.rank"] == 7 and draft["values"]["train.steps"] == "9"
    for name in ("two", "../one", ""):
        with pytest.raises(LorakitError):
            page.tools.answers_of(name)


def test_reusing_settings_warns_that_output_notify_is_not_used(page: RunsPage, run: RunFolder):
    own = configuration.load(run.config_file, {"output.notify": "https://box.example/secret"})
    run.config_file.write_text(configuration.to_toml(own), encoding="utf-8")
    built = app.build(page.workspace, T)
    (reuse,) = [event.fn for event in built.fns.values() if event.name == "reuse"]
    remark = reuse("one", SimpleNamespace(headers={}))[-1]
    assert "That run had its own output.notify" in remark and "secret" not in remark
    page.workspace.notify = "https://box.example/secret"
    assert reuse("one", SimpleNamespace(headers={}))[-1] == ""


def test_a_name_and_a_note_stay_with_the_run(page: RunsPage, run: RunFolder):
    assert "Saved." in page.tools.keep_note("one", " the <b>red</b>\n one ", "a\nb", SAY)
    title, note, *_ = page.tools.show("one", SAY)
    assert (title, note) == ("the <b>red</b> one", "a\nb")
    assert "the &lt;b&gt;red&lt;/b&gt; one" in list_of(page) and 'data-run="one"' in list_of(page)
    assert "no longer exists" in page.tools.keep_note("two", "x", "", SAY)
    assert not (page.workspace.runs / "two").exists()
    (run.path / "note.json").write_text("[]")
    assert page.tools.show("one", SAY)[0] == ""


def test_settings_are_shown_as_text(page: RunsPage, run: RunFolder):
    assert "rank = 7" in page.tools.show("one", SAY)[5]
    assert page.tools.show("", SAY)[5] == ""


def test_a_run_is_moved_to_the_trash_and_restored(page: RunsPage, run: RunFolder):
    assert "has not ended" in page.tools.put_aside("one", SAY) and run.path.is_dir()
    run.update(state="done")
    assert "No file is deleted" in page.tools.put_aside("one", SAY)
    assert list_of(page) == "" and (page.workspace.runs / ".trash/one/config.toml").is_file()
    (page.workspace.runs / ".trash/one").rename(run.path)
    assert 'data-run="one"' in list_of(page)


def test_a_job_without_a_folder_goes_to_the_trash_too(page: RunsPage):
    queue = page.workspace.queue
    job = queue.command(["train"], page.workspace.runs / "none")
    assert "has not ended" in page.tools.put_aside("none", SAY)
    queue._write(replace(job, state="failed"))
    assert 'data-run="none"' in list_of(page)
    page.tools.put_aside("none", SAY)
    assert list_of(page) == ""


def test_a_waiting_run_can_be_put_first(page: RunsPage):
    queue, runs = page.workspace.queue, page.workspace.runs
    for name in ("a", "b", "c"):
        queue.command(["train"], runs / name)
    assert "It is the first in the queue" in page.tools.put_first("c", SAY)
    assert [Path(job.folder).name for job in queue.waiting()] == ["c", "a", "b"]
    page.tools.put_first("b", SAY)
    assert [name for name, _ in page.workspace.runs_and_jobs()] == ["b", "c", "a"]
    assert list_of(page).index(">1.<") < list_of(page).index(">2.<")
    assert "It is number 2 in" in page.tools.put_later("b", SAY)
    assert "It is number 2 in" in page.tools.put_earlier("a", SAY)
    queue.command(["train"], runs / "e")
    assert [Path(job.folder).name for job in queue.waiting()] == ["c", "a", "b", "e"]
    assert "It is number 4 in" in page.tools.put_later("e", SAY), "it stays the last"
    assert "is not waiting" in page.tools.put_first("d", SAY) and not queue.move(99, -1)


def test_advice_about_memory_is_buttons(page: RunsPage, run: RunFolder):
    config = quickstart.config_for_answers({}, "quick")
    run.update(state="failed", message=memory_estimate.advice("step 3", config, "cuda"))
    html = page.tools.show("one", SAY)[6]
    assert 1 <= html.count("<button") <= 3 and "data-remedy=" in html and "memory.base_storage" in html
    run.update(state="failed", message="something = else, memory.engine = true")
    assert page.tools.show("one", SAY)[6] == ""


def test_a_run_saves_and_draws_on_request(page: RunsPage, run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "require_finite", lambda *arguments: None)
    calls = []
    milestones = Milestones.__new__(Milestones)
    nothing = SimpleNamespace(state=dict, state_dict=dict)
    milestones.model = SimpleNamespace(adapter=nothing, optimizer_step=SimpleNamespace(optimizer=nothing))
    milestones.run = SimpleNamespace(folder=run, stop=SimpleNamespace(requested=False))
    for name in ("save", "sample"):
        monkeypatch.setattr(milestones, name, lambda step, left, name=name: calls.append((name, step)))
    for ask in (page.tools.ask_samples, page.tools.ask_save):
        assert "one of its next steps" in ask("one", SAY)
    milestones._reach(10, ["sample"])
    milestones._reach(20, [])
    assert calls == [("sample", 10), ("save", 10)], "once, and what is due anyway is not done twice"
    run.update(state="done")
    assert "not running" in page.tools.ask_save("one", SAY) and run.take_requests() == []


BUTTONS = ("run-again", "run-save-now", "run-sample-now", "run-first", "run-notify", "run-delete", "run-words")


def offered(page: RunsPage, name: str) -> set[str]:
    """Return the buttons below "Settings, notes and more" that the page shows for a run."""
    updates = {
        component.elem_id: bool(update.get("visible", True))
        for component, update in zip(page.outputs, page.poll(name, {}, SAY), strict=True)
        if isinstance(update, dict)
    }
    return {name for name in BUTTONS if updates.get(name, True)} if updates.get("run-tools", True) else set()


def test_each_button_is_visible_for_the_runs_that_need_it(page: RunsPage, run: RunFolder):
    assert offered(page, "one") == {"run-again", "run-save-now", "run-sample-now", "run-notify", "run-words"}
    run.update(state="preparing")
    assert offered(page, "one") == {"run-again", "run-notify", "run-words"}, "it trains not yet"
    for state in ("done", "stopped", "failed", "interrupted"):
        run.update(state=state)
        assert offered(page, "one") == {"run-again", "run-delete", "run-words"}, state
    page.workspace.queue.command(["train"], page.workspace.runs / "two")
    assert offered(page, "two") == {"run-first", "run-notify"}, "it has no folder yet"


def test_without_a_run_there_are_no_tools_and_no_curves(page: RunsPage):
    assert offered(page, "") == set()
    updates = dict(zip(page.outputs, page.poll("", {}, SAY), strict=True))
    assert updates[page.view] == gr.update(visible=False)


def test_the_loss_of_two_runs_is_one_chart(page: RunsPage, run: RunFolder):
    other = RunFolder(page.workspace.runs / "two")
    other.path.mkdir()
    for folder in (run, other):
        for step in (1, 2):
            folder.event("step", step=step, smoothed_loss=0.5 / step)
    chart = page.tools.overlay_of("one", "two", SAY)
    assert chart.count("<polyline") == 2 and "one" in chart and "two" in chart
    assert page.tools.overlay_of("one", "", SAY) == ""


def test_a_note_that_cannot_be_written_says_why(page: RunsPage, run: RunFolder):
    (run.path / "note.json").mkdir()
    assert "The system refused this: Is a directory: " in page.tools.keep_note("one", "a", "b", SAY)
