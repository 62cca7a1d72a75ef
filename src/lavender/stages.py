"""Stages of training: the Aligner alone first, then all together (§6)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lavender.objective import AlignmentHead, is_alignment_part


class AlignerPretraining(TrainerCallback):
    """Keeps the VLM frozen for a share of the steps: its parameters get no gradient, and the optimiser skips them.

    With several processes every parameter must get its gradient, or DDP and FSDP2 would wait for it. There the VLM's
    gradients are dropped instead, after backward: see `drop_gradients`.
    """

    def __init__(self, share: float):
        self._share, self._frozen = share, []

    def is_on(self, state: TrainerState) -> bool:
        """Whether the next optimiser step belongs to the stage."""
        return state.global_step < round(self._share * state.max_steps)

    def drop_gradients(self, model: nn.Module) -> None:
        """Before gradients are clipped, so that their norm is the Aligner's alone."""
        for name, parameter in model.named_parameters():
            if not is_alignment_part(name):
                parameter.grad = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if args.world_size > 1:
            return
        if self.is_on(state):
            if not self._frozen:
                named = kwargs["model"].named_parameters()
                self._frozen = [one for name, one in named if one.requires_grad and not is_alignment_part(name)]
                self._set(kwargs["model"], trains=False)
        elif self._frozen:
            self._set(kwargs["model"], trains=True)
            self._frozen = []

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._set(kwargs["model"], trains=True)

    def _set(self, model: nn.Module, trains: bool) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(trains)
        for module in model.modules():
            if isinstance(module, AlignmentHead):
                module.vlm_is_frozen = not trains
