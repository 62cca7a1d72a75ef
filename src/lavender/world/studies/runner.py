"""Run the cells of a study, side by side and resumable: a finished cell is never run again."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lavender.errors import LavenderError
from lavender.world.studies.cells import Cell, prepare, result_path, run_cell

STOP_SECONDS = 10.0
"""For how long a run may clean up after it was told to end."""


def run_cells(folder: Path, cells: Iterable[Cell], jobs: int) -> dict[str, dict[str, Any]]:
    """Cell key → result, from its file or by running it now, `jobs` at a time, one core each.

    Raises:
        LavenderError: cells that failed, counted, with the first reason and its log; the others' results are kept.
    """
    wanted = {cell.key: cell for cell in cells}
    missing = [cell for cell in wanted.values() if not result_path(folder, cell).is_file()]
    if missing:
        _run(folder, missing, jobs)
    return {cell.key: json.loads(result_path(folder, cell).read_text()) for cell in wanted.values()}


def _run(folder: Path, cells: list[Cell], jobs: int) -> None:
    torch.set_num_threads(1)  # on busy cores torch's threads wait for each other
    folder.mkdir(parents=True, exist_ok=True)
    sets = {(cell.seed, cell.arm.num_scenes, cell.arm.target): cell for cell in cells if cell.arm.tuning != "none"}
    for cell in tqdm(sets.values(), desc="scenes and maps", unit="set", leave=False):
        # loaders draw bars of their own
        with (folder / "prepare.log").open("a") as log, contextlib.redirect_stderr(log):
            prepare(folder, cell)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",  # a run each would say again that there is no torchvision
    }
    context, failed = multiprocessing.get_context("spawn"), {}
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_cell, folder, cell): cell for cell in cells}
        try:
            for done in tqdm(as_completed(running), total=len(cells), desc="fine-tuning and scoring", unit="run"):
                error = done.exception()
                if error is not None:
                    failed[running[done].key] = f"{type(error).__name__}: {error}"
        except BaseException:  # stopped: the pool would first run all that waits
            pool.shutdown(wait=False, cancel_futures=True)
            _end(multiprocessing.active_children())
            raise
    if failed:
        key, reason = next(iter(failed.items()))
        raise LavenderError(
            f"{len(failed)} of {len(cells)} runs that failed; the first: {reason}",
            "runs that end",
            f"see {folder / 'cells' / key}.log, then start the study again: finished runs are kept",
        )


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(STOP_SECONDS)
        process.kill()
        process.join()
