"""The metrics logged beside the loss. They are summed on the device, without synchronisation before logging.

Every metric is a sum and the weight that divides it, so accumulated batches, several processes and batches of unequal
size give the same numbers as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from lavender.alignment.objective import AlignmentRequest
from lavender.errors import NotFiniteError
from lavender.maps import entropy


def num_real_samples(accelerator: Accelerator, num_samples: int) -> int:
    """How many samples of this process's evaluation batch count; the others fill up the last batch of the processes.

    accelerate fills it with the first samples of the data set, and drops what they give when it gathers.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return num_samples
    return min(max(state.remainder - accelerator.process_index * num_samples, 0), num_samples)


class Metrics:
    """Sums of metrics since they were last taken.

    In training, each metric is a mean over optimiser steps, of the whole accumulated batch over all processes:
    - `vlm_loss` and `attention_loss`: the terms of the loss, before λ.
    - `matched_words`: the number of words that count. With `rows="both"` the rows that predict a word and those that
      read it count as two, here and in the means.

    In evaluation, each metric is of the whole data set:
    - `vlm_loss`: mean over samples of their batch's loss.
    - `attention_loss`: weighted mean over all matched words; NaN if none matched.
    - `matched_words` and `matched_share`: their number, and their share of the mapped words.

    In both, of the student's attention on the picture before any Aligner, mean over words:
    - `student_entropy`: its entropy, in nats (Eq. 23).
    - `attention_mass`: the share of it that lies on the teacher's map, from 0 to 1. This is its level, which the
      published loss hardly changes; the place of its maximum, "pointing", does not show it.
    With attention forcing the figures of training are of a model whose rows are forced in some layers. Compare those of
    evaluation, or of the probe.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add_step(self, vlm_loss: Tensor, attention_loss: Tensor, request: AlignmentRequest, share: float) -> None:
        """Add a training micro-batch, which is `share` of an optimiser step; its losses add up to the step's."""
        vlm, attention = vlm_loss.detach().float(), attention_loss.detach().float()
        self._add([vlm.new_full((), share), vlm, vlm.new_zeros(()), attention], request)

    def add_batch(self, vlm_loss: Tensor, request: AlignmentRequest, num_real: int) -> None:
        """Add an evaluation batch: the mean L_VLM of the batch, and the losses of the words of its first samples.

        Args:
            num_real: see `num_real_samples`.
        """
        vlm, present = vlm_loss.detach().float(), request.present
        is_real = (torch.arange(len(present), device=present.device) < num_real)[:, None].expand_as(present)[present]
        weights = ((request.weights * request.matched)[present] * is_real).to(vlm)
        samples, attention = vlm.new_full((), num_real), (request.losses.to(vlm) * weights).sum()
        self._add([samples, samples * vlm, weights.sum(), attention], request, is_real)

    def _add(self, sums: list[Tensor], request: AlignmentRequest, counted: Tensor | None = None) -> None:
        """Add to the sums: steps or samples, L_VLM, weight of words, L_att; then the sums over words."""
        like, matched = sums[0], request.matched[request.present]
        of_words = [matched, entropy(request.student_maps), request.map_shares, torch.ones_like(request.map_shares)]
        if counted is not None:
            of_words = [values * counted.to(values.device) for values in of_words]
        sums = [*sums, *(values.sum().to(like) for values in of_words)]
        added = torch.stack(sums)
        self._sums = added if self._sums is None else self._sums + added

    def take_steps(self, accelerator: Accelerator) -> dict[str, float]:
        """The training metrics since they were last taken. Every process must call this."""
        steps, vlm, _, attention, matched, *of_words = self._take(accelerator)
        if not steps:
            return {}
        # every process counts every step, and its losses are multiplied by the number of processes
        return _numbers(vlm / steps, attention / steps, matched * accelerator.num_processes / steps, *of_words)

    def take_batches(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics of an evaluation. Every process must call this."""
        samples, vlm, words, attention, matched, *of_words = self._take(accelerator)
        if not samples:
            return {}
        numbers = _numbers(vlm / samples, attention / words if words else math.nan, matched, *of_words)
        return numbers | ({"matched_share": matched / of_words[-1]} if of_words[-1] else {})

    def clear(self) -> None:
        """Discard sums that were not taken."""
        self._sums = None

    def _take(self, accelerator: Accelerator) -> list[float]:
        if self._sums is None:
            return [0.0] * 8
        sums, self._sums = self._sums, None
        return accelerator.gather(sums[None]).sum(dim=0).tolist()


def _numbers(
    vlm: float, attention: float, matched: float, entropies: float, map_shares: float, maps: float
) -> dict[str, float]:
    numbers = {"vlm_loss": vlm, "attention_loss": attention, "matched_words": matched}
    return numbers | ({"student_entropy": entropies / maps, "attention_mass": map_shares / maps} if maps else {})


def check_choice(metrics: Mapping[str, float], name: str | None, aligns: bool) -> None:
    """Refuse to choose the best checkpoint by a meaningless metric.

    Args:
        metrics: those of an evaluation.
        name: `metric_for_best_model`.
        aligns: whether the loss contains L_att.

    Raises:
        NotFiniteError: the metric is NaN or infinite, or is a loss without L_att because no mapped word matched.
    """
    if name is None:
        return
    name = name if name.startswith("eval_") else f"eval_{name}"
    value = metrics.get(name)
    kind = next((kind for kind in ("vlm_loss", "attention_loss", "loss") if name.endswith(f"_{kind}")), "")
    begin = name.removesuffix(kind)
    share = metrics.get(f"{begin}matched_share")
    without = kind in ("attention_loss", "loss") and not share
    lacks_part = without and kind == "loss" and aligns and share is not None
    if value is None or (math.isfinite(value) and not lacks_part):
        return
    why = ", where no word has a map" if share is None else f", where none of the mapped words matched ({share:.0%})"
    raise NotFiniteError(
        f"{name} = {value:.6g}{why if without else ''}",
        "a number to choose the best checkpoint by" + (", with L_att in it" if lacks_part else ""),
        f"set metric_for_best_model: {begin}vlm_loss"
        if without
        else "find out what makes it not finite, or choose by another metric",
    )
