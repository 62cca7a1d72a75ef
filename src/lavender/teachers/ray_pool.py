"""A pool of workers on a Ray cluster, by Ray Data. This module knows nothing of maps, and imports Ray when it is used.

Ray Data limits how many results wait for this process. It starts a worker that died again, and repeats its tasks.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lavender.errors import ConfigError, LavenderError

if TYPE_CHECKING:
    import pyarrow as pa

RETRIES = 8
"""How often a task runs again whose worker died. Ray itself would repeat for ever a task that kills its worker."""
START_SECONDS = 30
"""How long Ray waits for a cluster that it starts on this host. Ray 2.60 has no setting for it."""
OBJECT_STORE = 2**28
"""Bytes of shared memory for tasks and results on a cluster that is started here. What is more goes to disk."""


def run_on_ray(
    tasks: Sequence[Any], work: Callable[[Any], Iterable[Any]], *, workers: int | None, gpu: bool
) -> Generator[Any, None, None]:
    """What `work` makes of the tasks, in any order. Each worker has its own copy of `work`.

    The results of a task arrive once, and together, also if its worker died on the way.

    Args:
        tasks: what can be pickled. Each is asked for once, and then only Ray's object store has it.
        work: makes results that can be pickled. An error is raised here after the results before it.
        workers: how many there are at once. Default: one per GPU of the cluster, or without `gpu` one per CPU but one.
        gpu: each worker has a GPU of its own.

    Raises:
        ConfigError: Ray is not installed, `workers` is not positive, or the cluster has no GPU.
        LavenderError: Ray failed, or a task's workers died `RETRIES` times.
    """
    ray = _import_ray()
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} workers", "1 or more", "change the number, or leave it out")
    if not len(tasks):
        return
    with _cluster(ray):
        pool = _pool(ray, workers, gpu)
        given = ray.put(work), _starts(ray)
        results = ray.data.from_items(_Packed(tasks), override_num_blocks=len(tasks)).map_batches(
            _Worker, fn_constructor_args=(given,), batch_size=1, batch_format="pyarrow", **pool
        )
        try:
            for table in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for content in table["result"].to_pylist():
                    found, error = pickle.loads(content)
                    yield from found
                    if error is not None:
                        raise error
        except ray.exceptions.RayError as error:
            got = f"an error of Ray, {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            do = "see Ray's logs, and run the command again; what is written stays"
            raise LavenderError(got, "a cluster that runs the tasks", do) from error


class _Packed(Sequence[dict[str, Any]]):
    """Tasks as rows for Ray, each made when Ray asks for it, so that they need not fit into memory together."""

    def __init__(self, tasks: Sequence[Any]):
        self._tasks = tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, number: Any) -> Any:
        return {"number": number, "task": pickle.dumps(self._tasks[number])}


class _Starts:
    """Counts how often each task was started, over all workers: an actor."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, task: int) -> int:
        self._counts[task] = self._counts.get(task, 0) + 1
        return self._counts[task]


class _Worker:
    """A worker of the pool, in a process of its own.

    Args:
        given: references of the work and of `_Starts`. They are in a tuple, in which Ray leaves references as they are.
    """

    def __init__(self, given: tuple[Any, Any]):
        import ray

        self._work, self._starts = ray.get(given[0]), given[1]

    def __call__(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        results = [pickle.dumps(self._run(row["number"], pickle.loads(row["task"]))) for row in table.to_pylist()]
        return pa.table({"result": pa.array(results, pa.large_binary())})

    def _run(self, number: int, task: Any) -> tuple[list[Any], Exception | None]:
        import ray

        if (starts := ray.get(self._starts.add.remote(number))) > RETRIES + 1:
            got = f"task {number}, whose worker died each of the {starts - 1} times"
            do = "look for lack of memory in Ray's logs; use a smaller batch size, or fewer workers per host"
            return [], LavenderError(got, "a task that ends", do)
        found: list[Any] = []
        try:
            for result in self._work(task):
                found.append(result)  # what comes before an error counts
        except Exception as error:
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
            return found, _sendable(error)
        return found, None


def _sendable(error: Exception) -> Exception:
    """The error, or its text if it cannot be pickled and read again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _starts(ray: Any) -> Any:
    """The actor `_Starts`, on the host of this process: the loss of another host must not end it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Starts).options(num_cpus=0, scheduling_strategy=here).remote()


def _import_ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no reports to Ray's makers; read when a cluster starts
    try:
        import ray
        import ray.data
    except ImportError as error:
        do = "pip install 'lavender-vlm[ray]'"
        raise ConfigError("extraction on Ray, and no Ray Data", "the extra `ray`", do) from error
    return ray


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start one on this host for as long as the context lasts."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    except Exception as error:  # Ray has no class of its own for this
        raise _unreached(address, error) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process with another exit code
    try:
        yield
    finally:
        ray.shutdown()


def _unreached(address: str, error: Exception) -> LavenderError:
    """Why there is no cluster."""
    reason = " ".join(str(error).split())[:300].rstrip(".")
    if address != "local":
        got = f"no answer from the Ray cluster at RAY_ADDRESS={address}: {reason}"
        return LavenderError(got, "a running cluster", "check the address, or unset RAY_ADDRESS to use this host alone")
    do = f"run it again when the host is less busy; Ray waits {START_SECONDS} s, and has no setting for that"
    if "AF_UNIX" in reason:
        do = "set RAY_TMPDIR to a folder with a short path, such as /tmp"
    return LavenderError(f"a Ray cluster that did not start on this host: {reason}", "a running cluster", do)


def _pool(ray: Any, workers: int | None, gpu: bool) -> dict[str, Any]:
    """Size and resources of the pool.

    On CPUs it leaves one for whatever else Ray Data runs, which would wait for ever. On GPUs it asks for no CPU, so
    that a host with fewer CPUs than GPUs uses all of its GPUs.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    available = ray.cluster_resources()
    cpus, gpus = available.get("CPU", 1), int(available.get("GPU", 0))
    if workers is None:
        if gpu and not gpus:
            do = "choose --device cpu, or name a number of workers, which then wait for GPUs to join"
            raise ConfigError("workers on a GPU, and a Ray cluster without any", "a GPU per worker", do)
        workers = gpus if gpu else max(1, int(cpus) - 1)
    share = min(1.0, max(cpus - 1, cpus / 2) / workers)
    resources = {"num_cpus": 0, "num_gpus": 1} if gpu else {"num_cpus": max(0.01, int(share * 100) / 100)}
    return {"compute": ray.data.ActorPoolStrategy(size=workers), **resources}
