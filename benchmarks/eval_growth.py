"""How time and memory of `lavender eval` grow with the number of samples.

    python benchmarks/eval_growth.py --json eval_growth.json
    python benchmarks/eval_growth.py --quick --json eval_growth.json   # smoke test: 16, 32 and 64 samples

A base and a run, both the built-in student, are compared on n, 2n and 4n samples (`--samples` is n), each number in a
process of its own. Pictures are drawn scenes of 1200 × 900 pixels, and take `picture_mb` decoded. `cpu_s` are the
process's CPU seconds after a first comparison of two samples, `peak_mb` the most resident memory of the process.
`time_exponent` and `peak_exponent` are the slopes of their logarithms over that of the number of samples: 1 is linear
growth. `kept_pictures` is how many decoded pictures the memory grows by per sample between n and 4n: 1 or more if all
stay in memory, about 0 if those of a batch do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

SIDES = (1200, 900)
PICTURE_MB = 3 * SIDES[0] * SIDES[1] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: 16, 32 and 64 samples")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="the smallest number, at least 16 (64)")
    parser.add_argument("--json", type=Path, default=None, help="file for the numbers")
    options = parser.parse_args()
    first = 16 if options.quick else options.samples
    if first < 16:
        parser.error("--samples: at least 16, a whole batch")
    numbers = measured([first, 2 * first, 4 * first])
    print(json.dumps(numbers, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(numbers, indent=1))


def measured(samples: list[int]) -> dict[str, object]:
    """The numbers of this benchmark for these numbers of samples."""
    context = multiprocessing.get_context("spawn")  # a forked process has the memory of its parent
    found = []
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, context) as process:
            process.submit(write_world, Path(folder), samples[-1]).result()
        for number in samples:
            with ProcessPoolExecutor(1, context) as process:
                found.append(process.submit(evaluate, Path(folder), number).result())
    seconds, peaks = zip(*found, strict=True)
    return {
        "samples": samples,
        "cpu_s": [round(value, 2) for value in seconds],
        "peak_mb": [round(value) for value in peaks],
        "picture_mb": round(PICTURE_MB, 2),
        "time_exponent": exponent(samples, seconds),
        "peak_exponent": exponent(samples, peaks),
        "kept_pictures": round((peaks[-1] - peaks[0]) / (samples[-1] - samples[0]) / PICTURE_MB, 3),
    }


def exponent(samples: list[int], values: tuple[float, ...]) -> float:
    """b of the closest values = a · samples ** b."""
    return round(float(np.polyfit(np.log(samples), np.log(values), 1)[0]), 3)


def write_world(folder: Path, number: int) -> None:
    """Large pictures with captions, and a run that is the built-in student."""
    import yaml
    from PIL import Image

    from lavender.world import STUDENT_PATH
    from lavender.world.language import caption_scene
    from lavender.world.scenes import scenes

    (folder / "data").mkdir()
    lines = []
    for index, scene in enumerate(scenes("development", number)):
        scene.image.resize(SIDES, Image.Resampling.BICUBIC).save(folder / "data" / f"{index}.jpg")
        lines.append(json.dumps({"file_name": f"{index}.jpg", "text": caption_scene(scene).text}) + "\n")
    (folder / "data" / "metadata.jsonl").write_text("".join(lines))
    shutil.copytree(STUDENT_PATH, folder / "run" / "checkpoint")
    config = {"model": str(STUDENT_PATH), "data": str(folder / "data"), "maps": None, "prompt": "describe the picture."}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config | {"training": {}}))
    (folder / "run" / "coverage.json").write_text("{}")  # it is finished


def evaluate(folder: Path, number: int) -> tuple[float, float]:
    """(CPU seconds, peak memory in MB) of a comparison on so many samples."""
    from lavender.evaluation.runs import evaluate_runs

    evaluate_runs(folder / "run", [], limit=2)  # imports, and what is read once
    began = time.process_time()
    evaluate_runs(folder / "run", [], limit=number)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, peak / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
