"""Scores of short answers: exact match, ANLS (DocVQA, InfoVQA), relaxed accuracy (ChartQA), and OCRBench's contains."""

from __future__ import annotations

import string
from collections.abc import Sequence

from lavender.errors import ConfigError, DataError
from lavender.evaluation.scorers.scores import Scores, gold_answers, mean, mean_scores, require_texts

_FORMULAS = "Handwritten Mathematical Expression Recognition"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    ignore_case: bool = True,
    ignore_punctuation: bool = False,
) -> Scores:
    """Whether the prediction is one of the right answers, apart from space around it.

    The defaults are VLMEvalKit's `accuracy` (OCR-VQA). With the two settings this is `exact_match` of lmms-eval and of
    Hugging Face evaluate, which both keep space around answers.

    Args:
        predictions: one answer per question.
        references: one or several right answers per question.
        ignore_case: compare in lower case.
        ignore_punctuation: compare without the 32 punctuation marks of ASCII.

    Returns:
        Per sample 0 or 1. Aggregate `exact_match`, their mean.

    Raises:
        DataError: not as many references as predictions, none, or one that is not a text.
    """
    require_texts(predictions, references=references)

    def compared(answer: str) -> str:
        answer = answer.strip()
        if ignore_punctuation:
            answer = answer.translate(_NO_PUNCTUATION)
        return answer.lower() if ignore_case else answer

    return mean_scores(
        "exact_match",
        [
            float(compared(prediction) in map(compared, gold))
            for prediction, gold in zip(predictions, gold_answers(references), strict=True)
        ],
    )


def anls(predictions: Sequence[str], references: Sequence[str | Sequence[str]], threshold: float = 0.5) -> Scores:
    """Average normalised Levenshtein similarity (Biten et al. 2019): 1 − edits / length, 0 below the threshold.

    As in the official script of DocVQA and InfoVQA, edits are counted in lower case with single spaces, and the length
    is that of the longer text as it was written, in upper case: surplus space makes a wrong answer a little better.

    Args:
        predictions: one answer per question.
        references: one or several right answers per question; the best counts.
        threshold: similarities below it count as 0.

    Returns:
        Per sample 0, or from `threshold` to 1. Aggregate `anls`, their mean.

    Raises:
        ConfigError: the extra `eval` is not installed.
        DataError: not as many references as predictions, none, or one that is not a text.
    """
    require_texts(predictions, references=references)
    per_sample = []
    for prediction, gold in zip(predictions, gold_answers(references), strict=True):
        best = max(_similarity(answer, prediction) for answer in gold)
        per_sample.append(best if best >= threshold else 0.0)
    return mean_scores("anls", per_sample)


def relaxed_accuracy(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], tolerance: float = 0.05
) -> Scores:
    """Whether a number is within 5 % of the right one; other answers must match (ChartQA, Masry et al. 2022).

    As in the scorer of Pix2Struct, lmms-eval and VLMEvalKit, "50%" is the number 0.5, so "50" is wrong for "50%", and a
    right answer 0 must be met as written. Case and space around the prediction do not count.

    Args:
        predictions: one answer per question.
        references: one or several right answers per question.
        tolerance: the largest relative difference from the right number.

    Returns:
        Per sample 0 or 1. Aggregate `relaxed_accuracy`, their mean.

    Raises:
        DataError: not as many references as predictions, none, or one that is not a text.
    """
    require_texts(predictions, references=references)

    def matches(prediction: str, answer: str) -> bool:
        said, true = _number(prediction), _number(answer)
        if said is None or not true:
            return prediction.lower() == answer.lower()
        return abs(said - true) / abs(true) <= tolerance

    return mean_scores(
        "relaxed_accuracy",
        [
            float(any(matches(prediction.strip(), answer) for answer in gold))
            for prediction, gold in zip(predictions, gold_answers(references), strict=True)
        ],
    )


def ocrbench(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], question_types: Sequence[str]
) -> Scores:
    """OCRBench (Liu et al. 2023, arXiv:2305.07895): whether the prediction contains one of the right answers.

    Upper and lower case are one, a line break is a space. For handwritten formulas case counts and space does not.
    lmms-eval also takes full-width letters as ASCII; OCRBench's scorer does not, nor does this one.

    Args:
        predictions: one answer per question.
        references: one or several right answers per question.
        question_types: the data set's column of that name.

    Returns:
        Per sample 0 or 1. Aggregate `ocrbench`, the number of right answers, 0 to 1000 on the whole data set, and then
        the share of right answers by type of question.

    Raises:
        DataError: not as many references or types as predictions, none, one that is not a text, or an empty right
            answer, which every prediction contains.
    """
    require_texts(predictions, references=references, question_types=question_types)
    per_sample: list[float] = []
    by_type: dict[str, list[float]] = {}
    for index, (prediction, gold) in enumerate(zip(predictions, gold_answers(references), strict=True)):
        formula = question_types[index] == _FORMULAS
        said, *answers = (_ocr_text(text, formula) for text in (prediction, *gold))
        if "" in answers:
            raise DataError(
                f"an empty right answer of sample {index}",
                "right answers with text: every prediction contains an empty one",
                "correct the sample's answers, or leave it out of the evaluation",
            )
        per_sample.append(float(any(answer in said for answer in answers)))
        by_type.setdefault(question_types[index], []).append(per_sample[-1])
    shares = {name: mean(values) for name, values in sorted(by_type.items())}
    return Scores(tuple(per_sample), {"ocrbench": sum(per_sample), **shares})


def _similarity(answer: str, prediction: str) -> float:
    try:
        from rapidfuzz.distance import Levenshtein
    except ModuleNotFoundError as error:
        got = "no package rapidfuzz, which ANLS needs"
        raise ConfigError(got, "the packages of the extra `eval`", "pip install 'lavender-vlm[eval]'") from error
    edits = Levenshtein.distance(*(" ".join(text.lower().split()) for text in (answer, prediction)))
    length = max(len(answer.upper()), len(prediction.upper()))
    return 1 - edits / length if length else 1.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _ocr_text(text: str, formula: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if formula else text.lower()
