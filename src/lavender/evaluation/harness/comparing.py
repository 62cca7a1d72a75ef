"""What lmms-eval found for a task: the number that is reported, the samples, and differences between checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from lavender.errors import DataError
from lavender.evaluation.harness.benchmarks import benchmark_of, scores_in
from lavender.evaluation.intervals import paired_difference
from lavender.evaluation.scorers import Scores, cider, refusals, with_refusals

_CAPTION = {"prediction", "references"}


@dataclass(frozen=True)
class Scored:
    """A task's result on one checkpoint.

    Attributes:
        task: its name.
        split: the split that was read.
        keys: the metrics whose sum is reported: those of the paper's table, else the task's first.
        metrics: name of a metric → the harness's number over all samples; None for NaN and infinite ones.
        samples: one per document: `doc_id`, `prompt`, `answer`, `target`, and `scores` by metric, with numbers only;
            None for NaN and infinite ones.
        scores: document → its score in the reported metric; empty if that gives samples no scores, such as AUROC.
        pictures: document → digest of its pictures. A document that is missing here shares them with no other.
    """

    task: str
    split: str
    keys: tuple[str, ...]
    metrics: dict[str, float | None]
    samples: list[dict[str, Any]]
    scores: dict[int, float]
    pictures: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: str,
        found: Mapping[str, Any],
        aggregations: Mapping[str, Callable[[list[Any]], Any]] | None = None,
        pictures: Mapping[int, str] | None = None,
    ) -> Scored:
        """From what `lmms_eval.evaluator.simple_evaluate` returns.

        Args:
            task: the task's name.
            found: what the evaluator returned.
            aggregations: the task's aggregations by metric, for benchmarks that are `scored_alone`.
            pictures: document → digest of its pictures.

        Raises:
            DataError: the harness gave none of the metrics that are reported.
        """
        config = found["configs"][task]
        # a task with several filters has each document once per filter; of metrics and documents the last filter counts
        logged = list({one["doc_id"]: one for one in found["samples"][task]}.values())
        metrics = {
            key.partition(",")[0]: _finite(float(value))
            for key, value in found["results"][task].items()
            if "," in key and "_stderr" not in key and isinstance(value, Real)
        }
        known = benchmark_of(task)
        keys = known.keys if known is not None else (scores_in(config["metric_list"])[0],)
        if not any(key in metrics for key in keys):
            raise DataError(
                f"the task {task} with the metrics {', '.join(metrics) or 'none'}",
                " or ".join(keys),
                "install the version of lmms-eval that docs/benchmarks.md names"
                if known is not None
                else "see that the metric's aggregation returns a number",
            )
        samples = [
            {
                "doc_id": one["doc_id"],
                "prompt": one["arguments"][0],
                "answer": one["filtered_resps"][0] if len(one["filtered_resps"]) == 1 else one["filtered_resps"],
                "target": one["target"],
                "scores": {key: _finite(score) for key in metrics if (score := _number(one.get(key))) is not None},
            }
            for one in logged
        ]
        split = str(config.get("test_split") or config.get("validation_split"))
        if known is not None and known.scored_alone and aggregations is not None:
            alone = aggregations[keys[0]]
            scores = {one["doc_id"]: float(alone([one[keys[0]]])) for one in logged if keys[0] in one}
        else:
            scores = _scores(logged, keys)
        return cls(task, split, keys, metrics, samples, scores, pictures or {})

    @property
    def missing(self) -> list[str]:
        """The metrics of the reported sum of which there was no sample."""
        return [key for key in self.keys if key not in self.metrics]

    @property
    def not_finite(self) -> list[str]:
        """The metrics of the reported sum that are NaN or infinite."""
        return [key for key in self.keys if self.metrics.get(key, 0.0) is None]

    @property
    def documents(self) -> set[int]:
        """The documents that were answered."""
        return {sample["doc_id"] for sample in self.samples}

    @property
    def num_not_finite(self) -> int:
        """How many samples have a score in the reported metric that is NaN or infinite."""
        return sum(not math.isfinite(score) for score in self.scores.values())


def reported(scored: Scored) -> float | None:
    """The number that is reported: the sum of the metrics, on the paper's scale for the paper's benchmarks.

    None if one of them is NaN or infinite.
    """
    values = [scored.metrics.get(key, 0.0) for key in scored.keys]
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    known = benchmark_of(scored.task)
    return sum(numbers) * known.scale if known is not None else sum(numbers)


def refusal_rate(scored: Scored) -> float | None:
    """The share of answers that refuse, which Table 3 of the paper counts apart.

    None for a task of options, and for a benchmark that is not in English: only English wordings are known.
    """
    texts = _texts(scored)
    return refusals(list(texts.values())).aggregate["refusal_rate"] if texts else None


def mean_if_answered(scored: Scored) -> float | None:
    """The mean score per sample of the answers that do not refuse; None if all do, or where either is not known."""
    texts = {doc: text for doc, text in _texts(scored).items() if doc in scored.scores}
    if not texts or scored.num_not_finite:
        return None
    scores = Scores(tuple(scored.scores[doc] for doc in texts), {})
    return with_refusals(scores, list(texts.values())).aggregate["mean_if_answered"]


def _texts(scored: Scored) -> dict[int, str]:
    """Document → answer, if all answers are English texts; else nothing."""
    known = benchmark_of(scored.task)
    texts = {one["doc_id"]: one["answer"] for one in scored.samples if isinstance(one["answer"], str)}
    return texts if len(texts) == len(scored.samples) and (known is None or known.english) else {}


def differences(by_arm: Mapping[str, Scored]) -> dict[str, dict[str, float | None]]:
    """The last arm minus each of the others: mean score per sample, with a 95 % interval of the paired bootstrap.

    Samples of the same pictures are not independent, so they are drawn together.

    Returns:
        Name of the other arm → `difference`, `low`, `high` and `num_units`, the number of samples with different
        pictures; `low` and `high` are None if there is one. Scores per sample are 0 to 1 in most tasks. Without
        the pairs of which an arm has a sample without a score, or with NaN.

    Raises:
        DataError: the arms were scored on other samples.
    """
    *others, last = by_arm.items()
    found = {}
    for name, other in others:
        if other.documents != last[1].documents:
            raise DataError(
                f"{len(last[1].samples)} and {len(other.samples)} samples of {other.task}, not the same ones",
                "the same samples for all models",
                "delete the task's logs, and run it again",
            )
        same = other.scores.keys() == last[1].scores.keys()
        if other.scores and same and not last[1].num_not_finite and not other.num_not_finite:
            docs, pictures = sorted(other.scores), {**other.pictures, **last[1].pictures}
            pairs = [[(arm.scores[doc], 1.0) for doc in docs] for arm in (last[1], other)]
            interval = paired_difference(*pairs, units=[pictures.get(doc, doc) for doc in docs])
            assert interval is not None
            found[name] = {key: _finite(number) for key, number in asdict(interval).items()}
    return found


def difference_of(by_arm: Mapping[str, Scored]) -> str | None:
    """What `differences` compares where that is another number than the reported one; None where it is the same.

    The reported number of MME, POPE, MMBench and others is no mean over samples.
    """
    if all(_is_mean(scored) for scored in by_arm.values()):
        return None
    values = {score for scored in by_arm.values() for score in scored.scores.values()}
    return "share of right answers" if values <= {0.0, 1.0} else "mean score per sample"


def _is_mean(scored: Scored) -> bool:
    """Whether the reported number is the mean of the samples' scores; also true where one of them is missing."""
    number, scores = reported(scored), list(scored.scores.values())
    if number is None or not scores:
        return True
    known = benchmark_of(scored.task)
    # lmms-eval rounds some numbers to four places or more
    return math.isclose(sum(scores) / len(scores), number / (known.scale if known else 1.0), abs_tol=1e-4)


def sample_lines(scored: Scored) -> Iterator[str]:
    """A line of JSON per sample. NaN, such as that of a missing target, is null."""
    return (json.dumps(_jsonable(sample), default=str, allow_nan=False) + "\n" for sample in scored.samples)


def _scores(logged: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[int, float]:
    """Document → its score. A document has at most one of the keys, as a question of MME is of one kind."""
    values = {one["doc_id"]: next((one[key] for key in keys if key in one), None) for one in logged}
    values = {doc: value for doc, value in values.items() if value is not None}
    captions = [value for value in values.values() if isinstance(value, Mapping) and value.keys() >= _CAPTION]
    if captions and len(captions) == len(values):  # a caption's CIDEr depends on all references
        scores = cider([one["prediction"] for one in captions], [one["references"] for one in captions]).per_sample
        return dict(zip(values, scores, strict=True))
    numbers = {doc: _number(value) for doc, value in values.items()}
    return (
        {doc: number for doc, number in numbers.items() if number is not None} if None not in numbers.values() else {}
    )


def _number(value: Any) -> float | None:
    """A score as a number: lmms-eval's tasks give it as it is, or under the key "score"."""
    value = value.get("score") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, Real) else None


def _finite(value: float) -> float | None:
    """The number, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    return _finite(value) if isinstance(value, float) else value
