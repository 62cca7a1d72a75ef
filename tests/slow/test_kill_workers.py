"""A process of a launch or a worker of Ray is killed while `lavender extract` runs: the records are all there, once.

So are the results of a Ray cluster that loses hosts.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lavender.data.store import MapStore
from lavender.maps import WordMaps
from lavender.teachers.ray_pool import run_on_ray
from lavender.world.language import caption_scene
from lavender.world.scenes import scenes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_PICTURES = 40
BEGUN = re.compile(r"\| [1-9]\d*/\d+ \[")  # the progress bar
DDP = Path(__file__).parents[2] / "examples" / "accelerate" / "ddp.yaml"
LAUNCH = ["accelerate.commands.launch", "--config_file", DDP, "--num_processes", "2", "--mixed_precision", "no"]
LAUNCH += ["--main_process_port", "0", "--max_restarts", "1", "-m", "lavender.cli"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    from command_line import write_scenes

    some = list(scenes("development", NUM_PICTURES))
    return write_scenes(tmp_path_factory.mktemp("data"), some, [caption_scene(scene).text for scene in some])


@pytest.fixture(scope="module")
def expected(photographs, lavender_process, tmp_path_factory) -> dict[tuple[str, str], WordMaps]:
    out = tmp_path_factory.mktemp("alone") / "maps"
    lavender_process("extract", *options(photographs, out))
    return records(out)


def options(data: Path, out: Path) -> list[object]:
    return ["--data", data, "--teacher", "world", "--grid", 16, "--batch-size", 1, "--out", out]


def records(path: Path) -> dict[tuple[str, str], WordMaps]:
    store = MapStore.open(path, verify=True)
    found = {(maps.image_id, maps.text): maps for maps in store}
    assert len(found) == len(store)  # none twice
    return found


def run_and_kill_one(command: list[object], is_worker: Callable[[psutil.Process], bool], log: Path) -> int:
    """Start a command and kill a worker when two are there and the first texts are done; the command's exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    environment.pop("RAY_ADDRESS", None)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)], stdout=output, stderr=output, env=environment
        )
    until = time.monotonic() + 900
    workers: list[psutil.Process] = []
    while len(workers) < 2 or not BEGUN.search(log.read_text()):
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < until, "no workers, or no text done"
        time.sleep(0.1)
        workers = [one for one in psutil.Process(process.pid).children(recursive=True) if is_worker(one)]
    os.kill(workers[-1].pid, signal.SIGKILL)
    return process.wait(timeout=1800)


def assert_same(found: dict[tuple[str, str], WordMaps], expected: dict[tuple[str, str], WordMaps]) -> None:
    assert found.keys() == expected.keys()
    for key, maps in expected.items():
        assert found[key].words == maps.words
        assert found[key].dropped == maps.dropped
        torch.testing.assert_close(found[key].maps, maps.maps, rtol=0, atol=1.01 / 255)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def test_a_killed_process_of_a_launch_is_started_again(photographs, expected, tmp_path):
    out, log = tmp_path / "maps", tmp_path / "log"
    code = run_and_kill_one(
        [*LAUNCH, "extract", *options(photographs, out)], lambda one: "lavender.cli" in command_line(one)[1:4], log
    )
    assert code == 0, log.read_text()[-6000:]
    assert "SIGKILL" in log.read_text() or "-9" in log.read_text()
    assert len(expected) == NUM_PICTURES
    assert_same(records(out), expected)


def test_the_tasks_of_a_killed_worker_of_ray_run_elsewhere(photographs, expected, tmp_path):
    out, log = tmp_path / "maps", tmp_path / "log"
    code = run_and_kill_one(
        ["lavender.cli", "extract", "--engine", "ray", "--workers", 2, *options(photographs, out)],
        lambda one: "".join(command_line(one)).startswith("ray::MapWorker"),
        log,
    )
    assert code == 0, log.read_text()[-6000:]
    assert "A worker died or was killed" in log.read_text()  # what Ray says
    assert_same(records(out), expected)


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A Ray cluster whose hosts are process groups of this one. The first has two CPUs and no GPU."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:ray")  # of Ray's own code, in this process
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray")
def test_the_tasks_of_lost_hosts_of_ray_run_elsewhere(cluster):
    """Two hosts have a GPU and no CPU. Both are lost while they work, and another host joins."""
    import ray

    def work(task: int) -> Iterator[tuple[str, int]]:
        import time

        import ray

        time.sleep(0.2)
        yield ray.get_runtime_context().get_node_id(), task

    hosts = [cluster.add_node(num_cpus=0, num_gpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    found: list[tuple[str, int]] = []
    for result in run_on_ray(range(40), work, workers=None, gpu=True):
        found.append(result)
        if len(found) == 3:
            cluster.remove_node(hosts[0], allow_graceful=False)
            cluster.add_node(num_cpus=0, num_gpus=1)
        if len(found) == 12:
            cluster.remove_node(hosts[1], allow_graceful=False)
    assert sorted(task for _, task in found) == list(range(40))
    assert len({host for host, _ in found}) >= 2
