"""The language of the page: the user's choice overrides the language that the browser requests."""

from __future__ import annotations

from contextvars import ContextVar
from html import escape

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.ui import texts

COOKIE = "lorakit-language"
# Language of the current request, set by the middleware.
REQUEST_LANGUAGE = ContextVar("REQUEST_LANGUAGE", default="en")
# When Gradio's script starts, it chooses its translations by `navigator.language`.
SCRIPT = '<script>Object.defineProperty(navigator, "language", {{value: "{0}"}});</script>'
SWITCH = (
    "element.querySelector(`[lang=\"${navigator.language}\"]`)?.setAttribute('aria-current', 'true');"
    "element.addEventListener('click', ({target}) => {"
    f" if (target.dataset.language) {{ document.cookie = `{COOKIE}=${{target.dataset.language}}; path=/; "
    "max-age=31536000; SameSite=Lax`; location.reload(); } });"
)


class Translations(gr.I18n):  # type: ignore[misc]  # Gradio has no types
    """The texts of the page as Gradio's translations, only in the language of the request."""

    @property
    def translations_dict(self) -> dict[str, dict[str, str]]:
        """locale -> key -> text."""
        language = REQUEST_LANGUAGE.get()
        return {texts.source(language).about.locale: texts.table(language)}


def buttons() -> str:
    """HTML with a button for each language. The script `SWITCH` handles their clicks."""
    every = [texts.source(language).about for language in texts.LANGUAGES]
    choices = "".join(
        f'<button type=button data-language="{one.locale}" lang="{one.locale}">{escape(one.name)}</button>'
        for one in every
    )
    return f"<nav class=lk-languages aria-label=Language>{choices}</nav>"


class Language:
    """An ASGI middleware that writes the user's language into the request's headers and into the page."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the app with its language, and add the script to a page that it returns."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        choice = cookie_parser(headers.get("cookie", "")).get(COOKIE) or ""
        if choice in [texts.source(language).about.locale for language in texts.LANGUAGES]:
            headers["accept-language"] = choice
        language = texts.language_of(headers.get("accept-language", ""))
        REQUEST_LANGUAGE.set(language)
        page: list[Message] = []

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                is_page = Headers(raw=message["headers"]).get("content-type", "").startswith("text/html")
                if is_page and scope["method"] == "GET":
                    page.append(message)
                    return
            elif page:
                page.append(message)
                if not message.get("more_body"):
                    await _send_page(page, texts.source(language).about.locale, send)
                return
            await send(message)

        await self.app(scope, receive, send_marked)


async def _send_page(messages: list[Message], name: str, send: Send) -> None:
    """Send an HTML page after adding `SCRIPT` and the language.

    Args:
        messages: ASGI messages of the response.
        name: locale, e.g. "zh-Hant".
    """
    start, *parts = messages
    body = b"".join(part.get("body", b"") for part in parts)
    body = body.replace(b"<head>", b"<head>" + SCRIPT.format(name).encode(), 1)
    body = body.replace(b'lang="en"', f'lang="{name}"'.encode(), 1)
    MutableHeaders(scope=start)["content-length"] = str(len(body))
    await send(start)
    await send({"type": "http.response.body", "body": body})
