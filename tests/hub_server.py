"""A small Hugging Face Hub: serves a folder as one repository to clients of huggingface_hub, and accepts commits."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Repository of "org" that the server refuses -> status and headers of the real hub for this case.
REFUSALS = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "expired": (401, {"X-Error-Message": 'User Access Token "mine" is expired'}),
    "badtoken": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {"X-Error-Message": "enable access to public gated repositories"}),
    "broken": (500, {}),
}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def take(self, folder: Path, visibility: dict[str, bool], repository: str, commit: str) -> None:
        """Answer a POST request: create a repository, or commit to one."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        refused = next((answer for name, answer in REFUSALS.items() if f"/org/{name}" in self.path), None)
        if refused:
            self.answer(b"{}", *refused)
        elif self.path == "/api/repos/create":
            wish = json.loads(content)
            name = f"{wish['organization']}/{wish['name']}"
            visibility[name] = wish.get("private", wish.get("visibility") == "private")
            self.json({"url": f"https://huggingface.co/{name}"})
        elif self.path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(content)["files"]]
            self.json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    target = folder / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"https://huggingface.co/{repository}/commit/{commit}"
            self.json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def json(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def answer(self, content: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def serve(
    folder: Path, requests: list[str], repository: str = "org/tiny", commit: str = COMMIT, *, private: bool = False
) -> Iterator[str]:
    """Run the server and yield its address. `requests` gets the path of each request. Commits change the folder. A new
    repository is private if the client requests it."""
    visibility = {repository: private}
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    class Handler(Answers):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            requests.append(f"{self.command} {path}")
            refused = next((answer for name, answer in REFUSALS.items() if f"/org/{name}" in path), None)
            if refused:
                self.answer(b"{}", *refused)
            elif not any(name in path for name in visibility):
                self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
            elif path.removeprefix("/api/models/") in visibility:
                names = files if repository in path else ()
                siblings = [{"rfilename": name} for name in names]
                facts = {
                    "private": visibility[path.removeprefix("/api/models/")],
                    "siblings": siblings,
                    "cardData": json.loads(files.get("card.json", b"{}")),
                }
                self.json({"id": path.removeprefix("/api/models/"), "sha": commit, **facts})
            elif path in (f"/api/models/{repository}/revision/main", f"/api/models/{repository}/revision/{commit}"):
                self.json({"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
            elif path.startswith(f"/api/models/{repository}/revision/"):
                self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith(f"/api/models/{repository}/tree/"):
                self.json(
                    [
                        {"type": "file", "path": name, "size": len(c), "oid": f"{n:040x}"}
                        for n, (name, c) in enumerate(files.items())
                    ]
                )
            else:
                content = files.get(unquote(re.sub(r".*/resolve/[^/]+/", "", path)))
                if content is None:
                    self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                    return
                self.answer(content, 200, {"ETag": f'"{hash(content) & 0xFFFFFFFF:040x}"', "X-Repo-Commit": commit})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            requests.append(f"POST {self.path}")
            self.take(folder, visibility, repository, commit)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
