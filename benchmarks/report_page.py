"""How large a report with many pictures is, and how long a browser takes to open it.

    python benchmarks/report_page.py --json report_page.json
    python benchmarks/report_page.py --quick --json report_page.json    # smoke test: 6 pictures, opened once

Pictures of 640 × 480 with soft shapes and noise, twelve words each, maps of four sources of 32 × 32 cells. Measured in
headless Chromium from disk, in milliseconds: `open_ms`, from the request to the end of the load event; `paint_ms`, to
the first contentful paint; and `cpu_ms`, the processor time of the page's main thread until then, which other programs
on the computer hardly change. Medians over the openings. It needs the system package chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from lavender.evaluation.report.page import Panel, Report, WordRow, write_report

TEXT = "A brown cat on a wooden table looks at one small cup beside the tall open window of an old grey house."
WORDS = ("brown", "cat", "wooden", "table", "small", "cup", "tall", "open", "window", "old", "grey", "house")
SOURCES = ("teacher", "base", "plain", "aligned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: 6 pictures, opened once")
    parser.add_argument("--pictures", type=int, default=200, help="number of pictures (200)")
    parser.add_argument("--openings", type=int, default=7, help="how often the page is opened (7)")
    parser.add_argument("--json", type=Path, default=None, help="file for the numbers")
    options = parser.parse_args()
    pictures, openings = (6, 1) if options.quick else (options.pictures, options.openings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        began = time.perf_counter()
        write_report(report_of(pictures), path)
        numbers = {"pictures": pictures, "write_s": round(time.perf_counter() - began, 1)}
        numbers |= {"megabytes": round(path.stat().st_size / 1e6, 2)} | opening(path, openings)
    print(json.dumps(numbers, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(numbers, indent=1))


def report_of(number: int) -> Report:
    """A page of `number` pictures, always the same."""
    draws, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    panels = []
    for index in range(number):
        rows = [WordRow(word, {source: heat(generator) for source in SOURCES}, None, span_of(word)) for word in WORDS]
        answers = dict.fromkeys(SOURCES[1:], "a brown cat on a wooden table.")
        group = ("best", "typical", "worst")[3 * index // number]
        panels.append(Panel(photograph(draws), f"picture {index}", rows, answers, TEXT, "", group))
    return Report("A run", "", [], panels, [], {}, choose_words=True)


def photograph(draws: np.random.Generator) -> Image.Image:
    """Soft shapes with the noise of a camera, which JPEG takes about as many bytes for as for a photograph."""
    soft = Image.fromarray(draws.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    return Image.fromarray((np.asarray(soft) + draws.normal(0, 6, (480, 640, 3))).clip(0, 255).astype(np.uint8))


def heat(generator: torch.Generator) -> torch.Tensor:
    """A spot at a random place with some noise around it."""
    place, width = torch.rand(2, generator=generator), 0.05 + 0.2 * torch.rand((), generator=generator)
    rows, cols = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    spot = torch.exp(-((rows - place[0]) ** 2 + (cols - place[1]) ** 2) / width**2)
    return spot + 0.1 * torch.rand(32, 32, generator=generator)


def span_of(word: str) -> tuple[int, int]:
    start = TEXT.index(word)
    return start, start + len(word)


def opening(path: Path, times: int) -> dict[str, float]:
    """Medians over some openings of a page, each in a new tab."""
    from playwright.sync_api import sync_playwright

    loads, paints, busy = [], [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(times):
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            page.goto(path.as_uri(), wait_until="load", timeout=300_000)
            metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
            busy.append(1000 * metrics["TaskDuration"])
            loads.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            page.close()
        browser.close()
    return {"open_ms": round(median(loads), 1), "paint_ms": round(median(paints), 1), "cpu_ms": round(median(busy), 1)}


if __name__ == "__main__":
    main()
