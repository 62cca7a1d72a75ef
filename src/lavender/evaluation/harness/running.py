"""Run tasks of lmms-eval on base, plain and aligned checkpoints, and compare them (`lavender eval --tasks`)."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import lock_descriptor

from lavender import __version__
from lavender.data.fingerprints import commit_of, digest_of_folder
from lavender.errors import ConfigError, DataError, LavenderError
from lavender.evaluation.harness import file_name
from lavender.evaluation.harness.answer_log import AnswerLog
from lavender.evaluation.harness.benchmarks import GROUPS, PAPER_MODELS, benchmark_of
from lavender.evaluation.harness.comparing import (
    Scored,
    difference_of,
    differences,
    mean_if_answered,
    refusal_rate,
    reported,
    sample_lines,
)
from lavender.evaluation.harness.task_index import TaskIndex, cause_of, of_task, require_harness
from lavender.evaluation.placement import Placement
from lavender.files import write_whole
from lavender.model_files import one_line

RESULT = "eval-tasks.json"
"""Name of the file with the result."""
LOCK = "eval-tasks.lock"
"""Name of the file in the folder of the logs that a running command locks."""


@dataclass(frozen=True)
class Settings:
    """How tasks are run.

    Attributes:
        limit: the first so many samples of each task; None for all.
        batch_size: requests per pass.
        device: such as "cuda:0"; None for a GPU if there is one.
        dtype: type of the weights; "auto" is theirs on disk, and float32 for models that differ in it.
        include: folders with tasks of the user's.
        trust_remote_code: run the Python code that comes with a model.

    Raises:
        ConfigError: `limit` or `batch_size` is below 1.
    """

    limit: int | None = None
    batch_size: int = 1
    device: str | None = None
    dtype: str = "auto"
    include: tuple[Path, ...] = ()
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} {value}", "at least 1", f"change {option}")


def evaluate_tasks(
    arms: Mapping[str, str | Path], tasks: Sequence[str], out: Path, result_path: Path, settings: Settings
) -> dict[str, Any]:
    """Run tasks on checkpoints with lmms-eval's evaluator, one checkpoint in memory at a time.

    Answers are on disk as soon as they are generated: OUT/ARM/answers-….jsonl. The same call after a stop generates
    only those that are missing. OUT/ARM/TASK.jsonl has a line per sample. A task that fails on a checkpoint is left
    out of the result, and is not run on the checkpoints after it; the other tasks go on.

    Args:
        arms: name → run folder, model folder or Hub id. The last is compared with each of the others.
        tasks: names of tasks, groups or tags of lmms-eval, or of the paper's groups; see `GROUPS`.
        out: folder of the logs; it is made.
        result_path: file to write the result to. One that is there is removed before the first task is run.
        settings: how tasks are run.

    Returns:
        `tasks` (name → `metric`, `samples`, `scores`, `metrics`, `refusal_rate` and `mean_if_answered` by arm,
        `differences`, `difference_of`, `paper`), `failed` (name of a task that failed → its error), `arms`, `limit`,
        `dtype` (of all models), `lmms_eval` (its version) and `notes` for the reader. A score that is NaN or infinite
        is None, and a note says so.

    Raises:
        ConfigError: lmms-eval is not installed, an unknown task, or a task that asks for what is not supported.
        DataError: the data of a task cannot be loaded, or another command writes to `out`.
        ModelError, FileError: a model is missing, damaged or not finished.
    """
    with _quiet(), _alone(out):
        return _evaluate_tasks(arms, tasks, out, result_path, settings)


def _evaluate_tasks(
    arms: Mapping[str, str | Path], tasks: Sequence[str], out: Path, result_path: Path, settings: Settings
) -> dict[str, Any]:
    from lavender.evaluation.harness.models import check_student, check_task

    index = TaskIndex(settings.include)
    names = index.leaves(tasks)
    for path in arms.values():  # before hours of work: is all there?
        check_student(path, settings.trust_remote_code)
    for name in names:
        check_task(name, index.build(name))
    place, notes_of_dtype = Placement(dtype=settings.dtype).one_dtype(arms, settings.trust_remote_code)
    settings = replace(settings, dtype=place.dtype)
    identities = {arm: checkpoint_digest(path) for arm, path in arms.items()}
    result_path.unlink(missing_ok=True)
    scored, failed = _run_arms(arms, identities, index, names, out, settings)
    result = _result(arms, identities, tasks, scored, failed, settings)
    result["notes"] += [*notes_of_dtype, *_notes_of_scores({name: scored[name] for name in result["tasks"]})]
    write_whole(result_path, json.dumps(result, indent=1, allow_nan=False))
    return result


def _run_arms(
    arms: Mapping[str, str | Path],
    identities: Mapping[str, str],
    index: TaskIndex,
    names: Sequence[str],
    out: Path,
    settings: Settings,
) -> tuple[dict[str, dict[str, Scored]], dict[str, str]]:
    """(task → arm → result, task that failed → its error). A task has the results of all arms, or has failed."""
    scored: dict[str, dict[str, Scored]] = {name: {} for name in names}
    failed: dict[str, str] = {}
    for arm, path in arms.items():
        if scored:
            for name, found in _run_arm(path, identities[arm], index, [*scored], out / file_name(arm), settings):
                if isinstance(found, Scored):
                    scored[name][arm] = found
                else:
                    failed[name] = found
                    del scored[name]
    return scored, failed


def _result(
    arms: Mapping[str, str | Path],
    identities: Mapping[str, str],
    tasks: Sequence[str],
    scored: Mapping[str, Mapping[str, Scored]],
    failed: Mapping[str, str],
    settings: Settings,
) -> dict[str, Any]:
    """The result without the notes on models and scores. A task that cannot be compared has failed too."""
    summaries, failed = {}, dict(failed)
    for name, by_arm in scored.items():
        try:
            summaries[name] = _summary(name, by_arm)
        except DataError as error:
            failed[name] = str(error)
    return {
        "lmms_eval": version("lmms_eval"),
        "limit": settings.limit,
        "dtype": settings.dtype,
        "arms": {arm: {"model": str(path), "checkpoint": identities[arm]} for arm, path in arms.items()},
        "tasks": summaries,
        "failed": failed,
        "notes": _notes(tasks, settings),
    }


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder of the logs, which is made: two commands that write to one file of answers damage it.

    Raises:
        DataError: another command holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as file:
        if not lock_descriptor(file.fileno(), blocking=False):
            got = f"{out}, which another `lavender eval --tasks` is writing to"
            raise DataError(got, "one command at a time", "wait until it ends, or name another folder with --out")
        yield


def checkpoint_digest(path: str | Path) -> str:
    """What identifies a checkpoint's content: a digest of its files, with those of an adapter's base, or a Hub commit.

    Raises:
        ModelError: no such folder, and no such model on the Hub.
    """
    folder = Path(path) / "checkpoint" if (Path(path) / "checkpoint").is_dir() else Path(path)
    if not folder.is_dir():
        return f"{path} at commit {commit_of(str(path))}"
    found = digest_of_folder(folder)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        found += f" on {checkpoint_digest(base)}" if base else ""
    return found


def _run_arm(
    path: str | Path, identity: str, index: TaskIndex, names: Sequence[str], out: Path, settings: Settings
) -> Iterator[tuple[str, Scored | str]]:
    """Each task's result on one checkpoint, which is loaded when the first answer is missing; or its error."""
    from lavender.evaluation.harness.models import ChatModel, RankingModel, default_device, load_student

    device = torch.device(settings.device or default_device())
    settle = {"checkpoint": identity, "dtype": settings.dtype, "lavender": __version__}
    settle |= {package: version(package) for package in ("lmms_eval", "transformers")}
    load = _once(partial(load_student, path, device, settings.dtype, settings.trust_remote_code))
    with AnswerLog(out, settle) as log:
        for name in names:
            kind = RankingModel if index.ranks(name) else ChatModel
            lm = kind(batch_size=settings.batch_size, device=str(device), log=log, student=load)
            lines = out / f"{file_name(name)}.jsonl"
            lines.unlink(missing_ok=True)
            try:
                found = _evaluate(lm, index.build(name), name, index, out, settings)
            except (ConfigError, DataError) as error:
                yield name, str(error)  # the error itself would keep the tensors of its frames
                continue
            write_whole(lines, "".join(sample_lines(found)))
            yield name, found
    del load, lm
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _evaluate(lm: Any, task: Any, name: str, index: TaskIndex, out: Path, settings: Settings) -> Scored:
    """One task through lmms-eval's evaluator. What tasks print goes to stderr, and their files to OUT/files."""
    from lmms_eval.evaluator import simple_evaluate

    # what lmms-eval's own command line would pass to tasks; documents come without their pictures after generation
    options = argparse.Namespace(output_path=str(out / "files"), process_with_media=False, reasoning_tags=None)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=index.manager,
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                cli_args=options,
                process_docs_parallel=1,
            )
    except Exception as error:
        cause = cause_of(error)
        if isinstance(cause, ConfigError | DataError):
            raise of_task(name, cause) from error
        if isinstance(cause, LavenderError):  # of the checkpoint, not of the task
            raise cause from error
        log = out / f"{file_name(name)}.error.log"
        write_whole(log, "".join(traceback.format_exception(error)))
        raise failure(name, cause, log, settings.limit, 1 if index.ranks(name) else settings.batch_size) from error
    with contextlib.redirect_stdout(io.StringIO()):  # an aggregation that prints does so once per sample
        return Scored.of(name, found, task.aggregation(), lm.pictures[name])


def failure(task: str, cause: BaseException, log: Path, limit: int | None, batch_size: int) -> DataError:
    """The error of a task that fails, with what helps against its cause.

    Args:
        log: file with the traceback.
        limit: as in `Settings`.
        batch_size: requests that were run at a time; 1 for a task of options, whatever the setting.
    """
    if isinstance(cause, MemoryError | torch.OutOfMemoryError):
        do = "lower --batch-size" if batch_size > 1 else "use --dtype bfloat16, or a device with more memory"
    elif _is_of_network(cause):
        do = "run the same command again; if that does not help, leave the task out"
    else:
        do = "leave the task out" if limit is None else "leave the task out, or --limit if it needs all its samples"
    return DataError(
        f"the task {task}, which fails: {one_line(cause)}",
        "a task that runs",
        f"{do}; {log} has the traceback. The answers so far are kept",
    )


def _is_of_network(cause: BaseException) -> bool:
    import requests
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    kinds = (ConnectionError, TimeoutError, requests.RequestException, HfHubHTTPError, LocalEntryNotFoundError)
    return isinstance(cause, kinds)


def _summary(name: str, by_arm: Mapping[str, Scored]) -> dict[str, Any]:
    known = benchmark_of(name)
    first, compared = next(iter(by_arm.values())), differences(by_arm)
    paper = dict(zip(PAPER_MODELS, known.paper, strict=True)) if known is not None and known.paper else None
    return {
        "metric": known.metric if known is not None else first.keys[0],
        "split": first.split,
        "scorer": known.scorer if known is not None else "",
        "samples": len(first.samples),
        "scores": {arm: reported(found) for arm, found in by_arm.items()},
        "metrics": {arm: found.metrics for arm, found in by_arm.items()},
        "refusal_rate": {arm: refusal_rate(found) for arm, found in by_arm.items()},
        "mean_if_answered": {arm: mean_if_answered(found) for arm, found in by_arm.items()},
        "differences": compared,
        "difference_of": difference_of(by_arm) if compared else None,
        "paper": paper,
        "note": known.note if known is not None else "",
    }


def _notes(tasks: Sequence[str], settings: Settings) -> list[str]:
    left_out = [one for name in tasks for one in GROUPS.get(name, ()) if not one.task]
    notes = []
    if left_out:
        listed = ", ".join(one.name for one in left_out)
        notes.append(f"only VLMEvalKit has {listed}; --print-vlmevalkit prints its settings")
    if settings.limit is not None:
        first = "sample" if settings.limit == 1 else f"{settings.limit} samples"
        notes.append(f"only the first {first} of each task: not comparable with published numbers")
    return notes


def _notes_of_scores(scored: Mapping[str, Mapping[str, Scored]]) -> list[str]:
    """Notes on sums that lack a part, scores that are NaN, tasks without a difference, and models that refuse."""
    notes = []
    for name, by_arm in scored.items():
        first = next(iter(by_arm.values()))
        if first.missing:
            notes.append(f"{name} is without {' and '.join(first.missing)}: no sample is of this kind")
        notes += [_note_of_nan(name, arm, found) for arm, found in by_arm.items() if found.not_finite]
        if len(by_arm) > 1 and not all(found.scores for found in by_arm.values()):
            notes.append(f"no difference of {name}: {first.keys[0]} gives samples no scores")
        if len({frozenset(found.scores) for found in by_arm.values()}) > 1:
            notes.append(f"no difference of {name} between models that have scores of other samples")
        if len(by_arm) > 1 and (arms := [arm for arm, found in by_arm.items() if found.num_not_finite]):
            notes.append(f"no difference of {name} with {', '.join(arms)}: some samples score NaN")
        rates = {arm: refusal_rate(found) for arm, found in by_arm.items()}
        notes += [f"{arm} refuses to answer {rate:.1%} of {name}" for arm, rate in rates.items() if rate]
    return notes


def _note_of_nan(name: str, arm: str, found: Scored) -> str:
    number = found.num_not_finite
    cause = f", as it is for {number} of {len(found.samples)} samples" if number else ""
    return f"no score for {arm} on {name}: lmms-eval's {' and '.join(found.not_finite)} is NaN or infinite{cause}"


def _once(load: Any) -> Any:
    """A function that calls `load` once and keeps what it returns."""
    kept: list[Any] = []

    def get() -> Any:
        if not kept:
            kept.append(load())
        return kept[0]

    return get


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lmms-eval's own log, which has a line per step."""
    require_harness()
    from loguru import logger

    logger.disable("lmms_eval")
    try:
        yield
    finally:
        logger.enable("lmms_eval")
