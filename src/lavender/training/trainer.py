"""TRL's SFTTrainer with the alignment loss: L = L_VLM + align_weight · L_att."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path

from lavender.errors import ConfigError
from lavender.training.arguments import AlignmentArguments, as_dict
from lavender.training.mixin import AlignmentMixin


@dataclass
class LavenderConfig(AlignmentArguments, SFTConfig):
    """SFTConfig with the settings of alignment, which `lavender.training.arguments.AlignmentArguments` lists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing or self.padding_free:
            raise ConfigError("packing or padding_free", "one sample a row", "switch both off")


class LavenderTrainer(AlignmentMixin, SFTTrainer):
    """TRL's SFTTrainer plus the alignment loss.

    `lavender.training.mixin.AlignmentMixin` has the arguments; here the model may also be a path or hub id.
    """

    def __init__(self, model: str | PreTrainedModel, args: LavenderConfig, **kwargs: Any):
        if isinstance(model, str):
            model = create_model_from_path(model, **as_dict(args.model_init_kwargs))
            args.model_init_kwargs = None
        super().__init__(model, args, **kwargs)

    def _run_epoch(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> None:
        """As the trainer's own, which would train one more step from a checkpoint of the last one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            return
        self._load_rng_state(resume_from_checkpoint)  # and what was counted
        self.control.should_training_stop = True
