"""Time and memory of a training step with alignment, beside those of TRL's own trainer on the same batch.

    python benchmarks/train_step.py --json train_step.json
    python benchmarks/train_step.py --device cuda --json train_step.json
    python benchmarks/train_step.py --quick --json train_step.json    # smoke test: two small rows

The model is a LLaVA of random weights: a decoder of 8 layers, 512 wide, with 16 heads and 4 key heads, and a tower of
two small layers, since every way runs the tower alike. A batch has one picture of 576 keys per sample, random text, and
words of one row each at the end of it. A step is the trainer's own `training_step`, forward and backward, without
optimiser. On a GPU the weights are bfloat16. `--checkpointing` switches on gradient checkpointing, TRL's default.

The ways, each with its trainer and its copy of the model: `sft`, TRL's SFTTrainer, which the others are compared with;
`zero`, LavenderTrainer with `align_weight=0`; `mass` and `kl`, the direct losses, without attention forcing;
`published`, the loss with an Aligner; `eager`, SFTTrainer with eager attention and `output_attentions`.

In each round every way makes one step, in random order. Times are the process's CPU seconds on one thread, or seconds
between two waits for the GPU. `time` is the median over the rounds of the ratio to `sft`, with the 95 % interval of a
bootstrap. `peak_mib` is the most memory of tensors during one step: on a GPU as its allocator says; on a CPU of tensors
that operations return, while they live, so that what a kernel needs within itself is left out. `memory` is its ratio to
that of `sft`.

`growth` compares rows that differ in words or in tokens alone: by which factor the memory beyond that of `sft` grows
where they grow by `by`. It is at most `by` where memory is linear in them; None where no memory was added.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from capture_overhead import MIB, ratio
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer

from lavender.alignment.coverage import Coverage
from lavender.data.images import image_id
from lavender.data.samples import Sample, to_dataset
from lavender.data.store import MapStore
from lavender.maps import WordMaps
from lavender.students.capture import row_tensors
from lavender.students.image_keys import grid_boxes
from lavender.students.kernels import set_kernel
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.words import content_words
from lavender.world.language import caption_scene
from lavender.world.scenes import scenes
from lavender.world.student_models import build_llava_processor, conversation

TOKENS, WORDS, BATCHES = (1024, 2048, 4096, 8192), (8, 32, 128, 256), (1, 2, 4, 8)
SIDE, PATCH, FIRST_KEY, GRID = 24, 14, 11, (32, 32)
EAGER_UP_TO = 2**22  # batch · tokens²; beyond it eager attention does not fit on small machines
WAYS: dict[str, dict[str, Any] | None] = {
    "sft": None,
    "eager": None,
    "zero": {"align_weight": 0.0},
    "mass": {"attention_loss": "mass", "attention_forcing": 0.0},
    "kl": {"attention_loss": "kl", "attention_forcing": 0.0},
    "published": {"attention_loss": "published"},
}
"""Settings of LavenderConfig; None for SFTTrainer."""


class LivePeak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, among those that operations returned inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._live, self._sizes = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self._live)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._sizes:
            return
        self._sizes[storage] = size = storage.nbytes()
        self._live += size
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._live -= size


def build_model(processor: Any, layers: int, width: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(3)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 128,
        intermediate_size=11 * width // 4,
        max_position_embeddings=max(TOKENS),
        pad_token_id=tokenizer.pad_token_id,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=SIDE**2)
    )


def build_data(folder: Path) -> tuple[Any, Dataset]:
    """A processor of pictures with 576 keys, and two samples with maps: trainers look at their data when they begin."""
    some = list(scenes("development", 2))
    captions = [caption_scene(scene).text for scene in some]
    processor = build_llava_processor(captions)
    square = {"height": SIDE * PATCH, "width": SIDE * PATCH}
    processor.image_processor.size = processor.image_processor.crop_size = square
    processor.patch_size = PATCH
    with MapStore.writer(folder / "maps", {"made by": "benchmark"}, {}, GRID) as writer:
        for scene, caption in zip(some, captions, strict=True):
            words = content_words(caption, ("noun",))
            writer.add(WordMaps(image_id(scene.image), caption, words, torch.rand(len(words), *GRID)))
    samples = [
        Sample(f"{scene.seed}", (scene.image,), conversation("describe the picture.", caption))
        for scene, caption in zip(some, captions, strict=True)
    ]
    return processor, to_dataset(samples)


def build_trainer(way: str, model: Any, processor: Any, dataset: Dataset, folder: Path, options: Any) -> Any:
    """The trainer of a way, with a copy of the model."""
    settings = WAYS[way]
    shared: dict[str, Any] = {
        "output_dir": str(folder / way),
        "max_length": None,
        "report_to": "none",
        "use_cpu": options.device == "cpu",
        "bf16": False,
        "activation_checkpointing": options.checkpointing,
        "disable_tqdm": True,
    }
    model = copy.deepcopy(model)
    if settings is None:
        if way == "eager":
            set_kernel(model, "eager")
        return SFTTrainer(model, SFTConfig(**shared), train_dataset=dataset, processing_class=processor)
    args = LavenderConfig(**shared, maps=str(folder / "maps"), probe_size=0, **settings)
    return LavenderTrainer(model, args, train_dataset=dataset, processing_class=processor)


def build_batch(model: Any, tokens: int, words: int, batch: int) -> dict[str, Any]:
    """What the collator makes of `batch` samples of so many tokens and words."""
    image, vocabulary = model.config.image_token_index, model.config.text_config.vocab_size
    ids = torch.randint(4, vocabulary - 1, (batch, tokens))
    ids[ids == image] = 5
    keys = torch.arange(FIRST_KEY, FIRST_KEY + SIDE**2).expand(batch, -1)
    ids.scatter_(1, keys, image)
    tensors = row_tensors([[(row,) for row in range(tokens - 1 - words, tokens - 1)]] * batch)
    tensors |= {
        "boxes": grid_boxes(SIDE, SIDE).float().expand(batch, -1, -1),
        "pictures": torch.zeros(batch, SIDE**2, dtype=torch.long),
        "keys": keys,
        "targets": torch.rand(batch, words, *GRID),
        "reads": torch.zeros(batch, words, dtype=torch.bool),
    }
    described = {"names": ["drawn"] * batch, "faults": [], "counts": Coverage(batch, batch, words * batch).counts()}
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == image, -100),
        "pixel_values": torch.rand(batch, 3, SIDE * PATCH, SIDE * PATCH, dtype=model.dtype),
        "alignment": tensors | described,
    }


def step_of(trainer: Any, way: str, batch: dict[str, Any]) -> Callable[[], None]:
    """One step of a way's trainer, as its loop makes it."""
    own = {name: value for name, value in batch.items() if name != "alignment" or WAYS[way] is not None}
    if way == "eager":
        own["output_attentions"] = True
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        trainer.model.zero_grad(set_to_none=True)
        batches, num_items = trainer.get_batch_samples(iter([dict(own)]), 1, trainer.args.device)
        trainer.training_step(trainer.model, batches[0], num_items)

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mib(step: Callable[[], None], device: str) -> float:
    """The most memory of tensors during a step, in MiB, beyond what was there before it."""
    if device == "cpu":
        with LivePeak() as live:
            step()
        return live.peak / MIB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def measure_row(trainers: dict[str, Any], batch: dict[str, Any], runs: int, device: str) -> dict[str, Any]:
    """Times and memory of the ways on one batch."""
    steps, draw = {way: step_of(trainer, way, batch) for way, trainer in trainers.items()}, random.Random(7)
    times: dict[str, list[float]] = {way: [] for way in steps}
    for index in range(-1, runs):  # the first round is a warm-up
        for way in draw.sample(list(steps), k=len(steps)):
            spent = seconds(steps[way], device)
            if index >= 0:
                times[way].append(spent)
    peaks = {way: peak_mib(step, device) for way, step in steps.items()}
    others = [way for way in steps if way != "sft"]
    return {
        "sft_seconds": median(times["sft"]),
        "peak_mib": peaks,
        "time": {way: ratio(times[way], times["sft"]) for way in others},
        "memory": {way: peaks[way] / peaks["sft"] for way in others},
    }


def growth_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How memory beyond that of `sft` grows between rows that differ in words or in tokens alone."""
    found = []
    for one, other in product(rows, rows):
        for axis in ("words", "tokens"):
            same = all(one[name] == other[name] for name in ("batch", "words", "tokens") if name != axis)
            if same and one[axis] < other[axis]:
                extra = {
                    way: [row["peak_mib"][way] - row["peak_mib"]["sft"] for row in (one, other)]
                    for way in ("mass", "kl", "published")
                }
                factors = {way: more / less if less > 0 else None for way, (less, more) in extra.items()}
                found.append(
                    {"axis": axis, "from": one[axis], "to": other[axis], "by": other[axis] / one[axis]} | factors
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: two small rows, two rounds")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens per sample")
    parser.add_argument("--words", type=int, nargs="+", default=WORDS, help="words per sample")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="samples per batch")
    parser.add_argument("--runs", type=int, default=12, help="rounds per row (12)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--layers", type=int, default=8, help="layers of the decoder (8)")
    parser.add_argument("--width", type=int, default=512, help="width of the decoder (512), 32 per head")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    fewest = FIRST_KEY + SIDE**2 + max(options.words) + 1
    if not options.quick and min(options.tokens) < fewest:
        parser.error(f"--tokens {min(options.tokens)}: the picture and the words take {fewest}; give more tokens")
    if options.quick:
        options.tokens, options.words, options.batch, options.runs = [640], [8, 16], [1], 2
        options.layers, options.width = 2, 128
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor, dataset = build_data(folder)
        model = build_model(processor, options.layers, options.width)
        if options.device == "cuda":
            model.to("cuda", torch.bfloat16)
        trainers = {way: build_trainer(way, model, processor, dataset, folder, options) for way in WAYS}
        for tokens, words, batch in product(options.tokens, options.words, options.batch):
            fits = batch * tokens**2 <= EAGER_UP_TO
            chosen = {way: trainer for way, trainer in trainers.items() if way != "eager" or fits}
            made = build_batch(model, tokens, words, batch)
            row = {"tokens": tokens, "words": words, "batch": batch}
            rows.append(row | measure_row(chosen, made, options.runs, options.device))
            print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "growth": growth_of(rows)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
