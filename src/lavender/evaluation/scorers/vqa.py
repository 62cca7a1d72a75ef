"""VQA accuracy: how many of the people who were asked gave the model's answer (VQAv2, OK-VQA, TextVQA, VizWiz)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from lavender.errors import ConfigError
from lavender.evaluation.scorers.scores import Scores, gold_answers, mean, mean_scores, require_texts

Rule = Literal["vqaeval", "lmms-eval", "evalai"]
_RULES = ("vqaeval", "lmms-eval", "evalai")
_AGREEING = 3  # so many other people with the same answer make it fully right
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset(["a", "an", "the"])
_PUNCTUATION = r""";/[]"{}()=+\_-><@`,?!"""
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_COMMAS_IN_NUMBER = re.compile(r"\d,+\d")
_STOP = re.compile(r"\.(?!\d)")
# The spellings that VQAv2's scorer corrects; a word with several apostrophes may lack any one of them.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll "
    "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd "
    "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've "
    "'ow's'at"
)
_CORRECTED = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTIONS.split()
    for index, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # as VQAv2's scorer has it


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]], rule: Rule = "vqaeval") -> Scores:
    """VQA accuracy (Antol et al. 2015): min(1, people with the model's answer / 3), each person left out in turn.

    Args:
        predictions: one answer per question.
        references: the answers of people per question, ten in VQAv2, each as often as it was given.
        rule: whose normalisation of answers.
            "vqaeval": VQAv2's own scorer, which OpenFlamingo uses too. Where all people gave the same answer, it
            compares as written: "Yes" is then wrong if they all wrote "yes".
            "lmms-eval": the same normalisation for every question; lmms-eval for VQAv2. VLMEvalKit differs in one
            thing: it keeps the stop of "5.".
            "evalai": with "'s" as a word of its own as well; lmms-eval for TextVQA and VizWiz.

    Returns:
        Per sample 0 to 1. Aggregate `vqa_accuracy`, their mean.

    Raises:
        ConfigError: an unknown rule.
        DataError: not as many references as predictions, none, one that is not a text, or a question with fewer than 4
            answers: none could then be fully right. `exact_match` is for questions with fewer.
    """
    if rule not in _RULES:
        raise ConfigError(f"rule={rule!r}", f"one of {', '.join(_RULES)}", "change rule")
    require_texts(predictions, references=references)
    per_sample = []
    for prediction, gold in zip(predictions, gold_answers(references, at_least=_AGREEING + 1), strict=True):
        said, *people = (_one_line(answer) for answer in (prediction, *gold))
        if rule != "vqaeval" or len(set(people)) > 1:
            said, *people = (vqa_normalized(answer, rule) for answer in (said, *people))
        agreeing = people.count(said)
        left_out = [agreeing - (person == said) for person in people]
        per_sample.append(mean([min(1, others / _AGREEING) for others in left_out]))
    return mean_scores("vqa_accuracy", per_sample)


def vqa_normalized(answer: str, rule: Rule = "vqaeval") -> str:
    """An answer in lower case, without articles and punctuation, with digits for "none" to "ten".

    Apostrophes are added to words such as "dont". Punctuation beside a space is removed, other punctuation becomes a
    space; if the answer has a number such as "1,000", all is removed.
    """
    commas = _COMMA_IN_NUMBER if rule == "vqaeval" else _COMMAS_IN_NUMBER
    if rule == "evalai":
        answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    words = [_DIGITS.get(word, word) for word in without_punctuation(_one_line(answer), commas).lower().split()]
    return " ".join(_CORRECTED.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str, comma_in_number: re.Pattern[str] = _COMMA_IN_NUMBER) -> str:
    """A text as VQAv2's scorer compares it: marks beside a space are removed, others become a space, "3.5" stays."""
    number = comma_in_number.search(text) is not None
    written = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        written = written.replace(mark, "" if beside_space or number else " ")
    return _STOP.sub("", written)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
