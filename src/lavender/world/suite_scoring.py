"""Scores of the world's tasks in lmms-eval: each task's `process_results`, and the aggregation of each metric.

`process_results` gives each metric of a document a `Scored`, whose "score" is what the sample counts where a mean over
samples is the metric. The aggregations hand all predictions to `lavender.evaluation.scorers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from string import whitespace
from typing import Any, TypedDict

from lavender.evaluation.answers import exact_set, micro_f1, names_said
from lavender.evaluation.scorers import Scores, anls, bleu, cider, exact_match, rouge_l, yes_no
from lavender.world.sprites import NAMES


class Scored(TypedDict, total=False):
    """One prediction. "score" is missing where the metric is none of single samples, such as CIDEr."""

    prediction: str
    answers: list[str]
    names: list[str]
    score: float


Scorer = Callable[[Sequence[str], Sequence[Any]], Scores]
_FORMS = ("left", "top", "beside", "right", "bottom", "either", "see")
_CAPTIONS: dict[str, Scorer] = {"cider": cider, "bleu_4": bleu, "rouge_l": rouge_l}
_READ: Scorer = partial(yes_no, rule="vlmevalkit")
"""The word yes or the word no. By POPE's own rule a caption in place of an answer would be a yes."""
_YES_NO = ("accuracy", "precision", "recall", "f1", "share_of_yes", "share_of_other")


def _short(prediction: str) -> str:
    """An answer without the full stop that ends it, and without space: some students end answers as captions end."""
    return prediction.strip(f"{whitespace}.")


def process_caption(doc: dict[str, Any], results: list[str]) -> dict[str, Scored]:
    """F1 of the names said, and whether they are exactly those there; CIDEr, BLEU-4, ROUGE-L against the captions."""
    scored: Scored = {"prediction": results[0], "answers": list(doc["answers"]), "names": list(doc["names"])}
    said, there = [names_said(results[0], NAMES)], [set(doc["names"])]
    return {
        "names_f1": {**scored, "score": micro_f1(said, there)},
        "names_micro_f1": scored,
        "names_exact": {**scored, "score": exact_set(said, there)},
        **dict.fromkeys(_CAPTIONS, scored),
    }


def process_answer(doc: dict[str, Any], results: list[str]) -> dict[str, Scored]:
    """Exact match, and exact match of the question's form where the task has several."""
    scored = _scored(doc, results, exact_match)
    form = {f"exact_match_{doc['form']}": scored} if doc["form"] in _FORMS else {}
    return {"exact_match": scored, **form}


def process_reading(doc: dict[str, Any], results: list[str]) -> dict[str, Scored]:
    """Exact match and ANLS; exact match apart for words that no sign of the fine-tuning split says."""
    scored = _scored(doc, results, exact_match)
    withheld = {"exact_match_withheld": scored} if doc["form"] == "read a withheld word" else {}
    return {"exact_match": scored, "anls": _scored(doc, results, anls), **withheld}


def process_yes_no(doc: dict[str, Any], results: list[str]) -> dict[str, Scored]:
    """POPE's numbers; an answer that is neither yes nor no is wrong, and is counted apart."""
    scored = _scored(doc, results, _READ)
    without: Scored = {"prediction": scored["prediction"], "answers": scored["answers"]}
    return {"accuracy": scored, **dict.fromkeys(_YES_NO[1:], without)}


def _scored(doc: dict[str, Any], results: list[str], scorer: Scorer) -> Scored:
    prediction, answers = _short(results[0]), list(doc["answers"])
    reference = answers[0] if scorer is _READ else answers
    (score,) = scorer([prediction], [reference]).per_sample
    return {"prediction": prediction, "answers": answers, "score": score}


def mean(scored: Sequence[Scored]) -> float:
    """The mean over the samples."""
    return sum(one["score"] for one in scored) / len(scored)


def names_micro_f1(scored: Sequence[Scored]) -> float:
    """F1 of the names, of sums over all captions: the evidence's "F1 of names"."""
    return micro_f1([names_said(one["prediction"], NAMES) for one in scored], [set(one["names"]) for one in scored])


def _of_corpus(scored: Sequence[Scored], metric: str) -> float | None:
    predictions, references = [one["prediction"] for one in scored], [one["answers"] for one in scored]
    return _CAPTIONS[metric](predictions, references).aggregate[metric]


def _of_answers(scored: Sequence[Scored], metric: str) -> float | None:
    return _READ([one["prediction"] for one in scored], [one["answers"][0] for one in scored]).aggregate[metric]


cider_of, bleu_4_of, rouge_l_of = (partial(_of_corpus, metric=metric) for metric in _CAPTIONS)
accuracy, precision, recall, f1, share_of_yes, share_of_other = (partial(_of_answers, metric=name) for name in _YES_NO)
