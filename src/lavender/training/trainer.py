"""TRL's SFTTrainer with the alignment loss: L = L_VLM + align_weight · L_att."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import BitsAndBytesConfig, EvalPrediction, PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path

from lavender.data.store import MapStore, SeveralStores
from lavender.errors import ConfigError
from lavender.students.loading import load_processor
from lavender.students.registry import adapter_for
from lavender.training.arguments import AlignmentArguments, as_dict
from lavender.training.mixin import AlignmentMixin
from lavender.training.model_card import CARD, trainer_card


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
            raise ConfigError(
                "packing or padding_free",
                "one sample per row",
                "switch both off; TRL has neither for samples with images",
            )


def _loading_settings(args: LavenderConfig, quantization_config: BitsAndBytesConfig | None) -> dict[str, Any]:
    """The arguments with which SFTTrainer loads a model by its name."""
    settings = {"trust_remote_code": args.trust_remote_code} | as_dict(args.model_init_kwargs)
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    state = args.distributed_state
    if state is not None and state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED):
        settings["device_map"] = None  # each process has a whole model; create_model_from_path would spread it
    return settings


class LavenderTrainer(AlignmentMixin, SFTTrainer):
    """TRL's SFTTrainer with the alignment loss: L = L_VLM + align_weight · L_att.

    It logs `vlm_loss`, `attention_loss`, `matched_words` and the probe's numbers beside TRL's. With `align_weight=0`
    losses and weights are bit-identical to SFTTrainer's.

    Examples:
        >>> import torch
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from lavender import LavenderConfig, LavenderTrainer, Teacher, extract, read_samples, to_dataset
        >>> from lavender.world import STUDENT_PATH, TEACHER_PATH
        >>> rows = [{"image": Image.new("RGB", (96, 64), "red"), "text": "a red dog"}]
        >>> samples = read_samples(Dataset.from_list(rows))
        >>> _ = extract(samples, Teacher.from_pretrained(TEACHER_PATH), "maps")
        >>> model = AutoModelForImageTextToText.from_pretrained(STUDENT_PATH, dtype=torch.float32)
        >>> processor = AutoProcessor.from_pretrained(STUDENT_PATH)
        >>> args = LavenderConfig("run", maps="maps", max_steps=1, max_length=None, use_cpu=True, bf16=False)
        >>> trainer = LavenderTrainer(model, args, train_dataset=to_dataset(samples), processing_class=processor)
        >>> _ = trainer.train()
        >>> trainer.state.global_step
        1

    Args:
        model: a loaded VLM of a supported family, or its folder or Hub id.
        args: a LavenderConfig.
        processing_class: the model's processor; None loads that of the model's folder or Hub id.
        maps: the open map store, or several as `SeveralStores`, if `args.maps` does not name it.
        peft_config: settings of LoRA or another PEFT method that tunes modules; None trains the model itself.
        train_dataset: a data set or stream with the columns `messages` and `images`.
        eval_dataset: the same for evaluation, or several by name.

    The other arguments are those of SFTTrainer.

    `lavender.training.mixin.AlignmentMixin` lists attributes and errors.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: LavenderConfig,
        *,
        processing_class: ProcessorMixin | None = None,
        maps: MapStore | SeveralStores | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        given, revision = args.model_init_kwargs, None
        try:
            if isinstance(model, str):
                settings = _loading_settings(args, quantization_config)
                model, revision = create_model_from_path(model, **settings), settings.get("revision")
                args.model_init_kwargs = quantization_config = None  # TRL would warn that it ignores them
                if revision is not None and peft_config is not None:
                    peft_config = copy.deepcopy(peft_config)
                    peft_config.revision = peft_config.revision or revision  # the export merges into these weights
            if processing_class is None:
                name = str(model.config.name_or_path)
                processing_class = load_processor(adapter_for(model.config), name, args.trust_remote_code, revision)
            super().__init__(
                model,
                args,
                processing_class=processing_class,
                maps=maps,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                peft_config=peft_config,
                data_collator=data_collator,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                formatting_func=formatting_func,
            )
        finally:
            args.model_init_kwargs = given

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card to README.md in `args.output_dir`: base, data, teacher, loss, λ and what to cite.

        Args:
            model_name: the model's name; None for that of the folder.
            dataset_name: hub id or name of the training data, which the trainer does not know.
            tags: tags beside our own.
        """
        if not self.is_world_process_zero():
            return
        out = Path(cast(str, self.args.output_dir))
        is_adapter = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        more = [tags] if isinstance(tags, str) else tags or ()
        trainer_card(self, model_name or out.name, is_adapter, dataset_name, more).save(out / CARD)

    def _run_epoch(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> None:
        """The trainer's epoch, which would train one step too many when resumed from the last step's checkpoint."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            return
        self._load_rng_state(resume_from_checkpoint)  # restores the counts of coverage too
        self.control.should_training_stop = True
