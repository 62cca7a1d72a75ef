"""What the scores of `lavender eval` mean and which direction is better, as the command and the page say it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Score:
    """What readers need to know of a score.

    Attributes:
        better: which direction is better; "" if neither is.
        meaning: what it is, with its unit and range. It completes "NAME is …".
    """

    better: Literal["lower", "higher", ""]
    meaning: str

    @property
    def direction(self) -> str:
        return f"{self.better} is better" if self.better else "neither direction is better"


SCORES: dict[str, Score] = {
    "answer_nll": Score(
        "lower",
        "the negative log-likelihood of the reference answers, given picture and question: nats per token, the mean "
        "over all tokens, with the end token.",
    ),
    "content_f1": Score(
        "higher",
        "the overlap of the content words (lemmas of nouns, adjectives and verbs) of the model's greedy answers, cut "
        "off after 64 tokens, and of the reference answers: micro F1, from 0 to 1. It knows no synonyms, and does not "
        "count answers without such words: yes and no, numbers, letters, other scripts than Latin.",
    ),
    "entropy": Score(
        "",
        "how widely the attention is spread over the picture where the model predicts a word: nats (Eq. 23), the mean "
        "over words. A uniform map has ln(number of cells).",
    ),
    "map_agreement": Score(
        "higher",
        "how well the model's attention follows the teacher's maps: Pearson correlation over cells, from −1 to 1, the "
        "mean over words. It does not say whether the maps or the answers are right.",
    ),
}
WORDS = (
    "entropy and map_agreement are of the attention of all layers and heads, before any Aligner, at every word of the "
    "reference answers that has a map, whatever `match` a run was trained with: so all models have the same words."
)


def explained(names: Iterable[str]) -> list[str]:
    """A line per score that is known here, "NAME (lower is better): …"; and one on the words that count."""
    known = [name for name in names if name in SCORES]
    lines = [f"{name} ({SCORES[name].direction}): {SCORES[name].meaning}" for name in known]
    return [*lines, WORDS] if {"entropy", "map_agreement"} & set(known) else lines


def judged(name: str, difference: float) -> str:
    """ "better" or "worse", for a difference of a score; "higher" or "lower" where neither direction is better."""
    rises = difference > 0
    better = SCORES[name].better if name in SCORES else ""
    if not better:
        return "higher" if rises else "lower"
    return "better" if rises == (better == "higher") else "worse"
