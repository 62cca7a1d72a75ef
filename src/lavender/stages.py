"""Stages of training: the Aligner alone first, then all together (§6)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lavender.objective import AlignmentHead, is_alignment_part


class AlignerPretraining(TrainerCallback):
    """Keeps the VLM frozen for a share of the steps: its parameters get no gradient, and the optimiser skips them."""

    def __init__(self, share: float):
        self._share, self._frozen = share, []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step < round(self._share * state.max_steps):
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
