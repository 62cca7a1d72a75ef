"""λ from the residuals (App. C): δ = Aligner(A_VLM) − A_DM is normal with variance σ², so λ = 1/(2σ²)."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

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
