"""Small pieces of HTML, and the widget that belongs to an option."""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from lorakit.ui import texts
from lorakit.ui.form import Field
from lorakit.ui.texts import Say

# How events are sent: each is one plain request with one answer. Gradio's own queue answers over streams that it opens
# and closes. An event that is sent while a stream closes can be lost, and a page that polls its run every second
# eventually loses one. While an event of a kind is running, a second event of this kind waits for it and is sent with
# the page's newest values (FOLLOW), is dropped, as for a second press of a button (ACT), or is sent too (EACH). None of
# these events is for other programs; api.py has the endpoints for them.
FOLLOW: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "trigger_mode": "always_last",
    "api_visibility": "private",
}
ACT: dict[str, Any] = FOLLOW | {"trigger_mode": "once"}
EACH: dict[str, Any] = FOLLOW | {"trigger_mode": "multiple"}


def clear_at(event: Callable[..., object], place: gr.HTML) -> None:
    """Empty a place when something happens, in the browser at once: an answer of the server could take away what a
    later event wrote there meanwhile."""
    event(None, None, place, js="() => ''", **FOLLOW)


class RequestCounter:
    """Counts the requests of a browser, so that a slow answer knows whether a newer request exists."""

    def __init__(self) -> None:
        self.number = 0

    def count_request(self) -> None:
        """Count a new request, which makes older ones obsolete."""
        self.number += 1


def say_for(request: gr.Request | None) -> Say:
    """The texts in the language of whoever asks."""
    accepted = request.headers.get("accept-language", "") if request is not None else ""
    return texts.sayer(texts.language_of(accepted))


def html(value: str = "", *, elem_id: str | None = None, js_on_load: str | None = None) -> gr.HTML:
    """A place for HTML of ours, under no style but ours."""
    return gr.HTML(value, elem_id=elem_id, js_on_load=js_on_load, apply_default_css=False)


def quiet(text: str) -> str:
    """A line in a low voice."""
    return f"<p class=lk-quiet>{escape(text)}</p>"


def problem(text: str) -> str:
    """A line that says what is wrong; screen readers read it at once."""
    return f"<p class=lk-problem role=alert>{escape(text)}</p>"


def good(text: str) -> str:
    """A line that says that something was done."""
    return f"<p class=lk-good role=status>✓ {escape(text)}</p>"


def badge(state: str, say: Say) -> str:
    """The state of a run as a word on a coloured ground."""
    return f'<span class="lk-badge lk-is-{state}">{escape(say(f"state.{state}"))}</span>'


def facts(pairs: list[tuple[str, str, str]]) -> str:
    """Name, value and remark of several numbers, side by side."""
    items = []
    for name, value, remark in pairs:
        small = f"<small>{escape(remark)}</small>" if remark else ""
        long = " class=lk-long" if len(value) > 14 else ""
        items += [f"<div><dt>{escape(name)}</dt><dd{long}>{escape(value)}{small}</dd></div>"] if value else []
    return f"<dl class=lk-facts>{''.join(items)}</dl>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of texts."""
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<div class=lk-scroll><table class=lk-table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def memory(size: float, say: Say) -> str:
    """Bytes for people."""
    if size >= 1e3 * 2**20:
        return say("unit.gib", value=f"{size / 2**30:.1f}")
    return say("unit.mib", value=f"{size / 2**20:.0f}")


def duration(seconds: float, say: Say) -> str:
    """Seconds for people."""
    if seconds < 100:
        return say("unit.seconds", value=round(seconds))
    if seconds < 6000:
        return say("unit.minutes", value=round(seconds / 60))
    return say("unit.hours", value=f"{seconds / 3600:.1f}")


def ago(moment: float, say: Say) -> str:
    """How long ago that was."""
    return duration(max(0.0, time.time() - moment), say)


def widget(field: Field, value: Any, t: gr.I18n, **more: Any) -> Any:
    """The widget for an option. Bounds are in its help, and are judged by the config alone."""
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


def answer_event(component: Any) -> Any:
    """The event of a widget that somebody changed. A text field's `input` comes with a key that prints and with nothing
    else: not with what is pasted, deleted, or written by an input method, as Chinese is."""
    return component.change if isinstance(component, gr.Textbox) else component.input


def element_id(key: str) -> str:
    """The HTML id of an option's widget."""
    return "option-" + key.replace(".", "-")
