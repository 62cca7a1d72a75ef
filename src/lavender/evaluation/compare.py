"""Compare models on the same samples: their answers, the likelihood of the references, and where they look."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from lavender.config import CONTENT_WORDS
from lavender.data.conversations import text_of
from lavender.data.images import image_id
from lavender.data.samples import Sample
from lavender.data.store import MapStore, SeveralStores
from lavender.errors import DataError, NotFiniteError
from lavender.evaluation.answers import answer_batch, answering, micro_f1
from lavender.evaluation.intervals import ratio
from lavender.evaluation.report.panels import Panel, WordRow
from lavender.maps import WordMaps, correlation, entropy
from lavender.students.locate import WordLocator
from lavender.students.logits import logits_at
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, processor_inputs, student_maps
from lavender.words import content_words

BATCH_SIZE = 16
"""Samples whose pictures are in memory at once."""


@dataclass(frozen=True, eq=False)
class Observed:
    """What one model says about some pictures, and where it looks.

    Attributes:
        answers: one greedy answer per sample.
        maps: one per sample: where the model looks when it predicts each mapped word of the reference answer.
    """

    answers: list[str]
    maps: list[WordMaps]


@dataclass(frozen=True)
class Judged:
    """What one model does on one sample.

    Attributes:
        answer: its greedy answer.
        tallies: score → (sum, weight). A score of many samples is Σ sum / Σ weight; `lavender.evaluation.score_help`
            says what each one is. Weights are tokens (`answer_nll`), content words of answer and reference together
            (`content_f1`, whose sum is twice the common ones), and words (`entropy`, `map_agreement`).
    """

    answer: str
    tallies: dict[str, tuple[float, float]]


def scores_of(judged: Sequence[Judged]) -> dict[str, float | None]:
    """The scores of a model over samples; None where nothing counted, such as `map_agreement` without maps."""
    names = judged[0].tallies if judged else ()
    return {name: ratio([one.tallies[name] for one in judged]) for name in names}


def readings_of(
    samples: Iterable[Sample], store: MapStore | SeveralStores | None
) -> Iterator[tuple[AnsweredPicture, WordMaps | None]]:
    """The first question and answer of each sample, with the teacher's maps. One picture is decoded at a time.

    The words are those that the store has maps of, else content words.

    Args:
        samples: with one picture each, as `spread` returns them.
        store: the teacher's maps.
    """
    for sample in samples:
        (image,) = sample.load()
        place = next(place for place, message in enumerate(sample.messages) if message["role"] == "assistant")
        asked, answer = sample.messages[:place], text_of(sample.messages[place]["content"])
        prompt = next(text_of(message["content"]) for message in asked if message["role"] == "user")
        teacher = store.get(image_id(image), answer) if store is not None else None
        words = teacher.words if teacher is not None else content_words(answer, CONTENT_WORDS)
        yield AnsweredPicture(image, prompt, answer, words, asked), teacher


def observe(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    store: MapStore | SeveralStores | None,
    max_new_tokens: int = 64,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], object] = lambda number: None,
) -> list[Judged]:
    """What one model does on each sample. The pictures and maps of one batch are in memory at a time.

    Args:
        model: a supported vision-language model.
        processor: its processor.
        samples: with one picture each, as `spread` returns them.
        store: the teacher's maps; the model's maps get its grid, else 32 × 32.
        max_new_tokens: where an answer is cut off.
        batch_size: samples per forward.
        on_progress: called with the number of samples of each finished batch.

    Raises:
        NotFiniteError: the model's loss is NaN or infinite.
    """
    grid = store.grid if store is not None else (32, 32)
    found: list[Judged] = []
    for start in range(0, len(samples), batch_size):
        pairs = list(readings_of(samples[start : start + batch_size], store))
        readings = [reading for reading, _ in pairs]
        with answering(model, processor):
            answers = answer_batch(model, processor, [reading.question() for reading in readings], max_new_tokens)
        maps = student_maps(model, processor, readings, grid, batch_size)
        likelihoods = answer_tallies(model, processor, readings)
        for (reading, teacher), answer, own, likelihood in zip(pairs, answers, maps, likelihoods, strict=True):
            tallies = {
                "answer_nll": likelihood,
                "content_f1": _overlap(answer, reading.answer),
                "entropy": entropy_tally(own),
                "map_agreement": _agreement(own, teacher),
            }
            found.append(Judged(answer, tallies))
        on_progress(len(pairs))
    return found


def entropy_tally(maps: WordMaps) -> tuple[float, float]:
    """(sum of the entropies of the maps in nats, Eq. 23; their number)."""
    return entropy(maps.maps).sum().item(), len(maps.words)


def _agreement(student: WordMaps, teacher: WordMaps | None) -> tuple[float, float]:
    """(sum of the correlations of the maps of the same words, their number). A flat map has none."""
    known = dict(zip(teacher.words, teacher.maps, strict=True)) if teacher is not None else {}
    words = zip(student.words, student.maps, strict=True)
    pairs = [(heat, known[word]) for word, heat in words if word in known]
    if not pairs:
        return 0.0, 0
    values = correlation(*(torch.stack(maps) for maps in zip(*pairs, strict=True)))
    values = values[~values.isnan()]
    return values.sum().item(), len(values)


def answer_nll(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    readings: Sequence[AnsweredPicture],
    batch_size: int = BATCH_SIZE,
) -> float:
    """Mean negative log-likelihood of the reference answers, nats per token. The end token counts.

    Raises:
        DataError: no answer has a token.
        NotFiniteError: the model's loss is NaN or infinite.
    """
    tallies = [
        tally
        for start in range(0, len(readings), batch_size)
        for tally in answer_tallies(model, processor, readings[start : start + batch_size])
    ]
    found = ratio(tallies)
    if found is None:
        raise DataError(f"{len(readings)} samples whose answers have no token", "an answer with a text", "add some")
    return found


@torch.inference_mode()
def answer_tallies(
    model: PreTrainedModel, processor: ProcessorMixin, readings: Sequence[AnsweredPicture]
) -> list[tuple[float, float]]:
    """Per reading (negative log-likelihood of the reference answer in nats, number of its tokens), in one forward.

    The tokens are those that have a character of the answer, and all after them: the end token, and what the chat
    template writes there. The model's locator finds them, so a tokenizer may add a blank to a text or join its pieces.
    An empty answer, and one that no tokenizer takes as it is, counts no token.

    Raises:
        NotFiniteError: the model's loss is NaN or infinite.
    """
    locator = WordLocator(processor, adapter_for(model.config))
    inputs = processor_inputs(processor, readings)
    rows_by_reading = [
        locator.rows_to_end(reading.messages(), reading.turn, ids, mask)
        for reading, ids, mask in zip(readings, inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    inputs = inputs.to(model.device, model.dtype)
    needed = sorted({row for rows in rows_by_reading for row in rows})
    place_of = {row: place for place, row in enumerate(needed)}
    logits = logits_at(model, inputs, needed)
    tallies = []
    for index, rows in enumerate(rows_by_reading):
        predicted = inputs["input_ids"][index, [row + 1 for row in rows]]
        own = logits[index, [place_of[row] for row in rows]]
        loss = torch.nn.functional.cross_entropy(own, predicted, reduction="sum")
        tallies.append((loss.item(), len(rows)))
    if not math.isfinite(sum(loss for loss, _ in tallies)):
        raise NotFiniteError(
            f"NaN or infinity in the loss of {model.config.name_or_path or type(model).__name__}",
            "a finite loss",
            "use bfloat16 or float32 (--dtype): float16 overflows in some models"
            if model.dtype == torch.float16
            else "leave this model out; its weights are damaged, or its training diverged",
        )
    return tallies


def content_f1(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """`micro_f1` of the content lemmas (nouns, adjectives, verbs) of answers and references.

    None if no text has one: of "yes", "3", "B" or "猫", nothing is known.
    """
    said, true = [_lemmas(text) for text in answers], [_lemmas(text) for text in references]
    found = micro_f1(said, true)
    return found if any(said) or any(true) else None


def _overlap(answer: str, reference: str) -> tuple[float, float]:
    """(twice the number of common content lemmas, number of those of both): what `content_f1` sums."""
    said, true = _lemmas(answer), _lemmas(reference)
    return 2.0 * len(said & true), len(said) + len(true)


def _lemmas(text: str) -> set[str]:
    return {word.lemma for word in content_words(text, CONTENT_WORDS)}


@dataclass(frozen=True, eq=False)
class Phrase:
    """A stretch of a text that gets a row of maps in a report.

    Attributes:
        text: what the row is called.
        start, end: half-open span of characters in the text.
        mask: the true mask, bool (height, width) of the picture, where it is known.
    """

    text: str
    start: int
    end: int
    mask: np.ndarray | None = None


def panels_of(
    readings: Sequence[AnsweredPicture],
    phrases: Sequence[Sequence[Phrase]],
    teacher: Sequence[WordMaps | None],
    observed: dict[str, Observed],
    titles: Sequence[str],
) -> list[Panel]:
    """One panel per reading: the teacher's map and each model's map of each of its phrases.

    Args:
        readings: pictures with their reference answers.
        phrases: per reading, what gets a row.
        teacher: per reading, the teacher's maps, or None. Without any there is no such column.
        observed: model name → what it does on these readings.
        titles: one per reading.
    """
    panels, has_teacher = [], any(maps is not None for maps in teacher)
    for index, reading in enumerate(readings):
        sources: dict[str, WordMaps | None] = {"teacher": teacher[index]} if has_teacher else {}
        sources |= {name: model.maps[index] for name, model in observed.items()}
        rows = [
            WordRow(
                phrase.text,
                {
                    name: None if maps is None else maps.map_of(phrase.start, phrase.end)
                    for name, maps in sources.items()
                },
                phrase.mask,
                (phrase.start, phrase.end),
            )
            for phrase in phrases[index]
        ]
        answers = {name: model.answers[index] for name, model in observed.items()}
        panels.append(Panel(reading.image, titles[index], rows, answers, truth=reading.answer))
    return panels
