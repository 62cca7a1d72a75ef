"""Yes/no benchmarks: POPE's rates, MME's pairs, and HallusionBench's groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

from lavender.errors import ConfigError, DataError
from lavender.evaluation.scorers.scores import Scores, mean, require_texts
from lavender.evaluation.scorers.vqa import without_punctuation

Answer = Literal["yes", "no", "other"]
Rule = Literal["vlmevalkit", "pope", "mme", "exact"]
_PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
_COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
_GOLD: dict[str, Answer] = {"yes": "yes", "no": "no", "1": "yes", "0": "no"}
_FIGURE = ("category", "subcategory", "set_id", "figure_id")
_QUESTION = ("category", "subcategory", "set_id", "question_id")


def read_yes_no(text: str, rule: Rule) -> Answer:
    """The answer in a text.

    Args:
        text: what the model wrote.
        rule: whose reading. "I'm not able to say" refuses: it is other by three rules, and no by "pope".
            "vlmevalkit": the word yes or the word no, in any case, but not both; VLMEvalKit for all three benchmarks.
            "pope": no if the first sentence has the word "No", "no" or "not", else yes, even for an empty text; POPE's
            evaluate.py.
            "mme": yes or no within the first four characters, so "know" is a no; MME's calculation.py.
            "exact": the whole text, apart from case and space around it; lmms-eval for POPE.

    Raises:
        ConfigError: an unknown rule.
    """
    if rule not in _READERS:
        raise ConfigError(f"rule={rule!r}", f"one of {', '.join(_READERS)}", "change rule")
    return _READERS[rule](text)


def yes_no(predictions: Sequence[str], references: Sequence[str], rule: Rule = "pope") -> Scores:
    """Accuracy, precision, recall and F1 of "yes", and the share of yes (POPE, Li et al. 2023, arXiv:2305.10355).

    An answer that is neither yes nor no is wrong, and missed where yes is right, as in VLMEvalKit. lmms-eval leaves
    such an answer out of recall, and its share of yes is that of the references.

    Args:
        predictions: one answer per question.
        references: "yes" or "no" per question, in any case.
        rule: how an answer is read, see `read_yes_no`.

    Returns:
        Per sample 1 if right. Aggregate `accuracy`, `precision`, `recall`, `f1`, `share_of_yes` and `share_of_other`, 0
        to 1. A rate of nothing is 0: precision if no answer is yes.

    Raises:
        ConfigError: an unknown rule.
        DataError: not as many references as predictions, none, or a reference that is neither yes nor no.
    """
    said, true = _read(predictions, references, rule)
    pairs = Counter(zip(said, true, strict=True))
    hits, said_yes, true_yes = pairs["yes", "yes"], said.count("yes"), true.count("yes")
    per_sample = tuple(float(one == other) for one, other in zip(said, true, strict=True))
    aggregate: dict[str, float | None] = {
        "accuracy": mean(per_sample),
        "precision": hits / said_yes if said_yes else 0.0,
        "recall": hits / true_yes if true_yes else 0.0,
        "f1": 2 * hits / (said_yes + true_yes) if hits else 0.0,
        "share_of_yes": said_yes / len(said),
        "share_of_other": said.count("other") / len(said),
    }
    return Scores(per_sample, aggregate)


def mme(
    predictions: Sequence[str],
    references: Sequence[str],
    categories: Sequence[str],
    images: Sequence[Hashable],
    rule: Rule = "mme",
) -> Scores:
    """MME (Fu et al. 2023, arXiv:2306.13394): accuracy plus accuracy+, in percent, summed over the categories.

    Accuracy+ is the share of images whose two questions are both answered right.

    Args:
        predictions: one answer per question.
        references: "yes" or "no" per question.
        categories: the data set's category of each question, such as "OCR".
        images: an id of each question's image. An image has two questions in a category.
        rule: how an answer is read, see `read_yes_no`.

    Returns:
        Per sample 1 if right. Aggregate `mme`, the sum over the categories, 0 to 2800 on the whole data set;
        `perception`, 0 to 2000, and `cognition`, 0 to 800; then each category's score, 0 to 200, with its
        `.accuracy` and `.accuracy_plus`, 0 to 1. Categories without questions add nothing.

    Raises:
        ConfigError: an unknown rule.
        DataError: not as many references, categories or images as predictions, none, a reference that is neither yes
            nor no, a category that MME does not have, or an image without exactly two questions.
    """
    require_texts(predictions, categories=categories, images=images)
    said, true = _read(predictions, references, rule)
    per_sample = tuple(float(one == other) for one, other in zip(said, true, strict=True))
    by_image: dict[str, dict[Hashable, list[float]]] = {}
    for score, category, image in zip(per_sample, categories, images, strict=True):
        if category not in (*_PERCEPTION, *_COGNITION):
            known = ", ".join((*_PERCEPTION, *_COGNITION))
            raise DataError(f"the category {category!r}", f"one of {known}", "give the data set's column `category`")
        by_image.setdefault(category, {}).setdefault(image, []).append(score)
    scores: dict[str, float] = {}
    parts: dict[str, float | None] = {}
    for category, pairs in by_image.items():
        for image, pair in pairs.items():
            if len(pair) != 2:
                raise DataError(
                    f"{len(pair)} question{'s' * (len(pair) > 1)} about image {image!r} in {category}",
                    "two: MME scores pairs of questions",
                    "score the whole category, and give each image its own id",
                )
        accuracy, plus = (mean([of(pair) for pair in pairs.values()]) for of in (mean, min))
        scores[category] = 100 * (accuracy + plus)
        parts |= {category: scores[category], f"{category}.accuracy": accuracy, f"{category}.accuracy_plus": plus}
    perception, cognition = (
        sum(score for category, score in scores.items() if category in group) for group in (_PERCEPTION, _COGNITION)
    )
    return Scores(
        per_sample, {"mme": perception + cognition, "perception": perception, "cognition": cognition, **parts}
    )


def hallusion_bench(
    predictions: Sequence[str],
    references: Sequence[str],
    questions: Sequence[Mapping[str, Any]],
    rule: Rule = "vlmevalkit",
) -> Scores:
    """HallusionBench (Guan et al. 2024, arXiv:2310.14566): accuracy per question, per figure and per question pair.

    Grouped as in the official utils.py, with yes and no read from the answer where that asks GPT-4. As there, a
    question without a figure (category "VS", figure "0") is also right if the answer is neither yes nor no, and belongs
    to no figure. lmms-eval and VLMEvalKit make neither exception.

    Args:
        predictions: one answer per question.
        references: "yes" or "no", or the data set's `gt_answer`: "1" or "0".
        questions: the data set's rows, with `category`, `subcategory`, `set_id`, `figure_id` and `question_id`.
        rule: how an answer is read, see `read_yes_no`.

    Returns:
        Per sample 1 if right. Aggregate `aAcc`, the share of right questions; `fAcc`, of figures with all questions
        right, None without a figure; `qAcc`, of questions that are right for all their figures.

    Raises:
        ConfigError: an unknown rule.
        DataError: not as many references or questions as predictions, none, a reference that is neither yes nor no, a
            row without one of the columns, or two rows of the same question and figure.
    """
    require_texts(predictions, questions=questions)
    said, true = _read(predictions, references, rule)
    per_sample: list[float] = []
    figures: dict[tuple[str, ...], list[float]] = {}
    pairs: dict[tuple[str, ...], list[float]] = {}
    seen: set[tuple[str, ...]] = set()
    for index, (one, other, row) in enumerate(zip(said, true, questions, strict=True)):
        missing = [column for column in (*_FIGURE, "question_id") if column not in row]
        if missing:
            raise DataError(f"question {index} without {missing[0]!r}", "HallusionBench's columns", "pass its rows")
        figure, pair = (tuple(str(row[column]) for column in columns) for columns in (_FIGURE, _QUESTION))
        if (*figure, pair[-1]) in seen:
            raise DataError(f"question {pair[-1]} of figure {figure} twice", "each once", "leave out the second")
        seen.add((*figure, pair[-1]))
        without_figure = figure[0] == "VS" and figure[-1] == "0"
        per_sample.append(float(one == other or (without_figure and one == "other")))
        pairs.setdefault(pair, []).append(per_sample[-1])
        if not without_figure:
            figures.setdefault(figure, []).append(per_sample[-1])
    per_figure, per_pair = ([min(group) for group in groups.values()] for groups in (figures, pairs))
    per_group = {"fAcc": mean(per_figure) if per_figure else None, "qAcc": mean(per_pair)}
    return Scores(tuple(per_sample), {"aAcc": mean(per_sample), **per_group})


def _read(predictions: Sequence[str], references: Sequence[str], rule: Rule) -> tuple[list[Answer], list[Answer]]:
    """What each prediction and each reference says."""
    require_texts(predictions, references=references)
    true: list[Answer] = []
    for index, reference in enumerate(references):
        gold = _GOLD.get(str(reference).strip().lower().rstrip("."))
        if gold is None:
            raise DataError(
                f"{reference!r} as the right answer of sample {index}",
                "yes or no",
                "correct it, or leave the sample out",
            )
        true.append(gold)
    return [read_yes_no(text, rule) for text in predictions], true


def _by_words(text: str) -> Answer:
    words = without_punctuation(text.lower()).split()
    return _the_only({"yes", "no"}.intersection(words))


def _by_first_sentence(text: str) -> Answer:
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def _by_beginning(text: str) -> Answer:
    beginning = text.lower()[:4]
    return "yes" if "yes" in beginning else "no" if "no" in beginning else "other"


def _by_whole(text: str) -> Answer:
    return _the_only({"yes", "no"} & {text.lower().strip()})


def _the_only(answers: set[str]) -> Answer:
    return "other" if len(answers) != 1 else "yes" if "yes" in answers else "no"


_READERS: dict[str, Callable[[str], Answer]] = {
    "vlmevalkit": _by_words,
    "pope": _by_first_sentence,
    "mme": _by_beginning,
    "exact": _by_whole,
}
