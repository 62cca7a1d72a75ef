"""Faithfulness of word maps by occlusion: insertion and deletion curves, as in RISE (Petsiuk et al. 2018).

Deletion hides the picture, the places with the highest values of a map first. Insertion starts from the hidden picture
and shows these places first. After each step the model gives the log-probability of its answer. If the answer depends
on the places that a map marks, it falls early in deletion and rises early in insertion. The area under a curve (AUC)
sums this up: **low in deletion and high in insertion speak for the map.** It is the mean of the curve over the share of
the picture, so its unit is that of the curve: nats per token.

A number alone says little, because any hiding harms. So the same curves are made with random orders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageStat
from torch import Tensor

from lavender.errors import ConfigError, DataError, NotFiniteError
from lavender.evaluation.map_scores import resize_map
from lavender.maps import Word, WordMaps
from lavender.students.locate import WordLocator
from lavender.students.logits import logits_at
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, evaluating, finite, processor_inputs

Fill = Literal["blur", "mean"]
"""What hides a part of a picture: the picture strongly blurred, or its mean colour."""
BLUR = 0.05
"""Radius of the blur, as a share of the picture's longest side."""
RANDOM_GRID = (8, 8)
"""(rows, cols) of the noise that gives a random order. So it hides patches, as a map does, and not single pixels."""
_ORDER_SIDE = 256  # pixels of the longest side at which the order is decided; in larger pictures neighbours share one

Score = Callable[[Iterable[Image.Image]], Tensor]
"""Scores of pictures: float (picture, target). A higher one means that the model is surer."""


@dataclass(frozen=True, eq=False)
class OcclusionCurves:
    """Scores while a picture is hidden and shown in one order.

    Attributes:
        shares: float64 (step,), from 0 to 1: the share of the picture that is hidden (deletion) or shown (insertion).
        deletion, insertion: float64 (step, target).
    """

    shares: Tensor
    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_auc(self) -> Tensor:
        """The area under each target's deletion curve, (target,). Low if the target depends on the first places."""
        return torch.trapezoid(self.deletion, self.shares, dim=0)

    @property
    def insertion_auc(self) -> Tensor:
        """The area under each target's insertion curve, (target,). High if the first places are enough."""
        return torch.trapezoid(self.insertion, self.shares, dim=0)


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Curves of the maps of one text, and of random orders.

    Attributes:
        names: of the targets: "the whole answer", then the words. The map of the whole answer is the mean of the maps.
        of_maps: per target its curves in the order of its own map, with this target alone: (step, 1).
        of_random: the curves in each random order, with all targets.
        fill: what hides a part of the picture.
    """

    names: tuple[str, ...]
    of_maps: tuple[OcclusionCurves, ...]
    of_random: tuple[OcclusionCurves, ...]
    fill: Fill


def ranks_of(heat: Tensor, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """The place of each pixel in the order of a map: float64 (height, width), from 0 for the first to almost 1.

    Pixels of equal value, such as those of a map's empty parts, are in a random order.

    Args:
        heat: non-negative (rows, cols), resized bilinearly.
        size: (height, width) in pixels. Above 256 pixels, neighbours share a place.
        seed: of the order of equal pixels.

    Examples:
        >>> import torch
        >>> ranks_of(torch.tensor([[0.2, 0.9], [0.5, 0.1]]), (2, 2)).tolist()
        [[0.5, 0.0], [0.25, 0.75]]
    """
    shrink = min(1.0, _ORDER_SIDE / max(size))
    small = max(1, round(shrink * size[0])), max(1, round(shrink * size[1]))
    values = resize_map(heat, small).flatten().numpy()
    order = np.lexsort((np.random.default_rng(seed).random(len(values)), -values))
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values)) / len(values)
    down, across = (np.arange(whole) * part // whole for whole, part in zip(size, small, strict=True))
    return ranks.reshape(small)[down[:, None], across[None]]


def hidden(image: Image.Image, fill: Fill = "blur") -> Image.Image:
    """The picture with everything hidden.

    Args:
        image: an RGB picture.
        fill: "blur" for a Gaussian blur, "mean" for the mean colour.

    Raises:
        ConfigError: another `fill`.
    """
    if fill not in get_args(Fill):
        raise ConfigError(f"fill={fill!r}", " or ".join(map(repr, get_args(Fill))), "choose one of them")
    if fill == "blur":
        return image.filter(ImageFilter.GaussianBlur(BLUR * max(image.size)))
    red, green, blue = ImageStat.Stat(image).mean
    return Image.new("RGB", image.size, (round(red), round(green), round(blue)))


def occlusion_curves(
    image: Image.Image, ranks: np.ndarray, score: Score, steps: int = 10, fill: Fill = "blur"
) -> OcclusionCurves:
    """Hide and show a picture in one order, and score it after each step.

    Args:
        image: an RGB picture.
        ranks: place of each pixel in the order, (height, width) in [0, 1); see `ranks_of`.
        score: called once, with 2 · (steps + 1) pictures.
        steps: number of equal shares of the picture.
        fill: what hides a part.

    Raises:
        ConfigError: `steps` below 1, or an unknown `fill`.
        NotFiniteError: a score is NaN or infinite.

    Examples:
        >>> import torch
        >>> from PIL import Image
        >>> image = Image.new("RGB", (2, 1))
        >>> image.putpixel((0, 0), (255, 0, 0))
        >>> red_on_the_left = lambda pictures: torch.tensor([[float(one.getpixel((0, 0))[0])] for one in pictures])
        >>> ranks = ranks_of(torch.tensor([[1.0, 0.0]]), (1, 2))
        >>> curves = occlusion_curves(image, ranks, red_on_the_left, steps=2, fill="mean")
        >>> curves.deletion.flatten().tolist(), curves.insertion.flatten().tolist()
        ([255.0, 128.0, 128.0], [128.0, 255.0, 255.0])
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}", "at least 1", "give the number of parts to hide one after the other")
    whole, nothing = np.asarray(image), np.asarray(hidden(image, fill))
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64)

    def pictures() -> Iterator[Image.Image]:  # one by one, since photographs are large
        for first, second in ((nothing, whole), (whole, nothing)):
            for share in shares.tolist():
                yield Image.fromarray(np.where((ranks < share - 1e-9)[..., None], first, second))

    scores = score(pictures()).double().cpu()
    if not scores.isfinite().all():
        raise NotFiniteError("NaN or infinity in a score", "finite log-probabilities", "check the model's weights")
    return OcclusionCurves(shares, scores[: steps + 1], scores[steps + 1 :])


def answer_score(model: Any, processor: Any, reading: AnsweredPicture, batch_size: int = 4) -> tuple[Score, list[Word]]:
    """How likely a model finds an answer and its words, as a function of the picture.

    Args:
        model: a model of a supported family.
        processor: its processor.
        reading: a picture with its question, answer and words.
        batch_size: pictures per forward.

    Returns:
        The score, and the words of the reading that were found. The score's targets are the answer, then these words:
        the mean log-probability of their tokens, in nats, each given the picture and the text before it. Pictures must
        have the size of the reading's.

    Raises:
        DataError: the model's tokenizer does not know the answer.
    """
    locator, dropped = WordLocator(processor, adapter_for(model.config)), Counter[str]()
    answer = Word(reading.answer, 0, len(reading.answer), reading.answer, "other")
    inputs = processor_inputs(processor, [reading])
    found = locator.rows(
        reading.messages(),
        [(reading.turn, reading.answer, (answer, *reading.words))],
        inputs["input_ids"][0],
        inputs["attention_mask"][0],
        dropped,
    )
    if not found or found[0][0] != answer:
        raise DataError(
            f"the answer {reading.answer!r}, which the model's tokenizer changes ({'; '.join(dropped)})",
            "an answer whose tokens spell it",
            "give another answer, or leave faithfulness out",
        )
    targets = [list(rows) for _, rows in found]

    @torch.inference_mode()
    def score(pictures: Iterable[Image.Image]) -> Tensor:
        scores: list[list[float]] = []
        readings = (replace(reading, image=picture, words=()) for picture in pictures)
        with evaluating(model):
            while batch := list(islice(readings, batch_size)):
                scores += _log_probabilities(model, processor, batch, targets)
        return finite(torch.tensor(scores, dtype=torch.float64), model, "a log-probability")

    return score, [word for word, _ in found[1:]]


def _log_probabilities(
    model: Any, processor: Any, batch: Sequence[AnsweredPicture], targets: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Per picture and target the mean log-probability of the tokens that the target's rows predict."""
    inputs = processor_inputs(processor, batch).to(model.device, model.dtype)
    rows = sorted({row for target in targets for row in target})
    logits = logits_at(model, inputs, rows)
    values = []
    for sample in range(len(batch)):
        tokens = inputs["input_ids"][sample, [row + 1 for row in rows]]
        all_tokens = logits[sample].log_softmax(dim=-1)
        own = all_tokens.gather(1, tokens[:, None].to(all_tokens.device))[:, 0]
        of_row = dict(zip(rows, own.tolist(), strict=True))
        values.append([sum(of_row[row] for row in target) / len(target) for target in targets])
    return values


def faithfulness(
    model: Any,
    processor: Any,
    reading: AnsweredPicture,
    maps: WordMaps,
    steps: int = 10,
    fill: Fill = "blur",
    num_random: int = 3,
    seed: int = 0,
    batch_size: int = 4,
    progress: Callable[[], None] | None = None,
) -> Faithfulness:
    """Insertion and deletion curves of each word's map, of the mean map, and of random orders.

    One call takes 2 · (steps + 1) · (words + 1 + num_random) forwards of one picture, in batches.

    Args:
        model, processor: of a supported family.
        reading: the picture, question and answer, and the words whose maps are judged.
        maps: maps of the answer's words, from any source: the model itself, or a teacher.
        steps: number of equal shares of the picture.
        fill: what hides a part.
        num_random: number of random orders.
        seed: of the random orders.
        batch_size: pictures per forward.
        progress: called after each order.

    Raises:
        ConfigError: `steps` or `num_random` below 1, or an unknown `fill`.
        DataError: the model's tokenizer does not know the answer, or no word has a map.
        NotFiniteError: a log-probability is NaN or infinite.
    """
    if num_random < 1:
        raise ConfigError(f"num_random={num_random}", "at least 1 random order", "raise it: a curve needs its control")
    known = {(word.start, word.end): heat for word, heat in zip(maps.words, maps.maps, strict=True)}
    words = tuple(word for word in reading.words if (word.start, word.end) in known)
    mapped = replace(reading, words=words)
    score, found = answer_score(model, processor, mapped, batch_size)
    if not found:
        raise DataError(
            f"{reading.answer!r}, of which no word has a map and tokens", "at least one", "give another answer"
        )
    heats = [known[word.start, word.end] for word in found]
    size = reading.size
    say = progress or (lambda: None)
    of_maps = []
    for target, heat in enumerate([torch.stack(heats).mean(dim=0), *heats]):
        curves = occlusion_curves(reading.image, ranks_of(heat, size, seed), score, steps, fill)
        own = slice(target, target + 1)
        of_maps.append(OcclusionCurves(curves.shares, curves.deletion[:, own], curves.insertion[:, own]))
        say()
    of_random = []
    for number in range(num_random):
        noise = torch.from_numpy(np.random.default_rng((seed, number)).random(RANDOM_GRID))
        of_random.append(occlusion_curves(reading.image, ranks_of(noise, size, seed), score, steps, fill))
        say()
    names = ("the whole answer", *(word.text for word in found))
    return Faithfulness(names, tuple(of_maps), tuple(of_random), fill)
