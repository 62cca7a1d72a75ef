"""`lavender eval --tasks` where a task fails, where another command runs, and where the network does not answer."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from filelock import lock_descriptor
from PIL import Image

from command_line import lavender
from lavender.cli.main import FAILED
from lavender.errors import DataError, ModelError
from lavender.evaluation.harness import models, paper_tasks, running
from lavender.evaluation.harness.comparing import Scored


def fail(error: Exception) -> None:
    raise error


@pytest.fixture
def two_tasks(monkeypatch, tmp_path) -> Any:
    """What runs the tasks "good" and "bad" on two models. Each sample of "good" scores 1; "bad" does as it is told."""
    out, asked = tmp_path / "out", []
    index = SimpleNamespace(leaves=list, build=lambda name: name, ranks=lambda name: name == "bad")
    monkeypatch.setattr(running, "TaskIndex", lambda _: index)
    for name in ("check_student", "check_task"):
        monkeypatch.setattr(models, name, lambda *_: None)
    monkeypatch.setattr(models, "load_student", lambda *_: None)
    monkeypatch.setattr(running, "checkpoint_digest", str)

    def evaluate(bad: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        def run(lm: Any, task: str, name: str, index: Any, logs: Path, settings: Any) -> Scored:
            asked.append((logs.name, name))
            if name == "bad":
                bad()
            return Scored(name, "test", ("acc",), {"acc": 1.0}, [{"doc_id": 0, "answer": "yes"}], {0: 1.0})

        monkeypatch.setattr(running, "_evaluate", run)
        asked.clear()
        settings = running.Settings(dtype="float32")
        arms = {"base": "b", "tuned": "t"}
        return running.evaluate_tasks(arms, ["bad", "good"], out, out / "eval-tasks.json", settings), asked

    return evaluate


def test_a_task_thatfails_costs_no_other_its_result(two_tasks, tmp_path):
    path = tmp_path / "out" / "eval-tasks.json"
    result, asked = two_tasks(lambda: None)
    assert (list(result["tasks"]), result["failed"], len(asked)) == (["bad", "good"], {}, 4)
    assert (tmp_path / "out" / "base" / "bad.jsonl").is_file()
    error = DataError("the task bad, which fails: a bad row", "a task that runs", "leave the task out")
    result, asked = two_tasks(partial(fail, error))
    assert asked == [("base", "bad"), ("base", "good"), ("tuned", "good")]
    assert json.loads(path.read_text()) == result
    assert result["failed"] == {"bad": str(error)}
    assert list(result["tasks"]) == ["good"]
    assert result["tasks"]["good"]["scores"] == {"base": 1.0, "tuned": 1.0}
    assert not (tmp_path / "out" / "base" / "bad.jsonl").exists()  # of the first command
    with pytest.raises(ModelError):
        two_tasks(partial(fail, ModelError("a model that is damaged", "a whole one", "repair it")))
    assert not path.exists()


def test_the_command_tells_of_a_task_thatfails(monkeypatch, tmp_path):
    result = {"arms": {"base": {}}, "tasks": {}, "notes": [], "failed": {"bad": "Got a. Expected b. Do this: c."}}
    monkeypatch.setattr(running, "evaluate_tasks", lambda *_: result)
    ran = lavender("eval", "--model", "m", "--tasks", "bad", "--out", tmp_path, "--quiet")
    assert (ran.code, ran.out) == (FAILED, "")
    assert ran.err.split() == ["lavender", "eval:", *result["failed"]["bad"].split()]


def test_two_commands_do_not_write_to_one_folder(two_tasks, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "eval-tasks.lock").open("a") as file:
        assert lock_descriptor(file.fileno(), blocking=False)
        with pytest.raises(DataError, match=r"out, which another `lavender eval --tasks` is writing to.*--out"):
            two_tasks(lambda: None)
    assert two_tasks(lambda: None)[0]["failed"] == {}


class Pictures(ThreadingHTTPServer):
    """A server on this machine with one picture, which answers with each of some codes in turn, then with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.codes: list[int] = []
        self.asked = 0


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = cast(Pictures, self.server)
        server.asked += 1
        code = server.codes.pop(0) if server.codes else 200
        content = io.BytesIO()
        Image.new("RGB", (3, 2), "red").save(content, "PNG")
        self.send_response(code)
        self.send_header("Content-Length", str(len(content.getvalue())))
        self.end_headers()
        self.wfile.write(content.getvalue())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def pictures(monkeypatch, tmp_path) -> Iterator[Pictures]:
    monkeypatch.setattr(paper_tasks, "_PAUSE", 0.0)
    monkeypatch.setattr(paper_tasks, "_coco_folder", lambda: tmp_path)
    paper_tasks._session.cache_clear()
    server = Pictures()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    paper_tasks._session().close()
    paper_tasks._session.cache_clear()
    server.shutdown()
    server.server_close()


def test_a_picture_of_coco_is_downloaded_once_in_spite_of_a_server_that_is_busy(pictures, tmp_path):
    doc = {"url": f"http://127.0.0.1:{pictures.server_port}/val2014/one.jpg"}
    pictures.codes = [503, 429]
    for _ in range(2):  # as of a second model
        [image] = paper_tasks.coco_picture(doc)
        assert (image.size, image.getpixel((0, 0))) == ((3, 2), (255, 0, 0))
        assert pictures.asked == 3
    assert [path.name for path in tmp_path.iterdir()] == ["val2014-one.jpg"]


@pytest.mark.parametrize(("code", "asked"), [(503, 5), (404, 1)])
def test_a_picture_of_coco_that_is_out_of_reach_is_asked_for_by_the_same_command(code, asked, pictures, tmp_path):
    pictures.codes = [code] * 9
    with pytest.raises(DataError, match=rf"val2014/one\.jpg: .*{code}.*Do this: run the same command again"):
        paper_tasks.coco_picture({"url": f"http://127.0.0.1:{pictures.server_port}/val2014/one.jpg"})
    assert pictures.asked == asked
    assert not [*tmp_path.iterdir()]


def test_a_server_of_coco_that_is_gone_is_told(pictures):
    with pytest.raises(DataError, match="Do this: run the same command again"):
        paper_tasks.coco_picture({"url": "http://127.0.0.1:9/val2014/one.jpg"})
