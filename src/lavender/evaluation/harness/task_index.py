"""Finding tasks of lmms-eval by name: ours, the user's, lmms-eval's own, and the paper's groups."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from yaml import YAMLError

from lavender.errors import ConfigError, DataError, LavenderError
from lavender.evaluation.harness import TASKS_PATH
from lavender.evaluation.harness.benchmarks import GROUPS
from lavender.model_files import one_line

_IMPORTED = ("aiohttp", "dotenv", "evaluate", "loguru", "pytz", "rapidfuzz", "requests", "sacrebleu", "tenacity")
# the packages of the extra `eval`, by the names that are imported
RANKING = ("multiple_choice", "loglikelihood")
"""Types of output that need the loss of options. The others need answers."""


def require_harness() -> None:
    """Raise ConfigError unless lmms-eval and what its evaluator imports are installed."""
    missing = [name for name in ("lmms_eval", *_IMPORTED) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"no package {missing[0]}",
            "lmms-eval and the packages of the extra `eval`",
            "pip install 'lavender-vlm[eval]', then pip install --no-deps lmms_eval==0.7.3; see docs/benchmarks.md",
        )


class TaskIndex:
    """The tasks that `--tasks` can name.

    Our tasks and the user's are looked at first. Only a name that they lack makes lmms-eval read its own 1,700 files.

    Args:
        include: folders with more tasks, as in `lmms-eval --include_path`.

    Raises:
        ConfigError: lmms-eval is not installed, or a folder is missing.
        DataError: a task's file is no YAML.
    """

    def __init__(self, include: Sequence[Path] = ()):
        require_harness()
        for folder in include:
            if not folder.is_dir():
                got = f"--include-path {folder}, which is no folder"
                raise ConfigError(got, "a folder of tasks", "check the path")
        self._folders = [str(TASKS_PATH), *map(str, include)]
        self.manager = self._manager(include_defaults=False)
        self._complete = False

    def leaves(self, names: Iterable[str]) -> list[str]:
        """The tasks that the names mean, each once: tasks, groups and tags of lmms-eval, and the paper's groups.

        Raises:
            ConfigError: a name that is none of these, or no task in all of them.
        """
        wanted: list[str] = []
        for name in names:
            wanted += [one.task for one in GROUPS[name] if one.task] if name in GROUPS else [name]
        found = list(dict.fromkeys(leaf for name in wanted for leaf in self._leaves(name)))
        if not found:
            raise ConfigError(f"--tasks {','.join(wanted)}, which has no task", "at least one task", "name a task")
        return found

    def build(self, task: str) -> Any:
        """The task with its data set, with state of its own: some tasks of lmms-eval add up over calls.

        Raises:
            DataError: its data cannot be loaded, or a package that it imports is missing.
        """
        try:
            return self.manager.load_task_or_group([task], self._kind(task))[task]
        except Exception as error:
            cause = cause_of(error)
            if isinstance(cause, LavenderError):
                raise of_task(task, cause) from error
            raise DataError(
                f"the task {task}, which cannot be loaded: {one_line(cause)}",
                "its data set and the packages that it imports",
                "check the network and `hf auth login`, or install the package; else leave the task out",
            ) from error

    def ranks(self, task: str) -> bool:
        """Whether the task needs the loss of options, which `RankingModel` gives."""
        return self._kind(task) == "simple"

    def _kind(self, task: str) -> Literal["simple", "chat"]:
        config = self.manager._get_config(task)
        return "simple" if config.get("output_type") in RANKING else "chat"

    def _leaves(self, name: str) -> list[str]:
        entry = self._entry(name)
        if entry["type"] == "tag":
            members = entry["task"]
        elif entry["type"] == "group":
            members = self.manager._get_config(name)["task"]
        else:
            return [name]
        return [leaf for one in members for leaf in self._leaves(one if isinstance(one, str) else str(one["task"]))]

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.manager.task_index and not self._complete:
            self.manager, self._complete = self._manager(include_defaults=True), True
        if name not in self.manager.task_index:
            near = difflib.get_close_matches(name, [*self.manager.task_index, *GROUPS], n=3)
            hint = f", such as {', '.join(near)}" if near else ""
            raise ConfigError(
                f"the task {name!r}",
                f"a task, group or tag of lmms-eval, or one of {', '.join(GROUPS)}{hint}",
                "correct --tasks; the folder lmms_eval/tasks of the package has all names",
            )
        return self.manager.task_index[name]

    def _manager(self, include_defaults: bool) -> Any:
        from lmms_eval.tasks import TaskManager

        try:
            return TaskManager("ERROR", self._folders, include_defaults, model_name="lavender")
        except YAMLError as error:
            got = f"a file of --include-path that is no YAML: {' '.join(str(error).split())}"
            raise DataError(got, "tasks in YAML", "repair the file") from error


def of_task(task: str, error: LavenderError) -> LavenderError:
    """The same error, which names the task."""
    return type(error)(f"the task {task}: {error.got}", error.expected, error.do)


def cause_of(error: BaseException) -> BaseException:
    """The error inside of one that says only that some attempts failed, as lmms-eval's do."""
    attempt = getattr(error, "last_attempt", None)
    return (attempt.exception() if attempt is not None else None) or error
