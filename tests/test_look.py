"""`lavender look` on a photograph: with students, with the teacher, with what training leaves, and on a map store.

The built-in models have never seen a photograph: what is looked at is that the page shows what the models compute.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from command_line import Ran, complaint, lavender, write_scenes
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.evaluation.look.page import percent
from lavender.maps import to_heat
from lavender.students.word_maps import AnsweredPicture, student_maps
from lavender.teachers.diffusion.teacher import Teacher
from lavender.words import content_words
from lavender.world import STUDENT_PATHS, TEACHER_PATH
from unit.evaluation.test_look_pages import data_of, tile_of

CAPTION = "A smiling astronaut in an orange suit with a flag."
WORDS = ["smiling", "astronaut", "orange", "suit", "flag"]
LLAVA, MLLAMA = STUDENT_PATHS["llava"], STUDENT_PATHS["mllama"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """scikit-image's astronaut, 512 × 512 pixels, cut to 400 × 512 (height, width)."""
    from skimage.data import astronaut

    path = tmp_path_factory.mktemp("photo") / "astronaut.png"
    Image.fromarray(astronaut()[:400]).save(path)
    return path


def look(*arguments: object, out: Path) -> tuple[Ran, str]:
    """The verb's output, and its page."""
    ran = lavender("look", *arguments, "--out", out)
    assert ran.code == DONE, ran
    html = out.read_text()
    assert len(html.encode()) < 10_000_000
    return ran, html


@pytest.mark.parametrize("path", [LLAVA, MLLAMA], ids=["llava", "mllama"])
def test_a_student_on_a_photograph(path, photo, tmp_path):
    """The page's means are the maps of `student_maps`, in 255 steps of their maximum."""
    ran, html = look(path, photo, CAPTION, "--png", tmp_path / "look.png", out=tmp_path / "look.html")
    assert re.findall(r'class="word" data-word="\d"[^>]*>(\w+)', html) == WORDS
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(path)
    reading = AnsweredPicture(
        Image.open(photo), "Describe the image.", CAPTION, content_words(CAPTION, ("noun", "adjective", "verb"))
    )
    (expected,) = student_maps(model, processor, [reading])
    data = data_of(html)
    assert [word["word"] for word in data["words"]] == WORDS == [word.text for word in expected.words]
    for word, heat in zip(data["words"], expected.maps, strict=True):
        torch.testing.assert_close(tile_of(word["summary"], 0), heat.double(), atol=1 / 255, rtol=0)
    level = percent(data["words"][1]["on_picture"][0])
    assert (level == "100 %") == (path == MLLAMA)
    assert re.search(rf"^  astronaut: attention on the picture {level}", ran.out, re.M)
    assert f"page: {tmp_path / 'look.html'}, picture: {tmp_path / 'look.png'}" in ran.out
    with Image.open(tmp_path / "look.png") as drawn:
        assert drawn.height > 5 * 100  # a row per word


def test_the_teacher_on_a_photograph(photo, tmp_path):
    """The page's maps are those of `Teacher.maps`; it says that this teacher knows no photographs."""
    ran, html = look("world", photo, CAPTION, out=tmp_path / "look.html")
    maps = Teacher.from_pretrained(TEACHER_PATH).maps(photo, CAPTION)
    data = data_of(html)
    assert [word["word"] for word in data["words"]] == WORDS
    for word, heat in zip(data["words"], maps.maps, strict=True):
        torch.testing.assert_close(tile_of(word["summary"], 0), heat.double(), atol=2 / 255, rtol=0)
    assert "trained on drawings over textures only" in html
    assert 'id="layer"' not in html
    assert ran.out.startswith(f"caption: {CAPTION}\n")
    _, by_folder = look(TEACHER_PATH, photo, CAPTION, out=tmp_path / "folder.html")
    assert data_of(by_folder) == data


def test_a_question_is_answered_by_the_model_or_by_the_user(photo, tmp_path):
    ran, html = look(LLAVA, photo, "Which animal is in the picture?", out=tmp_path / "1.html")
    (answer,) = re.findall(r"^answer \(generated\): (.+)$", ran.out, re.M)
    assert "The model answered greedily." in html
    words = data_of(html)["words"]
    assert {"animal", "picture"} <= {word["word"] for word in words}
    assert words[0]["word"] in answer
    ran, html = look(LLAVA, photo, "Name the animal.", "--answer", "a dog", out=tmp_path / "2.html")
    assert "question: Name the animal.\nanswer: a dog\n" in ran.out
    assert [word["word"] for word in data_of(html)["words"]] == ["dog", "Name", "animal"]
    ran, _ = look(LLAVA, photo, "Name the animal.", "--generate", out=tmp_path / "3.html")
    assert "question: Name the animal.\nanswer (generated): " in ran.out


def test_faithfulness_is_a_section_of_the_page(photo, tmp_path):
    ran, html = look(MLLAMA, photo, "a dog", "--faithfulness", "--steps", "2", out=tmp_path / "look.html")
    assert "hidden in 2 steps" in html
    assert html.count("<polyline") == 2 * 2 * 2  # answer and word, deletion and insertion, map and control
    assert re.findall(r"faithfulness of (.+): deletion \w+ (?:the|all) 3", ran.out) == ["the whole answer", "dog"]


def test_a_runs_lora_is_looked_at(photo, tmp_path):
    """A run folder whose checkpoint is an adapter: its maps are those of the tuned model, not of the base."""
    base = AutoModelForImageTextToText.from_pretrained(LLAVA, dtype=torch.float32)
    settings = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|k_proj)", init_lora_weights=False)
    tuned = get_peft_model(copy.deepcopy(base), settings)
    tuned.peft_config["default"].base_model_name_or_path = str(LLAVA)
    tuned.save_pretrained(tmp_path / "run" / "checkpoint")
    processor = AutoProcessor.from_pretrained(LLAVA)
    processor.save_pretrained(tmp_path / "run" / "checkpoint")
    _, html = look(tmp_path / "run", photo, "a dog", out=tmp_path / "look.html")
    reading = AnsweredPicture(Image.open(photo), "Describe the image.", "a dog", content_words("a dog", ("noun",)))
    shown = tile_of(data_of(html)["words"][0]["summary"], 0)
    merged: Any = tuned.merge_and_unload()
    (own,), (plain,) = (student_maps(one, processor, [reading]) for one in (merged, base))
    torch.testing.assert_close(shown, to_heat(own.maps[0]).double(), atol=1 / 255, rtol=0)
    assert (shown - to_heat(plain.maps[0])).abs().max() > 0.05


def test_a_picture_is_a_png_whatever_its_name_and_folders_are_made(photo, tmp_path):
    picture = tmp_path / "new folder" / "look.figure"
    look("world", photo, "a dog", "--png", picture, out=tmp_path / "new" / "look.html")
    assert picture.read_bytes().startswith(b"\x89PNG")
    ran = lavender("look", "world", photo, "a dog", "--out", tmp_path)
    assert f"Got {tmp_path}: Is a directory" in complaint(ran, FAILED)
    assert ran.out == "", "the path is tried before the work"


def test_a_gallery_of_a_map_store(store_path, some_scenes, captions, tmp_path):
    data = write_scenes(tmp_path, some_scenes, captions)
    ran, html = look(store_path, "--data", data, "--png", tmp_path / "look.png", out=tmp_path / "look.html")
    assert "5 of 5 texts are shown: spread evenly over the store." in ran.out
    assert html.count("data-record=") == 5
    nouns = [word.text for caption in captions[:5] for word in content_words(caption, ("noun",))]
    assert sorted(re.findall(r'data-word="\S+ \S+"><span class="name">([^<]+)', html)) == sorted(nouns)
    assert (tmp_path / "look.png").is_file()
    ran, html = look(store_path, "--data", data, "--worst", "--limit", 2, "--word", nouns[0], out=tmp_path / "2.html")
    assert 1 <= html.count("data-record=") <= 2
    assert f"with the word “{nouns[0]}”" in ran.out
    assert "a text has the place of this word." in ran.out
    assert f'><span class="name">{nouns[0]}' in html


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("MODEL",), WRONG_USAGE, "which is a vision-language model, without a photo"),
        (("MODEL", "PHOTO"), WRONG_USAGE, "without a text"),
        (("MODEL", "PHOTO", "a dog", "--data", "x"), WRONG_USAGE, "--data with"),
        (("MODEL", "PHOTO", "a dog", "--worst"), WRONG_USAGE, "Expected --worst with a map store"),
        (("MODEL", "PHOTO", "a dog", "--steps", "3"), WRONG_USAGE, "--steps without --faithfulness"),
        (("MODEL", "PHOTO", "a dog", "--generate", "--answer", "x"), WRONG_USAGE, "--generate with --answer"),
        (("MODEL", "PHOTO", "a dog", "--words", "nuon"), WRONG_USAGE, "Got --words 'nuon'"),
        (("MODEL", "--words", "noun", "PHOTO", "a dog"), WRONG_USAGE, "put TARGET, PHOTO and TEXT before --words"),
        (("MODEL", "PHOTO", "a dog", "--device", "warp"), WRONG_USAGE, "'warp'"),
        (("MODEL", "/no/photo.jpg", "a dog"), FAILED, "Got the picture /no/photo.jpg, which does not exist."),
        (("world", "/no/photo.jpg", "a dog"), FAILED, "Got the picture /no/photo.jpg, which does not exist."),
        (("MODEL", "TORN", "a dog"), FAILED, "/torn.png, 5 bytes that are no picture of a known format"),
        (("world", "TORN", "a dog"), FAILED, "/torn.png, 5 bytes that are no picture of a known format"),
        (("MODEL", "PHOTO", "of the"), FAILED, "of which no word has a map (it has no word of these parts"),
        (("world", "PHOTO", "of the"), FAILED, "the caption 'of the', of which no word has a map (it has no word of"),
        (("MODEL", "PHOTO", "一只猫"), FAILED, "it has no word in Latin letters). Expected an English text"),
        (("world", "PHOTO", "一只猫"), FAILED, "it has no word in Latin letters). Expected an English text"),
        (("world", "PHOTO", "a dog", "--png", "."), FAILED, "Got .: Is a directory"),
        (("world", "PHOTO", "a dog", "--png", "OUT"), WRONG_USAGE, "look.html for --out and for --png"),
        (("mapz", "--data", "x"), WRONG_USAGE, "--data with mapz, which is no folder here, so it is taken as the hub"),
        (("world", "PHOTO", "a dog", "--faithfulness"), WRONG_USAGE, "with world, which is a diffusion teacher"),
        (("world", "PHOTO", "a dog", "--trust-remote-code"), WRONG_USAGE, "--trust-remote-code with world"),
        (("STORE",), WRONG_USAGE, "which is a map store, without --data"),
        (("STORE", "PHOTO", "--data", "x"), WRONG_USAGE, "a photo with"),
        (("STORE", "--data", "/no/data"), FAILED, "/no/data, which does not exist"),
        (("/no/folder", "PHOTO", "a dog"), FAILED, "/no/folder, which cannot be loaded: there is no such folder"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, code, named, photo, store_path, tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"a cat")
    meant = {"MODEL": LLAVA, "PHOTO": photo, "TORN": torn, "STORE": store_path, "OUT": tmp_path / "look.html"}
    ran = lavender("look", *(meant.get(one, one) for one in arguments), "--out", tmp_path / "look.html")
    assert named in complaint(ran, code)
    assert not (tmp_path / "look.html").exists()
