"""Small pieces of HTML, and the widget of an option."""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from lorakit.core.errors import LorakitError
from lorakit.ui import texts
from lorakit.ui.form import Field
from lorakit.ui.texts import Say

# Options of Gradio's events. Each event is one plain request with one answer. Gradio's own queue answers over streams
# that it opens and closes, and an event can be lost while a stream closes. A page that polls its run every second
# eventually loses one. A second event during the first one waits and is sent with the page's newest values (FOLLOW), is
# dropped, as for a second click (ACT), or is sent at once (EACH). These events are private; api.py has the endpoints
# for other programs. No component shows the progress of an event: the browser would search the page for each of them,
# at each event.
FOLLOW: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "show_progress_on": [],
    "trigger_mode": "always_last",
    "api_visibility": "private",
}
ACT: dict[str, Any] = FOLLOW | {"trigger_mode": "once"}
EACH: dict[str, Any] = FOLLOW | {"trigger_mode": "multiple"}


# Name of a value that a script of the page sends with an event -> its types.
DETAILS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("act", "photo", "file", "text", "before", "name", "run", "settings"), (str,)),
    **dict.fromkeys(("box", "points"), (list,)),
    **dict.fromkeys(("brush", "ratio", "step"), (int, float)),
}


class Details(gr.EventData):  # type: ignore[misc]  # Gradio has no types
    """The values that a script of the page sends with an event, as attributes, see `DETAILS`."""

    def __getattr__(self, name: str) -> Any:
        """The value.

        Raises:
            LorakitError: the request does not have it, or its type is wrong.
        """
        if name not in DETAILS:
            raise AttributeError(name)
        value = self._data.get(name) if isinstance(self._data, dict) else None
        parts = value if isinstance(value, list) else []
        if not isinstance(value, DETAILS[name]) or not all(isinstance(part, (int, float)) for part in parts):
            raise LorakitError("the request has no {name}, or one of the wrong kind", name)
        return value


def clear_at(event: Callable[..., object], place: gr.HTML) -> None:
    """Empty an HTML component on an event, in the browser and at once.

    If the server did it, its answer could arrive late and clear the text of a later event.
    """
    event(None, None, place, js="() => ''", **FOLLOW)


class RequestCounter:
    """Counts the requests of a browser, so that a slow answer can be dropped after a newer request."""

    def __init__(self) -> None:
        self.number = 0

    def count_request(self) -> None:
        """Count a new request."""
        self.number += 1


def say_for(request: gr.Request | None) -> Say:
    """The texts in the language of the request."""
    accepted = request.headers.get("accept-language", "") if request is not None else ""
    return texts.sayer(texts.language_of(accepted))


def html(value: str = "", *, elem_id: str | None = None, js_on_load: str | None = None) -> gr.HTML:
    """An HTML component without Gradio's CSS."""
    return gr.HTML(value, elem_id=elem_id, js_on_load=js_on_load, apply_default_css=False)


def quiet(text: str) -> str:
    """A paragraph in a subdued style."""
    return f"<p class=lk-quiet>{escape(text)}</p>"


def problem(text: str) -> str:
    """A paragraph with an error message. Screen readers read it at once."""
    return f"<p class=lk-problem role=alert>{escape(text)}</p>"


def system_error(error: OSError, say: Say) -> str:
    """A line for an error of the system, such as a full disk or a folder that cannot be written to."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return say("task.system", reason=": ".join([error.strerror or str(error), *names[:1]]))


def good(text: str) -> str:
    """A paragraph with a message of success. Screen readers read it when they are idle."""
    return f"<p class=lk-good role=status>✓ {escape(text)}</p>"


def badge(state: str, say: Say) -> str:
    """The state of a run as a word on a coloured background."""
    return f'<span class="lk-badge lk-is-{state}">{escape(say(f"state.{state}"))}</span>'


def facts(pairs: list[tuple[str, str, str]]) -> str:
    """A list of facts side by side. Each is (name, value, remark); one with an empty value is left out."""
    items = []
    for name, value, remark in pairs:
        small = f"<small>{escape(remark)}</small>" if remark else ""
        long = " class=lk-long" if len(value) > 14 else ""
        items += [f"<div><dt>{escape(name)}</dt><dd{long}>{escape(value)}{small}</dd></div>"] if value else []
    return f"<dl class=lk-facts>{''.join(items)}</dl>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table of texts."""
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<div class=lk-scroll><table class=lk-table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def memory(size: float, say: Say) -> str:
    """A number of bytes in MiB or GiB, as text."""
    if size >= 1e3 * 2**20:
        return say("unit.gib", value=f"{size / 2**30:.1f}")
    return say("unit.mib", value=f"{size / 2**20:.0f}")


def duration(seconds: float, say: Say) -> str:
    """A number of seconds in seconds, minutes or hours, as text."""
    if seconds < 100:
        return say("unit.seconds", value=round(seconds))
    if seconds < 6000:
        return say("unit.minutes", value=round(seconds / 60))
    return say("unit.hours", value=f"{seconds / 3600:.1f}")


def ago(moment: float, say: Say) -> str:
    """The time since `moment`, in seconds since the epoch, as text."""
    return duration(max(0.0, time.time() - moment), say)


def widget(field: Field, value: Any, t: gr.I18n, **more: Any) -> Any:
    """The widget of an option. Its help shows the bounds, but only the config checks them.

    Args:
        field: the option.
        value: the option's value.
        more: arguments of the Gradio component that override the defaults.
    """
    common = {
        "label": t(f"option.{field.key}"),
        "info": t(f"help.{field.key}"),
        "elem_id": element_id(field.key),
    } | more
    widget_value = field.to_widget(value)
    words = [(t(f"choice.{name}"), name) if f"choice.{name}" in texts.table("en") else name for name in field.choices]
    if field.kind == "switch":
        return gr.Checkbox(value=widget_value, **common)
    if field.kind == "choices":
        return gr.CheckboxGroup(choices=list(field.choices), value=widget_value, **common)
    if field.kind == "choice":
        if len(field.choices) <= 3:
            return gr.Radio(choices=words, value=widget_value, **common)
        free = field.option.import_path or bool(field.option.numbered)
        return gr.Dropdown(
            list(field.choices) if free else words,
            value=widget_value,
            filterable=free,
            allow_custom_value=free,
            **common,
        )
    if field.kind in ("number", "whole") and not field.in_words:
        return gr.Number(value=widget_value, **common)
    return gr.Textbox(value=widget_value, lines=3 if field.kind == "lines" else 1, **common)


def answer_event(component: Any) -> Callable[..., object]:
    """The event that a change of a widget triggers.

    For a text field it is `change`, because Gradio triggers `input` only for keys that print a character. Pasting,
    deleting and input methods, e.g. for Chinese, do not trigger `input`.
    """
    listener: Callable[..., object] = component.change if isinstance(component, gr.Textbox) else component.input
    return listener


def element_id(key: str) -> str:
    """The HTML id of an option's widget."""
    return "option-" + key.replace(".", "-")
