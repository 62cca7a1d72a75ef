"""Compare models on the same samples: their answers, the likelihood of the references, and where they look."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from lavender.config import CONTENT_WORDS
from lavender.data.conversations import text_of
from lavender.data.images import image_id
from lavender.data.samples import Sample
from lavender.data.store import MapStore, SeveralStores
from lavender.errors import ConfigError, DataError, NotFiniteError
from lavender.evaluation.answers import generate_answers, micro_f1
from lavender.evaluation.report.panels import Panel, WordRow
from lavender.maps import WordMaps, entropy, map_agreement
from lavender.students.word_maps import AnsweredPicture, processor_inputs, student_maps
from lavender.words import content_words


@dataclass(frozen=True, eq=False)
class Observed:
    """What one model does on some samples.

    Attributes:
        answers: one greedy answer per sample.
        maps: one per sample: where the model looks when it predicts each mapped word of the reference answer.
        scores: `answer_nll`, nats per token of the reference answers; `content_f1`, overlap of the content lemmas of
            answers and references; `entropy` of the maps, in nats (Eq. 23), None without a map; `map_agreement`, mean
            Pearson correlation with the teacher's maps, None without a store.
    """

    answers: list[str]
    maps: list[WordMaps]
    scores: dict[str, float | None]


def require_limit(limit: int) -> None:
    """Raise ConfigError unless `limit` is a number of samples, at least 1."""
    if limit < 1:
        raise ConfigError(f"--limit {limit}", "at least 1", "give the number of samples to look at")


def spread(samples: Sequence[Sample], limit: int) -> tuple[Sample, ...]:
    """At most `limit` of the samples that can be compared on, spread evenly. `left_out` counts the others.

    Raises:
        DataError: no sample can be compared on.
    """
    usable = [index for index, sample in enumerate(samples) if not _reason_to_leave_out(sample)]
    if not usable:
        raise DataError(
            f"{len(samples)} samples: {'; '.join(left_out(samples))}",
            "at least one sample with one picture, which its first question shows",
            "name other data",
        )
    return tuple(samples[index] for index in usable[:: max(1, len(usable) // limit)][:limit])


def left_out(samples: Sequence[Sample]) -> list[str]:
    """A line per reason for which samples cannot be compared on: a reading is one picture, question and answer."""
    reasons = Counter(_reason_to_leave_out(sample) for sample in samples)
    return [
        f"left out {count} sample{'' if count == 1 else 's'} {reason}" for reason, count in reasons.items() if reason
    ]


def _reason_to_leave_out(sample: Sample) -> str:
    if len(sample.sources) != 1:
        return "with several pictures" if sample.sources else "without a picture"
    turns = [message for message in sample.messages if message["role"] != "system"]
    if [turn["role"] for turn in turns[:2]] != ["user", "assistant"]:
        return "not beginning with a question and its answer"
    has_picture = any(part["type"] == "image" for part in turns[0]["content"])
    return "" if has_picture else "whose picture is not in the first question"


def readings_of(samples: Sequence[Sample], store: MapStore | SeveralStores | None) -> list[AnsweredPicture]:
    """The first question and answer of each sample. Words: those that the store has maps of, else content words.

    Args:
        samples: with one picture each, as `spread` returns them.
        store: the teacher's maps.
    """
    readings = []
    for sample in samples:
        (image,) = sample.load()
        turns = [text_of(message["content"]) for message in sample.messages if message["role"] in ("user", "assistant")]
        prompt, answer = turns[0], turns[1]
        teacher_maps = store.get(image_id(image), answer) if store is not None else None
        words = teacher_maps.words if teacher_maps is not None else content_words(answer, CONTENT_WORDS)
        readings.append(AnsweredPicture(image, prompt, answer, words))
    return readings


def observe(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    readings: Sequence[AnsweredPicture],
    store: MapStore | SeveralStores | None,
    max_new_tokens: int = 64,
) -> Observed:
    """Answers, maps and scores of one model on the readings.

    Args:
        model: a supported vision-language model.
        processor: its processor.
        readings: at least one.
        store: the teacher's maps; the model's maps get its grid, else 32 × 32.
        max_new_tokens: where an answer is cut off.

    Raises:
        NotFiniteError: the model's loss is NaN or infinite.
    """
    images, prompts = [reading.image for reading in readings], [reading.prompt for reading in readings]
    answers = generate_answers(model, processor, images, prompts, max_new_tokens)
    maps = student_maps(model, processor, readings, store.grid if store is not None else (32, 32))
    all_maps = torch.cat([word_maps.maps for word_maps in maps])
    scores = {
        "answer_nll": answer_nll(model, processor, readings),
        "content_f1": content_f1(answers, [reading.answer for reading in readings]),
        "entropy": entropy(all_maps).mean().item() if len(all_maps) else None,
        "map_agreement": _agreement_with(store, maps) if store is not None else None,
    }
    return Observed(answers, maps, scores)


def _agreement_with(store: MapStore | SeveralStores, student: Sequence[WordMaps]) -> float | None:
    """`map_agreement` of a student's maps with the teacher's maps of the same words; None without a common word."""
    pairs = []
    for word_maps in student:
        known = store.get(word_maps.image_id, word_maps.text)
        teacher = dict(zip(known.words, known.maps, strict=True)) if known is not None else {}
        words = zip(word_maps.words, word_maps.maps, strict=True)
        pairs += [(heat, teacher[word]) for word, heat in words if word in teacher]
    return map_agreement(*(torch.stack(maps) for maps in zip(*pairs, strict=True))) if pairs else None


@torch.inference_mode()
def answer_nll(
    model: PreTrainedModel, processor: ProcessorMixin, readings: Sequence[AnsweredPicture], batch_size: int = 16
) -> float:
    """Mean negative log-likelihood of the reference answers, nats per token. The end token counts.

    Raises:
        NotFiniteError: the model's loss is NaN or infinite.
    """
    total, count = 0.0, 0
    for start in range(0, len(readings), batch_size):
        batch = readings[start : start + batch_size]
        inputs = processor_inputs(processor, batch).to(model.device)
        logits = model(**inputs).logits.float()
        for index, reading in enumerate(batch):
            prompt = processor.apply_chat_template(reading.messages()[:1], add_generation_prompt=True, tokenize=False)
            full = processor.apply_chat_template(reading.messages(), tokenize=False)
            tail = processor.tokenizer(full[len(prompt) :], add_special_tokens=False)["input_ids"]
            end = int(inputs["attention_mask"][index].sum())
            target = inputs["input_ids"][index, end - len(tail) : end]
            total += torch.nn.functional.cross_entropy(
                logits[index, end - len(tail) - 1 : end - 1], target, reduction="sum"
            ).item()
            count += len(tail)
    if not math.isfinite(total):
        raise NotFiniteError(
            f"NaN or infinity in the loss of {model.config.name_or_path or type(model).__name__}",
            "a finite loss",
            "leave this model out; its weights are damaged, or its training diverged",
        )
    return total / count


def content_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """`micro_f1` of the content lemmas (nouns, adjectives, verbs) of answers and references."""
    return micro_f1([_lemmas(text) for text in answers], [_lemmas(text) for text in references])


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
        teacher: per reading, the teacher's maps, or None.
        observed: model name → what it does on these readings.
        titles: one per reading.
    """
    panels = []
    for index, reading in enumerate(readings):
        sources = {"teacher": teacher[index]} | {name: model.maps[index] for name, model in observed.items()}
        rows = [
            WordRow(
                phrase.text,
                {
                    name: None if maps is None else maps.map_of(phrase.start, phrase.end)
                    for name, maps in sources.items()
                },
                phrase.mask,
            )
            for phrase in phrases[index]
        ]
        answers = {name: model.answers[index] for name, model in observed.items()}
        panels.append(Panel(reading.image, titles[index], rows, answers, truth=reading.answer))
    return panels
