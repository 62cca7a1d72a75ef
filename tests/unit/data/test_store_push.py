"""The push of a store to a hub: the hub's own client, and a server on this machine in the place of the hub."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest

from command_line import complaint, lavender
from lavender.cli.main import DONE, FAILED


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
        if hub.refuses or not self.path.startswith("/api/datasets/someone/maps/tree/main"):
            return self.reply({"error": "there is nothing for this token"}, 404)
        return self.reply([{"type": "file", "path": path, "size": 1, "oid": "a" * 40} for path in hub.files])

    def do_POST(self) -> None:
        content, hub = self.rfile.read(int(self.headers["Content-Length"])), cast(Hub, self.server)
        repository = f"{hub.url}/datasets/someone/maps"
        if hub.refuses:
            return self.reply({"error": "this token may not write"}, 403)
        if self.path == "/api/repos/create":
            hub.made = json.loads(content)
            return self.reply({"url": repository})
        if self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(content)["files"]]
            return self.reply({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        if self.path.startswith("/api/datasets/someone/maps/commit/main"):
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


def test_a_push_uploads_the_table_and_its_card(hub, store_path, tmp_path):
    ran = lavender("store", "push", store_path, "someone/maps")
    assert ran.code == DONE, ran.err
    assert ran.out == f"uploaded to {hub.url}/datasets/someone/maps/commit/{'a' * 40}\n"
    assert (hub.made["type"], hub.made["organization"], hub.made["name"]) == ("dataset", "someone", "maps")
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    lavender("store", "push", store_path, "someone/maps", "--dry-run", tmp_path / "dry")
    written = {str(path.relative_to(tmp_path / "dry")): path for path in (tmp_path / "dry").rglob("*.*")}
    assert (
        hub.files.keys() == written.keys() == {"README.md", "lavender_maps.json", "data/train-00000-of-00001.parquet"}
    )
    assert {name: path.read_bytes() for name, path in written.items()} == hub.files


def test_a_second_push_replaces_the_table(hub, store_path):
    """A file of a longer table would stay, and its records would be there twice."""
    hub.files = dict.fromkeys(
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "mine.txt"], b""
    )
    assert lavender("store", "push", store_path, "someone/maps").code == DONE
    assert hub.deleted == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert sorted(hub.files) == ["README.md", "data/train-00000-of-00001.parquet", "lavender_maps.json", "mine.txt"]
    assert lavender("store", "push", store_path, "someone/maps").code == DONE
    assert "data/train-00000-of-00001.parquet" in hub.files


def test_a_hub_that_refuses_is_one_error(hub, store_path):
    hub.refuses = True
    said = complaint(lavender("store", "push", store_path, "someone/maps"), FAILED)
    assert "nothing was uploaded" in said
    assert "someone/maps" in said
    assert not hub.files
