"""Run the cells of a study in parallel processes. A finished cell is not run again."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lavender.errors import LavenderError
from lavender.world.studies.cells import Cell, data_path, prepare, prepare_base, result_path, run_cell
from lavender.world.studies.targets import Target
from lavender.world.tuning import ONE_THREAD, stop_processes


def run_cells(folder: Path, cells: Iterable[Cell], jobs: int) -> dict[str, dict[str, Any]]:
    """The results of the cells; those that have none yet are run now.

    Args:
        folder: the folder of results, data and runs.
        jobs: how many cells to run at a time, on one core each.

    Returns:
        Cell key → result, as `run_cell` writes it.

    Raises:
        LavenderError: some cells failed. The message has the first reason and its log; the other results are kept.
    """
    by_key = {cell.key: cell for cell in cells}
    missing = [cell for cell in by_key.values() if not result_path(folder, cell).is_file()]
    if missing:
        _run(folder, missing, jobs)
    return {key: json.loads(result_path(folder, cell).read_text()) for key, cell in by_key.items()}


def _run(folder: Path, cells: list[Cell], jobs: int) -> None:
    torch.set_num_threads(1)  # on busy cores, PyTorch's threads wait for each other
    folder.mkdir(parents=True, exist_ok=True)
    # without the verbosity, each run would warn that torchvision is missing
    os.environ |= ONE_THREAD | {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    _prepare(folder, cells, jobs)
    failed = {}
    with _pool(jobs, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_cell, folder, cell): cell for cell in cells}
        for done in tqdm(as_completed(running), total=len(cells), desc="fine-tuning and scoring", unit="run"):
            error = done.exception()
            if error is not None:
                failed[running[done].key] = f"{type(error).__name__}: {error}"
    if failed:
        key, reason = next(iter(failed.items()))
        raise LavenderError(
            f"{len(failed)} failed runs of {len(cells)}; the first: {reason}",
            "no failed run",
            f"read {folder / 'cells' / key}.log, then start the study again: finished runs are kept",
        )


def _prepare(folder: Path, cells: list[Cell], jobs: int) -> None:
    """Write the bases of the cells, then their scenes and maps, one data set per process."""
    data_sets: dict[Path, dict[Target | None, Cell]] = {}
    for cell in cells:
        with _logged(folder):
            prepare_base(folder, cell.arm)
        data_sets.setdefault(data_path(folder, cell), {})[cell.arm.target] = cell
    with _pool(jobs) as pool:
        prepared = [pool.submit(_prepare_each, folder, [*by_target.values()]) for by_target in data_sets.values()]
        for done in tqdm(as_completed(prepared), total=len(prepared), desc="scenes and maps", unit="set", leave=False):
            done.result()


def _prepare_each(folder: Path, cells: list[Cell]) -> None:
    torch.set_num_threads(1)
    for cell in cells:
        with _logged(folder):
            prepare(folder, cell)


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Model loading and extraction have progress bars of their own."""
    with (folder / "prepare.log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


@contextlib.contextmanager
def _pool(jobs: int, **settings: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool that ends at once when it is stopped; otherwise it would first run all that waits."""
    # a worker imports libraries before it has a log, and they would warn on the terminal, each worker anew
    settings |= {"initializer": logging.disable, "initargs": (logging.WARNING,)}
    with ProcessPoolExecutor(jobs, mp_context=_new_processes(), **settings) as pool:
        try:
            yield pool
        except BaseException:
            stop_processes(multiprocessing.active_children())
            pool.shutdown(cancel_futures=True)  # waits until the pool, too, knows that they ended
            raise


def _new_processes() -> BaseContext:
    """How a pool starts a process: from one that has imported the packages, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lavender.world.studies.preloaded"])
    return context
