"""Check the host name, the origin, the upload size and the number of wrong passwords of every request."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.core import messages
from lorakit.ui import texts

# Key in a request's scope for the HTTP status to send instead of Gradio's 500.
STATUS = "lorakit.status"
# Number of wrong passwords from one address after which it must wait, and the longest wait in seconds.
FREE_TRIES, LONGEST = 5, 300.0
# Largest size of one upload request, as a multiple of the largest file.
FILES = 20
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "X-Frame-Options": "SAMEORIGIN",
    "Content-Security-Policy": "frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


class Guard:
    """An ASGI middleware that refuses invalid requests and sets the security headers.

    Args:
        hosts: accepted names in the Host header. If empty, all are accepted, because a password is required then.
        public: URL of the front end behind a reverse proxy, or "".
        max_upload: largest file, in bytes.
        embed: another origin whose pages may show the front end in a frame, or "".
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], public: str, max_upload: int, embed: str = ""):
        self.app, self.hosts, self.max_bytes = app, {host.lower() for host in hosts}, FILES * max_upload
        self.public = urlsplit(public).netloc.lower()
        self.headers = dict(HEADERS)
        if embed:  # X-Frame-Options cannot name another origin; without it, only the content policy applies
            self.headers["Content-Security-Policy"] += f" {embed}"
            del self.headers["X-Frame-Options"]
        # Client's address -> (number of wrong passwords, monotonic time of the next accepted try).
        self.tries: dict[str, tuple[int, float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it to the app."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_login = scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/login")
        client = scope["client"][0] if scope.get("client") else ""

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 500:  # Gradio's status for every error
                    message["status"] = scope.get(STATUS, 500)
                MutableHeaders(scope=message).update(self.headers)
                if is_login:
                    self._count(client, message["status"])
            await send(message)

        if refusal := self._refusal(scope, headers, client if is_login else ""):
            code, why = refusal
            say = texts.sayer(texts.language_of(headers.get("accept-language", "")))
            await PlainTextResponse(f"lorakit: {say.translate(why)}\n", code, self.headers)(scope, receive, send)
            return
        await self.app(scope, receive, send_marked)

    def _refusal(self, scope: Scope, headers: Headers, login_from: str) -> tuple[int, str] | None:
        """The HTTP status and the reason of a refusal, or None."""
        host = headers.get("host", "").lower()
        if self.hosts and host != self.public and _name(host) not in self.hosts:
            return 400, messages.Message(
                "the host name {host} is not accepted; behind a reverse proxy, start lorakit ui with --public https://{host}",
                host,
            )
        if scope["method"] in SAFE:
            return None
        origin = headers.get("origin")
        own = {host, self.public, headers.get("x-forwarded-host", "").lower()}
        if origin is not None and urlsplit(origin).netloc.lower() not in own - {""}:
            return 403, messages.Message(
                "a page of {origin} may not do this; behind a reverse proxy, start lorakit ui with --public https://{host}",
                *(origin, urlsplit(origin).netloc),
            )
        if scope["path"].rstrip("/").endswith("/upload"):
            size = headers.get("content-length", "")
            if not size.isdigit():
                return 411, "an upload needs the header Content-Length"
            if int(size) > self.max_bytes:
                large = "an upload may have {size} MB; send fewer files, or raise --max-upload"
                return 413, messages.Message(large, self.max_bytes >> 20)
        wait = self.tries.get(login_from, (0, 0.0))[1] - time.monotonic() if login_from else 0
        if wait > 0:
            return 429, messages.Message("too many wrong passwords; try again in {wait:.0f} s", wait)
        return None

    def _count(self, client: str, status: int) -> None:
        """Count wrong passwords and set the wait before the next try. A right password resets the count."""
        if status != 400:
            self.tries.pop(client, None)
            return
        count = self.tries.get(client, (0, 0.0))[0] + 1
        wait = min(LONGEST, 2.0 ** (count - FREE_TRIES)) if count >= FREE_TRIES else 0.0
        self.tries[client] = count, time.monotonic() + wait
        with contextlib.suppress(OSError, ValueError):  # no terminal is attached
            line = messages.Message(
                "wrong password from {client} ({count}); next try in {wait:.0f} s", client, count, wait
            )
            print(f"lorakit: {line}", file=sys.stderr, flush=True)


def _name(host: str) -> str:
    """The Host header without its port. An IPv6 address such as `[::1]` keeps its brackets."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host
