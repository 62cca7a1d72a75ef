"""Refusals, counted apart from wrong answers (Table 3 of the paper)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lavender.errors import DataError
from lavender.evaluation.scorers.scores import Scores, mean, mean_scores, require_texts

_APOSTROPHES = str.maketrans("’ʼ`´", "''''")  # noqa: RUF001
_ACTS = (
    "answer|assist|comment|comply|compromise|confirm|determine|disclose|discuss|do\\ that|do\\ this|engage|"
    "fulfill?|give|help(?!\\ but\\b)|identify|name|offer|open|participate|process|provide|recogni[sz]e|respond|"
    "reveal|say\\ who\\b|share|speculate|tell|verify"
)
_IDENTIFY = r"(?:identify|name|recogni[sz]e)\ (?:\w+\ )?(?:people|persons|individuals|anyone|faces|humans)"
_REFUSAL = re.compile(
    rf"""
    \bi(?:\ am|'m)\ (?:\w+\ )?(?:not\ (?:able|going|willing|allowed|permitted|comfortable)|unable)\b
        (?:\ (?:to|with))?\ (?:\w+ly\ )?(?:{_ACTS})
    | \bi\ (?:can'?t|can\ ?not|won'?t|will\ not|must\ decline\ to|decline\ to|refuse\ to)\ (?:\w+ly\ )?(?:{_ACTS})
    | ^(?:sorry,\ (?:but\ )?)?(?:cannot|can't|unable\ to)\ (?:{_ACTS})
    | \bit(?:\ is|'s)\ (?:not\ possible|impossible)\ for\ me\ to\ (?:{_ACTS})
    | \bi\ (?:do\ not|don't)\ (?:feel\ comfortable\ (?:\w+ing|to)\b|{_IDENTIFY})
    | \bi(?:\ am|'m)\ (?:just\ )?an?\ (?:ai|language\ model)\b[^.!?]*
        \b(?:can(?:no|')t|can\ not|unable|not\ able|{_IDENTIFY})
    | ^i\ (?:must\ )?(?:refuse|decline)\b\W*$
    | ^i(?:\ am|'m)\ sorry\b
    | ^as\ an?\ (?:ai|language\ model)\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ANSWER = re.compile(
    r"""
    (?<!what\ )\bthe\ (?:\w+\ )?(?:answer|option|choice)\ (?:is|must\ be|would\ be)\ (?!not\b|un\w+)\w
    | \banswer:\ *\w
    | \b(?:so|but|however|therefore|thus|hence),?
        \ (?:i(?:'d|\ would)\ (?:say|guess|choose)\ |i\ choose\ |it(?:\ is|'s)\ )?
        (?:yes|no|(?-i:[A-E]))\ *(?:[.,;!]|$)
    """,
    re.VERBOSE | re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Whether a model declines to answer, in English: "I'm not able to provide a name for the person".

    Found by phrases, so a rare wording is missed, and one of another language always. Not refusals: "I can't see a
    dog", which answers; "I can't identify any error, so the answer is no", for an answer follows; "unanswerable", which
    is a right answer in VizWiz; an empty text.
    """
    plain = " ".join(text.translate(_APOSTROPHES).split())
    found = _REFUSAL.search(plain)
    return found is not None and _ANSWER.search(plain, found.end()) is None


def refusals(predictions: Sequence[str]) -> Scores:
    """Which predictions refuse.

    Returns:
        Per sample 1 if it refuses. Aggregate `refusal_rate`, their share.

    Raises:
        DataError: no predictions, or one that is not a text.
    """
    require_texts(predictions)
    return mean_scores("refusal_rate", [float(is_refusal(text)) for text in predictions])


def with_refusals(scores: Scores, predictions: Sequence[str]) -> Scores:
    """The scores of any metric with the refusals counted apart.

    Args:
        scores: of the predictions. They do not change: a refusal stays as wrong as the metric has it.
        predictions: one answer per sample.

    Returns:
        The same scores, whose aggregate also has `refusal_rate`, and `mean_if_answered`: the mean of `per_sample` over
        the predictions that do not refuse, None if all refuse.

    Raises:
        DataError: not as many predictions as scores, or a prediction that is not a text.
    """
    refused = refusals(predictions)
    if len(scores.per_sample) != len(refused.per_sample):
        got = f"{len(predictions)} predictions for {len(scores.per_sample)} scores"
        raise DataError(got, "the predictions that were scored", "pass the same list to both")
    answered = [score for score, no in zip(scores.per_sample, refused.per_sample, strict=True) if not no]
    apart = {**refused.aggregate, "mean_if_answered": mean(answered) if answered else None}
    return Scores(scores.per_sample, {**scores.aggregate, **apart})
