"""Speed and memory of reading a data set, and the share of a training step that is spent waiting for samples.

    python benchmarks/reading.py --json reading.json
    python benchmarks/reading.py --quick --json reading.json    # smoke test: 1,000 and 2,000 rows, 4 steps, one worker

Reading: conversations of about 400 characters in a .jsonl file, all with one picture file, are read by `read_samples`,
gone through once as samples, and once as the data set of `to_dataset`, pictures not decoded. `samples_per_s` is of the
larger file. `rss_mb_10k` and `rss_mb_100k` are the most resident memory of a process that does this with 10,000 and
100,000 rows, in MB. The mapped pages of the temporary file are in it, which the system may drop at any time;
`anon_mb_10k` and `anon_mb_100k` are the memory at the end without mapped files (Linux only). `rss_mb_imported` is of a
process that only imports.

Training: the built-in student is fully tuned on drawn scenes with maps, batches of 8, which `--workers` processes make
(8). `step_share` is the share of the time of the steps in which the trainer waits for its batches, `step_ms` the time
of a whole step. The first steps, in which the workers start, are left out. `cores` says how many processes can run at
once. Without a GPU the model computes on the cores that the workers need, and `step_share` says how they share them:
it says little about training on a GPU.

`waiting_step_share` is measured in the same way with steps that only wait, `waiting_step_ms` long (`--step-ms`, 100):
the cores are free for the workers, as they are while a GPU computes. No model runs in these steps.
`plain_waiting_step_share` is of TRL's own `SFTTrainer` on the same data, so the difference is what maps cost.

`collate_ms` is the time that one process needs for a batch, and `collate_cpu_ms` the CPU time. `map_cpu_ms` is what the
maps add to it, per sample: the CPU time of the batch above that of TRL's own collator for the same samples.

Calculated: `enough_step_ms` is the step above which at most 0.01 of it is spent waiting, if the workers have the cores
for themselves: 0.99 × `collate_cpu_ms` / the smaller one of `workers` and `cores`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

BATCH = 8
LEFT_OUT = 4  # steps at the beginning
TEXT = "A cat sits on a red sofa beside a lamp, and looks at a cup of coffee on the table in front of it. "


def peak_mb() -> float:
    """The most resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def anonymous_mb() -> float:
    """The resident memory of this process without mapped files; NaN where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon:")), math.nan)


def write_rows(path: Path, number: int) -> None:
    from PIL import Image

    Image.new("RGB", (64, 48)).save(path.with_name("picture.png"))
    with path.open("w") as file:
        for index in range(number):
            turns = [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": f"What is on picture {index}?"}],
                },
                {"role": "assistant", "content": f"{index}: {3 * TEXT}"},
            ]
            file.write(json.dumps({"image": "picture.png", "messages": turns}) + "\n")


def measure_reading(folder: Path, number: int) -> tuple[float, float, float]:
    """Read so many rows in this process: the seconds, and the peak and the anonymous memory in MB.

    With 0 rows it only imports.
    """
    import datasets  # noqa: F401

    from lavender.data.samples import read_samples, to_dataset

    began = time.perf_counter()
    if number:
        samples = read_samples(folder / f"{number}.jsonl")
        letters = sum(len(sample.answers[0]) for sample in samples)
        dataset = to_dataset(samples).with_format("arrow")
        assert sum(table.num_rows for table in dataset.iter(100)) == number
        assert letters > number
    return time.perf_counter() - began, peak_mb(), anonymous_mb()


def reading(folder: Path, sizes: tuple[int, int]) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")  # so that each has only its own memory
    peaks, own, seconds = {}, {}, 0.0
    for number in (0, *sizes):
        if number:
            write_rows(folder / f"{number}.jsonl", number)
        with ProcessPoolExecutor(1, context) as process:
            seconds, peaks[number], own[number] = process.submit(measure_reading, folder, number).result()
    named = {
        f"{name}_mb_{number // 1000}k": of[number] for name, of in (("rss", peaks), ("anon", own)) for number in sizes
    }
    return {"samples_per_s": sizes[-1] / seconds, "rss_mb_imported": peaks[0], **named}


def write_world(folder: Path, number: int) -> None:
    """Scenes with captions, and a store with a random map of each noun and adjective."""
    import torch

    from lavender.data.images import image_id
    from lavender.data.samples import read_samples
    from lavender.data.store import MapStore
    from lavender.maps import WordMaps
    from lavender.words import content_words
    from lavender.world.language import write_scenes
    from lavender.world.scenes import scenes

    write_scenes(folder / "data", list(scenes("development", number)))
    with MapStore.writer(folder / "maps", {"teacher": "random"}, {}, (16, 16)) as writer:
        for sample in read_samples(folder / "data"):
            [text], [image] = sample.answers, sample.load()
            words = content_words(text, ("noun", "adjective"))
            key = image_id(image), text
            if key not in writer:
                writer.add(WordMaps(*key, words, torch.rand(len(words), 16, 16)))


def training(folder: Path, steps: int, workers: int, waiting_ms: float) -> dict[str, float]:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from lavender import read_samples, to_dataset

    write_world(folder, BATCH * (steps + LEFT_OUT))  # one epoch: the first batch of each is waited for
    dataset = to_dataset(read_samples(folder / "data"))
    share, step_ms, _ = timed_run(folder, dataset, steps, workers)
    plain_share, _, _ = timed_run(folder, dataset, steps, workers, waiting_ms, with_maps=False)
    waiting_share, waiting_step_ms, trainer = timed_run(folder, dataset, steps, workers, waiting_ms)
    examples = [dataset[index] for index in range(BATCH)]
    plain: Any = DataCollatorForVisionLanguageModeling(trainer.processing_class)
    (collate_ms, collate_cpu_ms), (_, plain_cpu_ms) = (timed(one, examples) for one in (trainer.data_collator, plain))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "step_share": share,
        "step_ms": step_ms,
        "waiting_step_share": waiting_share,
        "plain_waiting_step_share": plain_share,
        "waiting_step_ms": waiting_step_ms,
        "collate_ms": collate_ms,
        "collate_cpu_ms": collate_cpu_ms,
        "map_cpu_ms": (collate_cpu_ms - plain_cpu_ms) / BATCH,
        "enough_step_ms": 0.99 * collate_cpu_ms / min(max(1, workers), cores),
        "workers": workers,
        "cores": cores,
    }


def timed(collator: Any, examples: list[dict[str, Any]], times: int = 8) -> tuple[float, float]:
    """Milliseconds of a batch in this process: as the clock says, and of CPU."""
    collator(examples)  # what is made once
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        collator(examples)
    return 1000 * (time.perf_counter() - began) / times, 1000 * (time.process_time() - cpu) / times


def timed_run(
    folder: Path, dataset: Any, steps: int, workers: int, waiting_ms: float | None = None, with_maps: bool = True
) -> tuple[float, float, Any]:
    """The share of the steps' time in which a trainer waits for batches, the milliseconds of a step, and the trainer.

    Args:
        waiting_ms: each step only waits so long; None: the model computes.
        with_maps: False: TRL's own trainer, whose batches have no maps.
    """
    import torch
    from trl import SFTConfig, SFTTrainer

    from lavender import LavenderConfig, LavenderTrainer
    from lavender.students.loading import load_run
    from lavender.world import STUDENT_PATH

    base: Any = LavenderTrainer if with_maps else SFTTrainer

    class Timed(base):
        """Notes when it asks for batches, and when it has them."""

        asked: list[float]
        had: list[float]

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            self.asked.append(time.perf_counter())
            samples = super().get_batch_samples(*args, **kwargs)
            self.had.append(time.perf_counter())
            return samples

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if waiting_ms is None:
                return super().training_step(*args, **kwargs)
            time.sleep(waiting_ms / 1000)
            return torch.zeros((), device=self.args.device)

    ours: dict[str, Any] = {"maps": str(folder / "maps"), "probe_size": 0} if with_maps else {}
    args = (LavenderConfig if with_maps else SFTConfig)(
        **ours,
        activation_checkpointing=False,
        output_dir=str(folder / "run"),
        max_length=None,
        max_steps=LEFT_OUT + steps,
        per_device_train_batch_size=BATCH,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    model, processor = load_run(STUDENT_PATH)
    trainer = Timed(model, args, processing_class=processor, train_dataset=dataset)
    trainer.asked, trainer.had = [], []
    trainer.train()
    end = time.perf_counter()
    asked, had = trainer.asked[LEFT_OUT:], trainer.had[LEFT_OUT:]
    waited = sum(got - wanted for wanted, got in zip(asked, had, strict=True))
    return waited / (end - asked[0]), 1000 * (end - asked[0]) / len(asked), trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: 1,000 and 2,000 rows, 4 steps, one worker")
    parser.add_argument("--steps", type=int, help="steps that are timed (60)")
    parser.add_argument("--workers", type=int, help="processes that make batches (8)")
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of the steps that only wait (100)")
    parser.add_argument("--training-only", action="store_true", help="without speed and memory of reading a data set")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    workers = options.workers if options.workers is not None else (1 if options.quick else 8)
    with tempfile.TemporaryDirectory() as folder:
        sizes = (1000, 2000) if options.quick else (10_000, 100_000)
        numbers = {} if options.training_only else reading(Path(folder), sizes)
        numbers |= training(Path(folder), options.steps or (4 if options.quick else 60), workers, options.step_ms)
    numbers = {name: round(value, 4) for name, value in numbers.items() if not math.isnan(value)}
    print(json.dumps(numbers, indent=1))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
