"""The commands of README, docs and examples: each is one that the programs take, and those of docs/method.md run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lavender.cli.main import build_parser
from lavender.world import TEACHER_PATH

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
EXAMPLES = {path: path.read_text() for path in sorted((ROOT / "examples").rglob("*.yaml"))}
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
ON_SEVERAL_GPUS = "accelerate launch"  # tests/scale


def shells(page: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page) if language in ("", "sh", "bash")]


def commands(text: str) -> list[list[str]]:
    """The words of each `lavender` command of a shell text, also after `&&` and behind a launcher."""
    found = []
    for part in re.split(r"\n|&&", text):
        _, launched, rest = part.partition("-m lavender.cli ")
        own = part.lstrip("# ")
        if launched or own.startswith("lavender "):
            found.append(shlex.split(rest or own.removeprefix("lavender "), comments=True))
    return found


def documented() -> list[str]:
    blocks = [block for page in PAGES.values() for block in shells(page)]
    comments = ["\n".join(line for line in one.splitlines() if line.startswith("#")) for one in EXAMPLES.values()]
    studies = [one for page in PAGES.values() for one in re.findall(r"`(lavender study [^`]+)`", page)]
    return sorted({shlex.join(one) for text in (*blocks, *comments, *studies) for one in commands(text)})


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_is_understood(command):
    build_parser().parse_args(shlex.split(command))


def test_commands_are_found_in_blocks_comments_and_behind_launchers():
    verbs = [one.split()[0] for one in documented()]
    assert {"extract", "check", "train", "eval", "report", "export", "study"} <= set(verbs)
    assert len(verbs) > 40


@pytest.mark.parametrize(
    "command",
    sorted(
        {
            one
            for page in PAGES.values()
            for one in re.findall(r"python (benchmarks/[^`#\n]+)", page.replace("\\\n", " "))
        }
    ),
)
def test_a_documented_benchmark_has_its_options(command):
    name, *options = shlex.split(command)
    text = (ROOT / name).read_text()
    for option in options:
        assert not option.startswith("--") or re.search(rf'add_argument\(\s*"{option}"', text), option


def test_the_commands_of_the_readme_are_those_of_the_first_page():
    """tests/slow/test_start_page.py runs them as they stand."""
    readme, start = (
        [one for block in shells(PAGES[ROOT / page]) for one in commands(block)]
        for page in ("README.md", "docs/index.md")
    )
    assert [one[0] for one in readme].count("train") == 2
    assert [one for one in readme if one not in start] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four processes, one after the other
def test_the_commands_of_the_settings_page_run(some_scenes, captions, tmp_path):
    """As they stand, with maps of some scenes; the trainings are cut short."""
    from command_line import write_scenes

    (tmp_path / "my_photos").mkdir()
    write_scenes(tmp_path / "my_photos", some_scenes, captions)
    for name in ("examples", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    short = ["--set", "max_steps=1", "--set", "per_device_train_batch_size=2", "--set", "data=my_photos"]
    short += ["--set", "maps=maps", "--set", "match=label"]
    extract = ["extract", "--data", "my_photos", "--teacher", str(TEACHER_PATH), "--out", "maps"]
    page = [one for block in shells(PAGES[ROOT / "docs" / "method.md"]) for one in commands(block)]
    assert "train" in [one[0] for one in page]
    for command in (extract, *page):
        ran = subprocess.run(
            [sys.executable, "-m", "lavender.cli", *command, *(short if command[0] == "train" else [])],
            capture_output=True,
            text=True,
            timeout=500,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert ran.returncode == 0, f"{command}\n{ran.stderr[-3000:]}"
        assert "Traceback" not in ran.stderr
