"""Time, space, network and failures of an extraction of 130 k, 10 M and 5 B pairs, calculated from measured rates.

    python benchmarks/scale.py --json PATH            # measures the store's writer, then calculates
    python benchmarks/scale.py --read PATH            # calculates from what was measured
    python benchmarks/scale.py --quick --json PATH    # smoke test: few records

Measured here, in seconds of one CPU core (which other load does not change much), with records of `WORDS` maps of
32 × 32: the writer's records per second, bytes per record on disk, bytes per record that a Ray worker sends, and bytes
of memory per record that a writer knows. `docs/evidence/extraction_speed.json` has the rates of the teacher, from
`benchmarks/extraction_speed.py`. `--rate`, `--image-kilobytes` and `--hours-per-loss` are assumptions.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from lavender.data.store import MapStore
from lavender.maps import Word, WordMaps
from lavender.teachers.extraction_loop import Step

PAIRS = {"130 k": 130_000, "10 M": 10_000_000, "5 B": 5_000_000_000}
WORDS, GRID, RECORDS_PER_SHARD = 6, (32, 32), 256
PAPER_SECONDS = 20.0  # per image on a V100, as the paper reports: 722 hours for 130 k
EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence"


@dataclass(frozen=True)
class Assumptions:
    """What was not measured.

    Attributes:
        rate: images per second of a GPU. Default: 30 % of an A100's 312 TFLOP/s, at the counted TFLOP of one image of
            Stable Diffusion 1 at 512².
        image_kilobytes: size of an image file.
        hours_per_loss: hours that a worker runs until it is lost.
    """

    rate: float
    image_kilobytes: float = 100.0
    hours_per_loss: float = 24.0


def teacher_rates() -> dict[str, float]:
    """From the evidence: TFLOP per image, images per second of a core, seconds of a core to read an image."""
    numbers = json.loads((EVIDENCE / "extraction_speed.json").read_text())
    tiny, sd1 = numbers["models"]["tiny"], numbers["models"]["sd1"]
    return {
        "tflop_per_image": numbers["tflop"]["sd1"]["captured"] + numbers["tflop"]["sd1"]["vae"],
        "images_per_core_second": sd1["images_per_second_of_computing"],
        "read_seconds": tiny["io_share"] / tiny["images_per_second_of_computing"],
    }


def record(index: int) -> WordMaps:
    words = tuple(Word(f"word{at}", 6 * at, 6 * at + 5, f"word{at}", "noun") for at in range(WORDS))
    maps = torch.rand((WORDS, *GRID), generator=torch.Generator().manual_seed(index))
    return WordMaps(f"{index:032x}", " ".join(word.text for word in words) + f" {index}", words, maps)


def measure(num_records: int) -> dict[str, float]:
    """The numbers of the module's docstring."""
    drawn = [record(index) for index in range(64)]
    given = [replace(drawn[index % 64], image_id=f"{index:032x}") for index in range(num_records)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        with MapStore.writer(folder, {}, {}, GRID, RECORDS_PER_SHARD) as writer:
            for word_maps in given:
                writer.add(word_maps)
        seconds = time.process_time() - began
        stored = sum(path.stat().st_size for path in Path(folder).glob("shard-*"))
        keys = writer.keys
        memory = sys.getsizeof(keys) + sum(map(sys.getsizeof, keys))
    return {
        "records": num_records,
        "records_per_core_second": num_records / seconds,
        "bytes_stored": stored / num_records,
        "bytes_sent": len(pickle.dumps([Step(maps=drawn)])) / len(drawn),
        "bytes_of_memory": memory / num_records,
    }


def calculate(measured: dict[str, float], assumed: Assumptions) -> dict[str, list[float]]:
    """Per row of the table, the numbers for each of `PAIRS`."""
    hours, core_rate = assumed.rate * 3600, teacher_rates()["images_per_core_second"]
    formulas = {
        "GPU-hours of the paper's null-text inversion, V100: pairs × 20 s": lambda n: n * PAPER_SECONDS / 3600,
        "core-hours of one forward pass at 256², CPU: pairs / core rate": lambda n: n / core_rate / 3600,
        "GPU-hours of one forward pass at 512²: pairs / rate": lambda n: n / hours,
        "losses of workers: GPU-hours / hours per loss": lambda n: n / hours / assumed.hours_per_loss,
        "images read, TB: pairs × image size": lambda n: n * assumed.image_kilobytes / 1e9,
        "core-hours of reading: pairs × reading": lambda n: n * teacher_rates()["read_seconds"] / 3600,
        "maps sent to the writer with Ray, TB: pairs × sent": lambda n: n * measured["bytes_sent"] / 1e12,
        "core-hours of the writer: pairs / writer rate": lambda n: n / measured["records_per_core_second"] / 3600,
        "store, TB: pairs × stored": lambda n: n * measured["bytes_stored"] / 1e12,
        "shards: pairs / 256": lambda n: ceil(n / RECORDS_PER_SHARD),
        "keys in the memory of each writer, GB: pairs × memory": lambda n: n * measured["bytes_of_memory"] / 1e9,
    }
    return {name: [formula(number) for number in PAIRS.values()] for name, formula in formulas.items()}


def table(rows: dict[str, list[float]]) -> str:
    lines = [f"| | {' | '.join(PAIRS)} |", f"| --- |{' --- |' * len(PAIRS)}"]
    lines += [f"| {name} | {' | '.join(map(rounded, numbers))} |" for name, numbers in rows.items()]
    return "\n".join(lines)


def rounded(number: float) -> str:
    """Two significant digits, and all digits before the point."""
    return f"{float(f'{number:.2g}'):,.0f}" if number >= 10 else f"{number:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = 0.3 * 312 / teacher_rates()["tflop_per_image"]
    parser.add_argument("--read", type=Path, help="a file of --json, instead of measuring")
    parser.add_argument("--rate", type=float, default=default, help=f"images per second of a GPU ({default:.0f})")
    parser.add_argument("--image-kilobytes", type=float, default=100.0, help="size of an image file (100)")
    parser.add_argument("--hours-per-loss", type=float, default=24.0, help="hours that a worker runs (24)")
    parser.add_argument("--quick", action="store_true", help="smoke test: few records")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assumed = Assumptions(options.rate, options.image_kilobytes, options.hours_per_loss)
    if options.read:
        measured = json.loads(options.read.read_text())["measured"]
    else:
        measured = {name: float(f"{value:.4g}") for name, value in measure(500 if options.quick else 20_000).items()}
    rows = calculate(measured, assumed)
    numbers: dict[str, Any] = {
        "measured": measured,
        "teacher": teacher_rates(),
        "assumed": vars(assumed),
        "workers_per_writer": measured["records_per_core_second"] / assumed.rate,
        "megabit_per_second_per_worker": {
            "images": assumed.rate * assumed.image_kilobytes * 8e-3,
            "maps": assumed.rate * measured["bytes_sent"] * 8e-6,
        },
    }
    print(json.dumps(numbers, indent=1))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(numbers | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
