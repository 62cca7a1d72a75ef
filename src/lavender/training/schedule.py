"""Alignment over a run: λ at each step (estimate, warm-up, decay, switches), attention forcing, the pretraining."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lavender.alignment.objective import AlignmentHead, AlignmentRequest, is_alignment_part, matched_weight
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError

FIRST_VARIANCE = 0.05  # λ is 10 then, the authors' constant
DECAY = 0.95
LEAST_VARIANCE = 1e-6
GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, are spread evenly: a word's draws of successive steps cover [0, 1)."""


class AlignWeight:
    """λ at each step of a run: a constant or an estimate, with warm-up, decay and switches.

    Attributes:
        estimate: the callback that estimates λ, if `align_weight="estimated"`; else None.
        last: λ of the last training step.
    """

    def __init__(self, config: AlignmentConfig):
        self._config = config
        self.estimate = EstimatedWeight() if config.align_weight == "estimated" else None
        self.last = 0.0

    @property
    def varies(self) -> bool:
        """Whether λ changes during the run, so that it is worth logging."""
        config = self._config
        return bool(self.estimate or config.align_warmup or config.align_decay or config.align_switches)

    def of_evaluation(self) -> float:
        """λ without warm-up, decay and switches, which depend on the step."""
        return self.estimate.value if self.estimate is not None else float(self._config.align_weight)

    def of_step(self, state: TrainerState) -> float:
        """λ of the training step that runs."""
        config, weight = self._config, self.of_evaluation()
        if state.max_steps > 0:
            done = (state.global_step + 1) / state.max_steps
            weight *= not _is_switched_off(config, state)
            weight *= min(1.0, done / config.align_warmup) if config.align_warmup else 1.0
            weight *= min(1.0, (1 - done) / config.align_decay) if config.align_decay else 1.0
        self.last = weight
        return weight

    def note(self, total: Tensor, request: AlignmentRequest) -> None:
        """Pass a training micro-batch to the estimate, if there is one.

        Args:
            total: sum over its words of weight · loss, a scalar.
            request: the micro-batch's, after its forward pass.
        """
        if self.estimate is not None:
            cells = request.targets[0, 0].numel() if self._config.attention_loss == "published-sum" else 1
            self.estimate.add(total / cells, matched_weight(request))


def _is_switched_off(config: AlignmentConfig, state: TrainerState) -> bool:
    """Whether the step that runs lies in a part of the run without alignment, by `align_switches`."""
    return bool(state.global_step * (config.align_switches + 1) // max(1, state.max_steps) % 2)


def forced_words(
    config: AlignmentConfig, state: TrainerState, names: Sequence[str], predicted: Tensor
) -> Tensor | None:
    """The words whose rows are forced at the training step that runs: bool (sample, word). None if forcing is off.

    Each word is forced with the probability of the step. The draw is a function of the sample's pictures, the word's
    place and the step. So it does not depend on batches, processes or random states, and is the same after resuming.

    Args:
        config: its `attention_forcing` is the probability at the first step, which falls to 0 over `forcing_share`.
        state: of the trainer.
        names: a text for each sample that identifies its pictures.
        predicted: bool (sample, word), the words whose rows predict them; False at padding.
    """
    done = state.global_step / max(1, state.max_steps)
    probability = config.attention_forcing * max(0.0, 1 - done / config.forcing_share)
    # without λ the run is plain fine-tuning
    if probability <= 0 or config.align_weight == 0 or _is_switched_off(config, state):
        return None
    draws = [
        [(_uniform(f"{name} {word}") + state.global_step * GOLDEN_RATIO) % 1 for word in range(predicted.shape[1])]
        for name in names
    ]
    return predicted & (torch.tensor(draws) < probability).to(predicted.device)


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


class EstimatedWeight(TrainerCallback, ExportableState):
    """λ = 1/(2σ²) from the residuals (App. C), which takes δ = Aligner(A_VLM) − A_DM as normal with variance σ².

    σ² is the running mean of the squared residual per cell. It starts at 0.05 (λ = 10), and each optimiser step moves
    it by a twentieth of the difference. It is part of the trainer's state, so a resumed run continues with it.

    λ grows as the residual shrinks. With the loss "published", a mean over cells, λ · L_att tends to 1/2: a map counts
    as one observation. With "published-sum" each cell counts as one (Eq. 9 and 35 as written), and λ · L_att tends to
    half the number of cells, which is far more than L_VLM.
    """

    def __init__(self) -> None:
        self.variance = FIRST_VARIANCE
        self._pending: list[Tensor] = []

    @property
    def value(self) -> float:
        """The current λ."""
        return 1 / (2 * self.variance)

    def add(self, residual: Tensor, weight: Tensor) -> None:
        """Add a micro-batch: the weighted sum of its words' mean squared residuals, and the sum of the weights."""
        self._pending.append(torch.stack([residual, weight]).detach().float())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        residual, weight = reduce(torch.stack(self._pending).sum(dim=0), "sum").tolist()
        self._pending = []
        if weight > 0:
            self.variance = max(LEAST_VARIANCE, DECAY * self.variance + (1 - DECAY) * residual / weight)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        states = cast(dict[str, Any], state.stateful_callbacks)  # annotated as the list that the constructor takes
        name = type(self).__name__
        if name not in states:
            raise ConfigError(
                "align_weight='estimated', and a checkpoint of a run whose align_weight was a number",
                "the run's own align_weight",
                "set that number again, or begin anew with another output_dir",
            )
        self.variance = states[name]["attributes"]["variance"]

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {}, "attributes": {"variance": self.variance}}


class AlignerPretraining(TrainerCallback):
    """Freezes the VLM for a share of the steps: its parameters get no gradient, and the optimiser skips them.

    With several processes DDP and FSDP2 wait for the gradient of every parameter. There the VLM's gradients are
    dropped after backward instead, see `drop_gradients`.
    """

    def __init__(self, share: float):
        self._share = share
        self._frozen: list[nn.Parameter] = []

    def is_on(self, state: TrainerState) -> bool:
        """Whether the next optimiser step belongs to the pretraining."""
        return state.global_step < round(self._share * state.max_steps)

    def drop_gradients(self, model: nn.Module) -> None:
        """Remove the VLM's gradients, before clipping: the gradient norm is then the Aligner's alone."""
        for name, parameter in model.named_parameters():
            if not is_alignment_part(name):
                parameter.grad = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if args.world_size > 1:
            return
        if self.is_on(state):
            if not self._frozen:
                named = kwargs["model"].named_parameters()
                self._frozen = [
                    parameter for name, parameter in named if parameter.requires_grad and not is_alignment_part(name)
                ]
                self._set_trainable(kwargs["model"], trainable=False)
        elif self._frozen:
            self._set_trainable(kwargs["model"], trainable=True)
            self._frozen = []

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._set_trainable(kwargs["model"], trainable=True)

    def _set_trainable(self, model: nn.Module, trainable: bool) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(trainable)
        for module in model.modules():
            if isinstance(module, AlignmentHead):
                module.vlm_is_frozen = not trainable
