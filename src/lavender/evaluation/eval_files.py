"""What `lavender eval` writes into a run folder: the scores (eval.json), and what each model does on each sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavender.errors import DataError
from lavender.evaluation.compare import Judged
from lavender.files import write_whole

SCORES, SAMPLES = "eval.json", "eval.jsonl"
_KEYS = {"data", "maps", "against", "samples", "arms", "notes"}


@dataclass(frozen=True)
class EvaluatedSample:
    """A line of eval.jsonl.

    Attributes:
        sample: the sample's name, as the data set's reader gives it.
        picture: its `lavender.data.images.image_id`.
        reference: the reference answer.
        judged: model name → what it does on this sample.
    """

    sample: str
    picture: str
    reference: str
    judged: dict[str, Judged]


@dataclass(frozen=True)
class Evaluation:
    """The scores of several models, and their samples.

    Attributes:
        scored: the content of eval.json.
        samples: the lines of eval.jsonl; None if `lavender eval` of an earlier version wrote none.
    """

    scored: dict[str, Any]
    samples: list[EvaluatedSample] | None


def write_evaluation(run: Path, scored: Mapping[str, Any], samples: Sequence[EvaluatedSample]) -> None:
    """Write eval.jsonl, then eval.json: where this is, the other is complete."""
    lines = []
    for one in samples:
        models = {name: {"answer": judged.answer, "tallies": judged.tallies} for name, judged in one.judged.items()}
        line = {"sample": one.sample, "picture": one.picture, "reference": one.reference, "models": models}
        lines.append(json.dumps(line) + "\n")
    (run / SCORES).unlink(missing_ok=True)
    write_whole(run / SAMPLES, "".join(lines))
    write_whole(run / SCORES, json.dumps(scored, indent=1))


def read_evaluation(run: Path) -> Evaluation | None:
    """What `write_evaluation` wrote; None if there is no eval.json.

    Raises:
        DataError: a file is damaged.
    """
    path = run / SCORES
    if not path.is_file():
        return None
    try:
        scored = json.loads(path.read_text())
    except ValueError:
        scored = None
    if scored is None or not _is_whole(scored):
        raise _damaged(path, run)
    if not (run / SAMPLES).is_file():
        return Evaluation(scored, None)
    try:
        samples = [_sample_of(json.loads(line)) for line in (run / SAMPLES).read_text().splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(run / SAMPLES, run) from error
    names, arms = list(next(iter(scored["arms"].values()))), list(scored["arms"])
    is_same = all(list(one.judged) == arms for one in samples)
    has_scores = all(list(judged.tallies) == names for one in samples for judged in one.judged.values())
    if len(samples) != scored["samples"] or not is_same or not has_scores:
        raise _damaged(run / SAMPLES, run)
    return Evaluation(scored, samples)


def _is_whole(scored: Any) -> bool:
    """Whether the content of eval.json has all that is read from it, and the same scores for each model."""
    if not isinstance(scored, dict) or not scored.keys() >= _KEYS or not isinstance(scored["data"], str):
        return False
    teacher, arguments = scored.get("teacher") or {}, scored.get("arguments", {})
    if not isinstance(teacher, dict) or not isinstance(arguments, dict):
        return False
    limit = scored.get("limit", 1)  # an earlier version wrote none
    if type(limit) is not int or limit < 1 or ("fingerprint_of_data" in scored and "limit" not in scored):
        return False
    maps = scored["maps"] or []
    fingerprints = scored.get("fingerprints_of_maps", maps)  # an earlier version wrote none
    arms, lists = scored["arms"], (scored["against"], scored["notes"], maps, fingerprints)
    if not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in lists):
        return False
    if len(fingerprints) != len(maps):
        return False
    if not isinstance(arms, dict) or not arms or not all(isinstance(scores, dict) for scores in arms.values()):
        return False
    values = [value for scores in (*arms.values(), teacher) for value in scores.values()]
    are_numbers = all(value is None or isinstance(value, int | float) for value in values)
    return are_numbers and len({tuple(scores) for scores in arms.values()}) == 1


def _sample_of(line: Mapping[str, Any]) -> EvaluatedSample:
    judged = {
        str(name): Judged(
            str(one["answer"]), {key: (float(total), float(weight)) for key, (total, weight) in one["tallies"].items()}
        )
        for name, one in line["models"].items()
    }
    return EvaluatedSample(str(line["sample"]), str(line["picture"]), str(line["reference"]), judged)


def _damaged(path: Path, run: Path) -> DataError:
    return DataError(f"{path}, which is damaged", "what `lavender eval` wrote", f"run `lavender eval {run}` again")
