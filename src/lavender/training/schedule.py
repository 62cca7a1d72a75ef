"""λ from the residuals (App. C): δ = Aligner(A_VLM) − A_DM is normal with variance σ², so λ = 1/(2σ²)."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lavender.alignment.objective import AlignmentHead, is_alignment_part

FIRST_VARIANCE = 0.05  # for which λ is 10, the authors' constant
DECAY = 0.95
LEAST_VARIANCE = 1e-6


class EstimatedWeight(TrainerCallback, ExportableState):
    """λ = 1/(2σ²), where σ² is the running mean of a cell's squared residual over the steps before.

    It begins at 0.05, hence λ = 10, and moves by a twentieth with every optimiser step. Part of the trainer's state, so
    a resumed run goes on with it. As the residual shrinks λ grows: with the loss "min-max" (a mean over cells) the
    product tends to 1/2, a map counting as one observation; with "min-max-sum" to half the number of cells, each
    counting as one of its own (Eq. 9 and 35 as written), which is far more than L_VLM.
    """

    def __init__(self) -> None:
        self.variance = FIRST_VARIANCE
        self._pending: list[Tensor] = []

    @property
    def value(self) -> float:
        """λ of the step that runs."""
        return 1 / (2 * self.variance)

    def add(self, residual: Tensor, weight: Tensor) -> None:
        """Note a micro-batch: the weighted sum of its words' mean squared residuals, and the sum of the weights."""
        self._pending.append(torch.stack([residual, weight]).detach().float())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        residual, weight = reduce(torch.stack(self._pending).sum(dim=0), "sum").tolist()
        self._pending = []
        if weight > 0:
            self.variance = max(LEAST_VARIANCE, DECAY * self.variance + (1 - DECAY) * residual / weight)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        states = cast(dict[str, Any], state.stateful_callbacks)  # in its constructor alone it is a list
        self.variance = states[type(self).__name__]["attributes"]["variance"]

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {}, "attributes": {"variance": self.variance}}


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
