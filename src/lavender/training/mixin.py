"""What alignment adds to a trainer of the `transformers.Trainer` kind: its loss, normalised, metrics, guard and probe.

All mathematics is in `objective`; this module only carries tensors to it and its loss back. Losses are divided by the
words that count in the whole accumulated batch over all processes (`divisor`), so batch 4 × accumulation 1 equals
1 × 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from lavender.alignment.collator import AlignmentCollator, Coverage, SeveralStores, root_matcher
from lavender.alignment.objective import (
    TRAINED_PARTS,
    AlignmentRequest,
    attach,
    is_alignment_part,
    matched_weight,
    without_attention_loss,
)
from lavender.data.store import MapStore
from lavender.errors import ConfigError
from lavender.model_files import spare_packing
from lavender.students.registry import adapter_for
from lavender.students.word_maps import random_state_kept
from lavender.training.arguments import AlignmentArguments
from lavender.training.checkpoints import read_counts, write_counts
from lavender.training.distributed import (
    check_batches,
    prepare_for_fsdp,
    refuse_accelerator,
    refuse_model,
    refuse_settings,
)
from lavender.training.matched_words import LEAST_WEIGHT, Divisor
from lavender.training.metrics import Metrics, check_choice
from lavender.training.not_finite import Health, answers_finite, fault
from lavender.training.probe import OwnAttention, Probe, choose
from lavender.training.refused_samples import (
    NUM_NAMED,
    Refused,
    check_coverage,
    counts_of,
    first_of,
    is_stream,
    refuse_in_plain_trainer,
    refused_of,
    told,
    without,
)
from lavender.training.schedule import AlignerPretraining, EstimatedWeight
from lavender.training.trainable import name_all_linear

# the mixin leans on Trainer's attributes; at run time the class it is mixed into brings them
_TrainerLike = Trainer if TYPE_CHECKING else object


class AlignmentMixin(_TrainerLike):
    """Adds the alignment loss to a trainer of the `transformers.Trainer` kind. Put it before the trainer class.

    Args:
        args: training arguments that are `AlignmentArguments` too.
        processing_class: the model's processor.
        maps: the map store, or several, if `args.maps` does not name it.
        peft_config: LoRA settings, or another method's; the model itself must not be a PeftModel yet.
        kwargs: the trainer's other arguments. Data sets, streams too, need `messages` and `images`: none, one or
            several. A `data_collator` makes the batch of plain fine-tuning from them; SFTTrainer brings its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: AlignmentArguments,
        *,
        processing_class: ProcessorMixin,
        maps: MapStore | SeveralStores | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if maps is None and args.maps is None:
            raise ConfigError("no maps", "a map store", "set maps='FOLDER', written by `lavender extract`")
        if isinstance(model, PeftModel):
            raise ConfigError("a PeftModel", "the base model", "pass the base model and peft_config=...")
        refuse_settings(args, with_peft=peft_config is not None)
        refuse_model(model)
        spare_packing(model)
        if not isinstance(self, SFTTrainer):
            refuse_in_plain_trainer(args, kwargs.get("data_collator"))
        if peft_config is not None:
            name_all_linear(peft_config, model)
        self.maps = MapStore.open(str(args.maps)) if maps is None else maps
        config, adapter = args.alignment(), adapter_for(model.config)
        set_seed(args.seed)  # before the Aligner is drawn; the trainer sets it again before it draws anything
        self._alignment_layers, self._alignment = attach(model, config).layers, config
        self._train_metrics, self._eval_metrics = Metrics(), Metrics()
        self._counts = self._eval_counts = torch.zeros_like(Coverage().counts())
        self._last_align_weight, self._told = 0.0, set[str]()
        self._estimate = EstimatedWeight() if config.align_weight == "estimated" else None
        if self._estimate is not None:
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), self._estimate]
        self._root_matcher = root_matcher(processing_class) if config.match == "root" else None
        self._divisor = Divisor(cast(Trainer, self), config.match == "label", self._root_matcher)
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
            set_seed(args.seed)  # as SFTTrainer does before adapters are drawn
            wrapped = get_peft_model(model, peft_config)
        super().__init__(model=wrapped, args=args, processing_class=processing_class, **kwargs)
        _set_type(model)
        refuse_accelerator(self.accelerator, model)
        if self.is_fsdp_enabled:
            prepare_for_fsdp(self.accelerator, cast(nn.Module, self.model))
        self._pretraining = AlignerPretraining(config.aligner_pretraining)
        if config.aligner_pretraining:
            self.add_callback(self._pretraining)
        self.data_collator = AlignmentCollator(self.data_collator, processing_class, adapter, self.maps, config)
        with random_state_kept(args.device):
            self._read_ahead(self.data_collator, args)

    @property
    def coverage(self) -> Coverage:
        """What this training was on, counted: by all processes once it has ended; and, once each, what was refused."""
        return Coverage.of(self._counts.cpu() + counts_of(self.refused))

    @property
    def eval_coverage(self) -> Coverage:
        """The same of the last evaluation, of all processes."""
        return Coverage.of(self._eval_counts)

    def _read_ahead(self, collator: AlignmentCollator, args: AlignmentArguments) -> None:
        """Leave out what the model refuses; check the coverage of what trains and what chooses; choose the probe."""
        self.train_dataset, self.refused = self._without_refused(self.train_dataset)
        several = isinstance(self.eval_dataset, dict)
        evaluated = self.eval_dataset if several else {"": self.eval_dataset}
        taken = {name: self._without_refused(one) for name, one in evaluated.items()}
        self.eval_refused = [one for _, refused in taken.values() for one in refused]
        evaluated = {name: dataset for name, (dataset, _) in taken.items()}
        self.eval_dataset = evaluated if several else evaluated[""]
        chooses = (args.metric_for_best_model or "").endswith("attention_loss")
        for dataset in (self.train_dataset, *(evaluated.values() if chooses else ())):
            if dataset is not None:
                check_coverage(dataset, collator, self._alignment.min_coverage)
        looked_at = next((one for one in (*evaluated.values(), self.train_dataset) if one is not None), None)
        if args.probe_size and looked_at is not None:
            self._add_probe(choose(first_of(looked_at, collator), collator, args.probe_size), args)

    def _without_refused(self, dataset: Any) -> tuple[Any, list[Refused]]:
        """A data set without the samples that the model refuses, and these. Of a stream the collator drops them."""
        collator = cast(AlignmentCollator, self.data_collator)
        if dataset is None or is_stream(dataset):
            collator.drops |= dataset is not None
            return dataset, []
        refused = refused_of(dataset, collator, self.accelerator, with_bar=not self.args.disable_tqdm)
        if self.accelerator.is_main_process:
            for line in told(refused, len(dataset)):
                print(line)
        return without(dataset, refused), refused

    def _add_probe(self, examples: list[Any], args: AlignmentArguments) -> None:
        # where a forward needs every process, all must look at as many
        sizes = self.accelerator.gather(torch.tensor([len(examples)], device=self.accelerator.device))
        if int(sizes.min()):
            settings = {"use_cache": False} | ({"fused_lm_head": True} if isinstance(self, SFTTrainer) else {})
            chosen = examples[: int(sizes.min())]
            self.add_callback(Probe(self, self._probe_requests, chosen, args.probe_steps, settings))

    def _probe_requests(self, tensors: dict[str, Tensor]) -> list[AlignmentRequest]:
        kinds = (AlignmentRequest, OwnAttention) if self._alignment.pooling == "learn" else (AlignmentRequest,)
        return [kind(self._alignment_layers, tensors, self._root_matcher) for kind in kinds]

    def _inner_training_loop(self, *args: Any, **kwargs: Any):
        """As the trainer's own, which begins it anew where `auto_find_batch_size` has to."""
        self._train_metrics.clear()
        self._counts = torch.zeros_like(self._counts)
        result = super()._inner_training_loop(*args, **kwargs)
        self._counts = self.accelerator.gather(self._counts.to(self.accelerator.device)[None]).sum(dim=0)
        return result

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As the trainer's own; the micro-batches of one step, whose words are counted together."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._divisor.begin(batches)
        if self.args.world_size > 1:
            self._check_pictures(*(batch["alignment"]["pictures"] for batch in batches))
        return batches, num_items

    def _check_pictures(self, *pictures: Tensor) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            check_batches(self.accelerator, [bool((one >= 0).any()) for one in pictures])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = dict(inputs) | {"use_cache": False}
        alignment, labels = inputs.pop("alignment"), inputs["labels"]
        if not model.training:
            self._check_pictures(alignment["pictures"])
        request = AlignmentRequest(self._alignment_layers, alignment, self._root_matcher)
        with _carried(model, request) as seen:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain_loss, outputs = cast(tuple[Tensor, Any], result if return_outputs else (result, None))
        total = seen[0].attention_loss
        attention_loss = self._normalised(total, request, model.training, num_items_in_batch)
        if self._estimate is not None and model.training:
            cells = request.targets[0, 0].numel() if self._alignment.attention_loss == "min-max-sum" else 1
            self._estimate.add(total / cells, matched_weight(request))
        weight = self._align_weight(model.training)
        if model.training:
            parts = self.current_gradient_accumulation_steps
            shown = 1 / parts if self._is_divided_later(num_items_in_batch) else 1.0
            self._train_metrics.add_step(plain_loss * shown, attention_loss * shown, request, 1 / parts)
            self._counts = self._counts.to(alignment["counts"].device) + alignment["counts"]
            self._tell(alignment["faults"])
            self._last_align_weight = weight
            # not the request, which holds attention rows: they shall be gone when the next batch comes
            self._health = Health(answers_finite(seen[0], labels), request.present, request.losses)
        else:
            self._eval_metrics.add_batch(plain_loss, total, request)
            self._eval_counts = self._eval_counts.to(alignment["counts"].device) + alignment["counts"]
        # without alignment nothing is added, not even 0 times something: that would reorder sums of gradients
        loss = plain_loss + weight * attention_loss if self._alignment.align_weight else plain_loss
        return (loss, without_attention_loss(outputs)) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer's own; a loss that is not finite stops training with an error that names the sample.

        Here the trainer waits for the loss anyway, to filter what it logs.
        """
        self._divisor.look_ahead(model)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite():
            raise fault(
                self.state.global_step + 1, model, cast(ProcessorMixin, self.processing_class), inputs, self._health
            )
        if self.args.world_size > 1 and self.accelerator.sync_gradients and self._pretraining.is_on(self.state):
            self._pretraining.drop_gradients(model)
        return loss

    def _tell(self, faults: list[str]) -> None:
        """Print what was left out of a batch, the first few; `coverage` counts all."""
        new = [one for one in faults if one not in self._told]
        self._told.update(new[: NUM_NAMED - len(self._told)])
        for one in new:
            if one in self._told:
                print(f"left out of a batch, or of its alignment: {one}")

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

    def _normalised(self, total: Tensor, request: AlignmentRequest, training: bool, num_items_in_batch) -> Tensor:
        """Weighted sum over words → mean: in training over the accumulated batch, in evaluation over this one."""
        if not training:
            return total / matched_weight(request).clamp_min(LEAST_WEIGHT)
        share = self._divisor.share(total, request)
        return share * self.current_gradient_accumulation_steps if self._is_divided_later(num_items_in_batch) else share

    def _is_divided_later(self, num_items_in_batch) -> bool:
        """Whether the trainer will divide this micro-batch's loss by the accumulation steps: its own rule."""
        if self.loss_is_scaled_for_ga is not None:
            return not self.loss_is_scaled_for_ga
        by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return not (by_items or self.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the numbers of `lavender.training.metrics.Metrics` wherever the trainer logs its loss."""
        if "loss" in logs:
            logs |= self._train_metrics.take_steps(self.accelerator)
            config = self._alignment
            if self._estimate is not None or config.align_warmup or config.align_decay or config.align_switches:
                logs["align_weight"] = self._last_align_weight
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        """As the trainer's own, with the numbers of `lavender.training.metrics.Metrics` among its metrics."""
        self._eval_metrics.clear()
        self._eval_counts = torch.zeros_like(self._eval_counts)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        numbers = self._eval_metrics.take_batches(self.accelerator)
        counts = self._eval_counts.to(self.accelerator.device)
        self._eval_counts = self.accelerator.gather(counts[None]).sum(dim=0).cpu()
        metrics = cast(dict[str, float], output.metrics)
        if self._alignment.align_weight and f"{metric_key_prefix}_loss" in metrics and numbers:
            attention_loss = numbers["attention_loss"] if numbers["matched_words"] else 0.0
            numbers["loss"] = numbers["vlm_loss"] + self._align_weight(training=False) * attention_loss
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in numbers.items()})
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the trainer's own, which would pass over NaN, or take a loss that no word counted in for a low one."""
        check_choice(metrics, self.args.metric_for_best_model, aligns=bool(self._alignment.align_weight))
        return super()._determine_best_metric(metrics, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also keep what was counted so far. What makes a checkpoint complete is written after this."""
        super()._save_rng_state(output_dir)
        write_counts(self.accelerator, self._counts, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the trainer's own; what is trained keeps its type, where PEFT loads adapters as float32 (QLoRA's are not).

        A resumed run would go on in another precision.
        """
        tuned = cast(nn.Module, self.model if model is None else model)
        before = {name: one.dtype for name, one in tuned.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, one in tuned.named_parameters():
            if one.dtype != before[name]:
                one.data = one.data.to(before[name])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._counts = read_counts(self.accelerator, self._counts, checkpoint)

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


def _set_type(model: PreTrainedModel) -> None:
    """Float32 for what alignment trains: TRL makes bfloat16 of all that QLoRA does.

    With ZeRO-3 the model's own type, since DeepSpeed wants one of all; it keeps copies in float32.
    """
    dtype = model.dtype if is_deepspeed_zero3_enabled() else torch.float32
    for name, parameter in model.named_parameters():
        if is_alignment_part(name) and parameter.dtype in (torch.float32, torch.bfloat16):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _carried(model: nn.Module, request: AlignmentRequest) -> Iterator[list[Any]]:
    """The model's first call inside carries the request, and its output lands in the list.

    TRL runs the model again for logits that somebody asked for; the request has had its answer by then.
    """
    seen: list[Any] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs if seen else kwargs | {"attention_request": request}

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        if not seen:
            seen.append(output)

    # the first of the hooks before: others of the model already look for the request
    begin = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    handles = begin, model.register_forward_hook(after)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
