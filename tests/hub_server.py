"""A server that speaks the Hub's paths, on this machine: files, ranges, and the Hub's refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34
Files = Mapping[str, bytes]


@contextmanager
def serving(repos: Mapping[str, Files], refused: Mapping[str, tuple[int, str]]) -> Iterator[Any]:
    """(url, requests seen) of a Hub with these repositories; refused: their status and error code.

    Revision `main` and COMMIT exist; the repository `org/private` opens to the token `secret`.
    """
    seen: list[tuple[str, str, str]] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def send(self, status: int, body: bytes, headers: Mapping[str, str], whole: bool) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if whole:
                self.wfile.write(body)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            seen.append((self.command, path, self.headers.get("Range", "")))
            api = path.startswith("api/models/")
            parts = path.removeprefix("api/models/").split("/")
            repo, rest = "/".join(parts[:2]), parts[2:]
            if repo in refused:
                status, code = refused[repo]
                return self.send(status, b"", {"X-Error-Code": code} if code else {}, body)
            token = self.headers.get("Authorization") == "Bearer secret"
            if repo not in repos or (repo == "org/private" and not token):
                return self.send(401, b"", {"X-Error-Code": "RepoNotFound"}, body)
            files = repos[repo]
            if len(rest) > 1 and rest[1] not in ("main", COMMIT):
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
            if api and rest[:1] == ["tree"]:
                rows = [
                    {"type": "file", "path": n, "size": len(b), "oid": "0"}
                    for n, b in files.items()
                ]
                return self.send(200, json.dumps(rows).encode(), {}, body)
            if api:
                siblings = [{"rfilename": name} for name in files]
                info = {"id": repo, "sha": COMMIT, "siblings": siblings}
                return self.send(200, json.dumps(info).encode(), {}, body)
            content = files.get("/".join(rest[2:]))
            if content is None:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            about = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                content = content[int(first) : int(last) + 1]
                return self.send(206, content, about, body)
            self.send(200, content, about, body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
