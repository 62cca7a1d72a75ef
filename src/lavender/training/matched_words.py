"""What the alignment loss is divided by: the words that count, by weight, of the accumulated batch over all processes.

With `match="label"` every mapped word counts, so the sum is known before the first micro-batch runs. With "exact" and
"root" only matched words count, which the student's predictions decide: with one micro-batch a step they are known
between its forward and its backward; with several, forwards without gradient run through all of them first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

from lavender.alignment.objective import AlignmentRequest, SameWord, matched_weight
from lavender.students.word_maps import random_state_kept

LEAST_WEIGHT = 1e-6  # of a batch's words; below it, their sum of losses is 0


class Divisor:
    """Turns sums over a micro-batch's words into its share of the mean over the words of the accumulated batch.

    Every process must call it alike: each step costs one sum over processes.

    Args:
        trainer: whose accelerator, settings and kind of forward are used.
        known: whether every mapped word counts.
        same_word: as an `AlignmentRequest` wants it.
    """

    def __init__(self, trainer: Trainer, known: bool, same_word: SameWord | None = None):
        self._trainer, self._known, self._same_word = trainer, known, same_word
        self._waiting: list[dict[str, Any]] = []
        self._weight: float | None = None

    def begin(self, batches: list[dict[str, Any]]) -> None:
        """Take the micro-batches of the next step, as the data loader gave them."""
        self._weight, self._waiting = None, []
        if self._known:
            own = sum((batch["alignment"]["weights"].sum() for batch in batches), start=torch.zeros(()))
            self._weight = self._total(own)
        elif len(batches) > 1:
            self._waiting = batches

    @torch.no_grad()
    def look_ahead(self, model: nn.Module) -> None:
        """Before the first of several micro-batches: find which of their words match, where that is not known.

        These forwards draw the random numbers that those of training will draw, so dropout is the same in both.
        """
        if not self._waiting:
            return
        batches, self._waiting = self._waiting, []
        trainer = self._trainer
        model.train()
        own = torch.zeros((), device=trainer.args.device)
        with random_state_kept(trainer.args.device):
            for batch in batches:
                inputs: dict[str, Any] = dict(trainer._prepare_inputs(batch)) | {"use_cache": False}
                # of no layers: a forward that only tells what is predicted
                request = AlignmentRequest((), inputs.pop("alignment"), self._same_word)
                with trainer.compute_loss_context_manager():
                    model(**self._as_in_training(inputs), attention_request=request)
                own += matched_weight(request)
        self._weight = self._total(own)

    def share(self, total: Tensor, request: AlignmentRequest) -> Tensor:
        """A micro-batch's sum of losses, weighted, as its share of the mean over all words.

        Data parallelism averages gradients over processes, so each process's share is multiplied by their number.
        """
        if self._weight is None:
            self._weight = self._total(matched_weight(request))
        return total * (self._trainer.accelerator.num_processes / max(LEAST_WEIGHT, self._weight))

    def _total(self, own: Tensor) -> float:
        """The sum over processes."""
        if self._trainer.args.world_size > 1:
            accelerator = self._trainer.accelerator
            own = accelerator.gather(own.to(accelerator.device)[None]).sum()
        return float(own)

    def _as_in_training(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the forward that is aligned: TRL's fused head, unless the loss needs the logits."""
        trainer = self._trainer
        if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
            return {name: one for name, one in inputs.items() if name != "labels"}
        return inputs | ({"fused_lm_head": True} if isinstance(trainer, SFTTrainer) else {})
