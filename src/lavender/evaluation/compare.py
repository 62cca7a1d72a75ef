"""Models side by side on the same samples: answers, likelihood, and where they look."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from lavender.alignment.collator import SeveralStores
from lavender.data.conversations import text_of
from lavender.data.images import image_id
from lavender.data.samples import Sample
from lavender.data.store import MapStore
from lavender.errors import ConfigError, DataError, NotFiniteError
from lavender.evaluation.answers import generate_answers
from lavender.evaluation.report.page import Panel, WordRow
from lavender.maps import WordMaps, correlation, entropy
from lavender.students.word_maps import AnsweredPicture, processor_inputs, student_maps
from lavender.words import content_words

CONTENT = ("noun", "adjective", "verb")


@dataclass(frozen=True, eq=False)
class Observed:
    """What one model does on some samples.

    Attributes:
        answers: greedy answers, one a sample.
        maps: where it looks for each mapped word of the reference answer.
        scores: `answer_nll` nats a token of the reference answers; `content_f1` overlap of content
            lemmas of given and reference answers; `entropy` nats; `map_agreement` mean Pearson
            correlation with the teacher's maps, None without a store.
    """

    answers: list[str]
    maps: list[WordMaps]
    scores: dict[str, float | None]


def require_limit(limit: int) -> None:
    if limit < 1:
        raise ConfigError(f"--limit {limit}", "at least 1", "give a number of samples to look at")


def spread(samples: Sequence[Sample], limit: int) -> tuple[Sample, ...]:
    """At most `limit` of the samples that can be looked at, evenly over the data; `left_out` tells of the others.

    Raises:
        DataError: there is none.
    """
    able = [sample for sample in samples if not _hindrance(sample)]
    if not able:
        raise DataError(
            f"{len(samples)} samples: {'; '.join(left_out(samples))}",
            "some with one picture in the first question",
            "name such data",
        )
    return tuple(able[:: max(1, len(able) // limit)][:limit])


def left_out(samples: Sequence[Sample]) -> list[str]:
    """How many samples cannot be looked at, by reason. A reading is one picture, one question and its answer."""
    reasons = Counter(_hindrance(sample) for sample in samples)
    return [
        f"left out {count} sample{'' if count == 1 else 's'} {reason}" for reason, count in reasons.items() if reason
    ]


def _hindrance(sample: Sample) -> str:
    if len(sample.sources) != 1:
        return "with several pictures" if sample.sources else "without a picture"
    turns = [message for message in sample.messages if message["role"] != "system"]
    if [turn["role"] for turn in turns[:2]] != ["user", "assistant"]:
        return "not beginning with a question and its answer"
    shows = any(part["type"] == "image" for part in turns[0]["content"])
    return "" if shows else "whose picture is not in the first question"


def readings_of(samples: Sequence[Sample], store: MapStore | SeveralStores | None) -> list[AnsweredPicture]:
    """First question and answer of each sample with one picture; the words the teacher mapped, else content words."""
    readings = []
    for sample in samples:
        (image,) = sample.load()
        turns = [text_of(message["content"]) for message in sample.messages if message["role"] in ("user", "assistant")]
        prompt, answer = turns[0], turns[1]
        known = store.get(image_id(image), answer) if store is not None else None
        words = known.words if known is not None else content_words(answer, CONTENT)
        readings.append(AnsweredPicture(image, prompt, answer, words))
    return readings


def observe(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    readings: Sequence[AnsweredPicture],
    store: MapStore | SeveralStores | None,
    max_new_tokens: int = 64,
) -> Observed:
    """Run one model over the readings."""
    answers = generate_answers(
        model, processor, [one.image for one in readings], [one.prompt for one in readings], max_new_tokens
    )
    grid = store.grid if store is not None else (32, 32)
    maps = student_maps(model, processor, readings, grid)
    all_maps = torch.cat([one.maps for one in maps])
    scores = {
        "answer_nll": answer_nll(model, processor, readings),
        "content_f1": content_f1(answers, [one.answer for one in readings]),
        "entropy": entropy(all_maps).mean().item() if len(all_maps) else None,
        "map_agreement": map_agreement(maps, store) if store is not None else None,
    }
    return Observed(answers, maps, scores)


def map_agreement(maps: Sequence[WordMaps], store: MapStore | SeveralStores) -> float | None:
    """Mean Pearson correlation of a student's and the teacher's maps of the same words."""
    values = []
    for own in maps:
        known = store.get(own.image_id, own.text)
        if known is None:
            continue
        teacher = dict(zip(known.words, known.maps, strict=True))
        for word, one in zip(own.words, own.maps, strict=True):
            if word in teacher:
                values.append(correlation(one, teacher[word]))
    values = [value for value in values if not value.isnan()]  # a flat map correlates with nothing
    return torch.stack(values).mean().item() if values else None


@torch.inference_mode()
def answer_nll(
    model: PreTrainedModel, processor: ProcessorMixin, readings: Sequence[AnsweredPicture], batch_size: int = 16
) -> float:
    """Mean negative log-likelihood of the reference answers' tokens (with their end token), nats a token.

    Raises:
        NotFiniteError: the model's loss is NaN or infinite.
    """
    total, count = 0.0, 0
    for start in range(0, len(readings), batch_size):
        group = readings[start : start + batch_size]
        inputs = processor_inputs(processor, group).to(model.device)
        logits = model(**inputs).logits.float()
        for index, one in enumerate(group):
            prompt = processor.apply_chat_template(one.messages()[:1], add_generation_prompt=True, tokenize=False)
            full = processor.apply_chat_template(one.messages(), tokenize=False)
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
            "leave this model out: no score of it means anything",
        )
    return total / count


def content_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Micro F1 of the sets of content lemmas, over all samples."""
    said = [{word.lemma for word in content_words(text, CONTENT)} for text in answers]
    true = [{word.lemma for word in content_words(text, CONTENT)} for text in references]
    common = sum(len(one & other) for one, other in zip(said, true, strict=True))
    return 2 * common / max(1, sum(map(len, said)) + sum(map(len, true)))


@dataclass(frozen=True, eq=False)
class Phrase:
    """A stretch of a text that gets a row of maps in a report, and its true mask where it is known."""

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
    """Report panels: every reading with the teacher's map and each model's map of its phrases."""
    panels = []
    for index, reading in enumerate(readings):
        sources = {"teacher": teacher[index]} | {name: one.maps[index] for name, one in observed.items()}
        rows = [
            WordRow(
                phrase.text,
                {name: None if own is None else own.map_of(phrase.start, phrase.end) for name, own in sources.items()},
                phrase.mask,
            )
            for phrase in phrases[index]
        ]
        answers = {name: one.answers[index] for name, one in observed.items()}
        panels.append(Panel(reading.image, titles[index], rows, answers, truth=reading.answer))
    return panels
