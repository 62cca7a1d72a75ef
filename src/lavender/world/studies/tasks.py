"""What a study's students are fine-tuned on and scored by: captions, new words, attributes of things, and places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from lavender.evaluation.answers import generate_answers, micro_f1, names_said
from lavender.evaluation.map_scores import JudgedMap
from lavender.evaluation.scorers import cider
from lavender.maps import Word, WordMaps
from lavender.students.loading import load_run
from lavender.students.word_maps import AnsweredPicture, student_maps
from lavender.world.attributes import (
    EdgedScene,
    ask_about_colour,
    ask_about_place,
    bind_colours,
    draw_edged,
    pairs_said,
    withheld_names,
)
from lavender.world.judging import (
    BATCH_SIZE,
    DOMAINS,
    held_out_scenes,
    score_attention,
    score_new_words,
    score_student,
)
from lavender.world.language import CAPTION_PROMPT, Mention, article, caption_scene
from lavender.world.scenes import SPLITS, Scene, Style, scenes
from lavender.world.sprites import NAMES, NEW_NAMES
from lavender.world.studies.examples import (
    WARM_UP_START,
    Example,
    Scoring,
    Task,
    TaskName,
    Unconnected,
    WarmUp,
    captioned,
    captions,
    new_words,
    several,
    write_examples,
)
from lavender.world.suite import caption_references
from lavender.world.suite_signs import WITHHELD_WORDS, SignScene, ask_to_read, draw_sign, mention_of

__all__ = [
    "TASKS",
    "WARM_UP_START",
    "Example",
    "Scoring",
    "Task",
    "TaskName",
    "Unconnected",
    "WarmUp",
    "write_examples",
]

NUM_PICTURED = 3
"""How many held-out scenes a figure shows attention on: the first ones."""
OTHER_STYLES: tuple[Style, ...] = ("photograph", "openmoji", "outline")
"""Styles that no student was trained on, from near to far."""

# captions


def _score_captions(path: Path, scoring: Scoring) -> dict[str, Any]:
    return score_student(path, held_out_scenes(scoring.split, scoring.count, scoring.start, tuple(DOMAINS)))[0]


def _score_in_domain(path: Path, scoring: Scoring) -> dict[str, Any]:
    """Captions of scenes like those of training alone, for students that are scored several times; CIDEr too."""
    held_out = held_out_scenes(scoring.split, scoring.count, scoring.start, ("in_domain",))
    scores, observed = score_student(path, held_out)
    drawn = held_out["in_domain"]
    references = [caption_references(scene) for scene in drawn]
    scores["cider"] = cider(observed.answers, references).aggregate["cider"]
    pictured = zip(drawn[:NUM_PICTURED], observed.maps, strict=False)
    return scores | {"maps": [_first_map(scene, scene_maps) for scene, scene_maps in pictured]}


def _first_map(scene: Scene, scene_maps: WordMaps) -> list[list[float]]:
    """Where the student looks at the first name of a scene's caption, for a figure: rows of numbers from 0 to 1."""
    mention = caption_scene(scene).mentions[0]
    heat = scene_maps.map_of(mention.start, mention.end)
    assert heat is not None, mention
    return [[round(value, 2) for value in row] for row in heat.tolist()]


# captions and signs to read


def _captions_and_signs(start: int, count: int) -> list[Example]:
    """`count` captions, and half as many signs to read. The word in an answer has the teacher's map of it."""
    return captions(start, count) + [_read(draw_sign(seed)) for seed in _signs(start, count)]


def _captions_and_signs_unmapped(start: int, count: int) -> list[Example]:
    """The same samples; no word that is read has a map."""
    signs = [draw_sign(seed) for seed in _signs(start, count)]
    return captions(start, count) + [_read(scene, is_mapped=False) for scene in signs]


def _signs(start: int, count: int) -> range:
    return SPLITS["finetune"][start : start + count // 2]


def _read(scene: SignScene, is_mapped: bool = True) -> Example:
    asked = ask_to_read(scene)
    mentions = (mention_of(scene),) if is_mapped else ()
    return Example(scene, asked.question, asked.answer, asked.answer, mentions)


def _score_captions_and_signs(path: Path, scoring: Scoring) -> dict[str, Any]:
    """Captions as in `captions`; words of signs that are read rightly, and those that no training sign says apart."""
    model, processor = load_run(path)
    seeds = SPLITS[scoring.split][scoring.start : scoring.start + scoring.count]
    examples = [_read(draw_sign(seed)) for seed in seeds]
    hits = _right_answers(model, processor, examples)
    withheld = [hit for hit, example in zip(hits, examples, strict=True) if example.answer in WITHHELD_WORDS]
    reading = {"reading": sum(hits) / len(hits), "reading_withheld": sum(withheld) / max(1, len(withheld))}
    return _score_captions(path, scoring) | reading


# new words: 14 of the 42 names, which the base's language side never heard


def _one_named(start: int, count: int) -> list[Example]:
    """Captions that name one of the things alone: which thing is meant is not said."""
    examples = []
    for scene in several(start, count):
        name = scene.names[scene.seed % len(scene.names)]
        text = f"{article(name)} {name}."
        first = len(text) - len(name) - 1
        mention = Mention(name, first, first + len(name), 0)
        examples.append(Example(scene, CAPTION_PROMPT, text, text, (mention,)))
    return examples


def _score_new_words(path: Path, scoring: Scoring) -> dict[str, Any]:
    return score_new_words(path, list(scenes(scoring.split, scoring.count, start=scoring.start)))[0]


def _score_new_words_ood(path: Path, scoring: Scoring) -> dict[str, Any]:
    """As `_score_new_words`; and F1 of new and of known names in captions of each of `OTHER_STYLES`."""
    scores = _score_new_words(path, scoring)
    model, processor = load_run(path)
    new = set(NEW_NAMES)
    for style in OTHER_STYLES:
        drawn = list(scenes(scoring.split, scoring.count, style, scoring.start))
        images, prompts = [scene.image for scene in drawn], [CAPTION_PROMPT] * len(drawn)
        texts = generate_answers(model, processor, images, prompts, batch_size=BATCH_SIZE)
        said, there = [names_said(text, NAMES) for text in texts], [set(scene.names) for scene in drawn]
        scores[f"new_names_{style}"] = micro_f1([names & new for names in said], [names & new for names in there])
        scores[f"known_names_{style}"] = micro_f1([names - new for names in said], [names - new for names in there])
    return scores


# attributes: the colour of the edge around a thing; places: the thing at the side of another one


def _edged(start: int, count: int) -> list[EdgedScene]:
    return [draw_edged(seed) for seed in SPLITS["finetune"][start : start + count]]


def _questions(start: int, count: int) -> list[Example]:
    return [_asked(scene) for scene in _edged(start, count)]


def _asked(scene: EdgedScene, among: Sequence[str] = ()) -> Example:
    asked = ask_about_colour(scene, among=among)
    assert asked.name is not None
    first = asked.question.index(asked.name)
    mention = Mention(asked.name, first, first + len(asked.name), 0)
    about = ((asked.answer, asked.name),)
    return Example(scene, asked.question, asked.answer, asked.question, (mention,), about)


def _heard_pairs(start: int, count: int) -> list[Example]:
    """Questions about things whose pair of name and colour is not withheld; the first `count` scenes with such one."""
    return _about_pairs(SPLITS["finetune"][start:], count, withheld=False)


def _about_pairs(seeds: Iterable[int], count: int, withheld: bool) -> list[Example]:
    def asked() -> Iterable[Example]:
        for scene in map(draw_edged, seeds):
            never_heard = withheld_names(scene)
            among = never_heard if withheld else tuple(name for name in scene.names if name not in never_heard)
            if among:
                yield _asked(scene, among)

    return list(islice(asked(), count))


def _score_questions_ood(path: Path, scoring: Scoring) -> dict[str, Any]:
    """Answers about pairs as in training; about withheld pairs; and the first ones again, asked in other words."""
    seeds = SPLITS[scoring.split][scoring.start :]
    heard, withheld = (_about_pairs(seeds, scoring.count, withheld=which) for which in (False, True))
    reworded = [replace(example, prompt=_reworded(example.about[0][1])) for example in heard]
    model, processor = load_run(path)
    scores = score_attention(_attention_of_answers(model, processor, heard))
    for metric, examples in (("answers", heard), ("answers_withheld", withheld), ("answers_reworded", reworded)):
        hits = _right_answers(model, processor, examples)
        scores[metric] = sum(hits) / len(hits)
    return scores


def _reworded(name: str) -> str:
    """A question about a colour in a form that no student was trained on."""
    return f"which colour is around the {name}?"


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
    hits = _right_answers(model, processor, examples)
    judged = _attention_of_answers(model, processor, examples)
    return score_attention(judged) | {"answers": sum(hits) / len(hits)}


def _right_answers(model: Any, processor: Any, examples: Sequence[Example]) -> list[bool]:
    """Whether each greedy answer is the right one, but for a full stop."""
    images, prompts = [example.scene.image for example in examples], [example.prompt for example in examples]
    answers = generate_answers(model, processor, images, prompts, batch_size=BATCH_SIZE)
    return [answer.strip(" .") == example.answer for answer, example in zip(answers, examples, strict=True)]


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
    return [captioned(scene) for scene in _edged(start, count)]


_EDGED = WarmUp("edged-captions", 1600, 250)
_OF_QUESTIONS = (("texts", "all"), ("rows", "both"))
_OF_COLOURS = (("tokens", "first"), ("parts_of_speech", ("adjective",)))
TASKS: dict[TaskName, Task] = {
    "captions": Task(captions, _score_captions),
    "captions-in-domain": Task(captions, _score_in_domain, data="captions"),
    "captions-without-signs": Task(captions, _score_captions_and_signs, data="captions"),
    "captions-and-signs": Task(_captions_and_signs, _score_captions_and_signs),
    "captions-and-signs-unmapped": Task(_captions_and_signs_unmapped, _score_captions_and_signs),
    "new-words": Task(new_words, _score_new_words, base="mllama_new_words", num_replayed=800),
    "new-words-alone": Task(new_words, _score_new_words, base="mllama_new_words"),
    "new-words-one-named": Task(_one_named, _score_new_words, base="mllama_new_words", num_replayed=800),
    "new-words-ood": Task(new_words, _score_new_words_ood, base="mllama_new_words", num_replayed=800, data="new-words"),
    "edged-captions": Task(_edged_captions, _score_captions),
    "questions": Task(_questions, _score_questions, warm_up=_EDGED, settings=_OF_QUESTIONS),
    "questions-ood": Task(_heard_pairs, _score_questions_ood, warm_up=_EDGED, settings=_OF_QUESTIONS),
    "binding": Task(_binding, _score_binding, warm_up=_EDGED, settings=_OF_COLOURS),
    "binding-connecting": Task(_binding, _score_binding, warm_up=Unconnected(seed=0), settings=_OF_COLOURS),
    "places": Task(_places, _score_places, warm_up=_EDGED, settings=_OF_QUESTIONS),
}
