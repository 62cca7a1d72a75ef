"""Whether `lavender check` tells before training if alignment pays: each verdict on a real model, and its parts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lavender.cli import main
from lavender.data.about import Link, Place
from lavender.data.images import image_id
from lavender.data.samples import read_samples
from lavender.data.store import MapStore
from lavender.errors import DataError
from lavender.evaluation.check import _place_is_told, cases_of, check_model, estimate, groups_of
from lavender.evaluation.leave_out import FEATURES, VIEWS, Case, Measured, keys_that_show, measure
from lavender.evaluation.place_probe import read_words
from lavender.evaluation.promise import promise
from lavender.maps import Word, WordMaps, to_heat
from lavender.students.image_keys import KeyLayout
from lavender.students.loading import load_run
from lavender.students.word_maps import AnsweredPicture
from lavender.words import words_of
from lavender.world import STUDENT_PATHS
from lavender.world.language import write_scenes
from lavender.world.scenes import Scene, scenes
from lavender.world.student_models import CAPTION_PROMPT

GRID = (16, 16)
RENAMED = {"dog": "blick", "umbrella": "wug", "whale": "zav", "cake": "gorp"}
"""Names of things that a student knows → words that it has never heard."""


def mask_map(scene: Scene, name: str) -> torch.Tensor:
    return to_heat(
        torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(scene.mask_of(name)).float()[None], GRID)[0]
    )


def write_data(
    folder: Path,
    drawn: Sequence[Scene],
    renamed: Mapping[str, str] | None = None,
    map_of: Callable[[Sequence[Scene], int, str], torch.Tensor] | None = None,
) -> list[str]:
    """Scenes with captions "a dog and a cat", and a store with a map of each name; returns arguments of the command."""
    renamed = renamed or {}
    (folder / "data").mkdir()
    with (
        (folder / "data" / "metadata.jsonl").open("w") as lines,
        MapStore.writer(folder / "maps", {"made by": "tests"}, {}, GRID) as store,
    ):
        for index, scene in enumerate(drawn):
            text, words, maps = "", [], []
            for thing in scene.things:
                text += " and a " if text else "a "
                said = renamed.get(thing.name, thing.name)
                words.append(Word(said, len(text), len(text) + len(said), said, "noun"))
                maps.append(map_of(drawn, index, thing.name) if map_of else mask_map(scene, thing.name))
                text += said
            scene.image.save(folder / "data" / f"{scene.seed}.png")
            lines.write(json.dumps({"file_name": f"{scene.seed}.png", "text": text}) + "\n")
            store.add(WordMaps(image_id(scene.image), text, tuple(words), torch.stack(maps)))
    return ["--data", str(folder / "data"), "--maps", str(folder / "maps")]


def of_the_next_thing(drawn: Sequence[Scene], index: int, name: str) -> torch.Tensor:
    names = drawn[index].names
    return mask_map(drawn[index], names[(names.index(name) + 1) % len(names)])


def check(folder: Path, student: str, limit: int = 64) -> dict:
    return check_model(STUDENT_PATHS[student], folder / "data", folder / "maps", limit)


# the verdicts


def test_known_words_of_a_model_that_looks_already_gain_nothing(tmp_path):
    write_data(tmp_path, list(scenes("development", 24)))
    result = check(tmp_path, "mllama")
    known = result["groups"]["known"]
    assert (result["verdict"], result["hidden"]) == ("no gain", None)
    assert known["over_control"]["mean"] > 1
    assert known["cost_without"]["mean"] > 1
    assert known["gain"]["mean"] > 0.3  # which of the things is named next
    assert known["gain_of_place"]["mean"] < 0.2  # where the things are
    assert known["attention_mass"]["mean"] > known["attention_mass_control"]["mean"] + 0.05
    assert "Plain fine-tuning does as well" in result["reasons"]["known"]


def test_it_runs_with_numbers_of_16_bits(tmp_path, capsys):
    """As on a GPU by default. A logit of bfloat16 is rounded by up to 0.4 %, so a mean loss moves by less than 0.1."""
    data = write_data(tmp_path, list(scenes("development", 6)))
    exact, model = check(tmp_path, "mllama"), str(STUDENT_PATHS["mllama"])
    assert main(["check", model, *data, "--dtype", "bfloat16", "--device", "cpu", "--json"]) == 0
    rounded = json.loads(capsys.readouterr().out)
    assert (exact["device"], exact["dtype"]) == ("cpu", "float32")
    assert (rounded["device"], rounded["dtype"]) == ("cpu", "bfloat16")
    losses = [result["groups"]["all"]["loss"] for result in (rounded, exact)]
    assert losses[0] != losses[1]
    for view, loss in losses[1].items():
        assert losses[0][view]["mean"] == pytest.approx(loss["mean"], abs=0.1)


def test_a_model_that_keeps_its_evidence_elsewhere_gains_nothing(tmp_path):
    write_data(tmp_path, list(scenes("development", 24)))
    result = check(tmp_path, "llava")
    known = result["groups"]["known"]
    assert result["verdict"] == "no gain"
    assert known["cost_without"]["mean"] < 0.3
    assert known["gain"]["mean"] < 0
    assert result["hidden"]["part"] < 0.2 * result["hidden"]["all"]
    assert "all over the picture" in result["reasons"]["known"]


def test_new_words_that_the_tower_knows_pay(tmp_path, capsys):
    """The language side never heard four words; the vision tower knows what they name."""
    drawn = [scene for scene in scenes("development", 300) if set(scene.names) & set(RENAMED)][:40]
    arguments = write_data(tmp_path, drawn, RENAMED)
    assert main(["check", str(STUDENT_PATHS["mllama"]), *arguments]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    new = result["groups"]["new"]
    assert result["verdict"] == "pays"
    assert len(RENAMED) <= new["forms"] <= len(RENAMED) + 3  # a known word that is seen once may be hard too
    assert new["loss"]["there"]["mean"] > 5  # it cannot name them, wherever it looks
    assert new["read"]["there"]["mean"] > 0.7
    assert new["gain_of_reading"]["mean"] > 0.2
    assert result["groups"]["known"]["gain_of_place"]["mean"] < 0.25
    assert said.err.startswith("Known words: ")
    assert said.err.endswith("\nAlignment will pay.\n")
    assert "New words: a linear reader" in said.err


def test_maps_of_other_words_say_nothing(tmp_path):
    drawn = [scene for scene in scenes("development", 24) if len(scene.things) > 1][:12]
    write_data(tmp_path, drawn, map_of=of_the_next_thing)
    result = check(tmp_path, "mllama")
    assert result["verdict"] == "cannot say"
    assert "the maps say nothing" in result["reasons"]["known"]
    assert result["hidden"]["part"] > 0.3 * result["hidden"]["all"]


def test_uniform_maps_say_nothing(tmp_path):
    write_data(tmp_path, list(scenes("development", 10)), map_of=lambda *_: torch.ones(GRID))
    result = check(tmp_path, "mllama")
    assert result["verdict"] == "cannot say"
    assert result["groups"]["known"]["over_control"]["mean"] == pytest.approx(0, abs=1e-4)  # other batches' rounding


def test_few_samples_cannot_say(tmp_path, capsys):
    arguments = write_data(tmp_path, list(scenes("development", 4)))
    assert main(["check", str(STUDENT_PATHS["mllama"]), *arguments, "--limit", "3"]) == 0
    said = capsys.readouterr()
    assert '"samples": 3' in said.out
    assert said.err.startswith("Known words: ")  # and no line of what loads it
    assert said.err.endswith("\nThis check cannot say whether alignment will pay.\n")
    assert "in 3 pictures of 3 samples are too few" in said.err
    assert "(--limit 8)" in said.err


def test_a_model_that_sees_nothing_cannot_say(tmp_path, make_student, processor, monkeypatch):
    monkeypatch.setattr("lavender.evaluation.placement.load_run", lambda *args, **kwargs: (make_student(), processor))
    write_data(tmp_path, list(scenes("development", 10)))
    result = check(tmp_path, "mllama")
    assert result["groups"]["known"] is None  # random weights predict no word
    assert result["verdict"] == "cannot say"


# its parts


def test_keys_that_show_a_word():
    heat = torch.tensor([[1.0, 0.5], [0.3, 0]])
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0, 0, 1, 1], [0, 0, 0, 0]])
    layout = KeyLayout(boxes[None], torch.zeros(1, 5, dtype=torch.long))
    shown = keys_that_show(torch.stack([heat, torch.zeros(2, 2)])[None], layout)
    assert shown[0, 0].tolist() == [True, True, False, True, False]  # the whole has 0.45
    assert not shown[0, 1].any()


@torch.no_grad()
def test_the_loss_of_the_whole_picture_is_the_models_own():
    model, processor = load_run(STUDENT_PATHS["mllama"])
    scene = next(scene for scene in scenes("development", 40) if len(scene.things) == 1)
    text = f"a {scene.names[0]}"
    picture = AnsweredPicture(scene.image, CAPTION_PROMPT, text, words_of(text))
    case = Case(picture, 0, words_of(text)[1], mask_map(scene, scene.names[0]).expand(3, *GRID))
    measured = measure(model, processor, [case], Counter())
    assert measured is not None
    rendered = processor.apply_chat_template(picture.messages(), tokenize=False)
    inputs = processor(images=[[scene.image]], text=[rendered], add_special_tokens=False, return_tensors="pt")
    logits = model(**inputs).logits[0].log_softmax(-1)
    ids = processor.tokenizer(f" {case.word.text}", add_special_tokens=False)["input_ids"]
    sequence = inputs["input_ids"][0].tolist()
    start = next(at for at in range(len(sequence)) if sequence[at : at + len(ids)] == ids)
    expected = -sum(logits[start + step - 1, token] for step, token in enumerate(ids))
    torch.testing.assert_close(measured.losses["whole"], expected[None], rtol=1e-4, atol=1e-5)
    assert set(measured.losses) == {"whole", *VIEWS}
    torch.testing.assert_close(measured.losses["there"], measured.losses["control"])  # the same map
    assert measured.losses["elsewhere"] > measured.losses["there"] + 1
    assert not model.model.multi_modal_projector._forward_hooks


def test_cases_of_a_text_have_its_places_and_another_pictures(tmp_path):
    drawn = [scene for scene in scenes("development", 20) if len(scene.things) == 2][:2]
    write_data(tmp_path, drawn)
    samples, store = read_samples(tmp_path / "data").samples, MapStore.open(tmp_path / "maps")
    cases = cases_of(samples, store, "own", Counter())
    assert [case.index for case in cases] == [0, 0, 1, 1]
    first, second = (mask_map(drawn[0], name) for name in drawn[0].names)
    half = 2e-3  # maps are stored in half precision
    torch.testing.assert_close(cases[0].maps[0], first, rtol=0, atol=half)
    torch.testing.assert_close(cases[0].maps[1], torch.maximum(first, second), rtol=0, atol=half)
    others = [cases[2].maps[0], cases[3].maps[0]]
    assert any(torch.equal(cases[0].maps[2], other) for other in others)


def test_texts_of_one_picture_are_one_picture(tmp_path):
    """Else a reader is tested on pictures that it was fitted on, and a control is the picture's own map."""
    drawn = [scene for scene in scenes("development", 20) if len(scene.things) == 2][:2]
    write_data(tmp_path, drawn)
    once = read_samples(tmp_path / "data").samples
    cases = cases_of([sample for sample in once for _ in range(3)], MapStore.open(tmp_path / "maps"), "own", Counter())
    assert [case.index for case in cases] == [0] * 6 + [1] * 6
    own = [case.maps[0] for case in cases[:2]]
    assert not any(torch.equal(case.maps[2], one) for case in cases[:6] for one in own)
    with pytest.raises(DataError, match="in one picture alone"):
        cases_of([once[0]] * 3, MapStore.open(tmp_path / "maps"), "own", Counter())


def test_the_place_of_an_attribute_is_told_by_its_noun_before_it():
    red, dog = Word("red", 12, 15, "red", "adjective"), Word("dog", 2, 5, "dog", "noun")
    before = Link(Place(1, 12, 15), Place(1, 2, 5))
    asked = Link(Place(1, 12, 15), Place(0, 20, 23))
    after = Link(Place(1, 12, 15), Place(1, 20, 23))
    assert _place_is_told(red, [before], {})
    assert _place_is_told(red, [asked], {})
    assert not _place_is_told(red, [after], {})
    assert not _place_is_told(dog, [before], {})
    assert _place_is_told(red, [], {red: dog})
    assert not _place_is_told(dog, [], {red: dog, dog: None})


def test_pictures_are_the_units_of_an_estimate():
    """A hundred words of one picture count as much as one word of another."""
    values = torch.tensor([1.0] * 100 + [3.0])
    pictures = torch.tensor([0] * 100 + [1])
    figure = estimate(values, pictures)
    assert figure["mean"] == 2
    assert figure["margin"] == pytest.approx((1.96 + 2.5) * 2**0.5 / 2**0.5)
    assert estimate(values[:100], pictures[:100]) == {"mean": 1.0, "margin": None}


def test_a_reader_is_judged_on_pictures_that_it_has_not_seen():
    """Features that name the picture, not the word, read nothing."""
    rng = np.random.default_rng(0)
    words, pictures = rng.integers(0, 4, 80), np.arange(80) // 2
    of_word, of_picture = torch.eye(4)[words], torch.eye(40)[pictures]
    assert read_words(of_word, words.tolist(), pictures.tolist()).mean() == 1
    assert read_words(of_picture, words.tolist(), pictures.tolist()).mean() < 0.5


def test_a_reader_of_one_case_knows_its_word():
    assert read_words(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), [1, 1], [0, 1]).tolist() == [1, 1]
    assert read_words(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), [1, 0], [0, 1]).tolist() == [0, 0]


def measured_of(words: Sequence[tuple[str, str, int]]) -> Measured:
    """New words, each (text, part of speech, picture), whose places tell them, and whose pictures do not."""
    answered = AnsweredPicture(next(iter(scenes("development", 1))).image, CAPTION_PROMPT, "", ())
    cases = [
        Case(answered, picture, Word(text, 0, len(text), text, part), torch.ones(3, 1, 1))
        for text, part, picture in words
    ]
    forms = sorted({text for text, _, _ in words})
    there = torch.eye(len(forms))[[forms.index(text) for text, _, _ in words]]
    losses = {view: torch.full((len(words),), 9.0) for view in ("whole", *VIEWS)}
    features = {name: there if name == "there" else torch.ones_like(there) for name in FEATURES}
    return Measured(cases, losses, features, *(torch.ones(len(words)) for _ in range(3)))


def test_one_new_word_is_not_read():
    """A reader would be right by construction, wherever it looks."""
    groups = groups_of(measured_of([("wug", "noun", picture) for picture in range(40)]))
    new = groups["new"]
    assert new is not None
    assert (new["read"], new["gain_of_reading"], new["read_words"]) == (None, None, 0)
    assert new["alone"] == {"wug": 40}
    found = promise({"samples": 40, "groups": groups, "hidden": None})
    assert found.verdict == "cannot say"
    assert "nothing to tell wug from" in found.reasons["new"]


def test_words_without_another_of_their_kind_do_not_lower_the_gain_of_reading():
    """Here a verb alone, and an adjective beside one that a single picture has."""
    nouns = [(("blick", "wug")[picture % 2], "noun", picture) for picture in range(40)]
    others = [("zav", "verb", picture) for picture in range(30)]
    others += [("gorp", "adjective", picture) for picture in range(20)] + [("fep", "adjective", 20)]
    plain, mixed = (groups_of(measured_of(words))["new"] for words in (nouns, nouns + others))
    assert plain is not None
    assert mixed is not None
    assert plain["gain_of_reading"]["mean"] >= 0.5
    for key in ("read", "gain_of_reading", "read_words", "read_forms", "read_pictures"):
        assert mixed[key] == plain[key]
    assert (plain["alone"], mixed["alone"]) == ({}, {"zav": 30})


def test_maps_of_other_data_are_refused(tmp_path, store_path):
    write_scenes(tmp_path, list(scenes("finetune", 2)))
    with pytest.raises(DataError, match="Got no word with a map"):
        check_model(STUDENT_PATHS["mllama"], tmp_path, store_path)


def test_a_single_picture_is_refused(tmp_path):
    write_data(tmp_path, list(scenes("development", 2)))
    with pytest.raises(DataError, match="mapped words in one picture alone.*two pictures"):
        check(tmp_path, "mllama", limit=1)
