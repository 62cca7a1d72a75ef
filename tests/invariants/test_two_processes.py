"""Two processes log, evaluate and count what one does, on a list and on a stream; only the main one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1200)

WORKER = """
import json, sys
import torch
from datasets import load_dataset
from transformers import AutoProcessor, MllamaForConditionalGeneration
from lavender import LavenderConfig, LavenderTrainer

torch.set_num_threads(1)
folder, out, store, plant, runs = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5])
data = load_dataset("parquet", data_files=folder + "/data.parquet", split="train", cache_dir=folder + "/cache")
processor = AutoProcessor.from_pretrained(folder)
for name, settings in runs.items():
    args = LavenderConfig(
        output_dir=f"{out}/{name}", maps=store, max_steps=2, seed=3, bf16=False, use_cpu=True, max_length=None,
        logging_steps=1, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, learning_rate=0.05,
        optim="sgd", report_to="tensorboard", probe_size=3, probe_steps=1, train_sampling_strategy="sequential",
        per_device_eval_batch_size=1, **settings,
    )
    train = data.to_iterable_dataset() if name == "stream" else data
    model = MllamaForConditionalGeneration.from_pretrained(folder)
    trainer = LavenderTrainer(model, args, processing_class=processor, train_dataset=train)
    if plant and args.process_index == 1:
        collate = trainer.data_collator
        def spoil(examples):
            batch = collate(examples)
            batch["pixel_values"][0] = float("nan")
            return batch
        trainer.data_collator = spoil
    trainer.train()
    evaluated = trainer.evaluate(data.select(range(7)))  # an odd number: the first one fills up the last batch
    coverage, eval_coverage = trainer.coverage, trainer.eval_coverage
    if args.process_index == 0:
        facts = {"name": name, "log": trainer.state.log_history, "eval": evaluated}
        for kind, one in (("coverage", coverage), ("eval_coverage", eval_coverage)):
            facts[kind] = [one.samples, one.mapped_samples, one.words, dict(one.dropped)]
        print("FACTS" + json.dumps(facts))
"""
PARTS = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
RUNS: dict[int, dict[str, dict[str, int]]] = {
    1: {kind: {"per_device_train_batch_size": 4} for kind in ("list", "stream")},
    2: {"list": {"per_device_train_batch_size": 2}, "stream": PARTS},
}
"""Number of processes → kind of data → settings."""


@pytest.fixture(scope="module")
def launch(make_student, processor, dataset, store_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    make_student().save_pretrained(folder)
    processor.save_pretrained(folder)
    dataset.select([0, 1, 2, 5, 3, 4, 0, 1]).to_parquet(folder / "data.parquet")
    (folder / "worker.py").write_text(WORKER)

    def launch(num_processes: int, runs: dict[str, dict[str, int]], plant: bool = False) -> Any:
        out = folder / f"out{num_processes}"
        runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command = [sys.executable, *(runner if num_processes > 1 else []), str(folder / "worker.py"), str(folder)]
        command += [str(out), str(store_path), str(int(plant)), json.dumps(runs)]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if plant:
            return result
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if line.startswith("FACTS")]
        facts = [json.loads(line.removeprefix("FACTS")) for line in lines]
        assert [one["name"] for one in facts] == list(runs)
        return {one["name"]: one | {"out": out / one["name"]} for one in facts}

    return launch


@pytest.fixture(scope="module")
def launched(launch) -> dict[int, dict[str, Any]]:
    """Number of processes → kind of data → what they logged."""
    return {processes: launch(processes, runs) for processes, runs in RUNS.items()}


def numbers(facts: Any, name: str) -> list[float]:
    return [entry[name] for entry in facts["log"] if name in entry]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "stream"])
def test_two_processes_log_what_one_does(kind, launched):
    """Four samples a step either way; the stream with accumulation, each process taking every second batch."""
    one, two = launched[1][kind], launched[2][kind]
    for name in ("loss", "vlm_loss", "attention_loss", "matched_words", "student_entropy"):
        assert numbers(two, name) == pytest.approx(numbers(one, name), rel=1e-4), name
    for name in ("probe_map_agreement", "probe_peak_hits", "probe_attention_loss"):
        assert len(numbers(one, name)) == 3
        assert numbers(two, name) == pytest.approx(numbers(one, name), rel=1e-3), name
    for name in ("attention_loss", "matched_words", "student_entropy", "vlm_loss", "loss"):
        assert two["eval"][f"eval_{name}"] == pytest.approx(one["eval"][f"eval_{name}"], rel=1e-3), name
    assert two["coverage"] == one["coverage"]
    assert two["eval_coverage"] == one["eval_coverage"]
    assert one["eval_coverage"][0] == 7
    writers = {file.name.split(".")[-2] for file in two["out"].rglob("events.out.tfevents.*")}
    assert len(writers) == 1  # the id of the main process


@pytest.mark.slow
def test_one_process_stops_the_others(launch):
    """Whose sample it was says so; nobody waits for ever."""
    result = launch(2, {"list": {"per_device_train_batch_size": 2}}, plant=True)
    assert result.returncode != 0
    assert "NotFiniteError: Got a loss that is not finite, in step 1: L_VLM and L_att of " in result.stderr
