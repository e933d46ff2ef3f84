"""A stand-in for the Hugging Face hub: what huggingface_hub asks for, from folders, with failures on request."""

import hashlib
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class StandInHub:
    """Serves ``root/models/OWNER/NAME`` and ``root/datasets/OWNER/NAME`` on a port of this machine, in a thread.

    Attributes:
        endpoint: for HF_ENDPOINT.
        requests: (method, path) of all requests so far.
        failed, stalled: how many of them were refused or cut off, and how many were answered late.

    Args:
        fail: share of requests, of whatever kind, that are answered with 503 or cut off.
        stall: share that are answered only after ``stall_seconds``.
    """

    def __init__(self, root: Path, fail: float = 0.0, stall: float = 0.0, stall_seconds: float = 3.0, seed: int = 0):
        self.root, self.fail, self.stall, self.stall_seconds = root, fail, stall, stall_seconds
        self.requests: list[tuple[str, str]] = []
        self.failed = self.stalled = 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.handle(self)

            do_HEAD = do_POST = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "StandInHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: Any) -> None:
        url = urlsplit(request.path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        with self._lock:
            self.requests.append((request.command, url.path))
            dice = self._random.random()
            self.failed += dice < self.fail
            self.stalled += self.fail <= dice < self.fail + self.stall
        if dice < self.fail / 2:
            return self._answer(request, {"error": "busy"}, 503)
        if dice < self.fail:
            request.close_connection = True
            request.connection.close()
            return None
        if dice < self.fail + self.stall:
            time.sleep(self.stall_seconds)
        try:
            self._route(request, [unquote(part) for part in url.path.strip("/").split("/")], parse_qs(url.query), body)
        except OSError:  # the client has given up
            request.close_connection = True
        return None

    def _route(self, request: Any, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind, parts = (parts[0], parts[1:]) if parts[0] in ("models", "datasets") else ("models", parts)
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.root / kind / name
        if not folder.is_dir():
            return self._missing(request, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT):
            return self._missing(request, "RevisionNotFound")
        if not api:
            return self._file(request, folder / "/".join(rest[2:]))
        what = rest[0] if rest else "revision"
        if what == "revision":
            files = [
                {"rfilename": entry["path"]} for entry in _entries(folder, folder, True) if entry["type"] == "file"
            ]
            return self._answer(request, {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": files})
        if what == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
            return self._answer(request, {"branches": [main], "converts": [], "tags": []})
        if what == "tree":
            below = folder / "/".join(rest[2:])
            deep = query.get("recursive", ["false"])[0].lower() == "true"
            if not below.is_dir():
                return self._missing(request, "EntryNotFound")
            return self._answer(request, _entries(folder, below, deep))
        if what == "paths-info":
            is_json = "json" in (request.headers.get("Content-Type") or "")
            asked = (json.loads(body) if is_json else parse_qs(body.decode())).get("paths", [])
            return self._answer(request, [_entry(folder, folder / path) for path in asked if (folder / path).exists()])
        return self._missing(request, "EntryNotFound")

    def _file(self, request: Any, path: Path) -> None:
        if not path.is_file():
            return self._missing(request, "EntryNotFound")
        data = path.read_bytes()
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data))}
        if wanted := request.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            end = min(int(last) if last and first else len(data) - 1, len(data) - 1)
            if start >= len(data):
                return self._answer(request, b"", 416, headers)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._answer(request, data[start : end + 1], 206, headers)
        return self._answer(request, data, 200, headers)

    def _missing(self, request: Any, code: str) -> None:
        self._answer(request, {"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, request: Any, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            request.send_header(name, text)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": COMMIT, "size": 0, "path": name}
    return {"type": "file", "oid": _oid(path), "size": path.stat().st_size, "path": name}


def _entries(root: Path, folder: Path, recursive: bool) -> list[dict[str, Any]]:
    return [_entry(root, path) for path in sorted(folder.rglob("*") if recursive else folder.iterdir())]
