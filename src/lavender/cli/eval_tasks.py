"""`lavender eval --tasks`: benchmarks through lmms-eval."""

from __future__ import annotations

import argparse
import sys
from itertools import count
from pathlib import Path

from lavender.cli.output import own_lines, report
from lavender.cli.stopping import DONE, FAILED
from lavender.cli.terminal import show, width_of
from lavender.errors import ConfigError
from lavender.evaluation.harness import file_name
from lavender.files import expanded, writing

FOLDER = "eval-tasks"
_ALONE = ("model", "out", "include_path", "print_vlmevalkit")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmarks (lmms-eval)")
    group.add_argument(
        "--tasks",
        default=None,
        metavar="NAME,…",
        help="tasks, groups or tags of lmms-eval, or ours: paper, worldmedqa, openflamingo, world",
    )
    group.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a model folder or Hub id to run --tasks on, instead of a run; may be repeated",
    )
    group.add_argument(
        "--out", type=expanded, default=None, help=f"folder for logs (default: RUN/{FOLDER}, or {FOLDER} without a run)"
    )
    group.add_argument(
        "--include-path",
        type=expanded,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder with more tasks, as for lmms-eval; may be repeated",
    )
    group.add_argument(
        "--print-vlmevalkit",
        action="store_true",
        help="print VLMEvalKit's settings for the benchmarks of --tasks, and run nothing",
    )


def refuse_without_tasks(options: argparse.Namespace) -> None:
    """Raise ConfigError for an option that only --tasks reads."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    for name in _ALONE:
        if getattr(options, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} without --tasks", "both, or neither", f"name the tasks to run, or leave out {option}"
            )


def run(options: argparse.Namespace) -> int:
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise ConfigError(f"--tasks {options.tasks!r}", "names of tasks with commas between", "name one, such as pope")
    for option in ("data", "maps", "columns"):
        if getattr(options, option) is not None:
            raise ConfigError(f"--{option} with --tasks", "one of them", f"leave out --{option}: tasks have their data")
    arms = _arms(options)
    if options.print_vlmevalkit:
        return _print_vlmevalkit(tasks, arms)
    from lavender.cli.placement import usable_device
    from lavender.evaluation.harness.running import RESULT, Settings, evaluate_tasks
    from lavender.evaluation.harness.tables import result_lines

    settings = Settings(
        limit=options.limit,
        batch_size=1 if options.batch_size is None else options.batch_size,
        device=None if options.device is None else usable_device(options.device),
        dtype=options.dtype or "auto",
        include=tuple(options.include_path),
        trust_remote_code=options.trust_remote_code,
    )
    out = options.out or (options.run or Path()) / FOLDER
    path = (options.run if options.run is not None else out) / RESULT
    with writing(out), own_lines(options):
        result = evaluate_tasks(arms, tasks, out, path, settings)
    ends = [*(f"note: {note}" for note in result["notes"]), f"result: {path}; a line per sample: {out}"]
    report(options, result, result_lines(result, width_of()) if result["tasks"] else (), ends)
    for error in result["failed"].values():
        show(f"lavender eval: {error}", sys.stderr, "lavender eval:")
    return FAILED if result["failed"] else DONE


def _arms(options: argparse.Namespace) -> dict[str, str | Path]:
    """Name → model: of a run its base, those of --against, and itself last; else the models of --model."""
    from lavender.training.run_folder import read_config

    if (options.run is None) == (not options.model):
        got = "--tasks with a run folder and --model" if options.model else "--tasks without a model"
        raise ConfigError(got, "a run folder, or --model", "name one of the two")
    if options.run is None:
        paths: list[str | Path] = [*options.model, *options.against]
        arms: dict[str, str | Path] = {}
    else:
        arms = {"base": read_config(options.run)["model"]}
        paths = [*options.against, options.run]
    for path in paths:
        on_disk = expanded(path).exists()
        name = expanded(path).resolve().name if on_disk else str(path).rpartition("/")[2]
        free = (name if number == 1 else f"{name} ({number})" for number in count(1))
        used = {file_name(arm).casefold() for arm in arms}  # each has a folder of its own
        arms[next(one for one in free if file_name(one).casefold() not in used)] = expanded(path) if on_disk else path
    return arms


def _print_vlmevalkit(tasks: list[str], arms: dict[str, str | Path]) -> int:
    from lavender.evaluation.harness.tables import vlmevalkit_settings
    from lavender.students.loading import loading, read_config

    for path in arms.values():
        if (expanded(path) / "checkpoint").is_dir():
            raise ConfigError(
                f"--print-vlmevalkit with the run {path}",
                "models that VLMEvalKit loads itself",
                f"lavender export {path} --out MODEL, then pass --model MODEL",
            )
    first = next(iter(arms.values()))
    with loading("model", first):
        family = read_config(first).get("model_type")
    print(vlmevalkit_settings(tasks, arms, family))
    return DONE
