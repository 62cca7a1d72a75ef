"""What word maps cost: images a second, forwards of the backbone, memory, and what the capture adds.

Three ways through the backbone are compared in interleaved pairs, their order alternating: the bare forward; the
same forward under `capture_words` with its `Aggregate`, as `Teacher` runs it; and the reference that materialises
everything (`Materialise`, the way of DAAM and prompt-to-prompt). Overheads are quotients of neighbours, so they hold
on a noisy machine; with one thread they are of the thread's own time. Images a second do not hold there. Weights are
random where a model is not the world's own: time does not depend on them.

    python benchmarks/extraction_speed.py --side 256 --json PATH   # one core, at most 8 minutes: tiny, SD1.x at 256²
    python benchmarks/extraction_speed.py --json PATH              # SD1.x at 512²: about 40 minutes on one core
    python benchmarks/extraction_speed.py --device cuda --json PATH  # SD1.4, SDXL, SD3-medium at full size, bfloat16
    python benchmarks/extraction_speed.py --quick --json PATH      # that it runs: tiny alone, few pairs
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at import: the profiler's own lines are no part of the figures

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from extraction_ways import SIDES, Forward, build, check_same_maps
from torch.utils.flop_counter import FlopCounterMode

import lavender.teachers.extract
from lavender.config import ExtractionConfig
from lavender.data.samples import Sample, Samples
from lavender.data.store import StoreWriter
from lavender.teachers.diffusion.aggregate import Aggregate
from lavender.teachers.diffusion.capture import WordCapture, capture_words
from lavender.teachers.diffusion.teacher import Teacher
from lavender.teachers.extract import extract
from lavender.world import TEACHER_PATH
from lavender.world.language import caption_scene
from lavender.world.scenes import draw_scene
from lavender.world.student_models import conversation

PICTURE = (640, 480)  # (width, height) of the files that the whole extraction reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="that it runs: the world's teacher alone, few pairs")
    parser.add_argument("--side", type=int, choices=(256, 512), default=512, help="of SD1.x on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        found = on_gpu(options.device) if options.device != "cpu" else on_cpu(options.side, options.quick)
        found["tflop"] = {name: tflop(name) for name in SIDES}
    found["machine"] = {
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "threads": options.threads,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(time.process_time()),
    }
    text = json.dumps(rounded(found), indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


def on_cpu(side: int, quick: bool) -> dict[str, Any]:
    """The world's teacher and one of SD1.x's size in float32; the latter's figures are the headline.

    Args:
        quick: without the latter.
    """
    tiny = StableDiffusionPipeline.from_pretrained(TEACHER_PATH, safety_checker=None, use_safetensors=True)
    if quick:
        models = {"tiny": measure(tiny, ExtractionConfig(), pairs=2, others=1, images=2)}
    else:
        models = {"tiny": measure(tiny, ExtractionConfig(), pairs=60, others=20, images=64, batch=8)}
        # half the side, half the largest layer: the same layers are read as at 512²
        config = ExtractionConfig(largest_layer=side // 16, batch_size=1)
        models["sd1"] = measure(build("sd1", side), config, pairs=32, others=4, images=4)
    headline = ("capture_overhead", "materialised_overhead", "unet_forwards", "images_per_second", "vae_share")
    return {name: list(models.values())[-1][name] for name in headline} | {"models": models}


def on_gpu(device: str) -> dict[str, Any]:
    """Each family at full size in bfloat16 with random weights, against the matrix rate of the same run."""
    rate = matrix_rate(device)
    models = {}
    for name in SIDES:
        pipeline = build(name, SIDES[name], device)
        pipeline.to(device, torch.bfloat16)
        images = 64 if pipeline.text_encoder is not None else 0
        models[name] = measure(pipeline, ExtractionConfig(), pairs=20, others=10, images=images, batch=8)
        achieved = 8 * tflop(name)["forward"] / models[name]["seconds"]["bare"]
        models[name] |= {"tflop_per_second": achieved, "of_matrix_rate": achieved / rate}
    return {"matrix_tflop_per_second": rate, "models": models}


def measure(pipeline: Any, config: ExtractionConfig, pairs: int, others: int, images: int, batch: int = 1) -> dict:
    """All figures of one model.

    Args:
        pairs: of bare and captured forwards; `others` are rounds of the remaining ways.
        images: that a whole extraction reads; 0 leaves it out.
    """
    teacher = Teacher(pipeline, config)
    family, forward, watch = teacher.family, Forward(teacher, batch), Stopwatch()
    output = forward.captured()  # warms up, too
    assert output is not None
    assert torch.equal(forward.bare(), output), "capture changed the backbone's output"
    ways: dict[str, Callable[[], Any]] = {"bare": forward.bare, "stopped": partial(forward.captured, stop=True)}
    if isinstance(family.backbone, UNet2DConditionModel):
        ways["materialised"] = forward.materialised
        ways["materialised_self_attention"] = partial(forward.materialised, self_attention=True)
    with watch.over(CAPTURING):
        first = compare({"bare": forward.bare, "captured": forward.captured}, pairs)
    rest = compare(ways, others)
    found: dict[str, Any] = {
        "parameters": sum(one.numel() for one in family.backbone.parameters()),
        "dtype": str(family.dtype)[6:],
        "image_size": forward.image_size,
        "latents": forward.size,
        "batch": batch,
        "pairs": pairs,
        "rounds": others,
        "layers_read": len(forward.layers),
        "layers": len(family.layers(forward.size)),
        "words": int((forward.values[0].sum(0) > 0).sum()) - 1,
        "capture_overhead": interval(first["captured"], first["bare"], less=1),
        "capture_inside": watch.seconds["capture"] / (sum(first["captured"]) - watch.seconds["capture"]),
        "stopped_share": interval(rest["stopped"], rest["bare"]),
        "seconds": {"bare": float(np.median(first["bare"])), "captured": float(np.median(first["captured"]))},
    }
    memory = {"captured": forward.captured, **ways}
    peaks = {name: peak_bytes(run, family.device) for name, run in memory.items()}
    found["extra_peak_megabytes"] = {name: (peak - peaks["bare"]) / 1e6 for name, peak in peaks.items()}
    found["peak_megabytes"] = peaks["bare"] / 1e6
    if "materialised" in ways:
        for name in ("materialised", "materialised_self_attention"):
            found[f"{name}_overhead"] = interval(rest[name], rest["bare"], less=1)
        found["largest_difference_from_materialised"] = check_same_maps(forward)
        kept = forward.materialise()[1].values()
        found["materialised_megabytes_per_image"] = sum(one.numel() * one.element_size() for one in kept) / batch / 1e6
    if images:
        found |= whole_extraction(teacher, images, found["seconds"]["bare"] / batch)
    return found


def compare(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, once a round; every other round runs backwards."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in list(ways)[:: -1 if index % 2 else 1]:
            began = clock()
            ways[name]()
            found[name].append(clock() - began)
    return found


def interval(times: Sequence[float], bare: Sequence[float], less: float = 0) -> dict[str, float]:
    """Median of the pairs' quotients, minus `less`, with its 95 % interval from 10,000 bootstrap samples."""
    quotients = np.array(times) / np.array(bare) - less
    drawn = np.random.default_rng(0).choice(quotients, (10_000, len(quotients)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return {"median": float(np.median(quotients)), "low": float(low), "high": float(high)}


def alone() -> bool:
    """Whether one thread of the CPU computes."""
    return torch.get_num_threads() == 1 and not torch.cuda.is_initialized()


def clock() -> float:
    """Seconds of computing: one thread's own clock stands still while others have the core."""
    return time.thread_time() if alone() else now()


def now() -> float:
    """Seconds on the wall."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most memory of tensors above what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    # the allocator's own events, in their order; the profiler's tables have only each operator's sum
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    steps = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return max(0, int(np.cumsum(steps).max()))


def matrix_rate(device: str) -> float:
    """TFLOP a second of bfloat16 matrix products: the best of ten."""
    side, times = 8192, []
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    for _ in range(10):
        began = now()
        left @ right
        times.append(now() - began)
    return 2 * side**3 / min(times) / 1e12


def tflop(name: str) -> dict[str, float]:
    """TFLOP of one row at full size, counted without computing: forward, stopped forward, capture, VAE encoder."""
    pipeline = build(name, SIDES[name], "meta")
    forward = Forward(Teacher(pipeline, ExtractionConfig()), 1)
    keys = forward.condition["states"].shape[1]

    def captured(stop: bool) -> None:
        with capture_words(WordCapture(forward.layers, forward.values, keys, lambda layer, maps: None), stop):
            forward.bare()

    pixels = torch.empty(1, 3, *forward.image_size, device="meta")
    runs = {"forward": forward.bare, "captured": partial(captured, False), "stopped": partial(captured, True)}
    runs["vae"] = partial(pipeline.vae.encode, pixels)
    found = {}
    for part, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            run()
        found[part] = counter.get_total_flops() / 1e12
    return found


class Stopwatch:
    """Seconds spent in named parts, of each thread; time in a part inside another counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock, self._local = threading.Lock(), threading.local()

    @contextmanager
    def over(self, parts: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
        """Inside, calls of (owner, name) count for a part."""
        with ExitStack() as patches:
            for owner, name, part in parts:
                patches.enter_context(patch.object(owner, name, self._around(getattr(owner, name), part)))
            yield

    def _around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer = getattr(self._local, "part", None)
            self._switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(outer)

        return timed

    def _switch(self, part: str | None) -> None:
        moment, running = clock(), getattr(self._local, "part", None)
        if running is not None:
            with self._lock:
                self.seconds[running] += moment - self._local.since
        self._local.part, self._local.since = part, moment


CAPTURING = ((WordCapture, "see", "capture"), (Aggregate, "maps", "capture"), (Aggregate, "agreement", "capture"))
READING = (
    (Sample, "load", "io"),
    (lavender.teachers.extract, "image_id", "io"),
    (Teacher, "view", "io"),
    (StoreWriter, "add", "io"),
    (StoreWriter, "flush", "io"),
    (lavender.teachers.extract, "content_words", "words"),
)


def whole_extraction(teacher: Teacher, images: int, bare: float) -> dict[str, Any]:
    """`extract` from JPEG files to a store, and where its time goes.

    Shares are of the seconds of computing (see `clock`), pictures that are read ahead in a thread included; waiting
    for the disk is not. `forward_equivalents`: the computing for an image, everything included, in bare forwards of
    the backbone of one row, `bare` seconds each.
    """
    family, watch = teacher.family, Stopwatch()
    networks = ((family, "encode_pixels", "vae"), (family, "encode_texts", "text"), (family, "denoise", "unet"))
    with tempfile.TemporaryDirectory() as folder:
        samples = written(Path(folder), images + 1)
        extract(Samples(samples[:1]), teacher, Path(folder) / "warm")
        forwards, began = family.forwards, time.process_time()
        with watch.over((*CAPTURING, *READING, *networks)):
            summary = extract(Samples(samples[1:]), teacher, Path(folder) / "store")
        computing = time.process_time() - began if alone() else summary.seconds
        stored = sum(file.stat().st_size for file in (Path(folder) / "store").glob("shard-*"))
    shares = {part: seconds / computing for part, seconds in watch.seconds.items()}
    return {
        "images": images,
        "words_per_image": summary.words / images,
        "images_per_second": images / summary.seconds,
        "images_per_second_of_computing": images / computing,
        "unet_forwards": (family.forwards - forwards) / images,
        "forward_equivalents": computing / images / bare,
        **{f"{part}_share": share for part, share in shares.items()},
        "other_share": 1 - sum(shares.values()),
        "store_kilobytes_per_image": stored / images / 1e3,
    }


def written(folder: Path, count: int) -> tuple[Sample, ...]:
    """JPEG files of scenes with their captions."""
    samples = []
    for seed in range(count):
        scene = draw_scene(seed)
        scene.image.resize(PICTURE).save(folder / f"{seed}.jpg")
        messages = conversation("what?", caption_scene(scene).text)
        samples.append(Sample(f"{seed}", (folder / f"{seed}.jpg",), messages))
    return tuple(samples)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
