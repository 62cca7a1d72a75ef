"""TRL's SFTTrainer with the alignment loss: L = L_VLM + align_weight · L_att.

All mathematics is in `objective`; this module only carries tensors to it and its loss back. Losses
are normalised by the number of mapped words of the whole accumulated batch over all processes, so
batch 4 × accumulation 1 equals 1 × 4.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path

from lavender.alignment_data import AlignmentCollator, Coverage
from lavender.config import ATTENTION_LOSSES, PARTS_OF_SPEECH, POOLINGS, AlignmentConfig
from lavender.errors import ConfigError, DataError
from lavender.objective import TRAINED_PARTS, AlignmentHead, AlignmentRequest, attach
from lavender.store import MapStore
from lavender.vlm.registry import adapter_for

NUM_COVERAGE_SAMPLES = 256


@dataclass
class LavenderConfig(SFTConfig):
    """SFTConfig with the settings of alignment (see `lavender.config.AlignmentConfig`).

    Attributes:
        maps: folder of the map store that `lavender extract` wrote.
        align_weight and all that follow: as in AlignmentConfig.
    """

    maps: str | None = field(default=None, metadata={"help": "Folder of the map store."})
    align_weight: float = field(default=AlignmentConfig.align_weight, metadata={"help": "λ; 0 is plain fine-tuning."})
    pooling: str = field(default=AlignmentConfig.pooling, metadata={"help": f"One of {POOLINGS}."})
    match: str = field(
        default=AlignmentConfig.match, metadata={"help": "label: all words; exact: those the student predicts."}
    )
    parts_of_speech: list[str] | None = field(
        default=None, metadata={"help": f"Mapped words to align, some of {PARTS_OF_SPEECH}; all by default."}
    )
    attention_loss: str = field(
        default=AlignmentConfig.attention_loss, metadata={"help": f"One of {ATTENTION_LOSSES}."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Decoder layers to align; all by default."})
    aligner: str = field(default=AlignmentConfig.aligner, metadata={"help": "light, sim or deep."})
    aligner_kind: str = field(default=AlignmentConfig.aligner_kind, metadata={"help": "convolution or mlp."})
    aligner_norm: str = field(default=AlignmentConfig.aligner_norm, metadata={"help": "instance, batch, group, none."})
    aligner_activation: str = field(
        default=AlignmentConfig.aligner_activation, metadata={"help": "relu6 or leaky-relu."}
    )
    aligner_width: int = field(default=AlignmentConfig.aligner_width, metadata={"help": "Channels of the Aligner."})
    align_warmup: float = field(default=0.0, metadata={"help": "Share of the steps in which λ rises from 0."})
    align_decay: float = field(default=0.0, metadata={"help": "Share of the steps, at the end, in which λ falls to 0."})
    aligner_pretraining: float = field(default=0.0, metadata={"help": "Share of the steps with a frozen VLM."})
    min_coverage: float = field(
        default=AlignmentConfig.min_coverage, metadata={"help": "Least share of samples that must have maps."}
    )

    def alignment(self) -> AlignmentConfig:
        """The settings of alignment alone, checked."""
        return AlignmentConfig(**{one.name: getattr(self, one.name) for one in fields(AlignmentConfig)})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alignment()
        if self.activation_checkpointing:
            options = _as_dict(self.activation_checkpointing_kwargs)
            if options.get("use_reentrant"):
                raise ConfigError(
                    "activation_checkpointing_kwargs={'use_reentrant': True}",
                    "non-reentrant checkpointing; the reentrant kind loses the attention's gradient silently",
                    "set use_reentrant to False",
                )
            # transformers keeps the old names as mirrors, which TRL still reads
            options["use_reentrant"] = False
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = options


# the mixin leans on Trainer's attributes; at run time the class it is mixed into brings them
_TrainerLike = Trainer if TYPE_CHECKING else object


class AlignmentMixin(_TrainerLike):
    """Adds the alignment loss to a trainer of the `transformers.Trainer` kind. Put it before the trainer class."""

    _num_words_in_batch: int = 0

    def _start_alignment(self, layers: tuple[int, ...], config: AlignmentConfig) -> None:
        self._alignment_layers, self._alignment = layers, config
        self._alignment_metrics: dict[str, list[Tensor]] = defaultdict(list)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        words = sum(
            (batch["alignment"]["present"].sum() for batch in batch_samples), start=torch.zeros((), dtype=torch.long)
        )
        if self.args.world_size > 1:
            words = self.accelerator.gather(words.to(device)[None]).sum()
        self._num_words_in_batch = int(words)
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = dict(inputs)
        request = AlignmentRequest(self._alignment_layers, inputs.pop("alignment"))
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            result = super().compute_loss(
                model, inputs | {"attention_request": request}, return_outputs, num_items_in_batch
            )
        finally:
            handle.remove()
        plain_loss, outputs = cast(tuple[Tensor, Any], result if return_outputs else (result, None))
        attention_loss = self._normalise(seen[0].attention_loss, request, model.training, num_items_in_batch)
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
        """λ at this step: it may rise at the start and fall at the end of training."""
        config, weight = self._alignment, self._alignment.align_weight
        if training and self.state.max_steps > 0:
            done = (self.state.global_step + 1) / self.state.max_steps
            weight *= min(1.0, done / config.align_warmup) if config.align_warmup else 1.0
            weight *= min(1.0, (1 - done) / config.align_decay) if config.align_decay else 1.0
        return weight

    def _normalise(self, total: Tensor, request: AlignmentRequest, training: bool, num_items_in_batch) -> Tensor:
        """Sum over words → mean over the words of the whole accumulated batch.

        Data parallelism averages gradients over processes, so each process's share is multiplied by
        their number; and where the trainer will divide by the accumulation steps, that is undone first.
        """
        if not training:
            return total / request.present.sum().clamp_min(1)
        scale = self.accelerator.num_processes / max(1, self._num_words_in_batch)
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


class AlignerPretraining(TrainerCallback):
    """Keeps the VLM frozen for a share of the steps: its parameters get no gradient, and the optimiser skips them."""

    def __init__(self, share: float):
        self._share, self._frozen = share, []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step < round(self._share * state.max_steps):
            if not self._frozen:
                named = kwargs["model"].named_parameters()
                self._frozen = [one for name, one in named if one.requires_grad and not _is_ours(name)]
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


class LavenderTrainer(AlignmentMixin, SFTTrainer):
    """TRL's SFTTrainer plus the alignment loss.

    Args:
        args: a LavenderConfig.
        processing_class: the model's processor; unlike in SFTTrainer it is required.
        maps: the map store, if `args.maps` does not name it.
        peft_config: LoRA settings; the model itself must not be a PeftModel yet.
        kwargs: SFTTrainer's other arguments. Data sets need `messages` and `images`: none, one or several.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: LavenderConfig,
        *,
        processing_class: ProcessorMixin,
        maps: MapStore | None = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ):
        if maps is None and args.maps is None:
            raise ConfigError("no maps", "a map store", "set maps='FOLDER', written by `lavender extract`")
        if isinstance(model, PeftModel):
            raise ConfigError("a PeftModel", "the base model", "pass the base model and peft_config=...")
        if isinstance(model, str):
            model = create_model_from_path(model, **_as_dict(args.model_init_kwargs))
            args.model_init_kwargs = None
        _refuse_unsupported(args)
        self.maps = MapStore.open(str(args.maps)) if maps is None else maps
        set_seed(args.seed)  # before the Aligner is drawn; SFTTrainer sets it again before it draws anything
        head = attach(model, args.alignment())
        if args.align_weight == 0:
            for name, parameter in model.named_parameters():
                if _is_ours(name):  # without a loss they would be trained by nothing, and confuse DDP
                    parameter.requires_grad_(False)
        elif peft_config is not None:
            peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), *TRAINED_PARTS})
        self._start_alignment(head.layers, args.alignment())
        super().__init__(model=model, args=args, processing_class=processing_class, peft_config=peft_config, **kwargs)
        if args.aligner_pretraining:
            self.add_callback(AlignerPretraining(args.aligner_pretraining))
        base, adapter = self.data_collator, adapter_for(model.config)
        self.data_collator = AlignmentCollator(
            base, processing_class, adapter, self.maps, args.alignment().parts_of_speech
        )
        if isinstance(self.train_dataset, Dataset):  # a stream cannot be sampled; it is counted while training
            self._check_coverage(self.train_dataset, self.data_collator, args.min_coverage)

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


def _as_dict(options: dict[str, Any] | str | None) -> dict[str, Any]:
    """TrainingArguments declares such fields as dict or string, and has parsed strings by now."""
    assert not isinstance(options, str)
    return dict(options or {})


def _refuse_unsupported(args: LavenderConfig) -> None:
    if args.packing or args.padding_free:
        raise ConfigError("packing or padding_free", "one sample a row", "switch both off")
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


def export(trainer: LavenderTrainer, path: str | Path) -> Path:
    """Write an ordinary checkpoint with processor: no trace of alignment in weights or config.

    Full tuning writes what `from_pretrained` loads; LoRA writes an adapter for `PeftModel.from_pretrained`.
    """
    path = Path(path)
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model)
    if isinstance(model, PeftModel):
        _export_adapter(model, state, path)
    else:
        model.save_pretrained(path, state_dict={name: value for name, value in state.items() if not _is_ours(name)})
    cast(ProcessorMixin, trainer.processing_class).save_pretrained(path)
    return path


def save_head(trainer: LavenderTrainer, path: str | Path) -> None:
    """Write what alignment trained beside the model, and every export leaves out: Aligner, parallel projections."""
    state = trainer.accelerator.get_state_dict(trainer.model)
    own = {name: value for name, value in state.items() if _is_ours(name) and "original_module" not in name}
    saved = {name.replace(".modules_to_save.default", ""): value.contiguous() for name, value in own.items()}
    save_file(saved, str(path), metadata={"format": "pt"})


def _export_adapter(model: PeftModel, state: dict[str, Tensor], path: Path) -> None:
    """PEFT writes all it trained; then alignment's own parts are taken out of file and config."""
    config = cast(LoraConfig, model.peft_config["default"])
    kept = config.modules_to_save
    config.modules_to_save = [name for name in kept or () if name not in TRAINED_PARTS] or None
    try:
        model.save_pretrained(str(path), state_dict=state)
    finally:
        config.modules_to_save = kept
    weights = path / "adapter_model.safetensors"
    adapter = {name: value for name, value in load_file(weights).items() if not _is_ours(name)}
    save_file(adapter, weights, metadata={"format": "pt"})


def _is_ours(name: str) -> bool:
    return not set(name.split(".")).isdisjoint(TRAINED_PARTS)
