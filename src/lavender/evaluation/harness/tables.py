"""What `lavender eval --tasks` prints: scores, differences, the paper's numbers, and settings for VLMEvalKit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavender.errors import ConfigError
from lavender.evaluation.harness.benchmarks import GROUPS, PAPER_MODELS, Benchmark
from lavender.students.registry import VLMEVALKIT

WIDTH = 80
_TASK, _COUNT = 23, 8
_ARMS_PER_TABLE = 4
_SHORT = ("base", "LoRA", "Lav. LoRA", "full", "Lav. full")


def result_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The result of `evaluate_tasks` as lines of at most 80 columns: scores, differences, and the paper's numbers."""
    arms, tasks = list(result["arms"]), result["tasks"]
    for start in range(0, len(arms), _ARMS_PER_TABLE):
        shown = arms[start : start + _ARMS_PER_TABLE]
        cell = min(max(12, *(len(arm) + 2 for arm in shown)), (WIDTH - _TASK - _COUNT) // len(shown))
        yield _row("task", "samples", *shown, cell=cell)
        for name, task in tasks.items():
            scores = (_score(task["scores"][arm], task["scorer"] != "") for arm in shown)
            yield _row(name, str(task["samples"]), *scores, cell=cell)
        yield ""
    yield "What is scored"
    for name, task in tasks.items():
        yield _cut(f"{_cut(name, _TASK):<{_TASK}}  {task['metric']}; {task['split']}", WIDTH)
    yield ""
    if any(task["differences"] for task in tasks.values()):
        yield "Mean score per sample, times 100: difference, 95 % interval (paired bootstrap)"
        for name, task in tasks.items():
            for other, found in task["differences"].items():
                pair = _cut(f"{arms[-1]} − {other}", 26)
                yield f"{_cut(name, _TASK):<{_TASK}}  {pair:<26}  {_interval(found)}"
        yield ""
    known = {name: task for name, task in tasks.items() if task["paper"]}
    if known:
        yield "The paper, Table 1: Llama-3.2-11B with VLMEvalKit"
        yield _row("", "", *_SHORT, cell=9)
        for name, task in known.items():
            yield _row(name, "", *(_score(task["paper"][model], True) for model in PAPER_MODELS), cell=9)
        yield ""


def vlmevalkit_settings(groups: Sequence[str], models: Mapping[str, str | Path], family: str | None) -> str:
    """VLMEvalKit's file for `run.py --config`, as JSON: the benchmarks of the paper's groups that it has.

    Args:
        groups: names of the paper's groups; other tasks are lmms-eval's and have no place there.
        models: name → folder or Hub id. VLMEvalKit loads whole models: export a run with LoRA first.
        family: `model_type` of the models' config.json; None if it is not known.

    Raises:
        ConfigError: none of the names is a group whose benchmarks VLMEvalKit has.
    """
    chosen = [one for name in groups for one in GROUPS.get(name, ()) if one.vlmevalkit]
    if not chosen:
        raise ConfigError(
            f"--print-vlmevalkit with --tasks {','.join(groups)}",
            "a group whose benchmarks VLMEvalKit has, such as paper",
            "pass --tasks paper",
        )
    kind = VLMEVALKIT.get(family or "", "NAME_OF_THE_CLASS_IN_vlmeval.vlm")
    settings = {
        "model": {name: {"class": kind, "model_path": str(path)} for name, path in models.items()},
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


def _row(task: str, count: str, *cells: str, cell: int) -> str:
    """Name, number of samples, and cells to the right. A line is at most 80 columns wide."""
    row = f"{_cut(task, _TASK):<{_TASK}}{count:>{_COUNT}}" + "".join(f"{_cut(one, cell - 1):>{cell}}" for one in cells)
    return row.rstrip()


def _cut(text: str, width: int) -> str:
    return f"{text[: width - 1]}…" if len(text) > width else text


def _score(value: float, on_papers_scale: bool) -> str:
    return f"{value:.1f}" if on_papers_scale else f"{value:.4f}"


def _interval(found: Mapping[str, float]) -> str:
    difference, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    if math.isnan(low):
        return f"{difference:+.1f} (one sample: no interval)"
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
