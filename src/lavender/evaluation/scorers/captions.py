"""CIDEr, BLEU-4 and ROUGE-L of captions, with the values of COCO's caption evaluation (pycocoevalcap).

Written from the papers: COCO's package has 100 MB, needs Java, and its BLEU file forbids commercial use. The tokens are
those of COCO's PTBTokenizer, see `ptb_tokens`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from lavender.evaluation.scorers.ptb_tokens import ptb_tokens
from lavender.evaluation.scorers.scores import Scores, gold_answers, mean_scores, require_texts

_ORDERS = 4  # n-grams of 1 to 4 tokens
_CIDER_SIGMA = 6.0  # of the Gaussian penalty for a difference in length, in tokens
_ROUGE_BETA = 1.2  # how much recall counts more than precision
# COCO's smoothing of BLEU: a match count of 0 gives almost 0, and 0 of 0 n-grams gives no error
_TINY, _SMALL = 1e-15, 1e-9

Tokenizer = Callable[[str], list[str]]
_Counts = Counter[tuple[str, ...]]


def cider(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], tokenize: Tokenizer = ptb_tokens
) -> Scores:
    """CIDEr-D, what COCO's evaluation calls CIDEr (Vedantam et al. 2015, arXiv:1411.5726).

    The weights of the n-grams come from the references of all samples. So a sample's score depends on the others, and a
    single sample always has score 0, as in COCO's code.

    Args:
        predictions: one caption per sample.
        references: the captions of people, one or several per sample.
        tokenize: how a caption becomes words.

    Returns:
        Per sample 0 to 10. Aggregate `cider`, their mean; papers often give it times 100.

    Raises:
        DataError: not as many references as predictions, none, or one that is not a text.
    """
    require_texts(predictions, references=references)
    golds = [[_ngrams(tokenize(one)) for one in gold] for gold in gold_answers(references)]
    samples_with: Counter[tuple[str, ...]] = Counter()
    for gold in golds:
        samples_with.update({ngram for counts in gold for ngram in counts})

    def vector(counts: _Counts) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """The tf-idf weights by order, their norms, and the number of bigrams, which COCO's code takes as length."""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            idf = math.log(len(predictions)) - math.log(max(1, samples_with[ngram]))
            weights[len(ngram) - 1][ngram] = count * idf
        norms = [math.sqrt(sum(weight * weight for weight in order.values())) for order in weights]
        return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    per_sample = []
    for prediction, gold in zip(predictions, golds, strict=True):
        said, said_norms, said_length = vector(_ngrams(tokenize(prediction)))
        similarity = 0.0
        for counts in gold:
            true, true_norms, true_length = vector(counts)
            penalty = math.exp(-((said_length - true_length) ** 2) / (2 * _CIDER_SIGMA**2))
            for order in range(_ORDERS):
                norm = said_norms[order] * true_norms[order]
                if norm:
                    # clipped: repeating a right n-gram gains nothing
                    common = sum(
                        min(weight, true[order].get(n, 0.0)) * true[order].get(n, 0.0)
                        for n, weight in said[order].items()
                    )
                    similarity += penalty * common / norm
        per_sample.append(10 * similarity / _ORDERS / len(gold))
    return mean_scores("cider", per_sample)


def bleu(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], tokenize: Tokenizer = ptb_tokens
) -> Scores:
    """BLEU-4 (Papineni et al. 2002), with the reference length that is closest to the prediction's.

    Args:
        predictions: one caption per sample.
        references: the captions of people, one or several per sample.
        tokenize: how a caption becomes words.

    Returns:
        Per sample the caption's own BLEU-4, 0 to 1, almost 0 without a common 4-gram. Aggregate `bleu_4` and `bleu_1`
        to `bleu_3`: those of the corpus, from sums over all samples, not the mean of `per_sample`.

    Raises:
        DataError: not as many references as predictions, none, or one that is not a text.
    """
    require_texts(predictions, references=references)
    per_sample = []
    total = Counter[str]()
    for prediction, gold in zip(predictions, gold_answers(references), strict=True):
        statistics = _bleu_statistics(tokenize(prediction), [tokenize(one) for one in gold])
        total.update(statistics)
        per_sample.append(_bleu_from(statistics)[-1])
    by_order = _bleu_from(total)
    return Scores(tuple(per_sample), {f"bleu_{order}": by_order[order - 1] for order in (4, 1, 2, 3)})


def rouge_l(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], tokenize: Tokenizer = ptb_tokens
) -> Scores:
    """ROUGE-L (Lin 2004): F of the longest common subsequence, recall weighted by β = 1.2.

    As in COCO's code, the best precision and the best recall may come from different references.

    Args:
        predictions: one caption per sample.
        references: the captions of people, one or several per sample.
        tokenize: how a caption becomes words.

    Returns:
        Per sample 0 to 1. Aggregate `rouge_l`, their mean.

    Raises:
        DataError: not as many references as predictions, none, or one that is not a text.
    """
    require_texts(predictions, references=references)
    per_sample = []
    for prediction, gold in zip(predictions, gold_answers(references), strict=True):
        # COCO's code takes an empty caption as one empty token: equal to another empty caption, to nothing else
        said = tokenize(prediction) or [""]
        trues = [tokenize(one) or [""] for one in gold]
        common = [_longest_common_subsequence(said, true) for true in trues]
        precision = max(common) / len(said)
        recall = max(length / len(true) for length, true in zip(common, trues, strict=True))
        weighted = recall + _ROUGE_BETA**2 * precision
        per_sample.append((1 + _ROUGE_BETA**2) * precision * recall / weighted if weighted else 0.0)
    return mean_scores("rouge_l", per_sample)


def _ngrams(tokens: list[str]) -> _Counts:
    """How often each n-gram of 1 to 4 tokens occurs."""
    starts = ((order, start) for order in range(1, _ORDERS + 1) for start in range(len(tokens) - order + 1))
    return Counter(tuple(tokens[start : start + order]) for order, start in starts)


def _bleu_statistics(said: list[str], trues: list[list[str]]) -> Counter[str]:
    """Lengths, and per order the number of n-grams and of those that a reference has: they add up over samples."""
    most: _Counts = Counter()
    for true in trues:
        most |= _ngrams(true)
    matches = _ngrams(said) & most
    closest = min((abs(len(true) - len(said)), len(true)) for true in trues)[1]
    statistics = Counter({"length": len(said), "reference length": closest})
    for order in range(1, _ORDERS + 1):
        statistics[f"ngrams {order}"] = max(0, len(said) - order + 1)
        statistics[f"matches {order}"] = sum(count for ngram, count in matches.items() if len(ngram) == order)
    return statistics


def _bleu_from(statistics: Counter[str]) -> list[float]:
    """BLEU-1 to BLEU-4."""
    ratio = (statistics["length"] + _TINY) / (statistics["reference length"] + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, by_order = 1.0, []
    for order in range(1, _ORDERS + 1):
        product *= (statistics[f"matches {order}"] + _TINY) / (statistics[f"ngrams {order}"] + _SMALL)
        by_order.append(product ** (1 / order) * brevity)
    return by_order


def _longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Its length in tokens."""
    lengths = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for index, other in enumerate(second, 1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if token == other else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]
