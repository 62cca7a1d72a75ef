"""Multiple choice, with the letter read from the answer or taken as written (MMBench, MMMU, AI2D, ScienceQA, …)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

from lavender.errors import DataError
from lavender.evaluation.scorers.scores import Scores, mean, require_texts
from lavender.evaluation.scorers.short_answers import exact_match

_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
# beyond VLMEvalKit's rules, of texts in NFKC: a letter after or before such words, but not after "not", as in 不选B
_STATED = re.compile(
    r"""
    (?:
        (?:答案|正确选项|答え|正解|回答)\W*(?:是|为|應該是|应该是|應為|应为|は)?
        | (?<!不)(?<!别)(?:选择|選擇|选项|選項|选|選)\W*(?:是|为)?
        | (?:resposta|respuesta|alternativa|opção|opción|letra)
          (?:\s+(?:correta|correcta|certa|é|es|seria|sería|a|la|letra|alternativa|opção|opción))*
        | (?:התשובה|תשובה)(?:\s+הנכונה)?(?:\s+היא)?
    )
    [\W_]*(?-i:([A-Z]))(?![A-Za-z0-9])
    | (?<![A-Za-z0-9])(?-i:([A-Z]))(?=\s*(?:です|が正解|项|項|选项|選項))
    """,
    re.VERBOSE | re.IGNORECASE,
)
_EAST_ASIAN_SEPARATORS = str.maketrans(dict.fromkeys("。、「」『』【】〈〉《》・", " "))
_LAST = 4  # a single letter counts among so many last words
# what VLMEvalKit takes as no answer, whatever letters it has
_NO_ANSWER = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def multiple_choice(
    predictions: Sequence[str],
    references: Sequence[str],
    options: Sequence[Sequence[str]],
    extract: bool = True,
    other_languages: bool = False,
) -> Scores:
    """Whether the model chose the right option.

    Args:
        predictions: one answer per question.
        references: the right option's letter per question.
        options: the texts of each question's options, in the order of their letters A, B, C, …
        extract: find the letter in the answer by `extract_choice`, VLMEvalKit's rules. Otherwise the answer must be the
            letter, apart from case, punctuation and space around it: lmms-eval's `exact_match` with `ignore_case` and
            `ignore_punctuation`.
        other_languages: see `extract_choice`.

    Returns:
        Per sample 0 or 1. Aggregate `accuracy`, their mean; with `extract` also `share_without_choice`, the share of
        answers in which no option was found.

    Raises:
        DataError: not as many references or options as predictions, none, or a reference that is not one of the
            letters.
    """
    require_texts(predictions, references=references, options=options)
    for index, (reference, texts) in enumerate(zip(references, options, strict=True)):
        if reference not in _letters(texts):
            raise DataError(
                f"{reference!r} as the right answer of sample {index}",
                f"the letter of one of its {len(texts)} options, as in 'A'",
                "give the letter, not the option's text or number",
            )
    if not extract:
        scores = exact_match(predictions, references, ignore_punctuation=True)
        return Scores(scores.per_sample, {"accuracy": scores.aggregate["exact_match"]})
    pairs = zip(predictions, options, strict=True)
    chosen = [extract_choice(text, texts, other_languages) for text, texts in pairs]
    per_sample = tuple(float(letter == reference) for letter, reference in zip(chosen, references, strict=True))
    return Scores(per_sample, {"accuracy": mean(per_sample), "share_without_choice": chosen.count(None) / len(chosen)})


def extract_choice(text: str, options: Sequence[str], other_languages: bool = False) -> str | None:
    """The letter of the option that an answer chooses, as VLMEvalKit finds it without a judge model.

    The first of these that holds:

    1. Exactly one option's letter occurs as a word, in upper case, and first among the last four words.
    2. The text has "answer is A", to D.
    3. Exactly one option's text occurs, in any case, and the answer is at most twice as long as all options together.

    So "A dog" chooses A, as in VLMEvalKit.

    Args:
        text: what the model wrote.
        options: the options' texts, in the order of their letters.
        other_languages: also find the letter in Chinese, Japanese, Portuguese, Spanish and Hebrew answers, which
            VLMEvalKit leaves to its judge: "答案是B。", "选B", "正解はB", "A resposta é B". Full-width letters
            and marks are taken as ASCII (Unicode NFKC), and "。" or "、" ends a word.

    Returns:
        The letter, or None: VLMEvalKit counts such an answer as wrong if it has no judge model.

    Raises:
        DataError: more than 26 options.
    """
    letters = _letters(options)
    if not other_languages:
        return _by_vlmevalkit(text, options, letters)
    text, *options = (unicodedata.normalize("NFKC", one).strip() for one in (text, *options))
    stated = {letter for pair in _STATED.findall(text) for letter in pair if letter in letters}
    if stated:  # before the other rules: the "A" of "A resposta é B" is an article
        return stated.pop() if len(stated) == 1 else None
    return _by_vlmevalkit(text.translate(_EAST_ASIAN_SEPARATORS), options, letters)


def _by_vlmevalkit(text: str, options: Sequence[str], letters: Sequence[str]) -> str | None:
    if any(phrase in text for phrase in _NO_ANSWER):
        return None
    words = text.translate(_SEPARATORS).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST:
        return found[0]
    if not found and "Z" in words:  # VLMEvalKit's letter for "none of the options"
        return None
    stated = _ANSWER_IS.search(text)
    if stated and stated[1].upper() in letters:
        return stated[1].upper()
    answer = text.lower()
    texts = [option.lower() for option in options]
    if len(answer) > 2 * sum(map(len, texts)):
        return None
    found = [letter for letter, option in zip(letters, texts, strict=True) if option and option in answer]
    return found[0] if len(found) == 1 else None


def _letters(options: Sequence[str]) -> list[str]:
    if isinstance(options, str) or not 1 <= len(options) <= len(string.ascii_uppercase):
        got = "one text" if isinstance(options, str) else str(len(options))
        raise DataError(f"{got} as the options of a question", "1 to 26 texts", "correct the question's options")
    return list(string.ascii_uppercase[: len(options)])
