"""The world's suite: one task of held-out questions for each group of the paper's benchmarks.

| tasks | group of the paper |
| --- | --- |
| `captions` | captions (COCO, Flickr30k) |
| `attributes`, `where`, `counting` | perception (MME, MMBench, MMStar, SEED, RealWorldQA) |
| `pope_random`, `pope_popular`, `pope_adversarial` | hallucination (POPE) |
| `signs` | reading (OCRBench, TextVQA, OCR-VQA, DocVQA) |
| `ood_…` | severely out of domain (WorldMedQA-V) |

Items are a pure function of the task and the split. Choose on the development split; the sealed one is for numbers that
are reported. Both have scenes of their own, which no study and no demo uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import Literal

import numpy as np
from PIL import Image

from lavender.errors import ConfigError
from lavender.world.attributes import (
    LEAST_GAP,
    EdgedScene,
    ask_about_colour,
    ask_about_place,
    draw_edged,
    withheld_names,
)
from lavender.world.language import CAPTION_PROMPT, Question, article, caption_scene
from lavender.world.scenes import SPLITS, Scene, Split, Style, draw_scene
from lavender.world.sprites import NAMES
from lavender.world.suite_pope import SAMPLINGS, Sampling, absent_names
from lavender.world.suite_signs import SignScene, ask_to_read, draw_sign

Drawn = Style | Literal["edged", "sign"]
"""How a picture is drawn: in a style of `draw_scene`, by `draw_edged`, or by `draw_sign`."""
Side = Literal["left", "right", "top", "bottom"]
FIRST_SCENE, SCENES_PER_TASK = 700_000, 10_000
"""Index in a split of the suite's first scene, and how many scenes a task may look through."""
NUM_REFERENCES = 5
"""Captions of each scene that a caption is compared with; COCO and Flickr30k have five, too."""
ASKED_PER_SCENE = 3
"""Questions of POPE per scene with the answer yes, and as many with the answer no."""
_SHOWN = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
_NUMBERS = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Item:
    """A question about a picture, or the request for a caption.

    Attributes:
        drawn, seed: what the picture is drawn from; see `picture_of`.
        form: the kind of question, to score kinds apart.
        question: what the student is asked.
        answers: the right answers; of a caption, the captions that it is compared with.
        names: the things in the picture.
    """

    drawn: Drawn
    seed: int
    form: str
    question: str
    answers: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class SuiteTask:
    """A task of the suite.

    Attributes:
        items: (seeds of a split, number of items) → the items, at least so many.
        num_items: how many the task has.
    """

    items: Callable[[range, int], Iterator[Item]]
    num_items: int


def suite_items(task: str, split: Split = "development", count: int | None = None) -> list[Item]:
    """The items of a task.

    Args:
        task: a key of `SUITE`.
        split: "development" or "sealed".
        count: how many, from the first one on; default: all.

    Raises:
        ConfigError: no such task, another split, or a count below 0.
        FileError: the pictures need cut-outs that are not there (`ood_cutouts`).

    Examples:
        >>> first = suite_items("counting", count=1)[0]
        >>> first.question, first.answers
        ('how many things are there?', ('one',))
    """
    if task not in SUITE:
        raise ConfigError(f"the task {task!r}", f"one of {', '.join(SUITE)}", "name one of them")
    if split not in ("development", "sealed"):
        raise ConfigError(f"the split {split!r}", "development or sealed", "choose on development scenes")
    if count is not None and count < 0:
        raise ConfigError(f"{count} items", "at least 0", "leave count out for all of them")
    shared = "pope_random" if task.startswith("pope_") else task  # POPE's three samplings ask about the same pictures
    start = FIRST_SCENE + list(SUITE).index(shared) * SCENES_PER_TASK
    found = SUITE[task]
    count = found.num_items if count is None else min(count, found.num_items)
    # all are made, since POPE's statistics and balanced numbers are those of the whole task
    seeds = SPLITS[split][start : start + SCENES_PER_TASK]
    return list(islice(found.items(seeds, found.num_items), found.num_items))[:count]


def picture_of(drawn: Drawn, seed: int) -> Image.Image:
    """The picture of an item, RGB."""
    return scene_of(drawn, seed).image


def scene_of(drawn: Drawn, seed: int) -> Scene:
    """The scene of an item."""
    if drawn == "edged":
        return draw_edged(seed)
    return draw_sign(seed) if drawn == "sign" else draw_scene(seed, drawn)


def caption_references(scene: Scene) -> tuple[str, ...]:
    """`NUM_REFERENCES` captions of a scene in other words, to compare a caption with."""
    return tuple(caption_scene(scene, variant).text for variant in range(NUM_REFERENCES))


# one thing is asked of each scene


def _captions(seeds: range, num_items: int, style: Style) -> Iterator[Item]:
    for seed in seeds:
        scene = draw_scene(seed, style)
        yield Item(style, seed, "caption", CAPTION_PROMPT, caption_references(scene), scene.names)


def _colours(seeds: range, num_items: int) -> Iterator[Item]:
    for seed in seeds:
        scene = draw_edged(seed)
        yield _item("edged", scene, ask_about_colour(scene))


def _withheld_colours(seeds: range, num_items: int) -> Iterator[Item]:
    """Questions about things whose pair of name and colour is withheld; scenes without one are passed over."""
    for seed in seeds:
        scene = draw_edged(seed)
        withheld = withheld_names(scene)
        if withheld:
            yield _item("edged", scene, ask_about_colour(scene, among=withheld))


def _signs(seeds: range, num_items: int) -> Iterator[Item]:
    for seed in seeds:
        scene = draw_sign(seed)
        yield _item("sign", scene, ask_to_read(scene))


# what is where, and questions of forms that no student has heard


def _where(seeds: range, num_items: int) -> Iterator[Item]:
    """In turn: what is on the left, what is at the top, what is at the side of a thing."""
    forms: list[Callable[[Scene], Question | None]]
    forms = [partial(_at_the_side, side="left"), partial(_at_the_side, side="top"), _beside]
    return _in_turn(seeds, forms)


def _other_forms(seeds: range, num_items: int) -> Iterator[Item]:
    """In turn: what is on the right, what is at the bottom, which of two is there, and whether one can see a thing."""
    forms: list[Callable[[Scene], Question | None]]
    forms = [partial(_at_the_side, side="right"), partial(_at_the_side, side="bottom"), _either, _seen]
    return _in_turn(seeds, forms)


def _in_turn(seeds: range, forms: list[Callable[[Scene], Question | None]]) -> Iterator[Item]:
    """Questions of all forms in turn, each about the next scene that allows it."""
    turn = 0
    for seed in seeds:
        scene = draw_scene(seed)
        asked = forms[turn % len(forms)](scene)
        if asked is not None:
            turn += 1
            yield _item("plain", scene, asked)


def _at_the_side(scene: Scene, side: Side) -> Question | None:
    """Which thing's centre is farthest at a side; None unless it is so by at least `LEAST_GAP` pixels."""
    axis, sign = {"left": (1, 1), "right": (1, -1), "top": (0, 1), "bottom": (0, -1)}[side]
    sizes = scene.pixels.shape
    places = sorted((sign * thing.centre[axis] * sizes[axis], thing.name) for thing in scene.things)
    if any(second - first < LEAST_GAP for (first, _), (second, _) in islice(pairwise(places), 1)) or len(places) < 2:
        return None
    name = places[0][1]
    return Question(side, f"what is {_SHOWN[side]}?", name, name)


def _beside(scene: Scene) -> Question | None:
    asked = ask_about_place(scene)
    return None if asked is None else replace(asked, form="beside")


def _either(scene: Scene) -> Question:
    """ "which is here, a dog or a cat?": one of them is. The right one is first in half of the questions."""
    rng = np.random.default_rng([scene.seed, 29])
    here = scene.names[int(rng.integers(len(scene.names)))]
    absent = [name for name in NAMES if name not in scene.names]
    pair = [here, absent[int(rng.integers(len(absent)))]]
    first, second = pair if rng.random() < 0.5 else pair[::-1]
    asked = f"which is here, {article(first)} {first} or {article(second)} {second}?"
    return Question("either", asked, here, here)


def _seen(scene: Scene) -> Question:
    rng = np.random.default_rng([scene.seed, 31])
    absent = [name for name in NAMES if name not in scene.names]
    names = scene.names if rng.random() < 0.5 else absent
    name = str(names[int(rng.integers(len(names)))])
    return Question("see", f"can you see {article(name)} {name}?", "yes" if name in scene.names else "no", name)


# counts, and yes or no


def _counting(seeds: range, num_items: int) -> Iterator[Item]:
    """Each number as often as any other: the most frequent one is no good guess."""
    by_number: dict[int, list[Scene]] = {number: [] for number in range(1, len(_NUMBERS) + 1)}
    for scene in map(draw_scene, seeds):
        same = by_number[len(scene.things)]
        if len(same) < num_items // len(_NUMBERS):
            same.append(scene)
        if all(len(found) == num_items // len(_NUMBERS) for found in by_number.values()):
            break
    for of_each in zip(*by_number.values(), strict=True):
        for scene in of_each:
            answer = _NUMBERS[len(scene.things) - 1]
            yield _item("plain", scene, Question("count", "how many things are there?", answer))


def _pope(seeds: range, num_items: int, sampling: Sampling) -> Iterator[Item]:
    """Of each scene of three or four things: `ASKED_PER_SCENE` that are there, and as many that are not, in turn."""
    drawn = (scene for scene in map(draw_scene, seeds) if len(scene.things) >= ASKED_PER_SCENE)
    polled = list(islice(drawn, num_items // (2 * ASKED_PER_SCENE)))
    shown = [scene.names for scene in polled]
    absent = absent_names(shown, tuple(NAMES), sampling, ASKED_PER_SCENE, seed=seeds.start)
    for scene, others in zip(polled, absent, strict=True):
        for name, other in zip(scene.names[:ASKED_PER_SCENE], others, strict=True):
            for asked, answer in ((name, "yes"), (other, "no")):
                question = Question(sampling, f"is there {article(asked)} {asked}?", answer, asked)
                yield _item("plain", scene, question)


def _item(drawn: Drawn, scene: Scene | EdgedScene | SignScene, asked: Question) -> Item:
    """The item of a question. A name may be answered with its article."""
    answers = (asked.answer,)
    bare = asked.answer.removeprefix("the ")
    if bare in NAMES:
        answers = (bare, f"{article(bare)} {bare}", f"the {bare}")
    return Item(drawn, scene.seed, asked.form, asked.question, answers, scene.names)


SUITE: dict[str, SuiteTask] = {
    "captions": SuiteTask(partial(_captions, style="plain"), 200),
    "attributes": SuiteTask(_colours, 300),
    "where": SuiteTask(_where, 300),
    "counting": SuiteTask(_counting, 200),
    **{f"pope_{sampling}": SuiteTask(partial(_pope, sampling=sampling), 600) for sampling in SAMPLINGS},
    "signs": SuiteTask(_signs, 200),
    "ood_hand": SuiteTask(partial(_captions, style="openmoji"), 200),
    "ood_outline": SuiteTask(partial(_captions, style="outline"), 200),
    "ood_photographs": SuiteTask(partial(_captions, style="photograph"), 200),
    "ood_cutouts": SuiteTask(partial(_captions, style="cutout"), 200),
    "ood_combination": SuiteTask(_withheld_colours, 200),
    "ood_question": SuiteTask(_other_forms, 200),
}
"""Task → its items. The order decides a task's scenes: add new tasks at the end."""
