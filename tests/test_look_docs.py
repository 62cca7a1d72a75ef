"""The commands of docs/look.md, run as they stand in a folder with what they name."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from command_line import lavender, write_scenes
from lavender.cli.main import DONE
from lavender.evaluation.look.looking import MAX_FAITHFUL, MAX_NEW_TOKENS, MAX_WORDS
from lavender.evaluation.look.tiles import MAX_BYTES
from lavender.world import STUDENT_PATH, TEACHER_PATH
from test_documented_commands import commands, shells

PAGE = (Path(__file__).parents[1] / "docs" / "look.md").read_text()
COMMANDS = [one for block in shells(PAGE) for one in commands(block)]


@pytest.fixture(scope="module")
def folder(store_path, some_scenes, captions, tmp_path_factory) -> Path:
    """The built-in models in the places of the published ones; a caption has the word "cat"."""
    from skimage.data import chelsea

    folder = tmp_path_factory.mktemp("docs")
    Image.fromarray(chelsea()).save(folder / "photo.jpg")
    for place, model in (
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", STUDENT_PATH),
        ("runs/aligned/checkpoint", STUDENT_PATH),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", TEACHER_PATH),
    ):
        (folder / place).parent.mkdir(parents=True)
        (folder / place).symlink_to(model)
    (folder / "my_photos").mkdir()
    write_scenes(folder / "my_photos", some_scenes, captions)
    for name in ("maps", "other-maps"):
        shutil.copytree(store_path, folder / name)
    return folder


def test_the_page_has_a_command_of_each_kind():
    assert len(COMMANDS) == 10
    assert {one[0] for one in COMMANDS} == {"look"}
    assert {one[1].partition("/")[0] for one in COMMANDS} == {
        *("meta-llama", "runs", "stable-diffusion-v1-5", "world", "maps")
    }


@pytest.mark.parametrize("command", COMMANDS, ids=shlex.join)
def test_a_command_of_the_page_runs(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = lavender(*command)
    assert result.code == DONE, result.err
    out = command[command.index("--out") + 1] if "--out" in command else "look.html"
    assert f"page: {out}" in result.out
    assert Path(out).read_text().startswith("<!doctype html>")
    if "--png" in command:
        assert Path("look.png").is_file()


def test_the_page_names_the_real_limits():
    assert f"at most {MAX_BYTES // 10**6} MB" in PAGE
    assert f"at most {MAX_WORDS} words" in PAGE
    assert f"in at most {MAX_NEW_TOKENS} tokens" in PAGE
    assert f"the first {MAX_FAITHFUL} words of the answer" in PAGE
