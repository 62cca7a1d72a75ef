"""What a study's students are fine-tuned on and scored by: captions, new words, attributes of things, and places."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lavender.evaluation.answers import generate_answers, micro_f1, names_said
from lavender.evaluation.map_scores import JudgedMap
from lavender.maps import Word
from lavender.students.loading import load_run
from lavender.students.word_maps import AnsweredPicture, student_maps
from lavender.world.attributes import (
    EdgedScene,
    ask_about_colour,
    ask_about_place,
    bind_colours,
    draw_edged,
    pairs_said,
)
from lavender.world.judging import (
    BATCH_SIZE,
    DOMAINS,
    held_out_scenes,
    score_attention,
    score_new_words,
    score_student,
)
from lavender.world.language import Mention, caption_scene
from lavender.world.scenes import SPLITS, Scene, Split, draw_scene, scenes
from lavender.world.sprites import NAMES, NEW_NAMES
from lavender.world.student_models import CAPTION_PROMPT

TaskName = Literal[
    "captions",
    "new-words",
    "new-words-alone",
    "new-words-one-named",
    "edged-captions",
    "questions",
    "binding",
    "binding-connecting",
    "places",
]


@dataclass(frozen=True)
class Scoring:
    """The held-out scenes of the scores: `count` per domain, from the `start`-th seed of a split on."""

    split: Split
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class Example:
    """A sample of fine-tuning, with the truth about its scene.

    Attributes:
        scene: the scene.
        prompt, answer: the texts.
        mapped: the text whose words get maps, the answer or the prompt.
        mentions: the names in `mapped`.
        about: pairs (word of the answer, name that it is about).
        answer_mentions: the names in the answer that get maps as well, if `mapped` is the prompt.
    """

    scene: Scene
    prompt: str
    answer: str
    mapped: str
    mentions: tuple[Mention, ...]
    about: tuple[tuple[str, str], ...] = ()
    answer_mentions: tuple[Mention, ...] = ()

    @property
    def texts(self) -> tuple[tuple[str, tuple[Mention, ...]], ...]:
        """The texts whose words get maps, with the names in each."""
        also = ((self.answer, self.answer_mentions),) if self.answer_mentions else ()
        return ((self.mapped, self.mentions), *also)


@dataclass(frozen=True)
class Task:
    """What is learned, and how it is scored.

    Attributes:
        examples: (index of the first scene, count) → samples of the fine-tuning split.
        score: (checkpoint or run folder, scenes) → scores by name.
        base: name of the base in `lavender.world.STUDENT_PATHS`; None is the arm's own student.
        warm_up: how the base becomes the task's base: by plain fine-tuning, or by new weights in all but the tower.
            None: the task's base is the base.
        settings: settings of `LavenderConfig` that the task needs in every arm.
        num_replayed: number of captions of known names, from other scenes, that make up half of a run's samples.
    """

    examples: Callable[[int, int], list[Example]]
    score: Callable[[Path, Scoring], dict[str, Any]]
    base: str | None = None
    warm_up: WarmUp | Unconnected | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    num_replayed: int = 0

    def replayed(self, start: int) -> list[Example]:
        """The captions of known names that are replayed, for samples from the `start`-th scene on."""
        return _known_words(start + REPLAY_START, self.num_replayed)


@dataclass(frozen=True)
class WarmUp:
    """Plain fine-tuning on another task before any arm, with the same result for all arms and seeds.

    Attributes:
        task: what is learned.
        num_scenes, steps: samples, and optimizer steps of 16 samples.
    """

    task: TaskName
    num_scenes: int
    steps: int


@dataclass(frozen=True)
class Unconnected:
    """All but the vision tower is initialised anew: projector, cross-attention and text model.

    Attributes:
        seed: seed of the random weights, which are the same for all arms and seeds.
    """

    seed: int


REPLAY_START = 10_000
"""Distance from a seed's first fine-tuning scene to the first one that is replayed."""
WARM_UP_START = 990_000
"""Index of the first fine-tuning scene of warm-ups, which no seed uses."""


def write_examples(folder: Path, examples: Iterable[Example]) -> None:
    """Write samples as an image folder (`metadata.jsonl` and PNG files), which `read_samples` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for index, example in enumerate(examples):
            name = f"{index}.png"
            example.scene.image.save(folder / name)
            row: dict[str, Any] = {"file_name": name, "prompt": example.prompt, "completion": example.answer}
            if example.about:
                row["about"] = [{"word": word, "about": name} for word, name in example.about]
            lines.write(json.dumps(row) + "\n")


# captions


def _captions(start: int, count: int) -> list[Example]:
    return [_captioned(scene) for scene in scenes("finetune", count, start=start)]


def _captioned(scene: Scene) -> Example:
    caption = caption_scene(scene)
    return Example(scene, CAPTION_PROMPT, caption.text, caption.text, caption.mentions)


def _score_captions(path: Path, scoring: Scoring) -> dict[str, Any]:
    return score_student(path, held_out_scenes(scoring.split, scoring.count, scoring.start, tuple(DOMAINS)))[0]


# new words: 14 of the 42 names, which the base's language side never heard


def _several(start: int, count: int, names: Collection[str] = NAMES) -> list[Scene]:
    """Scenes of two to four things of these names, the first `count` from the `start`-th seed on."""
    drawn = map(draw_scene, SPLITS["finetune"][start:])
    return list(islice((scene for scene in drawn if len(scene.things) > 1 and set(scene.names) <= set(names)), count))


def _new_words(start: int, count: int) -> list[Example]:
    return [_captioned(scene) for scene in _several(start, count)]


def _known_words(start: int, count: int) -> list[Example]:
    """Captions of scenes without a new name."""
    return [_captioned(scene) for scene in _several(start, count, set(NAMES) - set(NEW_NAMES))]


def _one_named(start: int, count: int) -> list[Example]:
    """Captions that name one of the things alone: which thing is meant is not said."""
    examples = []
    for scene in _several(start, count):
        name = scene.names[scene.seed % len(scene.names)]
        article = "an" if name[0] in "aeiou" else "a"
        text = f"{article} {name}."
        first = len(article) + 1
        mention = Mention(name, first, first + len(name), 0)
        examples.append(Example(scene, CAPTION_PROMPT, text, text, (mention,)))
    return examples


def _score_new_words(path: Path, scoring: Scoring) -> dict[str, Any]:
    return score_new_words(path, list(scenes(scoring.split, scoring.count, start=scoring.start)))[0]


# attributes: the colour of the edge around a thing; places: the thing at the side of another one


def _edged(start: int, count: int) -> list[EdgedScene]:
    return [draw_edged(seed) for seed in SPLITS["finetune"][start : start + count]]


def _questions(start: int, count: int) -> list[Example]:
    return [_asked(scene) for scene in _edged(start, count)]


def _asked(scene: EdgedScene) -> Example:
    asked = ask_about_colour(scene)
    assert asked.name is not None
    first = asked.question.index(asked.name)
    mention = Mention(asked.name, first, first + len(asked.name), 0)
    about = ((asked.answer, asked.name),)
    return Example(scene, asked.question, asked.answer, asked.question, (mention,), about)


def _places(start: int, count: int) -> list[Example]:
    return _about_places(SPLITS["finetune"][start:], count)


def _about_places(seeds: Iterable[int], count: int) -> list[Example]:
    """Questions about the first `count` scenes that have one."""
    examples = (_placed(draw_edged(seed)) for seed in seeds)
    return list(islice((example for example in examples if example is not None), count))


def _placed(scene: Scene) -> Example | None:
    """A question about a place, None if the scene has none. Both names, that of the answer too, take their own maps."""
    asked = ask_about_place(scene)
    if asked is None or asked.name is None:
        return None
    first = asked.question.index(asked.name)
    mention = Mention(asked.name, first, first + len(asked.name), 0)
    named = asked.answer.removeprefix("the ")
    answered = Mention(named, len("the "), len(asked.answer), 0)
    return Example(scene, asked.question, asked.answer, asked.question, (mention,), answer_mentions=(answered,))


def _binding(start: int, count: int) -> list[Example]:
    return [_bound(scene) for scene in _edged(start, count)]


def _bound(scene: EdgedScene) -> Example:
    text, about = bind_colours(scene)
    pairs = tuple((pair["word"], pair["about"]) for pair in about)
    mentions = []
    for order, (colour, name) in enumerate(pairs):
        first = text.index(f"{name} on {colour}")  # with its colour, since "dog" is a part of "hot dog"
        mentions.append(Mention(name, first, first + len(name), order))
    return Example(scene, CAPTION_PROMPT, text, text, tuple(mentions), pairs)


def _held_out_edged(scoring: Scoring) -> list[EdgedScene]:
    seeds = SPLITS[scoring.split][scoring.start : scoring.start + scoring.count]
    return [draw_edged(seed) for seed in seeds]


def _score_questions(path: Path, scoring: Scoring) -> dict[str, Any]:
    """Exact match of the answers; attention of the answer on the thing that is asked about."""
    return _score_answers(path, [_asked(scene) for scene in _held_out_edged(scoring)])


def _score_places(path: Path, scoring: Scoring) -> dict[str, Any]:
    """Exact match of the answers; attention of the answer's name on its thing.

    The scenes are the first `count` with a question, from the `start`-th seed on.
    """
    return _score_answers(path, _about_places(SPLITS[scoring.split][scoring.start :], scoring.count))


def _score_answers(path: Path, examples: Sequence[Example]) -> dict[str, Any]:
    model, processor = load_run(path)
    images, prompts = [example.scene.image for example in examples], [example.prompt for example in examples]
    answers = generate_answers(model, processor, images, prompts, batch_size=BATCH_SIZE)
    hits = [answer.strip(" .") == example.answer for answer, example in zip(answers, examples, strict=True)]
    judged = _attention_of_answers(model, processor, examples)
    return score_attention(judged) | {"answers": sum(hits) / len(hits)}


def _score_binding(path: Path, scoring: Scoring) -> dict[str, Any]:
    """F1 of the pairs of name and colour; right colours of rightly named things; F1 of names; attention of colours."""
    model, processor = load_run(path)
    examples = [_bound(scene) for scene in _held_out_edged(scoring)]
    images, prompts = [example.scene.image for example in examples], [example.prompt for example in examples]
    texts = generate_answers(model, processor, images, prompts, batch_size=BATCH_SIZE)
    said = [pairs_said(text) for text in texts]
    true = [{(name, colour) for colour, name in example.about} for example in examples]
    rightly_named = [
        (pair, truth) for pairs, truth in zip(said, true, strict=True) for pair in pairs if pair[0] in dict(truth)
    ]
    judged = _attention_of_answers(model, processor, examples)
    return score_attention(judged) | {
        "pairs": micro_f1([set(map(" on ".join, pairs)) for pairs in said], [set(map(" on ".join, t)) for t in true]),
        "right_colours": sum(pair in truth for pair, truth in rightly_named) / max(1, len(rightly_named)),
        "all_names": micro_f1([names_said(text, NAMES) for text in texts], [set(dict(truth)) for truth in true]),
    }


def _attention_of_answers(model: Any, processor: Any, examples: Sequence[Example]) -> list[JudgedMap]:
    """Maps of the rows that predict a colour or a name, judged by the mask of its thing."""
    pictures, names = [], []
    for example in examples:
        words, about = [], []
        for colour, name in example.about:
            first = example.answer.index(colour)
            words.append(Word(colour, first, first + len(colour), colour, "adjective"))
            about.append(name)
        for mention in example.answer_mentions:
            words.append(Word(mention.name, mention.start, mention.end, mention.name, "noun"))
            about.append(mention.name)
        pictures.append(AnsweredPicture(example.scene.image, example.prompt, example.answer, tuple(words)))
        names.append(about)
    maps = student_maps(model, processor, pictures, batch_size=BATCH_SIZE)
    judged = []
    for example, about, scene_maps in zip(examples, names, maps, strict=True):
        for order, (name, heat) in enumerate(zip(about, scene_maps.maps, strict=True)):
            wrong = scene_maps.maps[(order + 1) % len(about)] if len(about) > 1 else None
            judged.append(JudgedMap(heat, example.scene.mask_of(name), order, wrong))
    return judged


def _edged_captions(start: int, count: int) -> list[Example]:
    return [_captioned(scene) for scene in _edged(start, count)]


_EDGED = WarmUp("edged-captions", 1600, 250)
_OF_QUESTIONS = (("texts", "all"), ("rows", "both"))
_OF_COLOURS = (("tokens", "first"), ("parts_of_speech", ("adjective",)))
TASKS: dict[TaskName, Task] = {
    "captions": Task(_captions, _score_captions),
    "new-words": Task(_new_words, _score_new_words, base="mllama_new_words", num_replayed=800),
    "new-words-alone": Task(_new_words, _score_new_words, base="mllama_new_words"),
    "new-words-one-named": Task(_one_named, _score_new_words, base="mllama_new_words", num_replayed=800),
    "edged-captions": Task(_edged_captions, _score_captions),
    "questions": Task(_questions, _score_questions, warm_up=_EDGED, settings=_OF_QUESTIONS),
    "binding": Task(_binding, _score_binding, warm_up=_EDGED, settings=_OF_COLOURS),
    "binding-connecting": Task(_binding, _score_binding, warm_up=Unconnected(seed=0), settings=_OF_COLOURS),
    "places": Task(_places, _score_places, warm_up=_EDGED, settings=_OF_QUESTIONS),
}
