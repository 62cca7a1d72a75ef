"""`lavender data`: the commands of docs/data.md run as they stand, on small data in the places that they name."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from command_line import Ran, complaint, lavender
from lavender.cli.stopping import DONE, FAILED
from lavender.evaluation.data_checks.overlap import FIGURES, Thresholds
from lavender.evaluation.data_checks.scan import extra
from lavender.world import STUDENT_PATH, TEACHER_PATH
from unit.data.test_recipes import flickr30k, laion, ocrvqa, rlaif_v

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", PAGE, re.M | re.S)
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("lavender data ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the page's commands name: published files, photographs, maps, models and benchmarks."""
    folder = tmp_path_factory.mktemp("page")
    published = folder / "published"
    flickr30k(published / "flickr30k", 6)
    rlaif_v(published / "rlaif-v")
    ocrvqa(published / "ocrvqa30k", 4)
    laion(published / "laion50k")
    photos = folder / "my_photos"
    photos.mkdir()
    images = sorted((published / "flickr30k" / "flickr30k_images").iterdir())
    rows = []
    for index, path in enumerate(images):
        (photos / path.name).write_bytes(path.read_bytes())
        rows.append({"file_name": path.name, "text": f"a cat and {index} cups on a table"})
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmarks = folder / "benchmarks"
    (benchmarks / "docvqa").mkdir(parents=True)
    Image.open(images[0]).save(benchmarks / "docvqa" / "page.png")
    row = {"file_name": "page.png", "text": "words that nobody else has written"}
    (benchmarks / "docvqa" / "metadata.jsonl").write_text(json.dumps(row))
    (benchmarks / "coco").mkdir()
    Image.open(images[1]).resize((26, 22)).save(benchmarks / "coco" / "small.png")
    row = {"image": "small.png", "text": "Caption 0 of 1001.jpg ."}
    (benchmarks / "coco" / "val.jsonl").write_text(json.dumps(row))
    for name, model in (
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", STUDENT_PATH),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", TEACHER_PATH),
    ):
        (folder / name).parent.mkdir()
        (folder / name).symlink_to(model)
    return folder


@pytest.fixture(scope="module")
def ran(place) -> dict[str, Ran]:
    """Every command of the page, in its order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert lavender("extract", "--data", "my_photos", "--teacher", "world", "--out", "maps").code == DONE
        return {command: lavender(*shlex.split(command, comments=True)[1:]) for command in COMMANDS}


def test_the_page_has_a_command_for_each_action_and_data_set():
    words = [command.split()[2:4] for command in COMMANDS]
    assert [pair[1] for pair in words if pair[0] == "prepare"] == [
        "flickr30k",
        "rlaif-v",
        "ocrvqa30k",
        "laion50k",
        "paper",
    ]
    assert {pair[0] for pair in words} == {"prepare", "inspect", "overlap"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command, ran):
    assert ran[command].code == DONE, ran[command].err


def test_prepare_says_what_it_found_and_what_the_paper_has(ran, place):
    (command,) = (one for one in COMMANDS if "prepare flickr30k" in one)
    first, second, last = ran[command].out.splitlines()
    assert first == (
        "flickr30k: 6 of 31,783 pictures, 31,777 fewer than the paper; 5 samples for training, 1 for testing; "
        "1 dropped; 23 further captions left out, as --captions one says"
    )
    assert second.startswith("  dropped results.csv line 31: 2 fields separated by bars, not 3: ")
    assert last == "5 samples in flickr30k/train.jsonl, 1 in test.jsonl; prepared.json has the counts"
    assert len(json.loads((place / "paper" / "prepared.json").read_text())["sets"]) == 3


def test_inspect_prints_json_and_writes_the_page(ran, place):
    whole, photos = (json.loads(ran[one].out) for one in COMMANDS if " inspect " in one)
    assert (whole["samples"], whole["broken"]) == (11, [])
    assert "Nothing is broken." in (place / "inspection.html").read_text()
    assert photos["maps"]["share_with_maps"] == 1
    assert photos["clip_tokens"]["limit"] == 48
    assert photos["student_tokens"]["limit"] == 512


def test_inspect_fails_on_broken_data_and_still_prints_the_json(place, tmp_path):
    good = (place / "my_photos" / "1000.jpg").read_bytes()
    (tmp_path / "good.jpg").write_bytes(good)
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    rows = [{"file_name": f"{name}.jpg", "text": "a cat on a table"} for name in ("good", "cut", "none")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = lavender("data", "inspect", tmp_path, "--html", tmp_path / "new" / "page.html")
    assert ran.code == FAILED
    assert [row["what"] for row in json.loads(ran.out)["broken"]] == ["metadata.jsonl line 3", "metadata.jsonl line 2"]
    assert "2 rows or pictures are broken" in ran.err.splitlines()[-1]
    assert "metadata.jsonl line 2" in (tmp_path / "new" / "page.html").read_text()
    (tmp_path / "folder").mkdir()
    ran = lavender("data", "inspect", tmp_path, "--html", tmp_path / "folder")
    assert "folder" in complaint(ran, FAILED)
    assert json.loads(ran.out)["samples"] == 2  # what was found is not lost with the page


def test_overlap_finds_the_equal_and_the_resized_picture(ran, place):
    (command,) = (one for one in COMMANDS if " overlap " in one)
    docvqa, coco = json.loads(ran[command].out)["benchmarks"]
    assert [one["data"] for one in (docvqa, coco)] == ["benchmarks/docvqa", "benchmarks/coco/val.jsonl"]
    assert docvqa["found"]["same_picture"] == 1
    assert (coco["found"]["near_picture"], coco["found"]["same_text"]) == (1, 1)
    head, *rows = ran[command].err.splitlines()
    assert head.split()[:2] == ["benchmark", "samples"]
    assert [row.split()[0] for row in rows] == ["benchmarks/docvqa", "benchmarks/coco/val.jsonl"]
    assert {path.name for path in (place / "overlap").iterdir()} == {"overlap.json", "overlap.png", "overlap.html"}


def test_columns_of_other_names(place, tmp_path):
    picture = str((place / "my_photos" / "1000.jpg").absolute())
    row = {"pic": picture, "q": "What is on the table of this house?", "a": "a cat"}
    (tmp_path / "vqa.jsonl").write_text(json.dumps(row))
    columns = "image=pic,question=q,answer=a"
    ran = lavender("data", "inspect", tmp_path / "vqa.jsonl", "--columns", columns)
    assert json.loads(ran.out)["words"]["per_question"]["max"] == 8
    both = ["data", "overlap", tmp_path / "vqa.jsonl", tmp_path / "vqa.jsonl", "--columns", columns]
    ran = lavender(*both, "--benchmark-columns", columns)
    assert json.loads(ran.out)["benchmarks"][0]["found"]["picture_and_text"] == 1
    assert "--benchmark-columns 'pic'" in complaint(lavender(*both, "--benchmark-columns", "pic"), 2)
    assert complaint(lavender(*both), 1)


def test_overlap_names_what_it_could_not_read(place, tmp_path):
    (tmp_path / "cut.jpg").write_bytes((place / "my_photos" / "1000.jpg").read_bytes()[:300])
    (tmp_path / "good.jpg").write_bytes((place / "my_photos" / "1000.jpg").read_bytes())
    rows = [{"file_name": f"{name}.jpg", "text": "a cat on a table"} for name in ("good", "cut", "none")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = lavender("data", "overlap", place / "my_photos", tmp_path)
    assert ran.code == DONE
    (bench,) = json.loads(ran.out)["benchmarks"]
    assert [row["what"] for row in bench["dropped"]] == ["metadata.jsonl line 3", "metadata.jsonl line 2"]
    assert ran.err.splitlines()[0].startswith(f"  {tmp_path}: dropped metadata.jsonl line 3: no such file")


def test_the_page_names_the_thresholds_and_what_the_json_has(ran):
    thresholds = Thresholds()
    assert f"at most {thresholds.distance} of 256 bits" in PAGE
    assert f"at least {thresholds.similarity} of their word triples" in PAGE
    (facts, _) = (json.loads(ran[one].out) for one in COMMANDS if " inspect " in one)
    table = PAGE.partition("| in the JSON | what it is |")[2].partition("\n\n")[0]
    named = {name for cell in re.findall(r"^\| (.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", cell)}
    assert named == facts.keys() - {"data"}
    assert len(FIGURES) == 6


@pytest.mark.parametrize("package", ["py3langid", "imagehash", "datasketch"])
def test_a_missing_extra_is_named(package, monkeypatch, place):
    monkeypatch.setitem(sys.modules, package, None)
    action = ["inspect"] if package == "py3langid" else ["overlap", place / "my_photos"]
    message = complaint(lavender("data", *action, place / "my_photos"), 2)
    assert f"no package {package}" in message
    assert message.endswith("Do this: pip install 'lavender-vlm[data]'.")


def test_wrong_settings_and_data_that_are_not_there(place, tmp_path):
    assert "captions" in lavender("data", "prepare", "flickr30k", "--captions", "two").err
    run = ["data", "prepare", "flickr30k", "--source", place / "published" / "flickr30k", "--out", tmp_path]
    assert "test_share=1.0" in complaint(lavender(*run, "--test-share", 1), 2)
    assert "flickr30k with 6 pictures and 1 rows dropped" in complaint(lavender(*run, "--strict"), 1)
    assert not list(tmp_path.glob("*.jsonl"))
    assert "does not exist" in complaint(lavender("data", "inspect", tmp_path / "none"), 1)
    assert "--distance" in complaint(lavender("data", "overlap", tmp_path, tmp_path, "--distance", 200), 2)


@pytest.mark.parametrize("action", ["prepare", "inspect", "overlap"])
def test_every_action_has_help_that_fits_a_terminal(action, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ran = lavender("data", action, "--help")
    assert ran.code == DONE
    assert ran.out.startswith(f"usage: lavender data {action} ")
    assert max(map(len, ran.out.splitlines())) <= 80


def test_looking_for_the_action_loads_nothing_heavy():
    code = "import lavender.cli, sys\ntry: lavender.cli.main(['data', 'inspect', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not (found := {'torch', 'datasets', 'numpy', 'PIL'} & set(sys.modules)), found"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert extra("json") is json
