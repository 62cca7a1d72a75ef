"""What alignment adds to a trainer of the `transformers.Trainer` kind: its loss, normalised, and its metrics.

All mathematics is in `objective`; this module only carries tensors to it and its loss back. Losses
are normalised by the number of mapped words of the whole accumulated batch over all processes, so
batch 4 × accumulation 1 equals 1 × 4.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed
from trl import SFTTrainer

from lavender.alignment_data import AlignmentCollator, Coverage, root_matcher
from lavender.arguments import AlignmentArguments
from lavender.errors import ConfigError, DataError
from lavender.objective import TRAINED_PARTS, AlignmentRequest, attach, is_alignment_part
from lavender.stages import AlignerPretraining
from lavender.store import MapStore
from lavender.vlm.registry import adapter_for
from lavender.weighting import EstimatedWeight

NUM_COVERAGE_SAMPLES = 256
LEAST_WEIGHT = 1e-6  # of a batch's words; below it, their sum is 0

# the mixin leans on Trainer's attributes; at run time the class it is mixed into brings them
_TrainerLike = Trainer if TYPE_CHECKING else object


class AlignmentMixin(_TrainerLike):
    """Adds the alignment loss to a trainer of the `transformers.Trainer` kind. Put it before the trainer class.

    Args:
        args: training arguments that are `AlignmentArguments` too.
        processing_class: the model's processor.
        maps: the map store, if `args.maps` does not name it.
        peft_config: LoRA settings, or another method's; the model itself must not be a PeftModel yet.
        kwargs: the trainer's other arguments. Data sets need `messages` and `images`: none, one or several. A
            `data_collator` makes the batch of plain fine-tuning from them; SFTTrainer brings its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: AlignmentArguments,
        *,
        processing_class: ProcessorMixin,
        maps: MapStore | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if maps is None and args.maps is None:
            raise ConfigError("no maps", "a map store", "set maps='FOLDER', written by `lavender extract`")
        if isinstance(model, PeftModel):
            raise ConfigError("a PeftModel", "the base model", "pass the base model and peft_config=...")
        _refuse_unsupported(args)
        self.maps = MapStore.open(str(args.maps)) if maps is None else maps
        config, adapter = args.alignment(), adapter_for(model.config)
        set_seed(args.seed)  # before the Aligner is drawn; the trainer sets it again before it draws anything
        self._alignment_layers, self._alignment = attach(model, config).layers, config
        self._estimate = EstimatedWeight() if config.align_weight == "estimated" else None
        if self._estimate is not None:
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), self._estimate]
        self._root_matcher = root_matcher(processing_class) if config.match == "root" else None
        self._alignment_metrics: dict[str, list[Tensor]] = defaultdict(list)
        if config.align_weight == 0:
            for name, parameter in model.named_parameters():
                if is_alignment_part(name):  # without a loss they would be trained by nothing, and confuse DDP
                    parameter.requires_grad_(False)
        elif peft_config is not None:
            tuned: Any = peft_config  # of a method that tunes modules, as all but the prompts' do
            tuned.modules_to_save = sorted({*(tuned.modules_to_save or ()), *TRAINED_PARTS})
        wrapped: nn.Module = model
        if isinstance(self, SFTTrainer):
            kwargs["peft_config"] = peft_config
        elif peft_config is not None:
            wrapped = get_peft_model(model, peft_config)
        super().__init__(model=wrapped, args=args, processing_class=processing_class, **kwargs)
        if config.aligner_pretraining:
            self.add_callback(AlignerPretraining(config.aligner_pretraining))
        self.data_collator = AlignmentCollator(self.data_collator, processing_class, adapter, self.maps, config)
        if isinstance(self.train_dataset, Dataset):  # a stream cannot be sampled; it is counted while training
            self._check_coverage(self.train_dataset, self.data_collator, config.min_coverage)

    @property
    def coverage(self) -> Coverage:
        """What was aligned and what was dropped, counted.

        With data loader workers each counts in its own process; then this is the check before the first step.
        """
        return cast(AlignmentCollator, self.data_collator).coverage

    def _check_coverage(self, dataset: Dataset, collator: AlignmentCollator, least: float) -> None:
        """Read some samples as training will, and stop if too few have maps."""
        for index in range(0, len(dataset), max(1, len(dataset) // NUM_COVERAGE_SAMPLES)):
            collator([dataset[index]])
        coverage = collator.coverage
        if coverage.share < least:
            raise DataError(
                f"maps for {coverage.mapped_samples} of {coverage.samples} samples ({dict(coverage.dropped)})",
                f"at least a share of {least}",
                "extract maps for this data set (pictures and answers must be the same), or lower min_coverage",
            )
        if self.args.dataloader_num_workers == 0:
            collator.coverage = Coverage()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        weight = sum((batch["alignment"]["weights"].sum() for batch in batch_samples), start=torch.zeros(()))
        if self.args.world_size > 1:
            weight = self.accelerator.gather(weight.to(device)[None]).sum()
        self._weight_in_batch = float(weight)
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = dict(inputs)
        request = AlignmentRequest(self._alignment_layers, inputs.pop("alignment"), self._root_matcher)
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            result = super().compute_loss(
                model, inputs | {"attention_request": request}, return_outputs, num_items_in_batch
            )
        finally:
            handle.remove()
        plain_loss, outputs = cast(tuple[Tensor, Any], result if return_outputs else (result, None))
        total = seen[0].attention_loss
        attention_loss = self._normalise(total, request, model.training, num_items_in_batch)
        if self._estimate is not None and model.training:
            cells = request.targets[0, 0].numel() if self._alignment.attention_loss == "min-max-sum" else 1
            self._estimate.add(total / cells, (request.weights * request.matched).sum())
        mode = "train" if model.training else "eval"
        for name, value in (
            ("vlm_loss", plain_loss), ("attention_loss", attention_loss), ("matched_words", request.matched.sum()),
        ):  # fmt: skip
            self._alignment_metrics[f"{mode}/{name}"].append(value.detach())
        # without alignment nothing is added, not even 0 times something: that would reorder sums of gradients
        weight = self._align_weight(model.training)
        loss = plain_loss + weight * attention_loss if self._alignment.align_weight else plain_loss
        return (loss, outputs) if return_outputs else loss

    def _align_weight(self, training: bool) -> float:
        """λ at this step: it may be estimated, rise at the start, fall at the end, be switched off."""
        config = self._alignment
        weight = self._estimate.value if self._estimate is not None else float(config.align_weight)
        if training and self.state.max_steps > 0:
            done = (self.state.global_step + 1) / self.state.max_steps
            if self.state.global_step * (config.align_switches + 1) // self.state.max_steps % 2:
                return 0.0
            weight *= min(1.0, done / config.align_warmup) if config.align_warmup else 1.0
            weight *= min(1.0, (1 - done) / config.align_decay) if config.align_decay else 1.0
        return weight

    def _normalise(self, total: Tensor, request: AlignmentRequest, training: bool, num_items_in_batch) -> Tensor:
        """Weighted sum over words → mean over the words of the whole accumulated batch.

        Data parallelism averages gradients over processes, so each process's share is multiplied by
        their number; and where the trainer will divide by the accumulation steps, that is undone first.
        """
        if not training:
            return total / request.weights.sum().clamp_min(LEAST_WEIGHT)
        scale = self.accelerator.num_processes / max(LEAST_WEIGHT, self._weight_in_batch)
        divided_later = not (self.model_accepts_loss_kwargs and num_items_in_batch is not None)
        return total * scale * (self.current_gradient_accumulation_steps if divided_later else 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds vlm_loss, attention_loss and matched_words: sums over the micro-batches of an optimiser step."""
        assert self.model is not None
        mode, prefix, parts = "eval", "eval_", 1
        if self.model.training:
            mode, prefix, parts = "train", "", self.args.gradient_accumulation_steps
        for key in [key for key in self._alignment_metrics if key.startswith(mode)]:
            values = self._alignment_metrics.pop(key)
            total = torch.stack(values).float().sum().item()
            logs[prefix + key.removeprefix(f"{mode}/")] = total / max(1, len(values) // parts)
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model under its modules' own names.

        For some models transformers writes older names, and a resumed run, which loads into modules
        that stand already, would silently keep the base's weights.
        """
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel):
            save = partial(type(model).save_pretrained, model, save_original_format=False)
            model.save_pretrained = save
        try:
            super()._save(output_dir, state_dict)
        finally:
            vars(model).pop("save_pretrained", None)


def _refuse_unsupported(args: AlignmentArguments) -> None:
    if args.aligner_pretraining and args.align_weight == 0:
        raise ConfigError("aligner_pretraining with align_weight=0", "alignment to pretrain", "set one of them")
    if args.aligner_pretraining and args.world_size > 1:
        raise ConfigError(
            f"aligner_pretraining with {args.world_size} processes, whose parameters must all get gradients",
            "one process",
            "run this stage on one process",
        )
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3 and args.activation_checkpointing:
        raise ConfigError(
            "DeepSpeed ZeRO-3 with gradient checkpointing, for which TRL forces the reentrant kind with PEFT",
            "non-reentrant checkpointing",
            "use FSDP2 or ZeRO-2, or switch checkpointing off",
        )
