"""docs/scale.md: its commands run, their stores have equal records, and its numbers are those of the benchmark."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lavender.config import ExtractionConfig
from lavender.data.store import MapStore
from lavender.maps import WordMaps
from lavender.teachers.extraction_loop import FLUSH_SECONDS
from lavender.teachers.ray_engine import TASK_BATCHES
from lavender.teachers.ray_pool import RETRIES, START_SECONDS
from lavender.world import TEACHER_PATH
from lavender.world.language import caption_scene
from lavender.world.scenes import scenes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # each command starts several processes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text()
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
# as on the page, but for a CPU and a test: fewer processes, fewer kills
SHORTER = {"--num_processes 8": "--num_processes 2 --mixed_precision no", "--kills 100": "--kills 2 --quick"}
PROGRAMS = {
    "lavender": ["-m", "lavender.cli"],
    "accelerate launch": ["-m", "accelerate.commands.launch", "--main_process_port", "0"],
    "python": [],
}


@dataclass(frozen=True)
class Ran:
    """The folder in which all commands ran, and what each wrote to stdout."""

    folder: Path
    said: dict[str, str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    from command_line import write_scenes

    folder = tmp_path_factory.mktemp("scale")
    (folder / "photos").mkdir()
    some = list(scenes("development", 12))
    write_scenes(folder / "photos", some, [caption_scene(scene).text for scene in some])
    for name in ("benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "sd15").symlink_to(TEACHER_PATH)
    return Ran(folder, {command: run(command, folder) for command in COMMANDS})


def run(command: str, folder: Path) -> str:
    short = command
    for long, shorter in SHORTER.items():
        short = short.replace(long, shorter)
    program = next(name for name in PROGRAMS if command.startswith(f"{name} "))
    words = [*PROGRAMS[program], *shlex.split(short.removeprefix(program))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    environment.pop("RAY_ADDRESS", None)
    ended = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=1500, cwd=folder, env=environment
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    assert "Traceback" not in ended.stderr
    return ended.stdout


def records(path: Path) -> dict[tuple[str, str], WordMaps]:
    store = MapStore.open(path, verify=True)
    found = {(maps.image_id, maps.text): maps for maps in store}
    assert len(found) == len(store)  # none twice
    return found


@pytest.mark.parametrize("out", ["maps-8", "maps-ray"])
def test_several_processes_and_ray_have_the_records_of_one(ran, out):
    expected, found = records(ran.folder / "maps"), records(ran.folder / out)
    assert len(expected) == 12
    assert found.keys() == expected.keys()
    for key, maps in expected.items():
        assert found[key].words == maps.words
        assert found[key].dropped == maps.dropped
        # batches differ, and one of another size changes the last bits: at most one of 255 steps
        torch.testing.assert_close(found[key].maps, maps.maps, rtol=0, atol=1.01 / 255)
    summaries = [json.loads((ran.folder / name / "extraction.json").read_text()) for name in ("maps", out)]
    for name in ("records", "words", "already_there", "in_store", "dropped"):
        assert summaries[0][name] == summaries[1][name]
    assert [len(one["runs"]) for one in summaries] == [1, 1]
    said = [text for command, text in ran.said.items() if f"--out {out}/" in command]
    assert [text.count("12 texts with") for text in said] == [1]  # one process tells


def test_kills_lose_and_double_nothing(ran):
    crashes = {command: text for command, text in ran.said.items() if "crash.py" in command}
    assert len(crashes) == 3
    for command, text in crashes.items():
        numbers = json.loads(text.splitlines()[-1])
        assert numbers.pop("kills") >= 2, command
        assert numbers == {"lost": 0, "doubled": 0, "equal": True}, command


def test_the_tables_are_those_of_the_benchmark(ran):
    [said] = [text for command, text in ran.said.items() if "scale.py" in command]
    calculated = said[said.index("| | ") :].strip()
    assert calculated in PAGE
    numbers = json.loads(said[: said.index("| | ")])
    for name, kind in (
        ("records_per_core_second", "writer rate"),
        ("bytes_stored", "stored"),
        ("bytes_sent", "sent"),
        ("bytes_of_memory", "memory"),
    ):
        assert re.search(rf"^\| .* \({kind}\) \| {numbers['measured'][name]:,.0f} \|$", PAGE, re.M)
    assert f"| Ray's writer | {int(numbers['workers_per_writer'])} workers |" in PAGE
    megabit = numbers["megabit_per_second_per_worker"]
    assert f"{megabit['images']:.0f} Mbit/s of images per worker" in PAGE
    assert f"{megabit['maps']:.0f} Mbit/s of maps per worker" in PAGE
    assert f"{numbers['teacher']['tflop_per_image']:.1f} TFLOP per image" in PAGE
    assert f"{numbers['assumed']['rate']:.0f} images per second of a GPU" in PAGE
    assert f"{numbers['teacher']['read_seconds'] * 1000:.1f} ms of a core" in PAGE


def test_what_follows_from_the_tables():
    numbers = json.loads((ROOT / "docs" / "evidence" / "scale.json").read_text())
    rows = {name.partition(":")[0]: row for name, row in numbers["rows"].items()}
    rate, megabit = numbers["assumed"]["rate"], numbers["megabit_per_second_per_worker"]
    task, shard, day, loading = TASK_BATCHES * ExtractionConfig().batch_size / rate, 256 / rate, 86400, 60
    assert shard < FLUSH_SECONDS
    assert f"| min(20 s, 256 / rate) + loading | {shard:.0f} s + loading, on every GPU |" in PAGE
    assert f"| 8 × batch size / rate + loading | {task:.1f} s + loading, on one GPU |" in PAGE
    assert f"| with 16 workers {shard / 16 + task:.1f} s + loading, on every GPU |" in PAGE
    assert f"loses {task + loading:.0f} s / 24 h = {100 * (task + loading) / day:.2f} % of its time" in PAGE
    assert f"8 × {shard + loading:.0f} s / 24 h = {800 * (shard + loading) / day:.1f} %" in PAGE
    hours, keys = rows["GPU-hours of one forward pass at 512²"][1], rows["keys in the memory of each writer, GB"][1]
    assert f"| one process on a GPU | 10 M pairs | {hours:.0f} GPU-hours |" in PAGE
    assert f"| {round(1 / numbers['teacher']['read_seconds'], -1):.0f} images per second of a worker |" in PAGE
    assert f"8 × {keys:.1f} GB | Ray: {keys:.1f} GB in the writer" in PAGE
    assert f"| {int(1000 / megabit['images'])} workers at 1 Gbit/s | {megabit['images']:.0f} Mbit/s of images" in PAGE
    assert f"| {int(1000 / megabit['maps'])} workers at 1 Gbit/s | {megabit['maps']:.0f} Mbit/s of maps" in PAGE
    assert f"{round(rows['shards'][1], -3):,} files, {keys:.1f} GB" in PAGE
    assert f"a shard after each batch that takes {FLUSH_SECONDS:.0f} s or more" in PAGE
    assert f"one of {ExtractionConfig().batch_size} records" in PAGE


def test_the_limits_are_those_of_the_code():
    assert (TASK_BATCHES, RETRIES, FLUSH_SECONDS) == (8, 8, 20.0)
    assert "A task has eight batches" in PAGE
    assert "After eight losses" in PAGE
    assert "at most 20 seconds" in PAGE
    assert f"Ray waits {START_SECONDS} seconds" in PAGE
