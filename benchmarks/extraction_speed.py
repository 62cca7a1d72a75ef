"""Cost of the teacher's word maps: images per second, forwards of the backbone, memory, and overhead of the capture.

    python benchmarks/extraction_speed.py --side 256 --json PATH   # one core, at most 8 minutes: tiny, SD1.x at 256²
    python benchmarks/extraction_speed.py --json PATH              # SD1.x at 512²: about 40 minutes on one core
    python benchmarks/extraction_speed.py --device cuda --json PATH  # SD1.4, SDXL, SD3-medium at full size, bfloat16
    python benchmarks/extraction_speed.py --quick --json PATH      # smoke test: tiny alone, few pairs

Three forwards of the backbone are compared: the bare forward; the same forward with `capture_words` and `Aggregate`, as
`Teacher` runs it; and `Materialise`, a reference that materialises all attention as DAAM and prompt-to-prompt do. They
alternate, and overheads are ratios of neighbouring forwards, so other load on the computer hardly affects them. With
one thread, times are the thread's CPU seconds. Images per second do depend on other load.

"tiny" is the built-in world's teacher. The other models have random weights, on which time does not depend.
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

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences the profiler; it is read at import

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

PICTURE = (640, 480)  # (width, height) of the JPEG files of the whole extraction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: the world's teacher alone, few pairs")
    parser.add_argument(
        "--side", type=int, choices=(256, 512), default=512, help="side of SD1.x's picture on the CPU, in pixels (512)"
    )
    parser.add_argument("--device", default="cpu", help="a torch device (cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--json", type=Path, default=None, help="where to write the numbers")
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        numbers = on_gpu(options.device) if options.device != "cpu" else on_cpu(options.side, options.quick)
        numbers["tflop"] = {name: count_tflop(name) for name in SIDES}
    numbers["machine"] = {
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "threads": options.threads,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(time.process_time()),
    }
    text = json.dumps(rounded(numbers), indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


def on_cpu(side: int, quick: bool) -> dict[str, Any]:
    """The world's teacher and a teacher of SD1.x's size, in float32. The headline numbers are of the last one.

    Args:
        side: side of SD1.x's picture, in pixels.
        quick: measure the world's teacher alone.
    """
    tiny = StableDiffusionPipeline.from_pretrained(TEACHER_PATH, safety_checker=None, use_safetensors=True)
    if quick:
        models = {"tiny": measure(tiny, ExtractionConfig(), pairs=2, others=1, images=2)}
    else:
        models = {"tiny": measure(tiny, ExtractionConfig(), pairs=60, others=20, images=64, batch=8)}
        # scaled with the side, so that the same layers are captured as at 512²
        config = ExtractionConfig(largest_layer=side // 16, batch_size=1)
        models["sd1"] = measure(build("sd1", side), config, pairs=32, others=4, images=4)
    headline = ("capture_overhead", "materialised_overhead", "unet_forwards", "images_per_second", "vae_share")
    return {name: list(models.values())[-1][name] for name in headline} | {"models": models}


def on_gpu(device: str) -> dict[str, Any]:
    """Each family at full size in bfloat16, and its share of the device's rate of matrix products."""
    rate = measure_matrix_rate(device)
    models = {}
    for name in SIDES:
        pipeline = build(name, SIDES[name], device)
        pipeline.to(device, torch.bfloat16)
        models[name] = measure(pipeline, ExtractionConfig(), pairs=20, others=10, images=64, batch=8)
        achieved = 8 * count_tflop(name)["forward"] / models[name]["seconds"]["bare"]
        models[name] |= {"tflop_per_second": achieved, "of_matrix_rate": achieved / rate}
    return {"matrix_tflop_per_second": rate, "models": models}


def measure(pipeline: Any, config: ExtractionConfig, pairs: int, others: int, images: int, batch: int = 1) -> dict:
    """All numbers of one model.

    Args:
        pairs: rounds of the bare and the captured forward.
        others: rounds of the other forwards.
        images: images of the whole extraction.
        batch: images per forward.
    """
    teacher = Teacher(pipeline, config)
    family, forward, watch = teacher.family, Forward(teacher, batch), Stopwatch()
    output = forward.captured()  # also a warm-up
    assert output is not None
    assert torch.equal(forward.bare(), output), "the capture changed the backbone's output"
    ways: dict[str, Callable[[], Any]] = {"bare": forward.bare, "stopped": partial(forward.captured, stop=True)}
    if isinstance(family.backbone, UNet2DConditionModel):
        ways["materialised"] = forward.materialised
        ways["materialised_self_attention"] = partial(forward.materialised, self_attention=True)
    with watch.over(CAPTURING):
        main_times = compare({"bare": forward.bare, "captured": forward.captured}, pairs)
    other_times = compare(ways, others)
    numbers: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in family.backbone.parameters()),
        "dtype": str(family.dtype)[6:],
        "image_size": forward.image_size,
        "latents": forward.size,
        "batch": batch,
        "pairs": pairs,
        "rounds": others,
        "layers_read": len(forward.layers),
        "layers": len(family.layers(forward.size)),
        "words": int((forward.values[0].sum(0) > 0).sum()) - 1,
        "capture_overhead": interval(main_times["captured"], main_times["bare"], subtract=1),
        "capture_inside": watch.seconds["capture"] / (sum(main_times["captured"]) - watch.seconds["capture"]),
        "stopped_share": interval(other_times["stopped"], other_times["bare"]),
        "seconds": {name: float(np.median(times)) for name, times in main_times.items()},
    }
    memory = {"captured": forward.captured, **ways}
    peaks = {name: peak_bytes(run, family.device) for name, run in memory.items()}
    numbers["extra_peak_megabytes"] = {name: (peak - peaks["bare"]) / 1e6 for name, peak in peaks.items()}
    numbers["peak_megabytes"] = peaks["bare"] / 1e6
    if "materialised" in ways:
        for name in ("materialised", "materialised_self_attention"):
            numbers[f"{name}_overhead"] = interval(other_times[name], other_times["bare"], subtract=1)
        numbers["largest_difference_from_materialised"] = check_same_maps(forward)
        kept = forward.materialise()[1].values()
        numbers["materialised_megabytes_per_image"] = sum(maps.nbytes for maps in kept) / batch / 1e6
    return numbers | whole_extraction(teacher, images, numbers["seconds"]["bare"] / batch)


def compare(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, once per round; every second round runs in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in list(ways)[:: -1 if index % 2 else 1]:
            began = clock()
            ways[name]()
            seconds[name].append(clock() - began)
    return seconds


def interval(times: Sequence[float], bare: Sequence[float], subtract: float = 0) -> dict[str, float]:
    """Median of the pairs' ratios, minus `subtract`, with its 95 % interval from 10,000 bootstrap samples."""
    ratios = np.array(times) / np.array(bare) - subtract
    samples = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(samples, axis=1), (0.025, 0.975))
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def is_single_threaded() -> bool:
    """Whether all computing is in one CPU thread."""
    return torch.get_num_threads() == 1 and not torch.cuda.is_initialized()


def clock() -> float:
    """Seconds of computing. A thread's own clock stops while other processes have the core."""
    return time.thread_time() if is_single_threaded() else now()


def now() -> float:
    """Wall-clock seconds, after the GPU has finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of tensors during the run, minus the memory before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    # the allocator's events in order; the profiler's tables only have a sum per operator
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(0, int(np.cumsum(changes).max()))


def measure_matrix_rate(device: str) -> float:
    """TFLOP per second of bfloat16 matrix products: the best of ten."""
    side, times = 8192, []
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    for _ in range(10):
        began = now()
        left @ right
        times.append(now() - began)
    return 2 * side**3 / min(times) / 1e12


def count_tflop(name: str) -> dict[str, float]:
    """TFLOP of one image at full size, counted without computing: bare, captured and stopped forward, VAE encoder."""
    pipeline = build(name, SIDES[name], "meta")
    forward = Forward(Teacher(pipeline, ExtractionConfig()), 1)
    keys = forward.condition["states"].shape[1]

    def captured(stop: bool) -> None:
        with capture_words(WordCapture(forward.layers, forward.values, keys, lambda layer, maps: None), stop):
            forward.bare()

    pixels = torch.empty(1, 3, *forward.image_size, device="meta")
    runs = {"forward": forward.bare, "captured": partial(captured, False), "stopped": partial(captured, True)}
    runs["vae"] = partial(pipeline.vae.encode, pixels)
    tflop = {}
    for part, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            run()
        tflop[part] = counter.get_total_flops() / 1e12
    return tflop


class Stopwatch:
    """Seconds per named part, over all threads. Time in a part inside another part counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock, self._local = threading.Lock(), threading.local()

    @contextmanager
    def over(self, parts: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
        """Inside this context, calls of the functions (owner, name) count for their part."""
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
        time_now, running = clock(), getattr(self._local, "part", None)
        if running is not None:
            with self._lock:
                self.seconds[running] += time_now - self._local.since
        self._local.part, self._local.since = part, time_now


CAPTURING = (
    (WordCapture, "on_attention", "capture"),
    (Aggregate, "maps", "capture"),
    (Aggregate, "agreement", "capture"),
)
READING = (
    (Sample, "load", "io"),
    (lavender.teachers.extract, "image_id", "io"),
    (Teacher, "view", "io"),
    (StoreWriter, "add", "io"),
    (StoreWriter, "flush", "io"),
    (lavender.teachers.extract, "content_words", "words"),
)


def whole_extraction(teacher: Teacher, images: int, bare: float) -> dict[str, Any]:
    """Run `extract` from JPEG files to a store, and measure where its time goes.

    Shares are of the seconds of computing (see `clock`). They include pictures that a thread reads ahead, but not the
    time that it waits for the disk.

    Args:
        bare: seconds of a bare forward per image. `forward_equivalents` is all computing per image in this unit.
    """
    family, watch = teacher.family, Stopwatch()
    networks = ((family, "encode_pixels", "vae"), (family, "encode_texts", "text"), (family, "denoise", "unet"))
    with tempfile.TemporaryDirectory() as folder:
        samples = write_samples(Path(folder), images + 1)
        extract(Samples(samples[:1]), teacher, Path(folder) / "warm")
        forwards, began = family.forwards, time.process_time()
        with watch.over((*CAPTURING, *READING, *networks)):
            summary = extract(Samples(samples[1:]), teacher, Path(folder) / "store")
        computing = time.process_time() - began if is_single_threaded() else summary.seconds
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


def write_samples(folder: Path, count: int) -> tuple[Sample, ...]:
    """Write scenes as JPEG files; samples of them with their captions."""
    samples = []
    for seed in range(count):
        scene = draw_scene(seed)
        scene.image.resize(PICTURE).save(folder / f"{seed}.jpg")
        messages = conversation("what?", caption_scene(scene).text)
        samples.append(Sample(f"{seed}", (folder / f"{seed}.jpg",), messages))
    return tuple(samples)


def rounded(value: Any) -> Any:
    """The value with four significant digits in every number."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
