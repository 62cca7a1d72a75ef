"""What `lavender eval --tasks` prints: scores, differences, the paper's numbers, and settings for VLMEvalKit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavender.errors import ConfigError
from lavender.evaluation.harness.benchmarks import GROUPS, PAPER_MODELS, Benchmark
from lavender.files import expanded
from lavender.students.registry import VLMEVALKIT

WIDTH = 80
"""The most columns of a line."""
_TASK, _COUNT = 23, 8
_PAIR, _INTERVAL = 26, 24
_ARM, _ARMS_PER_TABLE = 12, 4
_SHORT = ("base", "LoRA", "Lav. LoRA", "full", "Lav. full")


def result_lines(result: Mapping[str, Any], width: int | None = None) -> Iterator[str]:
    """The result of `evaluate_tasks` as lines: scores, differences, and the paper's numbers.

    Args:
        width: the most columns of a line, at least 45; None for 80.
    """
    width = min(width or WIDTH, WIDTH)
    arms, tasks = list(result["arms"]), result["tasks"]
    per_table = max(1, min(_ARMS_PER_TABLE, (width - _TASK - _COUNT) // _ARM))
    labels = _labels(arms, min(len(arms), per_table), width)
    for arm, label in labels.items():
        if label != arm:
            yield f"{label} {arm}"
    for start in range(0, len(arms), per_table):
        shown = arms[start : start + per_table]
        heads = [labels[arm] for arm in shown]
        cell = min(max(_ARM, *(len(head) + 2 for head in heads)), _widest(len(shown), width))
        yield _row("task", "samples", *heads, cell=cell)
        for name, task in tasks.items():
            scores = (_score(task["scores"][arm], task["scorer"] != "") for arm in shown)
            yield _row(name, str(task["samples"]), *scores, cell=cell)
        yield ""
    yield "What is scored"
    for name, task in tasks.items():
        yield _cut(f"{name:<{_TASK}}  {task['metric']}; {task['split']}", width)
    yield ""
    if any(task["differences"] for task in tasks.values()):
        yield "Mean score per sample, times 100: difference, 95 % interval (paired bootstrap)"
        for name, task in tasks.items():
            for other, found in task["differences"].items():
                pair = _pair(labels[arms[-1]], labels[other])
                pair = f"{_cut(name, _TASK):<{_TASK}}  {pair:<{_PAIR}}"
                if width < _TASK + _PAIR + _INTERVAL + 4:
                    yield pair.rstrip()
                    pair = ""
                yield f"{pair}  {_interval(found)}"
            if task["differences"] and task["difference_of"]:
                yield _cut(f"{'':<{_TASK}}  ({task['difference_of']})", width)
        yield ""
    known = {name: task for name, task in tasks.items() if task["paper"]}
    if known:
        yield "The paper, Table 1: Llama-3.2-11B with VLMEvalKit"
        papers = list(zip(_SHORT, PAPER_MODELS, strict=True))
        together = max(1, (width - _TASK - _COUNT) // 9)
        for start in range(0, len(papers), together):
            shown = papers[start : start + together]
            yield _row("", "", *(head for head, _ in shown), cell=9)
            for name, task in known.items():
                yield _row(name, "", *(_score(task["paper"][model], True) for _, model in shown), cell=9)
            yield ""


def vlmevalkit_settings(groups: Sequence[str], models: Mapping[str, str | Path], family: str | None) -> str:
    """VLMEvalKit's file for `run.py --config`, as JSON: the benchmarks of the paper's groups that it has.

    Args:
        groups: names of the paper's groups.
        models: name → folder or Hub id. VLMEvalKit loads whole models: export a run with LoRA first.
        family: `model_type` of the models' config.json; None if it is not known.

    Raises:
        ConfigError: one of the names is no group whose benchmarks VLMEvalKit has.
    """
    chosen = []
    for name in groups:
        found = [one for one in GROUPS.get(name, ()) if one.vlmevalkit]
        if not found:
            raise ConfigError(
                f"--print-vlmevalkit with --tasks {name}",
                "groups whose benchmarks VLMEvalKit has, such as paper",
                f"leave {name} out, and run it without --print-vlmevalkit",
            )
        chosen += found
    kind = VLMEVALKIT.get(family or "", "NAME_OF_THE_CLASS_IN_vlmeval.vlm")
    # VLMEvalKit runs in its own folder, so a path on this disk is written out in full
    places = {name: expanded(path).resolve() if expanded(path).exists() else path for name, path in models.items()}
    settings = {
        "model": {name: {"class": kind, "model_path": str(place)} for name, place in places.items()},
        "data": {one.vlmevalkit: {"class": one.kind, "dataset": one.vlmevalkit} for one in chosen},
    }
    return json.dumps(settings, indent=2)


def benchmark_table() -> Iterator[str]:
    """The table of docs/benchmarks.md, in Markdown."""
    yield "| group | benchmark | task of lmms-eval | split | metric | scorer | test |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for group, benchmarks in GROUPS.items():
        for one in benchmarks:
            task = f"`{one.task}`" if one.task else f"VLMEvalKit only: `{one.vlmevalkit}`"
            cells = (group, one.name, task, one.split or "–", one.metric, _scorer(one), _test(one))
            yield f"| {' | '.join(cells)} |"


def notes_of_benchmarks() -> Iterator[str]:
    """What differs from the paper, as a Markdown list for docs/benchmarks.md."""
    return (f"- {one.name}: {one.note}." for group in GROUPS.values() for one in group if one.note)


def _scorer(one: Benchmark) -> str:
    return one.scorer or "–"


def _test(one: Benchmark) -> str:
    return f"[{Path(one.test).name}](../{one.test})" if one.test else "–"


def _labels(arms: Sequence[str], per_table: int, width: int) -> dict[str, str]:
    """Arm → its name in the tables: as it is where all of them fit, else a number: names that are cut may be equal."""
    widest = _widest(per_table, width) - 1
    fit = all(len(arm) <= widest for arm in arms) and all(len(_pair(arms[-1], one)) <= _PAIR for one in arms[:-1])
    return {arm: arm if fit else f"[{number}]" for number, arm in enumerate(arms, 1)}


def _pair(last: str, other: str) -> str:
    return f"{last} − {other}"


def _widest(num_arms: int, width: int) -> int:
    """Columns per arm in a table of so many."""
    return (width - _TASK - _COUNT) // num_arms


def _row(task: str, count: str, *cells: str, cell: int) -> str:
    """Name, number of samples, and cells to the right. A line is at most 80 columns wide."""
    row = f"{_cut(task, _TASK):<{_TASK}}{count:>{_COUNT}}" + "".join(f"{_cut(one, cell - 1):>{cell}}" for one in cells)
    return row.rstrip()


def _cut(text: str, width: int) -> str:
    return f"{text[: width - 1]}…" if len(text) > width else text


def _score(value: float | None, on_papers_scale: bool) -> str:
    if value is None:
        return "NaN"
    return f"{value:.1f}" if on_papers_scale else f"{value:.4f}"


def _interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{100 * found['difference']:+.1f} (one picture: no interval)"
    difference, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
