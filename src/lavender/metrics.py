"""What is logged beside the loss, summed on the device: nothing waits for a number before it is logged.

Every quantity is a sum with the weight it is divided by, so that accumulated batches, several processes and
batches of unequal size come out as one batch would.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from lavender.maps import entropy
from lavender.objective import AlignmentRequest


class Metrics:
    """Sums since the last `take`.

    Of training, numbers a step, mean over the optimiser's steps: `vlm_loss` and `attention_loss`, the addends of the
    loss before λ, and `matched_words`; each of the whole accumulated batch, over all processes. Of evaluation, numbers
    of the data set: `vlm_loss`, mean over samples of their batch's loss, as `eval_loss` is made; `attention_loss`,
    mean over words by their weights; `matched_words`, their sum. In both `student_entropy`: of where the student looks,
    before any Aligner; mean over words, in nats (Eq. 23).
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add_step(self, vlm_loss: Tensor, attention_loss: Tensor, request: AlignmentRequest, share: float) -> None:
        """A micro-batch of training that is `share` of an optimiser's step; the losses add up to the step's."""
        self._add(vlm_loss.new_tensor(share), vlm_loss, vlm_loss.new_tensor(0.0), attention_loss, request)

    def add_batch(self, vlm_loss: Tensor, attention_loss: Tensor, request: AlignmentRequest) -> None:
        """A batch of evaluation, whose losses are its own means."""
        samples, words = vlm_loss.new_tensor(len(request.present)), request.weights.sum()
        self._add(samples, samples * vlm_loss, words, words * attention_loss, request)

    def _add(self, weight: Tensor, vlm: Tensor, words: Tensor, attention: Tensor, request: AlignmentRequest) -> None:
        maps = request.student_maps
        sums = [weight, vlm, words, attention, request.matched.sum(), entropy(maps).sum(), vlm.new_tensor(len(maps))]
        added = torch.stack([one.detach().to(vlm.device, torch.float32) for one in sums])
        self._sums = added if self._sums is None else self._sums + added

    def take_steps(self, accelerator: Accelerator) -> dict[str, float]:
        """The numbers of training since the last time; every process must ask."""
        steps, vlm, _, attention, matched, spread, maps = self._take(accelerator)
        if not steps:
            return {}
        # each process counts each step, and has scaled its losses up by the number of processes
        return _numbers(vlm / steps, attention / steps, matched * accelerator.num_processes / steps, spread, maps)

    def take_batches(self, accelerator: Accelerator) -> dict[str, float]:
        """The numbers of an evaluation; every process must ask."""
        samples, vlm, words, attention, matched, spread, maps = self._take(accelerator)
        return _numbers(vlm / samples, attention / words if words else 0.0, matched, spread, maps) if samples else {}

    def clear(self) -> None:
        """Forget what was not taken."""
        self._sums = None

    def _take(self, accelerator: Accelerator) -> list[float]:
        if self._sums is None:
            return [0.0] * 7
        sums, self._sums = self._sums, None
        return accelerator.gather(sums[None]).sum(dim=0).tolist()


def _numbers(vlm: float, attention: float, matched: float, spread: float, maps: float) -> dict[str, float]:
    numbers = {"vlm_loss": vlm, "attention_loss": attention, "matched_words": matched}
    return numbers | ({"student_entropy": spread / maps} if maps else {})
