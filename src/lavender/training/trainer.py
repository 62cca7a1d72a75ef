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
    """TRL's SFTConfig with the settings of alignment. TRL's and transformers' settings and defaults are unchanged.

    Examples:
        >>> from lavender import LavenderConfig
        >>> args = LavenderConfig(output_dir="out", maps="maps", attention_loss="kl", bf16=False, use_cpu=True)
        >>> args.align_weight
        1.0

    Attributes:
        maps: folder of the map store that `lavender extract` wrote.
        align_weight: λ, the weight of the alignment loss; 0 is plain fine-tuning, bit for bit. Its default depends on
            `attention_loss`.
        others: those of `lavender.training.arguments.AlignmentArguments`, and all of SFTConfig.

    Raises:
        ConfigError: a setting of alignment is of another type, out of its range, or contradicts another; packing or
            padding_free, which put several samples in one row.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing or self.padding_free:
            raise ConfigError("packing or padding_free", "one sample per row", "switch both off")


class LavenderTrainer(AlignmentMixin, SFTTrainer):
    """TRL's SFTTrainer with the alignment loss: L = L_VLM + align_weight · L_att.

    It logs `vlm_loss`, `attention_loss`, `matched_words` and the probe's numbers beside TRL's. With `align_weight=0`
    losses and weights are bit-identical to SFTTrainer's.

    Examples:
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from lavender import LavenderConfig, LavenderTrainer, Teacher, extract, read_samples, to_dataset
        >>> from lavender.world import STUDENT_PATH, TEACHER_PATH
        >>> rows = [{"image": Image.new("RGB", (96, 64), "red"), "text": "a red dog"}]
        >>> samples = read_samples(Dataset.from_list(rows))
        >>> _ = extract(samples, Teacher.from_pretrained(TEACHER_PATH), "maps")
        >>> model = AutoModelForImageTextToText.from_pretrained(STUDENT_PATH)
        >>> processor = AutoProcessor.from_pretrained(STUDENT_PATH)
        >>> args = LavenderConfig("run", maps="maps", max_steps=1, max_length=None, use_cpu=True, bf16=False)
        >>> trainer = LavenderTrainer(model, args, train_dataset=to_dataset(samples), processing_class=processor)
        >>> _ = trainer.train()
        >>> trainer.state.global_step
        1

    Args:
        model: a loaded VLM of a supported family, or its folder or Hub id.
        args: a LavenderConfig.
        kwargs: `processing_class`, `maps`, `peft_config`, data sets and all other arguments of SFTTrainer, see
            `lavender.training.mixin.AlignmentMixin`, which also lists attributes and errors.
    """

    def __init__(self, model: str | PreTrainedModel, args: LavenderConfig, **kwargs: Any):
        if isinstance(model, str):
            model = create_model_from_path(model, **as_dict(args.model_init_kwargs))
            args.model_init_kwargs = None
        super().__init__(model, args, **kwargs)

    def _run_epoch(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> None:
        """The trainer's epoch, which would train one step too many when resumed from the last step's checkpoint."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            return
        self._load_rng_state(resume_from_checkpoint)  # restores the counts of coverage too
        self.control.should_training_stop = True
