"""What the tasks of studies train on and how they score, without a model: its answers and maps are given here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from lavender.data.images import image_id, load_image
from lavender.data.samples import read_samples
from lavender.maps import Word, WordMaps
from lavender.students.word_maps import AnsweredPicture
from lavender.world import judging
from lavender.world.attributes import EdgedScene, draw_edged, is_withheld, withheld_names
from lavender.world.language import Mention, caption_scene
from lavender.world.scenes import SPLITS, Scene, Thing, draw_scene, scenes
from lavender.world.sprites import NAMES, NEW_NAMES
from lavender.world.student_models import CAPTION_PROMPT
from lavender.world.studies import tasks
from lavender.world.studies.cells import SCENES_PER_SEED
from lavender.world.studies.registry import STUDIES
from lavender.world.studies.tasks import (
    OTHER_STYLES,
    TASKS,
    WARM_UP_START,
    Example,
    Scoring,
    TaskName,
    WarmUp,
    write_examples,
)
from lavender.world.suite_signs import SIGN_QUESTION, WITHHELD_WORDS, SignScene, draw_sign

# examples

FIRST = 2_000_007  # the seed of the first scene below


def texts(task: TaskName, count: int = 3) -> list[tuple[int, str, str]]:
    examples = TASKS[task].examples(7, count)
    return [(example.scene.seed - FIRST, example.prompt, example.answer) for example in examples]


def test_captions_name_every_thing():
    assert texts("captions") == [
        (0, CAPTION_PROMPT, "you can see a big fish on the right."),
        (1, CAPTION_PROMPT, "there is a sunflower on the right."),
        (2, CAPTION_PROMPT, "we see a single turtle next to a ladybug here."),
    ]


def test_new_words_are_taught_by_scenes_of_several_things():
    """Scenes 0, 1, 6 and 8 show one thing."""
    assert texts("new-words") == [
        (2, CAPTION_PROMPT, "we see a single turtle next to a ladybug here."),
        (3, CAPTION_PROMPT, "monkey on the left near a rocket and a whale."),
        (4, CAPTION_PROMPT, "we see the owl and the nice cake plus dog on the right in this picture."),
    ]
    examples = TASKS["new-words"].examples(7, 40)
    assert [example.scene.seed - FIRST for example in examples[3:6]] == [5, 7, 9]
    assert {len(example.scene.things) for example in examples} == {2, 3, 4}


def test_what_is_replayed_has_no_new_name_and_scenes_of_its_own():
    task = TASKS["new-words"]
    examples, replayed = task.examples(7, 40), replace(task, num_replayed=50).replayed(7)
    assert task.num_replayed == 800
    assert len(replayed) == 50
    assert not {name for example in replayed for name in example.scene.names} & set(NEW_NAMES)
    assert {name for example in examples for name in example.scene.names} & set(NEW_NAMES)
    assert {len(example.scene.things) for example in replayed} == {2, 3, 4}
    assert min(example.scene.seed for example in replayed) > max(example.scene.seed for example in examples)
    assert TASKS["new-words-alone"].replayed(7) == []


def test_one_of_several_things_is_named():
    assert texts("new-words-one-named") == [
        (2, CAPTION_PROMPT, "a turtle."),
        (3, CAPTION_PROMPT, "a whale."),
        (4, CAPTION_PROMPT, "a cake."),
    ]
    examples = TASKS["new-words-one-named"].examples(7, 40)
    assert [example.scene.seed for example in examples] == [
        example.scene.seed for example in TASKS["new-words"].examples(7, 40)
    ]
    assert any(example.answer.startswith("an ") for example in examples)
    places = [example.scene.names.index(example.mentions[0].name) for example in examples]
    assert set(places) == {0, 1, 2, 3}


def test_captions_of_edged_scenes():
    assert texts("edged-captions", 2) == [
        (0, CAPTION_PROMPT, "you can see a small penguin on the left, rabbit on a pattern."),
        (
            1,
            CAPTION_PROMPT,
            "there is a big butterfly and an octopus and a banana near the fish on the right on a pattern.",
        ),
    ]
    assert all(isinstance(example.scene, EdgedScene) for example in TASKS["edged-captions"].examples(7, 2))


def test_questions_about_colours():
    examples = TASKS["questions"].examples(7, 3)
    assert texts("questions") == [
        (0, "the penguin is on", "white"),
        (1, "the butterfly is on", "white"),
        (2, "the grapes is on", "blue"),
    ]
    assert [example.about for example in examples] == [
        (("white", "penguin"),),
        (("white", "butterfly"),),
        (("blue", "grapes"),),
    ]


def test_questions_about_places():
    """The scenes between have two things, or things that are not clearly apart."""
    examples = TASKS["places"].examples(7, 3)
    assert texts("places") == [
        (1, "the butterfly is left of", "the octopus"),
        (8, "the palm tree is right of", "the car"),
        (15, "the sailboat is left of", "the banana"),
    ]
    assert examples[1].texts == (
        ("the palm tree is right of", (Mention("palm tree", 4, 13, 0),)),
        ("the car", (Mention("car", 4, 7, 0),)),
    )


def test_captions_that_bind():
    examples = TASKS["binding"].examples(7, 3)
    assert texts("binding") == [
        (0, CAPTION_PROMPT, "a penguin on white and a rabbit on blue."),
        (1, CAPTION_PROMPT, "an octopus on yellow and a banana on blue and a fish on green and a butterfly on white."),
        (2, CAPTION_PROMPT, "a tree on green and a grapes on blue."),
    ]
    assert examples[0].about == (("white", "penguin"), ("blue", "rabbit"))
    assert texts("binding-connecting") == texts("binding")


@pytest.mark.parametrize("task", get_args(TaskName))
def test_every_sample_of_a_task_is_what_it_says(task: TaskName):
    """Names stand where their mentions say; colours and what they are about are true; questions have mapped prompts."""
    examples = TASKS[task].examples(11, 25)
    signs = [example for example in examples if isinstance(example.scene, SignScene)]
    assert len(signs) == (12 if task.startswith("captions-and-signs") else 0)
    examples = [example for example in examples if example not in signs]
    assert len({example.scene.seed for example in examples}) == 25
    assert {example.scene.seed in SPLITS["finetune"] for example in (*examples, *signs)} == {True}
    for example in examples:
        asks = task in ("questions", "questions-ood", "places")
        assert example.mapped == (example.prompt if asks else example.answer)
        names = [mention.name for mention in example.mentions]
        if asks or task == "new-words-one-named":
            assert len(names) == 1
            assert names[0] in example.scene.names
        else:
            assert sorted(names) == sorted(example.scene.names)
        for order, mention in enumerate(example.mentions):
            assert mention.order == order
            assert example.mapped[mention.start : mention.end] == mention.name
        scene = example.scene
        for mention in example.answer_mentions:
            assert mention.name in set(scene.names) - set(names)
            assert example.answer[mention.start : mention.end] == mention.name
        assert len(example.answer_mentions) == (task == "places")
        if isinstance(scene, EdgedScene) and task not in ("edged-captions", "places"):
            assert [name for _, name in example.about] == names
            assert all(scene.colour_of(name) == colour for colour, name in example.about)
        else:
            assert example.about == ()


def test_signs_are_read_with_and_without_maps():
    """Half as many as captions; the word of an answer is its mention, and its place is the board."""
    for task, is_mapped in (("captions-and-signs", True), ("captions-and-signs-unmapped", False)):
        examples = TASKS[task].examples(11, 4)
        assert [example.prompt for example in examples] == [CAPTION_PROMPT] * 4 + [SIGN_QUESTION] * 2
        for example in examples[4:]:
            assert isinstance(example.scene, SignScene)
            assert example.answer == example.mapped == example.scene.word
            words = [mention.name for mention in example.mentions]
            assert words == ([example.scene.word] if is_mapped else [])
            assert example.scene.mask_of(example.answer).any()
    assert texts("captions-without-signs") == texts("captions") == texts("captions-in-domain")


def test_tasks_that_share_samples_share_their_folder():
    for name, task in TASKS.items():
        if task.data is not None:
            other = TASKS[task.data]
            assert texts(name) == texts(task.data)
            assert (task.num_replayed, task.base, task.warm_up) == (other.num_replayed, other.base, other.warm_up)
            assert other.data is None


def test_no_withheld_pair_is_heard():
    examples = TASKS["questions-ood"].examples(11, 60)
    assert not [example for example in examples if is_withheld(*reversed(example.about[0]))]
    edged = [example.scene for example in examples if isinstance(example.scene, EdgedScene)]
    assert len(edged) == 60
    assert any(map(withheld_names, edged)), "withheld pairs are seen"
    asked = {is_withheld(*reversed(example.about[0])) for example in TASKS["questions"].examples(11, 60)}
    assert asked == {True, False}


@pytest.mark.parametrize(("long", "short"), [("hot dog", "dog"), ("palm tree", "tree")])
def test_a_name_within_another_is_found_at_its_own_place(long, short):
    """In both orders: "a hot dog on red and a dog on blue", "a dog on blue and a hot dog on red"."""
    mask = np.ones((3, 5), dtype=bool)
    things = tuple(Thing(name, (0, 0, 3, 5), False, mask) for name in (long, short))
    seen = set()
    for seed in range(2_000_000, 2_000_012):
        scene = EdgedScene(seed, "plain", np.zeros((3, 5, 3), np.uint8), things, ("red", "blue"))
        example = tasks._bound(scene)
        seen.add(example.answer)
        for mention in example.mentions:
            colour = scene.colour_of(mention.name)
            assert example.answer[mention.start :].startswith(f"{mention.name} on {colour}")
            before = example.answer[: mention.start].split()[-1]
            assert before == "a"
    assert seen == {f"a {long} on red and a {short} on blue.", f"a {short} on blue and a {long} on red."}


def test_warm_ups_have_scenes_that_no_seed_of_a_study_has():
    warm_ups = [task.warm_up for task in TASKS.values() if isinstance(task.warm_up, WarmUp)]
    assert {(warm_up.task, warm_up.num_scenes) for warm_up in warm_ups} == {("edged-captions", 1600)}
    assert len(SPLITS["finetune"]) >= WARM_UP_START + 1600
    for seed in (seed for study in STUDIES.values() for seed in (*study.seeds, *study.quick_seeds)):
        assert (seed + 1) * SCENES_PER_SEED <= WARM_UP_START


def test_samples_are_read_as_they_were_written(tmp_path):
    chosen: tuple[TaskName, ...] = ("binding", "questions", "captions")
    examples = [TASKS[task].examples(7, 1)[0] for task in chosen]
    write_examples(tmp_path, examples)
    samples = list(read_samples(tmp_path, "another prompt"))
    assert len(samples) == 3
    for example, sample in zip(examples, samples, strict=True):
        spoken = [turn["content"][-1]["text"] for turn in sample.messages]
        assert spoken == [example.prompt, example.answer]
        assert tuple((entry.word, entry.about) for entry in sample.about) == example.about
        assert image_id(load_image(sample.sources[0], "a picture")) == image_id(example.scene.image)


# scores


class Student:
    """Gives the answers of a list and maps that are `level` in a thing's mask and 1 elsewhere."""

    def __init__(self, monkeypatch, answers: Sequence[str]):
        self.asked: list[str] = []
        self.measured: list[AnsweredPicture] = []
        self._answers, self._heat = list(answers), {}
        for module in (tasks, judging):
            monkeypatch.setattr(module, "load_run", lambda path: (None, None))
            monkeypatch.setattr(module, "generate_answers", self._generate)
            monkeypatch.setattr(module, "student_maps", self._maps)
        monkeypatch.setattr(judging, "answer_nll", self._nll)

    def look(self, scene: Scene, text: str, start: int, end: int, mask: np.ndarray, level: float) -> None:
        """Where it looks at the characters [start, end) of an answer."""
        heat = torch.where(torch.from_numpy(mask), level, 1.0) / level
        self._heat[image_id(scene.image), text, start, end] = heat

    def _generate(self, model: Any, processor: Any, images: list, prompts: list[str], batch_size: int) -> list[str]:
        self.asked += prompts
        assert len(images) == len(self._answers)
        return self._answers

    def _nll(self, model: Any, processor: Any, pictures: list[AnsweredPicture], batch_size: int) -> float:
        self.measured += pictures
        return 1.25

    def _maps(self, model: Any, processor: Any, pictures: Sequence[AnsweredPicture], batch_size: int) -> list[WordMaps]:
        return [self._map(picture) for picture in pictures]

    def _map(self, picture: AnsweredPicture) -> WordMaps:
        identity, words, maps = image_id(picture.image), [], []
        for (image, text, start, end), heat in self._heat.items():
            inside = [word for word in picture.words if start <= word.start < end]
            if (image, text) == (identity, picture.answer) and inside:
                words += inside
                maps += [heat] * len(inside)
        order = sorted(range(len(words)), key=lambda index: words[index].start)
        sorted_words: list[Word] = [words[index] for index in order]
        return WordMaps(identity, picture.answer, tuple(sorted_words), torch.stack([maps[index] for index in order]))


def share_in(mask: np.ndarray, level: float, lit: np.ndarray | None = None) -> float:
    """The share in a mask of a map that is `level` where it is lit, by default in the mask, and 1 elsewhere."""
    heat = np.where(mask if lit is None else lit, level, 1.0)
    return heat[mask].sum() / heat.sum()


def test_scores_of_new_words(monkeypatch):
    """The scenes: caterpillar, dog · house, strawberry, bus · fire engine · crab, grapes*, rocket* · palm tree*, ice
    cream, elephant · rabbit*, carrot; with * are new. The last caption's carrot looks at the rabbit.
    """
    drawn = list(scenes("development", 6, start=40))
    assert [scene.names for scene in drawn[2:5]] == [
        ("fire engine",),
        ("crab", "grapes", "rocket"),
        ("palm tree", "ice cream", "elephant"),
    ]
    student = Student(
        monkeypatch,
        [
            "a dog and a caterpillar.",
            "a bus.",
            "a fire engine and a car.",
            "a rocket and a grapes.",
            "a tree.",
            "a rabbit and a banana.",
        ],
    )
    shares: dict[str, float] = {}
    for scene in drawn:
        caption = caption_scene(scene)
        for mention in caption.mentions:
            level = 7.0 if mention.name in NEW_NAMES else 3.0
            mask, lit = scene.mask_of(mention.name), None
            if mention.name == "carrot":
                lit = scene.mask_of("rabbit") & ~mask
            student.look(scene, caption.text, mention.start, mention.end, mask if lit is None else lit, level)
            shares[mention.name] = share_in(mask, level, lit)
    scores = TASKS["new-words"].score(Path("run"), Scoring("development", 40, 6))
    assert student.asked == [CAPTION_PROMPT] * 6
    assert scores["new_names"] == pytest.approx(2 * 3 / (4 + 4))  # said: car, rocket, grapes, rabbit
    assert scores["known_names"] == pytest.approx(2 * 4 / (6 + 10))  # right: dog, caterpillar, bus, fire engine
    assert scores["all_names"] == pytest.approx(2 * 7 / (10 + 14))
    assert scores["single_things"] == pytest.approx(2 * 1 / (2 + 1))  # "a fire engine and a car"
    assert scores["known_loss"] == 1.25
    assert [picture.answer for picture in student.measured] == [caption_scene(scene).text for scene in drawn[:3]]
    assert len(shares) == 14
    assert scores["pointing"] == pytest.approx(13 / 14)
    assert scores["attention_mass"] == pytest.approx(np.mean(list(shares.values())), rel=1e-5)
    new = [share for name, share in shares.items() if name in NEW_NAMES]
    assert len(new) == 4
    assert scores["new_pointing"] == 1
    assert scores["new_attention_mass"] == pytest.approx(np.mean(new), rel=1e-5)


def look_at_colours(student: Student, examples: list[Example], level: float) -> list[float]:
    """Each colour looks at its thing, but of the first sample at the next thing. The shares on the things."""
    shares = []
    for index, example in enumerate(examples):
        for colour, name in example.about:
            start = example.answer.index(f"on {colour}") + 3 if "on " in example.answer else 0
            names = example.scene.names
            lit = example.scene.mask_of(names[(names.index(name) + 1) % len(names)] if index == 0 else name)
            student.look(example.scene, example.answer, start, start + len(colour), lit, level)
            shares.append(share_in(example.scene.mask_of(name), level, lit))
    return shares


def test_scores_of_questions(monkeypatch):
    """The answers are blue, white, blue, purple."""
    student = Student(monkeypatch, ["blue", "white.", "blue and white.", "red."])
    examples = [tasks._asked(draw_edged(seed)) for seed in SPLITS["development"][40:44]]
    assert [example.answer for example in examples] == ["blue", "white", "blue", "purple"]
    shares = look_at_colours(student, examples, 4.0)
    scores = TASKS["questions"].score(Path("run"), Scoring("development", 40, 4))
    assert student.asked == ["the elephant is on", "the octopus is on", "the cow is on", "the sailboat is on"]
    assert scores["answers"] == 2 / 4
    assert scores["attention_mass"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert scores["pointing"] == 3 / 4


def test_scores_of_questions_out_of_domain(monkeypatch):
    """A student that is right where a pair was heard, says red of withheld ones, and knows one form of question."""
    seeds = SPLITS["development"][40:]
    heard, withheld = (tasks._about_pairs(seeds, 5, withheld=which) for which in (False, True))
    right = {(image_id(one.scene.image), one.prompt): one.answer for one in heard}
    student = Student(monkeypatch, [])
    look_at_colours(student, heard, 4.0)

    def answer(model: Any, processor: Any, images: list, prompts: list[str], batch_size: int) -> list[str]:
        student.asked += prompts
        return [right.get((image_id(image), prompt), "red") for image, prompt in zip(images, prompts, strict=True)]

    monkeypatch.setattr(tasks, "generate_answers", answer)
    scores = TASKS["questions-ood"].score(Path("run"), Scoring("development", 40, 5))
    assert scores["answers"] == 1.0
    assert scores["answers_withheld"] == np.mean([one.answer == "red" for one in withheld])
    assert scores["answers_reworded"] == np.mean([one.answer == "red" for one in heard]) < 1
    names = [one.about[0][1] for one in heard]
    assert student.asked[:5] == [f"the {name} is on" for name in names]
    assert student.asked[-5:] == [f"which colour is around the {name}?" for name in names]
    assert scores["pointing"] == 4 / 5  # the first looks at the next thing


def test_scores_of_captions_and_signs(monkeypatch):
    """Every third sign is read. The captions are scored as ever."""
    monkeypatch.setattr(tasks, "_score_captions", lambda path, scoring: {"in_domain": 0.25})
    monkeypatch.setattr(tasks, "load_run", lambda path: (None, None))
    drawn = [draw_sign(seed) for seed in SPLITS["development"][40:61]]

    def read(model: Any, processor: Any, images: list, prompts: list[str], batch_size: int) -> list[str]:
        assert prompts == [SIGN_QUESTION] * 21
        return [f"{scene.word}." if index % 3 == 0 else "stopp" for index, scene in enumerate(drawn)]

    monkeypatch.setattr(tasks, "generate_answers", read)
    scores = TASKS["captions-and-signs"].score(Path("run"), Scoring("development", 40, 21))
    withheld = [index % 3 == 0 for index, scene in enumerate(drawn) if scene.word in WITHHELD_WORDS]
    assert len(withheld) > 1
    assert scores == {"in_domain": 0.25, "reading": 7 / 21, "reading_withheld": np.mean(withheld)}


def test_scores_of_new_words_in_other_styles(monkeypatch):
    """It names everything rightly in front of photographs, one known thing in the unseen hand, nothing in outlines."""
    monkeypatch.setattr(tasks, "_score_new_words", lambda path, scoring: {"new_names": 0.5})
    monkeypatch.setattr(tasks, "load_run", lambda path: (None, None))
    drawn = {style: list(scenes("development", 6, style, 40)) for style in OTHER_STYLES}
    known = next(name for scene in drawn["openmoji"] for name in scene.names if name not in NEW_NAMES)
    texts = {"photograph": lambda names: " and ".join(names), "openmoji": lambda names: known, "outline": lambda _: "."}
    said = {image_id(scene.image): texts[style](scene.names) for style, of in drawn.items() for scene in of}

    def caption(model: Any, processor: Any, images: list, prompts: list[str], batch_size: int) -> list[str]:
        return [said[image_id(image)] for image in images]

    monkeypatch.setattr(tasks, "generate_answers", caption)
    scores = TASKS["new-words-ood"].score(Path("run"), Scoring("development", 40, 6))
    assert (scores["new_names"], scores["new_names_photograph"], scores["known_names_photograph"]) == (0.5, 1.0, 1.0)
    assert (scores["new_names_openmoji"], scores["new_names_outline"], scores["known_names_outline"]) == (0, 0, 0)
    there = [name for scene in drawn["openmoji"] for name in scene.names if name not in NEW_NAMES]
    assert scores["known_names_openmoji"] == pytest.approx(2 * there.count(known) / (6 + len(there)))


def test_scores_of_places(monkeypatch):
    """Of the first scenes that have a question. The first answer looks at the thing that is asked about."""
    examples = tasks._about_places(SPLITS["development"][40:], 3)
    assert [(example.scene.seed, example.prompt, example.answer) for example in examples] == [
        (3_000_042, "the cow is right of", "the palm tree"),
        (3_000_044, "the rabbit is left of", "the rocket"),
        (3_000_045, "the cake is left of", "the penguin"),
    ]
    student = Student(monkeypatch, [examples[0].answer, examples[1].scene.names[0] + ".", f"{examples[2].answer}."])
    shares = []
    for index, example in enumerate(examples):
        (asked,), (answered,) = example.mentions, example.answer_mentions
        lit = example.scene.mask_of(asked.name if index == 0 else answered.name)
        student.look(example.scene, example.answer, answered.start, answered.end, lit, 4.0)
        shares.append(share_in(example.scene.mask_of(answered.name), 4.0, lit))
    scores = TASKS["places"].score(Path("run"), Scoring("development", 40, 3))
    assert student.asked == [example.prompt for example in examples]
    assert scores["answers"] == pytest.approx(2 / 3)
    assert scores["attention_mass"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert scores["pointing"] == pytest.approx(2 / 3)


def test_scores_of_binding(monkeypatch):
    """True: elephant blue, hot dog yellow · octopus white, sailboat purple, crab red · house red, palm tree yellow, owl
    white, cow blue. A name that is not there counts as a false pair, not as a wrong colour.
    """
    student = Student(
        monkeypatch,
        [
            "an elephant on blue and a dog on yellow.",
            "an octopus on red and a crab on red.",
            "a cow on blue and a house on red and a palm tree on white.",
        ],
    )
    examples = [tasks._bound(draw_edged(seed)) for seed in SPLITS["development"][40:43]]
    shares = look_at_colours(student, examples, 4.0)
    scores = TASKS["binding"].score(Path("run"), Scoring("development", 40, 3))
    assert student.asked == [CAPTION_PROMPT] * 3
    assert scores["pairs"] == pytest.approx(2 * 4 / (7 + 9))  # elephant, crab, cow, house
    assert scores["right_colours"] == pytest.approx(4 / 6)  # of elephant, octopus, crab, cow, house, palm tree
    assert scores["all_names"] == pytest.approx(2 * 6 / (7 + 9))
    assert len(shares) == 9
    assert scores["attention_mass"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert scores["pointing"] == pytest.approx(7 / 9)


@pytest.mark.parametrize("answers", [["a.", "no colour.", "on."]])
def test_binding_without_a_name_has_no_right_colour(monkeypatch, answers):
    student = Student(monkeypatch, answers)
    look_at_colours(student, [tasks._bound(draw_edged(seed)) for seed in SPLITS["development"][40:43]], 4.0)
    scores = TASKS["binding"].score(Path("run"), Scoring("development", 40, 3))
    assert (scores["pairs"], scores["right_colours"], scores["all_names"]) == (0, 0, 0)


def test_scores_of_captions(monkeypatch):
    """In three domains; the attention is that of the first. Each scene is named but for its first thing."""
    drawn = list(scenes("development", 3, start=40))
    texts = [" ".join(scene.names[1:]) for scene in drawn]
    student = Student(monkeypatch, texts)
    shares = []
    for scene in drawn:
        caption = caption_scene(scene)
        for mention in caption.mentions:
            mask = scene.mask_of(mention.name)
            student.look(scene, caption.text, mention.start, mention.end, mask, 5.0)
            shares.append(share_in(mask, 5.0))
    scores = TASKS["captions"].score(Path("run"), Scoring("development", 40, 3))
    assert scores["in_domain"] == pytest.approx(2 * 3 / (3 + 6))
    assert scores["in_domain_exact_set"] == 0
    assert {"out_of_domain", "other_backgrounds"} <= scores.keys()
    assert scores["held_out_loss"] == 1.25
    assert scores["attention_mass"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert scores["pointing"] == 1


def test_the_new_names_are_a_third():
    assert len(NEW_NAMES) == 14
    assert len(NAMES) == 42
    assert draw_scene(3_000_040).names == ("caterpillar", "dog")
