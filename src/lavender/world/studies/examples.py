"""What a study's students are fine-tuned on: the types of samples and tasks, and samples of captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lavender.world.language import CAPTION_PROMPT, Mention, caption_scene
from lavender.world.scenes import SPLITS, Scene, Split, draw_scene, scenes
from lavender.world.sprites import NAMES, NEW_NAMES

TaskName = Literal[
    "captions",
    "captions-in-domain",
    "captions-without-signs",
    "captions-and-signs",
    "captions-and-signs-unmapped",
    "new-words",
    "new-words-alone",
    "new-words-one-named",
    "new-words-ood",
    "edged-captions",
    "questions",
    "questions-ood",
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
        data: the task with the same samples, whose folder of samples and maps this one shares; None is its own.
    """

    examples: Callable[[int, int], list[Example]]
    score: Callable[[Path, Scoring], dict[str, Any]]
    base: str | None = None
    warm_up: WarmUp | Unconnected | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    num_replayed: int = 0
    data: TaskName | None = None

    def replayed(self, start: int) -> list[Example]:
        """The captions of known names that are replayed, for samples from the `start`-th scene on."""
        return known_words(start + REPLAY_START, self.num_replayed)


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


def captions(start: int, count: int) -> list[Example]:
    """Captions of the scenes of the fine-tuning split from the `start`-th on."""
    return [captioned(scene) for scene in scenes("finetune", count, start=start)]


def captioned(scene: Scene) -> Example:
    """A scene's caption, which names every thing."""
    caption = caption_scene(scene)
    return Example(scene, CAPTION_PROMPT, caption.text, caption.text, caption.mentions)


def several(start: int, count: int, names: Collection[str] = NAMES) -> list[Scene]:
    """Scenes of two to four things of these names, the first `count` from the `start`-th seed on."""
    drawn = map(draw_scene, SPLITS["finetune"][start:])
    return list(islice((scene for scene in drawn if len(scene.things) > 1 and set(scene.names) <= set(names)), count))


def new_words(start: int, count: int) -> list[Example]:
    """Captions of scenes of several things, new names among them."""
    return [captioned(scene) for scene in several(start, count)]


def known_words(start: int, count: int) -> list[Example]:
    """Captions of scenes without a new name."""
    return [captioned(scene) for scene in several(start, count, set(NAMES) - set(NEW_NAMES))]
