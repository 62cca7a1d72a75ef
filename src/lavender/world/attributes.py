"""Scenes whose things have a coloured edge, and texts about one of several things.

Questions and captions bind a colour to a thing. Other questions ask for the thing at the side of another one.

The edge lies around a thing, which keeps its own colours: a tinted drawing would lose its name for the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.ndimage import binary_dilation

from lavender.world.language import Question, article
from lavender.world.scenes import Scene, Thing, place_things, random_background, split_of
from lavender.world.sprites import NAMES

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (40, 170, 50),
    "blue": (40, 80, 230),
    "yellow": (245, 220, 40),
    "purple": (150, 50, 190),
    "white": (250, 250, 250),
}
"""Colour of an edge → RGB, 0 to 255."""
EDGE = 3  # pixels
LEAST_GAP = 8.0  # pixels, a patch of the students
_STREAM = 77
_OWN_COLOUR = {"red apple", "green apple", "fire engine"}
NAMES_WITHOUT_COLOUR = tuple(name for name in NAMES if name not in _OWN_COLOUR)


@dataclass(frozen=True, eq=False)
class EdgedScene(Scene):
    """A scene of two to four things, each with an edge of its own colour.

    Attributes:
        colours: the colour of each thing's edge, in the order of `things`; all different.
    """

    colours: tuple[str, ...] = ()

    def colour_of(self, name: str) -> str:
        """The colour of a thing's edge."""
        return self.colours[self.names.index(name)]


def is_withheld(name: str, colour: str) -> bool:
    """Whether a pair is one of the sixth of all pairs that a study withholds from fine-tuning.

    Every name has one withheld colour, and every colour is withheld of about a sixth of the names. So a student can
    know the name and the colour, and never have heard the two together.
    """
    return list(NAMES).index(name) % len(COLOURS) == list(COLOURS).index(colour)


def withheld_names(scene: EdgedScene) -> tuple[str, ...]:
    """The things of a scene whose pair of name and colour `is_withheld`."""
    return tuple(name for name, colour in zip(scene.names, scene.colours, strict=True) if is_withheld(name, colour))


def draw_edged(seed: int) -> EdgedScene:
    """The scene of a seed with coloured edges. It has other things than the plain scene of that seed.

    A thing's mask is that of the thing, without its edge.

    Raises:
        ValueError: the seed is in no split.
    """
    split_of(seed)
    rng = np.random.default_rng([seed, _STREAM])
    background = random_background(rng)
    count = 2 + int(rng.choice(3, p=(0.4, 0.35, 0.25)))
    names = [str(name) for name in rng.choice(NAMES_WITHOUT_COLOUR, size=count, replace=False)]
    colours = tuple(str(colour) for colour in rng.choice(list(COLOURS), size=count, replace=False))
    pixels, things = place_things(rng, background, names, ["twemoji"] * count)
    is_thing = np.any([thing.mask for thing in things], axis=0)
    for thing, colour in zip(things, colours, strict=True):
        around = binary_dilation(thing.mask, structure=np.ones((3, 3), bool), iterations=EDGE)
        pixels[around & ~is_thing] = COLOURS[colour]
    return EdgedScene(seed, "plain", pixels, things, colours)


def ask_about_colour(scene: EdgedScene, variant: int = 0, among: Sequence[str] = ()) -> Question:
    """ "the dog is on" → "red": a question about one thing of the scene, drawn at random.

    Args:
        among: the things that may be asked about; default: all.
    """
    rng = np.random.default_rng([scene.seed, 13, variant])
    names = among or scene.names
    name = names[int(rng.integers(len(names)))]
    return Question("colour", f"the {name} is on", scene.colour_of(name), name)


def ask_about_place(scene: Scene, variant: int = 0) -> Question | None:
    """ "the dog is left of" → "the cat": a question whose answer needs the place of the thing that it names.

    The answer is the next thing in the order of the things' centres from left to right. A question is asked where this
    order is clear: the gaps between the two things, and from each of them to its other neighbour, are at least
    `LEAST_GAP` pixels wide. With two things the answer would be the other one wherever it is, so there must be three.

    Returns:
        A question drawn at random among those of the scene, None if there is none. Its `name` is the thing that the
        question names.
    """
    things = sorted(scene.things, key=_across)
    if len(things) < 3:
        return None
    is_clear = [True, *(_across(right) - _across(left) >= LEAST_GAP for left, right in pairwise(things)), True]
    pairs = [pair for place, pair in enumerate(pairwise(things)) if all(is_clear[place : place + 3])]
    if not pairs:
        return None
    rng = np.random.default_rng([scene.seed, 19, variant])
    left, right = pairs[int(rng.integers(len(pairs)))]
    asked, side, answer = (left, "left", right) if rng.random() < 0.5 else (right, "right", left)
    return Question("place", f"the {asked.name} is {side} of", f"the {answer.name}", asked.name)


def _across(thing: Thing) -> float:
    """The column of the centre of a thing's box, in pixels."""
    return thing.centre[1] * thing.mask.shape[1]


def bind_colours(scene: EdgedScene, variant: int = 0) -> tuple[str, list[dict[str, str]]]:
    """A caption that names every thing with its colour, "a dog on red and a cat on blue".

    Returns:
        The caption, and which colour is about which thing, as a data set's column `about`.
    """
    rng = np.random.default_rng([scene.seed, 17, variant])
    order = rng.permutation(len(scene.things))
    parts, about = [], []
    for index in order:
        name, colour = scene.names[index], scene.colours[index]
        parts.append(f"{article(name)} {name} on {colour}")
        about.append({"word": colour, "about": name})
    return " and ".join(parts) + ".", about


def pairs_said(text: str) -> set[tuple[str, str]]:
    """The pairs (name, colour) that a caption of the form of `bind_colours` says."""
    pairs = set()
    for part in text.rstrip(". ").split(" and "):
        words, _, colour = part.partition(" on ")
        name = words.removeprefix("an ").removeprefix("a ").strip()
        if name in NAMES and colour.strip() in COLOURS:
            pairs.add((name, colour.strip()))
    return pairs
