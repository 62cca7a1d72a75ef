"""Studies without a model: comparisons, control maps, keys of cells, pages of made-up scores.

Control maps are 11 × 13 cells of pictures of 22 × 39 pixels, so that a cell has 2 × 3 pixels.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavender.alignment.pooling import POOLINGS
from lavender.data.images import image_id
from lavender.data.store import MapStore
from lavender.errors import ConfigError
from lavender.maps import Word, WordMaps
from lavender.words import words_of
from lavender.world.demo import NUM_HELD_OUT as NUM_HELD_OUT_OF_DEMO
from lavender.world.demo import run_demo
from lavender.world.language import Mention, caption_scene
from lavender.world.scenes import SPLITS, Scene, Thing
from lavender.world.student_models import CAPTION_PROMPT
from lavender.world.studies import cells
from lavender.world.studies.cells import SCENES_PER_SEED, Arm, Cell, Scoring, base_path, result_path
from lavender.world.studies.over_time import row_of
from lavender.world.studies.page import QUICK, page, show
from lavender.world.studies.registry import STUDIES, Scale, run_study
from lavender.world.studies.scaling import SIZES
from lavender.world.studies.study import METRICS, compare
from lavender.world.studies.targets import OTHER_MASK, TARGETS, Target, write_target
from lavender.world.studies.tasks import TASKS, Example, Unconnected
from lavender.world.tuning import ALIGNMENT, LEARNING_RATES

GRID, SIZE = (11, 13), (22, 39)
TOLERANCE = 1.01 / 255  # a stored map has 255 steps up to its maximum


@pytest.fixture(autouse=True)
def base_weights(tmp_path_factory, monkeypatch) -> dict[str, Path]:
    """Stand-ins for the students' weights, which the key of a cell depends on."""
    paths = {student: tmp_path_factory.mktemp(student) for student in ("mllama", "llava")}
    for student, path in paths.items():
        (path / "model.safetensors").write_text(student)
    monkeypatch.setattr(cells, "STUDENT_PATHS", paths)
    return paths


# comparisons


@pytest.mark.parametrize(
    ("values", "baseline", "outcome", "differences"),
    [
        ([0.5, 0.75, 0.625], [0.25, 0.375, 0.375], "above", (0.291667, 0.25, 0.375)),
        ([0.5, 1.0], [0.25, 0.5], "higher on average", (0.375, 0.25, 0.5)),  # the ranges touch
        ([0.75, 0.25], [0.5, 0.125], "higher on average", (0.1875, 0.125, 0.25)),
        ([0.75, 0.25], [0.5, 0.25], "no clear difference", (0.125, 0.0, 0.25)),
        ([0.75, 0.25], [0.5, 0.375], "no clear difference", (0.0625, -0.125, 0.25)),
        ([0.5, 0.125], [0.75, 0.25], "lower on average", (-0.1875, -0.25, -0.125)),
        ([0.25, 0.5], [0.5, 1.0], "lower on average", (-0.375, -0.5, -0.25)),
        ([0.25, 0.375], [0.5, 0.75], "below", (-0.3125, -0.375, -0.25)),
        ([1.0], [0.0], "higher on average", (1.0, 1.0, 1.0)),
        ([0.0], [1.0], "lower on average", (-1.0, -1.0, -1.0)),
        ([0.5], [0.5], "no clear difference", (0.0, 0.0, 0.0)),
    ],
)
def test_each_outcome_by_hand(values, baseline, outcome, differences):
    scores = {"arm": {"pointing": values}, "baseline": {"pointing": baseline}}
    finding = compare(scores, "pointing", "arm", "baseline")
    assert finding.what == "arm against baseline, pointing accuracy of attention"
    assert finding.outcome == outcome
    assert (finding.mean, finding.low, finding.high) == pytest.approx(differences, abs=1e-6)


def test_a_finding_as_text():
    scores = {"arm": {"entropy": [0.5, 0.25]}, "baseline": {"entropy": [1.0, 2.0]}}
    finding = compare(scores, "entropy", "arm", "baseline")
    assert str(finding) == "arm against baseline, entropy of attention, nats: below (-1.125, from -1.750 to -0.500)"
    assert show([0.25, 0.75]) == "0.500 (0.250–0.750)"
    assert show([0.25]) == "0.250"


# control maps


def drawn(seed: int, *names: str) -> Scene:
    """A picture of noise; the n-th thing's mask is a cell, half of the next cell, and two pixels of the cell below."""
    things = []
    for index, name in enumerate(names):
        mask = np.zeros(SIZE, dtype=bool)
        mask[4 * index : 4 * index + 2, 6:9] = mask[4 * index, 9:12] = mask[4 * index + 2, 6:8] = True
        things.append(Thing(name, (4 * index, 6, 4 * index + 4, 12), False, mask))
    pixels = np.random.default_rng(seed).integers(256, size=(*SIZE, 3), dtype=np.uint8)
    return Scene(seed, "plain", pixels, tuple(things))


def captioned(scene: Scene) -> Example:
    caption = caption_scene(scene)
    return Example(scene, CAPTION_PROMPT, caption.text, caption.text, caption.mentions)


# a scene of one thing; one with a name of two words; one without a map; one of three things
DRAWN = (drawn(7, "dog"), drawn(3, "ice cream", "cat"), drawn(19, "tree"), drawn(41, "cow", "red apple", "bus"))
EXAMPLES = tuple(captioned(scene) for scene in DRAWN)


def key_of(scene: Scene) -> tuple[str, str]:
    return image_id(scene.image), caption_scene(scene).text


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> MapStore:
    """Each word of each caption, articles included, has a map of another cell; the tree's picture has no map."""
    path, count = tmp_path_factory.mktemp("targets") / "maps", 0
    with MapStore.writer(path, {"made by": "tests"}, {}, GRID) as writer:
        for scene in DRAWN:
            words = words_of(caption_scene(scene).text) if scene.names != ("tree",) else ()
            cells = torch.eye(math.prod(GRID))[count : count + len(words)]
            writer.add(WordMaps(*key_of(scene), words, cells.view(-1, *GRID)))
            count += len(words)
    return MapStore.open(path)


def maps_of(store: MapStore, scene: Scene) -> dict[Word, torch.Tensor]:
    word_maps = store.get(*key_of(scene))
    assert word_maps is not None
    return dict(zip(word_maps.words, word_maps.maps, strict=True))


def thing_map(store: MapStore, scene: Scene, name: str) -> torch.Tensor:
    """The mean of the maps of a name's words, found by their text."""
    return torch.stack([heat for word, heat in maps_of(store, scene).items() if word.text in name.split()]).mean(0)


def order_of(scene: Scene) -> list[str]:
    return [mention.name for mention in caption_scene(scene).mentions]


@pytest.fixture
def targets(store, tmp_path) -> dict[str, MapStore]:
    return {target: MapStore.open(write_target(tmp_path / target, target, store, EXAMPLES)) for target in TARGETS}


def test_every_target_has_the_words_that_name_things(targets):
    named = [scene for scene in DRAWN if scene.names != ("tree",)]
    expected = [(key_of(scene), " ".join(order_of(scene)).split()) for scene in named]
    assert [len(words) for _, words in expected] == [1, 3, 4]
    for target, target_store in targets.items():
        assert target_store.identity == {"made by": "tests", "target": target}
        assert target_store.grid == GRID
        records = [((maps.image_id, maps.text), [word.text for word in maps.words]) for maps in target_store]
        assert records == expected, target


def test_the_mask_of_another_thing_is_in_the_same_picture(store, targets, tmp_path):
    """Also of a question, which names one thing; a picture of one thing gets a map of another picture."""
    others = MapStore.open(write_target(tmp_path / OTHER_MASK, OTHER_MASK, store, EXAMPLES))
    several = DRAWN[3]
    for name, other in zip(several.names, (*several.names[1:], several.names[0]), strict=True):
        found, masks = (thing_map(one, several, which) for one, which in ((others, name), (targets["masks"], other)))
        torch.testing.assert_close(found, masks, rtol=0, atol=TOLERANCE)
    alone = thing_map(others, DRAWN[0], "dog")
    torch.testing.assert_close(alone, thing_map(targets["wrong-image"], DRAWN[0], "dog"), rtol=0, atol=TOLERANCE)


def test_maps_of_the_teacher_stay_as_they_are(store, targets):
    for scene in (DRAWN[0], DRAWN[1], DRAWN[3]):
        teacher_maps = maps_of(store, scene)
        assert all(torch.equal(teacher_maps[word], heat) for word, heat in maps_of(targets["teacher"], scene).items())


def test_a_wrong_word_is_another_thing_of_the_picture(store, targets):
    for scene in (DRAWN[1], DRAWN[3]):
        order = order_of(scene)
        for word, heat in maps_of(targets["wrong-word"], scene).items():
            (name,) = [name for name in order if word.text in name.split()]
            other = order[(order.index(name) + 1) % len(order)]
            torch.testing.assert_close(heat, thing_map(store, scene, other), atol=TOLERANCE, rtol=0)
    # with no other thing in the picture, it is of the next picture
    (alone,) = maps_of(targets["wrong-word"], DRAWN[0]).values()
    torch.testing.assert_close(alone, thing_map(store, DRAWN[1], order_of(DRAWN[1])[0]), atol=TOLERANCE, rtol=0)


def test_a_wrong_image_is_the_next_one_with_words(store, targets):
    for scene, following in ((DRAWN[0], DRAWN[1]), (DRAWN[1], DRAWN[3]), (DRAWN[3], DRAWN[0])):
        other = thing_map(store, following, order_of(following)[0])
        for heat in maps_of(targets["wrong-image"], scene).values():
            torch.testing.assert_close(heat, other, atol=TOLERANCE, rtol=0)


def test_a_question_and_its_answer_have_a_map_each(tmp_path):
    """A wrong word's map is of another picture, as each of the texts names one thing."""
    scenes = (DRAWN[3], DRAWN[1])
    examples = []
    for scene, (asked, answer) in zip(scenes, (("cow", "bus"), ("ice cream", "cat")), strict=True):
        prompt, named = f"the {asked} is left of", f"the {answer}"
        mentions = [Mention(name, 4, 4 + len(name), 0) for name in (asked, answer)]
        examples.append(Example(scene, prompt, named, prompt, (mentions[0],), (), (mentions[1],)))
    texts = [(image_id(example.scene.image), text) for example in examples for text, _ in example.texts]
    cells = torch.eye(math.prod(GRID)).view(-1, *GRID)
    with MapStore.writer(tmp_path / "maps", {"made by": "tests"}, {}, GRID) as writer:
        for index, (image, text) in enumerate(texts):
            words = words_of(text)
            writer.add(WordMaps(image, text, words, cells[9 * index : 9 * index + len(words)]))
    store = MapStore.open(tmp_path / "maps")
    written: dict[Target, list[list[int]]] = {}
    kinds: tuple[Target, ...] = ("teacher", "wrong-word", "masks")
    for target in kinds:
        records = list(MapStore.open(write_target(tmp_path / target, target, store, examples)))
        assert [(record.image_id, record.text) for record in records] == texts
        named = [" ".join(word.text for word in record.words) for record in records]
        assert named == ["cow", "bus", "ice cream", "cat"]
        written[target] = [[int(heat.argmax()) for heat in record.maps] for record in records]
    assert written["teacher"] == [[1], [10], [19, 20], [28]]
    assert written["wrong-word"] == [[19], [19], [1, 1], [1]]  # "ice cream": the mean of two maps; "cow"
    assert written["masks"] == [[2], [4 * 13 + 2], [2, 2], [2 * 13 + 2]]  # the n-th thing is in the 2n-th row of cells


def test_uniform_maps_and_the_blob(targets):
    assert all(torch.equal(maps.maps, torch.ones(len(maps.words), *GRID)) for maps in targets["uniform"])
    for maps in targets["centre"]:
        for heat in maps.maps:
            assert heat.argmax().item() == 5 * 13 + 6
            assert torch.equal(heat, heat.flip(0))
            assert torch.equal(heat, heat.flip(1))
            # one cell from the centre; and the corner, 5 of 11 and 6 of 13 cells from it; the width is 0.2
            expected = [math.exp(-((1 / 11) ** 2) / 0.08), math.exp(-((5 / 11) ** 2 + (6 / 13) ** 2) / 0.08)]
            assert [heat[4, 6].item(), heat[0, 0].item()] == pytest.approx(expected, abs=TOLERANCE)


def test_masks_are_averaged_over_cells(targets):
    for scene in (DRAWN[0], DRAWN[1], DRAWN[3]):
        for word, heat in maps_of(targets["masks"], scene).items():
            (index,) = [index for index, name in enumerate(scene.names) if word.text in name.split()]
            expected = torch.zeros(GRID)
            # 6, 3 and 2 of a cell's 6 pixels
            expected[2 * index, 2], expected[2 * index, 3], expected[2 * index + 1, 2] = 1, 1 / 2, 1 / 3
            torch.testing.assert_close(heat, expected, atol=TOLERANCE, rtol=0)


def test_the_masks_of_all_things_are_one_map(targets):
    """The same for every word: a cell that is 6 of 6 pixels, 3 of 6 and 2 of 6, for each of the things."""
    for scene in (DRAWN[0], DRAWN[1], DRAWN[3]):
        expected = torch.zeros(GRID)
        for index in range(len(scene.things)):
            expected[2 * index, 2], expected[2 * index, 3], expected[2 * index + 1, 2] = 1, 1 / 2, 1 / 3
        for heat in maps_of(targets["things"], scene).values():
            torch.testing.assert_close(heat, expected, atol=TOLERANCE, rtol=0)


def test_an_existing_target_is_kept(store, tmp_path):
    (tmp_path / "masks").mkdir()
    assert write_target(tmp_path / "masks", "masks", store, EXAMPLES) == tmp_path / "masks"
    assert list(tmp_path.rglob("*")) == [tmp_path / "masks"]


def test_a_partial_target_of_a_killed_run_is_replaced(store, tmp_path):
    partial = tmp_path / "masks.partial"
    with MapStore.writer(partial, {"made by": "someone else"}, {}, (5, 7)) as writer:
        writer.add(WordMaps("another", "a dog", words_of("a dog"), torch.ones(2, 5, 7)))
    target_store = MapStore.open(write_target(tmp_path / "masks", "masks", store, EXAMPLES), verify=True)
    assert target_store.grid == GRID
    assert [len(maps.words) for maps in target_store] == [1, 3, 4]
    assert not partial.exists()


def test_scenes_that_are_not_in_the_store(store, tmp_path):
    with pytest.raises(ValueError, match=r"Got no maps of scene 5; expected a store of these samples' texts\."):
        write_target(tmp_path / "masks", "masks", store, [captioned(drawn(5, "dog"))])
    assert not (tmp_path / "masks").exists()


# cells

CELL = Cell(Arm("mllama", "full", "teacher", 97, 31, (("pooling", "learn"),)), 3, Scoring("development", 5, 7))


def test_a_base_has_one_key_whatever_the_seed():
    base = Cell(Arm("mllama", "none"), 3, CELL.scoring)
    assert replace(base, seed=4).key == base.key
    assert replace(base, arm=Arm("llava", "none")).key != base.key
    assert replace(base, scoring=Scoring("development", 6, 7)).key != base.key


def test_the_teacher_is_another_one_with_other_weights(monkeypatch):
    cell = replace(CELL, arm=Arm("teacher", "none"))
    before = cell.key
    monkeypatch.setattr(cells, "_teacher_digest", lambda: "other")
    assert cell.key != before


def test_any_other_field_changes_the_key():
    arm, scoring = CELL.arm, CELL.scoring
    others = [
        replace(CELL, seed=4),
        replace(CELL, arm=replace(arm, student="llava")),
        replace(CELL, arm=replace(arm, tuning="lora")),
        replace(CELL, arm=replace(arm, target="masks")),
        replace(CELL, arm=replace(arm, target=None)),
        replace(CELL, arm=replace(arm, num_scenes=98)),
        replace(CELL, arm=replace(arm, steps=32)),
        replace(CELL, arm=replace(arm, settings=())),
        replace(CELL, arm=replace(arm, settings=(("pooling", "layer-mean"),))),
        replace(CELL, scoring=replace(scoring, split="sealed")),
        replace(CELL, scoring=replace(scoring, start=6)),
        replace(CELL, scoring=replace(scoring, count=8)),
    ]
    assert len({CELL.key, *(cell.key for cell in others)}) == 1 + len(others)
    assert replace(CELL, arm=replace(arm)).key == CELL.key


def test_another_seed_of_new_weights_is_another_base(tmp_path, monkeypatch):
    arm = STUDIES["attributes"].arms(False)["binding-connecting plain 3200"]
    cell, task = Cell(arm, 3, CELL.scoring), TASKS["binding-connecting"]
    before = cell.key, base_path(tmp_path, arm)
    assert before[1].name.startswith("mllama-unconnected-")
    monkeypatch.setitem(TASKS, "binding-connecting", replace(task, warm_up=Unconnected(seed=1)))
    assert cell.key != before[0]
    assert base_path(tmp_path, arm) != before[1]


def test_other_weights_and_other_settings_of_all_arms_change_the_key(base_weights, monkeypatch):
    base, before = Cell(Arm("mllama", "none"), 3, CELL.scoring), CELL.key
    untrained = base.key
    monkeypatch.setitem(ALIGNMENT, "align_weight", 0.1234)
    assert len({before, CELL.key}) == 2
    assert base.key == untrained
    before = CELL.key
    (base_weights["mllama"] / "model.safetensors").write_text("trained anew")
    assert len({before, CELL.key}) == len({untrained, base.key}) == 2


@pytest.mark.parametrize("quick", [True, False])
def test_equal_arms_of_two_studies_share_their_key(quick):
    size = 200 if quick else 800
    same = {
        "plain": [
            ("main", "mllama full plain"),
            ("teacher-controls", "plain"),
            ("pooling", "plain"),
            ("entropy", "mllama plain"),
            ("scaling", f"plain {size}"),
        ],
        "aligned": [
            ("main", "mllama full published"),
            ("entropy", "mllama aligned"),
            ("scaling", f"aligned {size}"),
        ],
        "recipe": [("main", "mllama full recipe"), ("teacher-controls", "teacher")],
    }
    keys = {}
    for name, arms in same.items():
        same_arms = [STUDIES[study].arms(quick)[arm] for study, arm in arms]
        keys[name] = {
            Cell(replace(arm, num_scenes=min(size, arm.num_scenes)), 2, CELL.scoring).key for arm in same_arms
        }
        assert len(keys[name]) == 1
    assert len(set.union(*keys.values())) == len(same)
    words = [STUDIES[study].arms(quick) for study in ("new-words", "recipe")]
    assert [words[0]["plain 100"], words[0]["recipe 100"]] == [words[1]["plain"], words[1]["recipe"]]


def test_a_student_that_is_scored_once_keeps_the_key_of_before():
    """Results that exist are found again: the key is of the same facts as before there were several scorings."""
    facts = asdict(CELL)
    del facts["arm"]["scorings"], facts["arm"]["settings"]
    facts |= {"training": CELL.arm.training(3), "teacher": cells._teacher_digest()}
    facts |= {"weights": cells._digest(cells.STUDENT_PATHS["mllama"] / "model.safetensors"), "warm_up": "None"}
    assert CELL.key == hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    assert "save_steps" not in facts["training"]


def test_a_student_that_is_scored_several_times():
    arm = replace(CELL.arm, scorings=4)
    assert arm.scored_steps == (7, 14, 21, 31)
    assert replace(CELL, arm=arm).key != CELL.key
    added = {key: value for key, value in arm.training(3).items() if CELL.arm.training(3).get(key) != value}
    assert added == {"save_strategy": "steps", "save_steps": 7, "save_only_model": True, "logging_steps": 7}
    assert CELL.arm.scored_steps == (31,)


def test_settings_of_an_arm():
    plain, aligned = Arm("mllama", "lora").training(7), Arm("mllama", "lora", "uniform", steps=31).training(7)
    assert (plain["align_weight"], plain["max_steps"], plain["seed"]) == (0.0, 200, 7)
    assert plain["learning_rate"] == LEARNING_RATES["mllama", "lora"]
    assert {key: aligned[key] for key in plain if aligned[key] != plain[key]} == {
        "align_weight": ALIGNMENT["align_weight"],
        "max_steps": 31,
    }
    changed = Arm("mllama", "lora", "uniform", settings=(("match", "label"), ("align_weight", 0.5))).training(7)
    assert (changed["match"], changed["align_weight"]) == ("label", 0.5)


# whole studies

ATTENTION = ("pointing", "wrong_word_pointing", "entropy", "mask_kl")


def rows_of(arms: dict[str, Arm]) -> list[tuple[str, Arm]]:
    """The rows of scores, one per arm, or one per step that an arm is scored after."""
    return [
        (row, arm)
        for name, arm in arms.items()
        for row in ([name] if arm.scorings == 1 else [row_of(name, step) for step in arm.scored_steps])
    ]


def made_up(arms: dict[str, Arm], count: int) -> dict[str, dict[str, list[float]]]:
    """Random scores with the names of `score_student`; the teacher has only those of attention."""
    rng, scores = np.random.default_rng(13), {}
    for name, arm in rows_of(arms):
        metrics = ATTENTION if arm.student == "teacher" else (*METRICS, "out_of_domain_exact_set")
        scores[name] = {metric: rng.random(count).tolist() for metric in metrics}
    return scores


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", list(STUDIES))
def test_every_study_is_judged_drawn_and_written(name, quick, tmp_path):
    study, seeds = STUDIES[name], [5] if quick else [2, 3, 5]
    arms = study.arms(quick)
    scores = made_up(arms, len(seeds))
    findings = study.judge(scores)
    assert len({finding.what for finding in findings}) == len(findings) > 1
    differing = {finding.outcome for finding in findings if finding.mean}  # signs of overfitting can be 0 in both arms
    assert not quick or differing <= {"higher on average", "lower on average"}
    results: dict[str, Any] = {
        "study": name,
        "command": f"lavender study {name}",
        "quick": quick,
        "seeds": seeds,
        "arms": scores,
        "controls": {"uniform_pointing": 0.125, "centre_pointing": 0.25},
        "verdict": [str(finding) for finding in findings],
        "check": {"arms": {}},
        "settings": {"scoring": {"split": "development", "start": 0, "count": 97}},
    }
    text = page(study, results)
    assert text.startswith(f"# {study.title}\n\n" + (f"{QUICK}\n" if quick else study.question))
    assert ("Quick version" in text) == quick
    assert all(f"\n- {line}\n" in text for line in results["verdict"])
    assert all(f"\n| {row} | " in text for row, _ in rows_of(arms))
    assert f"`lavender study {name}`. Seeds {', '.join(map(str, seeds))};" in text
    assert "Each score is over 97 development scenes." in text
    assert "uniform map 0.125, picture's centre 0.250." in text
    entropies = {arm: [np.random.default_rng(seed).uniform(4, 6, 29).tolist() for seed in seeds] for arm in scores}
    study.draw(results | {"entropies": entropies}, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert min(plot.size) > 200


def test_arms_of_the_controls_and_of_pooling():
    assert list(STUDIES["teacher-controls"].arms(False)) == ["plain", *TARGETS]
    in_paper = [pooling for pooling in POOLINGS if "-flow-" not in pooling]
    assert list(STUDIES["pooling"].arms(False)) == ["plain", *in_paper]


def test_arms_of_attributes():
    """Each task has plain fine-tuning and the recipe; the quick study has two tasks at one size."""
    study = STUDIES["attributes"]
    full, quick = study.arms(False), study.arms(True)
    assert list(full) == [
        *(f"questions plain {size}" for size in (400, 800, 1600, 3200)),
        *(f"questions recipe {size}" for size in (400, 1600)),
        "questions published 1600",
        *(f"questions recipe, {target} 1600" for target in ("masks", "other-mask", "wrong-word", "uniform")),
        *(f"binding {form} 1600" for form in ("plain", "recipe", "recipe, masks", "recipe, wrong-word")),
        *(f"places {form} 1600" for form in ("plain", "recipe", "recipe, masks", "recipe, wrong-word")),
        *(f"binding-connecting {form} 3200" for form in ("plain", "recipe", "recipe, masks", "recipe, wrong-word")),
        "binding-connecting recipe, uniform 3200",
    ]
    assert list(quick) == [
        f"{task} {form} 800" for task in ("questions", "binding") for form in ("plain", "recipe", "recipe, wrong-word")
    ]
    steps = {"questions": 600, "binding": 450, "places": 600, "binding-connecting": 1000}
    for arm in full.values():
        assert arm.steps == steps[arm.task]
        training = arm.training(3)
        assert training["learning_rate"] == 1e-3
        assert (training["align_weight"] == 0) == (arm.target is None)
        frozen = ("vision_tower",) if arm.task == "binding-connecting" else ("vision_tower", "connector")
        assert arm.freeze == frozen


def test_finished_cells_are_judged_without_a_run(tmp_path):
    """Existing results are read, and the study's folder is written from them."""
    scale = Scale.of(True, None, (3, 5))
    arms = {
        name: replace(arm, num_scenes=200, steps=60) for name, arm in STUDIES["teacher-controls"].arms(True).items()
    }
    scores = made_up(arms, 2)
    for name, arm in arms.items():
        for index, seed in enumerate((3, 5)):
            path = result_path(tmp_path, Cell(arm, seed, scale.scoring))
            path.parent.mkdir(exist_ok=True)
            cell_scores: dict[str, Any] = {metric: values[index] for metric, values in scores[name].items()}
            cell_scores |= {"entropies": [4.5, 5.5], "uniform_pointing": 0.125, "centre_pointing": 0.25}
            path.write_text(json.dumps({"scores": cell_scores, "curves": []}))
    results = run_study("teacher-controls", tmp_path, scale, 1, "lavender study teacher-controls --quick")
    folder = tmp_path / "teacher-controls"
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["arms"] == scores
    assert results["verdict"] == [str(finding) for finding in STUDIES["teacher-controls"].judge(scores)]
    assert results["controls"] == {"uniform_pointing": 0.125, "centre_pointing": 0.25}
    assert (results["quick"], results["seeds"]) == (True, [3, 5])
    assert (folder / "page.md").read_text() == page(STUDIES["teacher-controls"], results)
    assert (folder / "plot.png").stat().st_size > 1000


# scale


def test_the_quick_version_never_touches_sealed_scenes():
    for seeds in (None, (7,)):
        scale = Scale.of(True, None, seeds)
        assert scale.scoring == Scoring("development", 0, 100)
        assert scale.quick
    assert Scale.of(True, None, (7, 11)).seeds == (7, 11)
    assert Scale.of(True, None, None).seeds is None


def test_the_full_version_uses_sealed_scenes_that_the_demo_does_not():
    scale = Scale.of(False, None, None)
    assert (scale.seeds, scale.scoring, scale.quick) == (None, Scoring("sealed", 2000, 300), False)
    first = inspect.signature(run_demo).parameters["start"].default
    of_demo = range(first, first + NUM_HELD_OUT_OF_DEMO)
    assert (of_demo[0], of_demo[-1]) == (1000, 1199)
    assert not set(of_demo) & set(range(scale.scoring.start, scale.scoring.start + scale.scoring.count))
    assert Scale.of(False, "development", (5,)).scoring == Scoring("development", 0, 300)


@pytest.mark.parametrize("name", STUDIES)
def test_each_seed_has_fine_tuning_scenes_of_its_own(name):
    for seed in (*STUDIES[name].seeds, *STUDIES[name].quick_seeds):
        start = seed * SCENES_PER_SEED
        assert len(SPLITS["finetune"][start : start + max(SIZES)]) == max(SIZES)
    assert max(SIZES) <= SCENES_PER_SEED


@pytest.mark.parametrize(
    ("quick", "split", "seeds"),
    [(True, "sealed", None), (False, None, (7, 7)), (False, None, (-1,)), (True, None, (50,))],
)
def test_scales_that_would_mislead_are_refused(quick, split, seeds):
    with pytest.raises(ConfigError, match="Got --quick on sealed scenes" if split else "Got --seeds"):
        Scale.of(quick, split, seeds)


def test_an_unknown_study_and_no_jobs_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        run_study("mian", tmp_path / "out", Scale.of(True, None, None), 1, "")
    assert str(caught.value) == (
        "Got the study 'mian'. Expected one of new-words, recipe, attributes, main, teacher-controls, entropy, "
        "scaling, pooling, aligner, words, layers, pretraining, lambda, switching, learning-rate, ood, "
        "alignment-over-time, loss-vs-score, pooling-over-training, rearrangement, mixing, overfitting. "
        "Do this: write 'main' instead."
    )
    with pytest.raises(ConfigError) as caught:
        run_study("main", tmp_path / "out", Scale.of(True, None, None), 0, "")
    assert str(caught.value) == "Got --jobs 0. Expected at least 1. Do this: leave it out to use every core."
    assert not (tmp_path / "out").exists()
