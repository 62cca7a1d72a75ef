"""Texts about a scene: captions from a small grammar, and questions with answers.

CLIP's text encoder is causal, so every token after a noun depends on that noun. If captions always had the same form,
a diffusion model could read a thing from any later token. Therefore openings, attributes, places, connectives, order
and endings all vary: only the noun's own tokens carry it reliably.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavender.world.scenes import Scene, Thing
from lavender.world.sprites import NAMES

CAPTION_PROMPT = "describe the picture."
_OPENINGS = ("", "", "", "there is ", "we see ", "here is ", "look at ", "this shows ", "you can see ")
_CONNECTIVES = (" and ", " and ", " with ", " near ", " next to ", ", ", " plus ")
_ENDINGS = ("", "", "", "", " here", " in this picture", " all together", " on a pattern")
_PLAIN_ADJECTIVES = ("nice", "pretty", "single", "plain")


@dataclass(frozen=True)
class Mention:
    """A name in a text.

    Attributes:
        name: the name of a thing.
        start, end: its characters are `text[start:end]`.
        order: its place in the order of mention, from 0.
    """

    name: str
    start: int
    end: int
    order: int


@dataclass(frozen=True)
class Caption:
    """A text and its mentions, in the order of the text."""

    text: str
    mentions: tuple[Mention, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its answer.

    Attributes:
        form: the kind of question, to score the kinds apart: exists, count, leftmost, topmost, only, colour or place.
        question, answer: the texts.
        name: the thing that the question or the answer names, or None.
    """

    form: str
    question: str
    answer: str
    name: str | None = None


def caption_scene(scene: Scene, variant: int = 0) -> Caption:
    """A caption that names every thing of the scene once.

    Args:
        scene: the scene to describe.
        variant: each variant is another random wording of the same scene.
    """
    rng = np.random.default_rng([scene.seed, 7, variant])
    text, mentions = _pick(rng, _OPENINGS), []
    for order, index in enumerate(rng.permutation(len(scene.things))):
        if order:
            text += _pick(rng, _CONNECTIVES)
        thing = scene.things[index]
        before, after = _words_around(rng, thing)
        start = len(text) + len(before)
        text += before + thing.name + after
        mentions.append(Mention(thing.name, start, start + len(thing.name), order))
    return Caption(text + _pick(rng, _ENDINGS) + ".", tuple(mentions))


def ask_about(scene: Scene, variant: int = 0, names: Collection[str] = tuple(NAMES)) -> list[Question]:
    """One question of each form that the scene allows; every answer has one or two words. See `caption_scene`.

    Args:
        names: the names that questions may ask for, besides those of the scene.
    """
    rng = np.random.default_rng([scene.seed, 11, variant])
    things = list(scene.things)
    thing = things[int(rng.integers(len(things)))]
    absent = [name for name in names if name not in scene.names]
    asked = thing.name if rng.random() < 0.5 else _pick(rng, absent)
    questions = [
        Question("exists", f"is there {article(asked)} {asked}?", "yes" if asked in scene.names else "no", asked),
        Question("count", "how many things are there?", ("one", "two", "three", "four")[len(things) - 1]),
    ]
    if len(things) > 1:
        leftmost = min(things, key=lambda thing: thing.centre[1])
        topmost = min(things, key=lambda thing: thing.centre[0])
        questions.append(Question("leftmost", "what is on the left?", leftmost.name, leftmost.name))
        questions.append(Question("topmost", "what is at the top?", topmost.name, topmost.name))
    else:
        questions.append(Question("only", "what is it?", thing.name, thing.name))
    return questions


def write_scenes(folder: Path, scenes: Sequence[Scene]) -> None:
    """Write scenes and captions as an image folder (`metadata.jsonl` and PNG files), which `read_samples` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for scene in scenes:
            name = f"{scene.seed}.png"
            scene.image.save(folder / name)
            lines.write(json.dumps({"file_name": name, "text": caption_scene(scene).text}) + "\n")


def _words_around(rng: np.random.Generator, thing: Thing) -> tuple[str, str]:
    """Words before and after a name: article, adjective, place. Size and place are true."""
    before, after = "", ""
    if rng.random() < 0.35:
        size = "small" if thing.share < 0.08 else "big"
        before = f"{size if rng.random() < 0.5 else _pick(rng, _PLAIN_ADJECTIVES)} "
    kind = rng.random()
    if kind < 0.5:
        before = f"{article(before + thing.name)} {before}"
    elif kind < 0.7:
        before = f"the {before}"
    if rng.random() < 0.3:
        row, column = thing.centre
        across = "on the left" if column < 0.5 else "on the right"
        along = "at the top" if row < 0.5 else "at the bottom"
        after = f" {across if rng.random() < 0.5 else along}"
    return before, after


def article(words: str) -> str:
    """The indefinite article before some words: "an" before a vowel, but "a one"."""
    return "an" if words[0] in "aeiou" and not words.startswith("one") else "a"


def _pick(rng: np.random.Generator, options) -> str:
    return options[int(rng.integers(len(options)))]
