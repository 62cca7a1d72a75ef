"""The divisor of the alignment loss: the summed weights of the words that count, over the accumulated batch.

With `match="label"` every mapped word counts, so the sum is known before the first micro-batch runs. With "exact" and
"root" the student's predictions decide. With one micro-batch per step they are known between its forward and its
backward; with several, forwards without gradient run through all micro-batches first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

from lavender.alignment.objective import AlignmentRequest, SameWord, matched_weight
from lavender.students.word_maps import random_state_kept

LEAST_WEIGHT = 1e-6  # smallest divisor; a batch with a smaller weight has a loss of 0


class Divisor:
    """Turns a micro-batch's sum of losses into its share of the mean over the accumulated batch's words.

    Every process must call it at the same points: each step needs one sum over processes.

    Args:
        trainer: its accelerator, settings and kind of forward are used.
        known: whether every mapped word counts.
        same_word: as for an `AlignmentRequest`.
    """

    def __init__(self, trainer: Trainer, known: bool, same_word: SameWord | None = None):
        self._trainer, self._known, self._same_word = trainer, known, same_word
        self._waiting: list[dict[str, Any]] = []
        self._weight: float | None = None

    def begin(self, batches: list[dict[str, Any]]) -> None:
        """Start a step with the micro-batches that the data loader returned."""
        self._weight, self._waiting = None, []
        if self._known:
            weight = sum((batch["alignment"]["weights"].sum() for batch in batches), start=torch.zeros(()))
            self._weight = self._total(weight)
        elif len(batches) > 1:
            self._waiting = batches

    @torch.no_grad()
    def look_ahead(self, model: nn.Module) -> None:
        """Before the first of several micro-batches, find which of their words match, unless that is known.

        These forwards draw the same random numbers as the training forwards, so dropout is the same in both.
        """
        if not self._waiting:
            return
        batches, self._waiting = self._waiting, []
        trainer = self._trainer
        model.train()
        weight = torch.zeros((), device=trainer.args.device)
        with random_state_kept(trainer.args.device):
            for batch in batches:
                inputs: dict[str, Any] = dict(trainer._prepare_inputs(batch)) | {"use_cache": False}
                # no layers: this forward only finds out what is predicted
                request = AlignmentRequest((), inputs.pop("alignment"), self._same_word)
                with trainer.compute_loss_context_manager():
                    model(**self._as_in_training(inputs), attention_request=request)
                weight += matched_weight(request)
        self._weight = self._total(weight)

    def share(self, total: Tensor, request: AlignmentRequest) -> Tensor:
        """A micro-batch's weighted sum of losses as its share of the mean over all words.

        Data parallelism averages gradients over processes, so the share is multiplied by the number of processes.
        """
        if self._weight is None:
            self._weight = self._total(matched_weight(request))
        return total * (self._trainer.accelerator.num_processes / max(LEAST_WEIGHT, self._weight))

    def _total(self, weight: Tensor) -> float:
        """The sum over processes."""
        if self._trainer.args.world_size > 1:
            accelerator = self._trainer.accelerator
            weight = accelerator.gather(weight.to(accelerator.device)[None]).sum()
        return float(weight)

    def _as_in_training(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the training forward: with TRL's fused head, unless the loss needs the logits."""
        trainer = self._trainer
        if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
            return {name: value for name, value in inputs.items() if name != "labels"}
        return inputs | ({"fused_lm_head": True} if isinstance(trainer, SFTTrainer) else {})
