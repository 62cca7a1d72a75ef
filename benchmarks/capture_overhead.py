"""Time and memory that the capture of attention adds to a training step, compared with eager attention.

    python benchmarks/capture_overhead.py --tokens 1024 2048 --words 32 --eager-runs 3 --json overhead.json
    python benchmarks/capture_overhead.py --padded --tokens 1024 2048 --words 32 --runs 1 --json overhead.json
    python benchmarks/capture_overhead.py --quick --json overhead.json   # smoke test

The model is a Llama decoder with random weights (8 layers of width 512, 16 heads, 4 key heads), on one CPU thread with
one sample, of whose tokens 576 are a picture's keys. A plain step is forward and backward of the language loss. With
capture, the loss also has a weighted sum of the attention rows of some words (one row each) in all layers, captured by
the same functions as in training. Eager attention takes the same rows from `output_attentions=True`. The Aligner's step
starts from captured rows. The steps of the direct losses, mass and kl, are whole: language loss, capture and alignment
loss, without attention forcing. With `--padded` the first token is padding, in every step: then the layers get a mask.

Steps run in random order, and times are the process's CPU seconds. Each ratio is the median over the rounds, with the
95 % interval of a bootstrap. Memory is what autograd keeps between forward and backward, each storage counted once. The
captured rows themselves are reported apart.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lavender.alignment.objective import AlignmentHead, AlignmentRequest
from lavender.config import AlignmentConfig
from lavender.students.capture import AttentionRequest, row_tensors
from lavender.students.image_keys import grid_boxes
from lavender.students.kernels import install, set_kernel

LAYERS, HEADS, FIRST_KEY, SIDE, GRID = 8, 16, 11, 24, (32, 32)
TOKENS, WORDS = (1024, 2048, 4096, 8192), (8, 32, 128)
EAGER_UP_TO = 4096  # tokens; with more, eager attention needs 32 GiB
MIB = 2**20
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A decoder and a sample.

    Attributes:
        model: the decoder.
        ids: token ids, (1, token).
        mask: which tokens are not padding, (1, token); None without padding.
        rows: positions of the words' rows, at the end of the text, (1, word).
        keys: positions of the picture's keys, (1, key).
        weights: of the captured rows in the loss, (layer, 1, head, word, key).
    """

    model: LlamaForCausalLM
    ids: Tensor
    mask: Tensor | None
    rows: Tensor
    keys: Tensor
    weights: Tensor

    @property
    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "labels": self.ids, "attention_mask": self.mask, "use_cache": False}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The alignment tensors: each word has one row and a random map, and the picture is a square of keys."""
        words = self.rows.shape[1]
        return row_tensors([[(row,) for row in self.rows[0].tolist()]]) | {
            "boxes": grid_boxes(SIDE, SIDE).float()[None],
            "pictures": torch.zeros(1, SIDE**2, dtype=torch.long),
            "targets": torch.rand(1, words, *GRID),
            "keys": self.keys,
        }

    def plain(self) -> Tensor:
        """The language loss."""
        return self.model(**self.inputs).loss

    def with_capture(self) -> Tensor:
        """The language loss plus the weighted sum of captured rows."""
        request = AttentionRequest(self.rows, tuple(range(LAYERS)), self.keys)
        output = self.model(**self.inputs, attention_request=request)
        return output.loss + torch.tensordot(request.stacked(), self.weights, dims=5)

    def direct(self, kind: Literal["mass", "kl"]) -> Step:
        """The language loss plus a direct loss of all layers, as training computes it."""
        head, tensors = AlignmentHead(HEADS, tuple(range(LAYERS)), AlignmentConfig(attention_loss=kind)), self.tensors

        def step() -> Tensor:
            request = AlignmentRequest(tuple(range(LAYERS)), tensors)
            request.heads = "mean"  # what the hook of `lavender.alignment.objective.attach` sets
            output = self.model(**self.inputs, attention_request=request)
            return output.loss + head.train()(request)

        return step

    def eager(self) -> Tensor:
        """The same as `with_capture`, from the maps that eager attention returns. The kernel must be eager."""
        output = self.model(**self.inputs, output_attentions=True)
        rows = torch.stack([layer_maps[:, :, self.rows[0]][..., self.keys[0]] for layer_maps in output.attentions])
        return output.loss + torch.tensordot(rows, self.weights, dims=5)


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        intermediate_size=1408,
        max_position_embeddings=max(TOKENS),
    )
    return LlamaForCausalLM(config).train()


def build_case(model: LlamaForCausalLM, tokens: int, words: int, padded: bool) -> Case:
    rows, keys = torch.arange(tokens - 1 - words, tokens - 1)[None], torch.arange(FIRST_KEY, FIRST_KEY + SIDE**2)[None]
    weights = torch.randn(LAYERS, 1, HEADS, words, SIDE**2) / words
    mask = (torch.arange(tokens) > 0)[None].long() if padded else None
    return Case(model, torch.randint(1024, (1, tokens)), mask, rows, keys, weights)


def aligner_step(case: Case) -> Step:
    """The alignment loss of captured rows: pooling per word, resampling to the grid, Aligner, loss."""
    config = AlignmentConfig(attention_loss="published")
    head, tensors = AlignmentHead(HEADS, tuple(range(LAYERS)), config).train(), case.tensors
    captured = torch.rand_like(case.weights).softmax(dim=-1).requires_grad_()

    def step() -> Tensor:
        request = AlignmentRequest(tuple(range(LAYERS)), tensors)
        request.rows = dict(enumerate(captured.unbind(0)))
        return head(request)

    return step


def seconds(step: Step) -> float:
    """CPU seconds of forward and backward."""
    start = time.process_time()
    step().backward()
    return time.process_time() - start


def kept_bytes(case: Case, step: Step) -> int:
    """Bytes that autograd keeps for backward, each storage once, without the benchmark's own weights."""
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = step()  # keeps the graph alive, so that no address is used twice
    del loss
    return sum(size for address, size in storages.items() if address != case.weights.untyped_storage().data_ptr())


def ratio(times: list[float], plain: list[float]) -> dict[str, float]:
    """Median of the rounds' ratios, with the 95 % interval of 2,000 bootstrap samples."""
    ratios, draw = [spent / bare for spent, bare in zip(times, plain, strict=True)], random.Random(5)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"median": median(ratios), "low": medians[49], "high": medians[1949], "runs": len(ratios)}


def with_kernel(model: LlamaForCausalLM, kernel: str, measure: Callable[[], float]) -> float:
    """Measure while the model has this attention kernel."""
    set_kernel(model, kernel)
    return measure()


def measure_row(
    model: LlamaForCausalLM, tokens: int, words: int, runs: int, eager_runs: int, padded: bool = False
) -> dict:
    """One row of the result, for a number of tokens and words. All steps share the weights."""
    case, draw = build_case(model, tokens, words, padded), random.Random(7)
    base = model.config._attn_implementation.removeprefix("lavender_")
    capturing = f"lavender_{base}"
    steps: dict[str, tuple[str, Step]] = {
        "plain": (base, case.plain),
        "capture": (capturing, case.with_capture),
        "aligner": (base, aligner_step(case)),
        "mass": (capturing, case.direct("mass")),
        "kl": (capturing, case.direct("kl")),
    }
    if eager_runs:
        steps["eager"] = ("eager", case.eager)
    memory = {
        name: with_kernel(model, kernel, partial(kept_bytes, case, step)) for name, (kernel, step) in steps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(-1, runs):  # the first round is a warm-up
        names = [name for name in steps if name != "eager" or round_index < eager_runs]
        for name in draw.sample(names, k=len(names)):
            kernel, step = steps[name]
            model.zero_grad(set_to_none=True)
            spent = with_kernel(model, kernel, partial(seconds, step))
            if round_index >= 0:
                times[name].append(spent)
    set_kernel(model, capturing)
    plain = times["plain"]
    row = {
        "tokens": tokens,
        "words": words,
        "plain_seconds": median(plain),
        "capture_time_vs_plain": ratio(times["capture"], plain),
        "aligner_time_vs_plain": ratio(times["aligner"], plain),
        "mass_time_vs_plain": ratio(times["mass"], plain),
        "kl_time_vs_plain": ratio(times["kl"], plain),
        "extra_mib_per_layer": (memory["capture"] - memory["plain"]) / LAYERS / MIB,
        "mass_extra_mib_per_layer": (memory["mass"] - memory["plain"]) / LAYERS / MIB,
        "kl_extra_mib_per_layer": (memory["kl"] - memory["plain"]) / LAYERS / MIB,
        "rows_mib_per_layer": case.weights.nbytes / LAYERS / MIB,
        "eager_time_vs_plain": None,
        "eager_extra_mib_per_layer": None,
    }
    if eager_runs:
        row["eager_time_vs_plain"] = ratio(times["eager"], plain[: len(times["eager"])])
        row["eager_extra_mib_per_layer"] = (memory["eager"] - memory["plain"]) / LAYERS / MIB
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: 640 tokens, 8 words, two rounds")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens of the sample")
    parser.add_argument("--words", type=int, nargs="+", default=WORDS, help="captured words")
    parser.add_argument("--padded", action="store_true", help="the first token is padding")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--runs", type=int, default=20, help="rounds per row (20)")
    parser.add_argument("--eager-runs", type=int, default=None, help="rounds with eager attention (as --runs)")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.words, options.runs, options.eager_runs = [640], [8], 2, 1
    torch.set_num_threads(1)
    model = build_model()
    install(model)
    rows = []
    for tokens, words in product(options.tokens, options.words):
        eager_runs = 0 if tokens > EAGER_UP_TO else options.eager_runs or options.runs
        rows.append(measure_row(model, tokens, words, options.runs, eager_runs, options.padded))
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
