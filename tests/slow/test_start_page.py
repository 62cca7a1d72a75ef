"""The commands of docs/index.md and docs/check.md, in their order, in a folder with what they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from command_line import lavender, write_scenes
from lavender.cli.main import DONE
from lavender.world import STUDENT_PATH, TEACHER_PATH
from test_documented_commands import commands, shells

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DOCS = Path(__file__).parents[2] / "docs"
START, CHECK = (DOCS / "index.md").read_text(), (DOCS / "check.md").read_text()
STEPS = [one for page in (START, CHECK) for block in shells(page) for one in commands(block)]
# one step of a small model on the CPU; the page's run is of a large one on a GPU
SMALL = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": "false"}
SMALL |= {"use_cpu": "true", "dtype": "float32"}


def test_the_pages_have_the_whole_way():
    verbs = [one[0] for one in STEPS]
    assert {"env", "look", "demo", "data", "extract", "check", "train", "report", "export"} == set(verbs)
    assert verbs.index("extract") < verbs.index("check") < verbs.index("train") < verbs.index("report")


def test_the_commands_run(some_scenes, captions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, model in (
        ("Qwen/Qwen2.5-VL-7B-Instruct", STUDENT_PATH),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", TEACHER_PATH),
    ):
        Path(place).parent.mkdir()
        Path(place).symlink_to(model)
    for folder in ("my_photos", "held_out"):
        Path(folder).mkdir()
        write_scenes(Path(folder), some_scenes, captions)
    for photo in ("photo.jpg", "held_out/photo.jpg"):
        Image.open("my_photos/0.png").save(photo)
    (run,) = re.findall(r"^```yaml run\.yaml\n(.*?)^```", START, re.M | re.S)
    of_any_model = [line for line in run.splitlines() if not line.startswith("image_processor:")]
    Path("run.yaml").write_text("\n".join(of_any_model))
    smaller = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    for command in STEPS:
        if command[0] != "demo":  # tests/slow/test_wheel.py
            ran = lavender(*command, *(smaller if command[0] == "train" else []))
            assert ran.code == DONE, f"{command}\n{ran.err[-3000:]}"
    assert Path("runs/aligned/report.html").is_file()
    assert Path("tuned/model.safetensors").is_file()
    for page in ("look.html", "gallery.html", "aligned.html", "plain.html", "worst.html"):
        assert Path(page).is_file()
