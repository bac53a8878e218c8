"""Tests of a run's listeners and of requests to stop it."""

import pytest

from lorakit.core import events as events_module
from lorakit.core.errors import Stopped, StopRequested
from lorakit.core.events import Event, Events, StopRequest


class Closing(list):
    """A listener that records whether it was closed."""

    closed = False

    def __call__(self, event: Event) -> None:
        self.append(event)

    def close(self) -> None:
        self.closed = True


def test_all_listeners_are_called_in_their_order_and_closed_at_the_end() -> None:
    order: list[str] = []
    listener = Closing()
    with pytest.raises(ZeroDivisionError), Events(lambda event: order.append(event.kind), listener) as events:
        events.emit("step", 3, loss=0.5)
        events.say("one photo is small", warning=True)
        assert 1 / 0
    assert order == ["step", "warning"] and listener.closed
    assert listener == [Event("step", 3, {"loss": 0.5}), Event("warning", None, {"message": "one photo is small"})]


def test_a_listeners_error_reaches_the_run() -> None:
    def refuse(event: Event) -> None:
        raise RuntimeError("the host program is closing")

    with pytest.raises(RuntimeError, match="host program"):
        Events(refuse).emit("step", 1)


def test_a_stop_is_reported_once_and_remains() -> None:
    messages: list[str] = []
    answers = iter([False, True])
    stop = StopRequest(
        Events(lambda event: messages.append(event.facts["message"])), lambda: False, lambda: next(answers)
    )
    assert not stop("saving step 1") and not stop.requested
    assert stop("saving step 2") and stop("saving step 3") and stop.requested
    with pytest.raises(StopRequested):
        stop.poll("nothing is lost")
    assert messages == ["stopping: saving step 2"]


def test_stopped_says_how_to_continue(tmp_path) -> None:
    assert str(Stopped(tmp_path, 7)) == f"stopped after step 7; go on with: lorakit resume {tmp_path}"
    assert str(Stopped(tmp_path, 0)) == f"stopped before the first step; go on with: lorakit resume {tmp_path}"


def test_slow_work_reports_progress_and_quick_work_does_not(monkeypatch) -> None:
    heard: list[Event] = []
    events = Events(heard.append)
    events.begin("encoding the photos", 2)
    events.advance(2)
    assert not heard
    monkeypatch.setattr(events_module, "WORK_SECONDS", 0.0)
    events.begin("drawing the class images", 8)
    events.advance(3)
    events.advance(4)
    assert [event.facts for event in heard] == [
        {"doing": "drawing the class images", "position": position, "total": 8} for position in (3, 7)
    ]
