"""A Hugging Face hub on this machine: the few routes that loading a model or a data set asks for.

Written from what `huggingface_hub` and `datasets` request; nothing of it is the hub's own code.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def local_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root/models/{org}/{name}` and `root/datasets/{org}/{name}`.

    Yields:
        The address for `HF_ENDPOINT`, and the list of the requests as they come.
    """
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(root, asked))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _handler(root: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(f"{self.command} {self.path}")
            parts = path.split("/")
            if parts[0] == "api":
                self._api(parts[1:])
            else:
                kind = "datasets" if parts[0] == "datasets" else "models"
                self._resolve(kind, parts[1:] if parts[0] == "datasets" else parts)

        def _api(self, parts: list[str]) -> None:
            kind, repo, rest = parts[0], "/".join(parts[1:3]), parts[3:]
            folder = root / kind / repo
            if kind not in ("models", "datasets") or not folder.is_dir():
                self._missing("RepoNotFound", f"Repository {repo} not found")
            elif not rest or rest[0] == "revision":
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                names = [{"rfilename": str(file.relative_to(folder))} for file in files]
                self._json({"id": repo, "sha": COMMIT, "siblings": names, "private": False})
            elif rest[0] == "tree":
                below = folder.joinpath(*rest[2:])
                recursive = "recursive=true" in self.path.lower()
                if below.is_dir():
                    found = sorted(below.rglob("*") if recursive else below.iterdir())
                    self._json([_entry(path, folder) for path in found])
                else:
                    self._missing("EntryNotFound", f"no folder {'/'.join(rest[2:])}")
            else:
                self._missing("EntryNotFound", f"no route {'/'.join(rest)}")

        def _resolve(self, kind: str, parts: list[str]) -> None:
            folder = root / kind / "/".join(parts[:2])
            if not folder.is_dir():
                self._missing("RepoNotFound", f"Repository {'/'.join(parts[:2])} not found")
                return
            file = folder.joinpath(*parts[4:])
            if parts[2:3] != ["resolve"] or not file.is_file():
                self._missing("EntryNotFound", f"no file {'/'.join(parts[4:])}")
                return
            content = file.read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(file)}"'}
            self._send(200, content, "application/octet-stream", headers)

        def _missing(self, code: str, message: str) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self._send(404, json.dumps({"error": message}).encode(), "application/json", headers)

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), "application/json", {})

        def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the tests' output quiet."""

    return Handler


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
