"""A server on this machine in the place of the hub: what its own client sends to make a repository and to commit."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest


class Hub(ThreadingHTTPServer):
    """Takes what the client sends to make a repository and to commit small files.

    Attributes:
        made: the client's wish for the new repository.
        files: content by path.
        deleted: paths that a commit removed.
        refuses: whether the token may not write.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.made: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub = cast(Hub, self.server)
        if hub.refuses or "/someone/" not in self.path or "/tree/main" not in self.path:
            return self.reply({"error": "there is nothing for this token"}, 404)
        return self.reply([{"type": "file", "path": path, "size": 1, "oid": "a" * 40} for path in hub.files])

    def do_POST(self) -> None:
        content, hub = self.rfile.read(int(self.headers["Content-Length"])), cast(Hub, self.server)
        repository = hub.url + ("/datasets/someone/maps" if "/datasets/" in self.path else "/someone/model")
        if hub.refuses:
            return self.reply({"error": "this token may not write"}, 403)
        if self.path == "/api/repos/create":
            hub.made = json.loads(content)
            return self.reply({"url": f"{hub.url}/someone/{hub.made['name']}"})
        if self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(content)["files"]]
            return self.reply({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        if "/someone/" in self.path and "/commit/main" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    hub.deleted.append(line["value"]["path"])
                    del hub.files[line["value"]["path"]]
            return self.reply({"success": True, "commitOid": "a" * 40, "commitUrl": f"{repository}/commit/{'a' * 40}"})
        return self.reply({"errors": [], "warnings": []})  # the check of a card's metadata

    def reply(self, value: Any, code: int = 200) -> None:
        encoded = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub(monkeypatch) -> Generator[Hub, None, None]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()
