"""Alignment in a trainer of the `transformers.Trainer` kind: loss, metrics, checks, probe.

The mathematics is in `lavender.alignment.objective`; the mixin passes tensors to it and adds its loss. Losses are
divided by the words that count in the whole accumulated batch over all processes (`Divisor`), so batch 4 ×
accumulation 1 equals batch 1 × accumulation 4.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed
from trl import SFTTrainer

from lavender.alignment.collator import AlignmentCollator, root_matcher
from lavender.alignment.coverage import Coverage
from lavender.alignment.objective import (
    AlignmentRequest,
    attach,
    matched_weight,
    without_attention_loss,
)
from lavender.alignment.pooling import POOLINGS
from lavender.data.replay import with_replay
from lavender.data.store import MapStore, SeveralStores
from lavender.errors import ConfigError
from lavender.model_files import spare_packing
from lavender.students.registry import adapter_for
from lavender.students.word_maps import random_state_kept
from lavender.training.arguments import AlignmentArguments
from lavender.training.augmented import Numbered, augmented, own_collator
from lavender.training.checkpoints import (
    check_alignment_parts,
    read_counts,
    saved_under_module_names,
    types_kept,
    write_counts,
)
from lavender.training.distributed import (
    UnroundedAlignment,
    check_batches,
    prepare_for_fsdp,
    refuse_accelerator,
    refuse_model,
    refuse_settings,
)
from lavender.training.matched_words import LEAST_WEIGHT, Divisor
from lavender.training.metrics import Metrics, check_choice, num_real_samples
from lavender.training.not_finite import Health, answers_finite, not_finite_error
from lavender.training.probe import OwnAttention, add_probe, choose
from lavender.training.refused_samples import (
    NUM_NAMED,
    Refused,
    check_coverage,
    counts_of,
    first_accepted,
    leave_out_refused,
    refuse_in_plain_trainer,
)
from lavender.training.schedule import AlignerPretraining, AlignWeight, forced_words
from lavender.training.trainable import name_all_linear, refuse_float16, set_alignment_type, train_alignment
from lavender.training.undoing import undone_on_failure


class AlignmentMixin(UnroundedAlignment):
    """Adds the alignment loss to a trainer of the `transformers.Trainer` kind. List it before the trainer class.

    Examples:
        >>> from transformers import Trainer
        >>> from lavender.training.mixin import AlignmentMixin
        >>> class AlignedTrainer(AlignmentMixin, Trainer):
        ...     pass

    Args:
        model: a loaded VLM of a supported family, not yet wrapped by PEFT.
        args: training arguments that are also `AlignmentArguments`.
        processing_class: the model's processor.
        maps: the open map store, or several as `SeveralStores`, if `args.maps` does not name it.
        peft_config: settings of LoRA or another PEFT method that tunes modules; None trains the model itself.
        kwargs: the trainer's other arguments. Data sets and streams need the columns `messages` and `images`, with any
            number of images per sample. A `data_collator` makes the batch of plain fine-tuning from them; SFTTrainer
            brings its own.

    Attributes:
        coverage: number of samples and words with maps, and why others have none. Complete when training has ended.
        eval_coverage: the same for the last evaluation.
        refused: the training samples that the model refuses; they are left out.
        eval_refused: the same for the evaluation set.

    Raises:
        ConfigError: no maps; a PeftModel; a setting, launcher or model that alignment does not support.
        DataError: a smaller share than `args.min_coverage` of the samples has maps; the model takes no sample.
        UnsupportedModelError: the model's family is not supported.
        NotFiniteError: while training, a loss is NaN or infinite.
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
            peft_config = copy.deepcopy(peft_config)  # another trainer may get the caller's
            name_all_linear(peft_config, model)
        self.maps = MapStore.open(str(args.maps)) if maps is None else maps
        config, adapter = args.alignment(), adapter_for(model.config)
        set_seed(args.seed)  # for the Aligner's initial weights; the trainer sets the seed again
        with undone_on_failure(model):
            self._alignment_layers, self._alignment = attach(model, config).layers, config
            self._train_metrics, self._eval_metrics = Metrics(), Metrics()
            self._counts = self._eval_counts = torch.zeros_like(Coverage().counts())
            self._printed_faults: set[str] = set()
            self._align_weight = AlignWeight(config)
            if self._align_weight.estimate is not None:
                kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), self._align_weight.estimate]
            self._root_matcher = root_matcher(processing_class) if config.match == "root" else None
            self._divisor = Divisor(cast(Trainer, self), config.match == "label", self._root_matcher)
            train_alignment(model, config, peft_config)
            wrapped: nn.Module = model
            if isinstance(self, SFTTrainer):
                kwargs["peft_config"] = peft_config
            elif peft_config is not None:
                set_seed(args.seed)  # as SFTTrainer does before it initialises adapters
                wrapped = get_peft_model(model, peft_config)
            super().__init__(model=wrapped, args=args, processing_class=processing_class, **kwargs)
            if not self.is_deepspeed_enabled:  # which keeps its own copy of 32 bits
                refuse_float16(cast(nn.Module, self.model))
            set_alignment_type(model)
            refuse_accelerator(self.accelerator, model)
            if self.is_fsdp_enabled:
                prepare_for_fsdp(self.accelerator, cast(nn.Module, self.model))
            self._pretraining = AlignerPretraining(config.aligner_pretraining)
            if config.aligner_pretraining:
                self.add_callback(self._pretraining)
            self.data_collator = AlignmentCollator(self.data_collator, processing_class, adapter, self.maps, config)
            self._augment = args.augment()
            with random_state_kept(args.device):
                self._check_data(self.data_collator, args)

    @property
    def coverage(self) -> Coverage:
        """Counts of the samples of this training, and of the samples left out. Summed over processes at the end."""
        return Coverage.of(self._counts.cpu() + counts_of(self.refused))

    @property
    def eval_coverage(self) -> Coverage:
        """Counts of the samples of the last evaluation, summed over processes."""
        return Coverage.of(self._eval_counts)

    def _check_data(self, collator: AlignmentCollator, args: AlignmentArguments) -> None:
        """Leave out refused samples; check the coverage of the data that trains or chooses; set up the probe."""
        self.train_dataset, self.refused = self._without_refused(self.train_dataset)
        has_several = isinstance(self.eval_dataset, dict)
        checked = {
            name: self._without_refused(dataset)
            for name, dataset in (self.eval_dataset if has_several else {"": self.eval_dataset}).items()
        }
        self.eval_refused = [sample for _, refused in checked.values() for sample in refused]
        eval_sets = {name: dataset for name, (dataset, _) in checked.items()}
        self.eval_dataset = eval_sets if has_several else eval_sets[""]
        chooses = (args.metric_for_best_model or "").endswith("attention_loss")
        for dataset in (self.train_dataset, *(eval_sets.values() if chooses else ())):
            if dataset is not None:
                check_coverage(dataset, collator, self._alignment.min_coverage)
        probed = next((dataset for dataset in (*eval_sets.values(), self.train_dataset) if dataset is not None), None)
        if args.probe_size and probed is not None:
            examples = choose(first_accepted(probed, collator), collator, args.probe_size)
            add_probe(self, self._probe_requests, examples, args.probe_steps)

    def _without_refused(self, dataset: Any) -> tuple[Any, list[Refused]]:
        collator = own_collator(self, "add_replay")
        return leave_out_refused(dataset, collator, self.accelerator, with_bar=not self.args.disable_tqdm)

    def add_replay(self, dataset: Dataset, share: float) -> None:
        """Mix samples of what the model knows already into the training set. Call it before training.

        They need no maps, and `min_coverage` does not count them. Those that the model refuses are left out first, and
        added to `refused`, numbered on from the samples of the training set.

        Args:
            dataset: these samples, with the columns of the training set, which must be a `datasets.Dataset` too.
            share: their share among all samples, between 0 and 1; see `lavender.data.replay.with_replay`.

        Raises:
            DataError: the model takes none of them.
        """
        with random_state_kept(self.args.device):
            known, refused = self._without_refused(dataset)
        new = cast(Dataset, self.train_dataset)
        first = len(new) + len(self.refused)
        self.refused += [sample._replace(index=first + sample.index) for sample in refused]
        self.train_dataset = with_replay(new, known, share)

    def _probe_requests(self, tensors: dict[str, Tensor]) -> list[AlignmentRequest]:
        learned = POOLINGS[self._alignment.pooling].learned
        kinds = (AlignmentRequest, OwnAttention) if learned else (AlignmentRequest,)
        return [kind(self._alignment_layers, tensors, self._root_matcher) for kind in kinds]

    def get_train_dataloader(self) -> DataLoader:
        """The trainer's loader of training samples, whose pictures are augmented if the arguments say so."""
        with augmented(cast(Trainer, self), self._augment):
            return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None):
        """The trainer's sampler, which may read a column of the data set, such as its lengths."""
        return super()._get_train_sampler(train_dataset.rows if isinstance(train_dataset, Numbered) else train_dataset)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any):
        if self._augment is not None:
            self._augment.epoch.fill_(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any):
        """The trainer's loop, with counts that start at 0 again where `auto_find_batch_size` restarts it."""
        self._train_metrics.clear()
        self._counts = torch.zeros_like(self._counts)
        result = super()._inner_training_loop(*args, **kwargs)
        self._counts = self.accelerator.gather(self._counts.to(self.accelerator.device)[None]).sum(dim=0)
        return result

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one step; their words are counted together."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._divisor.begin(batches)
        if self.args.world_size > 1:
            self._check_pictures(*(batch["alignment"]["pictures"] for batch in batches))
        return batches, num_items

    def _check_pictures(self, *pictures: Tensor) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            check_batches(self.accelerator, [bool((indices >= 0).any()) for indices in pictures])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = dict(inputs) | {"use_cache": False}
        alignment, labels = inputs.pop("alignment"), inputs["labels"]
        if not model.training:
            self._check_pictures(alignment["pictures"])
        forced = None
        if model.training:
            predicted = alignment["present"] & ~alignment["reads"]
            forced = forced_words(self._alignment, self.state, alignment["names"], predicted)
        request = AlignmentRequest(self._alignment_layers, alignment, self._root_matcher, forced)
        with _passed_on(model, request) as outputs_seen:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain_loss, outputs = cast(tuple[Tensor, Any], result if return_outputs else (result, None))
        total = outputs_seen[0].attention_loss
        attention_loss = self._normalised(total, request, model.training, num_items_in_batch)
        if model.training:
            self._align_weight.note(total, request)
            weight = self._align_weight.of_step(self.state)
            parts = self.current_gradient_accumulation_steps
            shown = 1 / parts if self._is_divided_later(num_items_in_batch) else 1.0
            self._train_metrics.add_step(plain_loss * shown, attention_loss * shown, request, 1 / parts)
            self._counts = self._counts.to(alignment["counts"].device) + alignment["counts"]
            self._print_faults(alignment["faults"])
            # not the request: it holds attention rows, whose memory the next batch needs
            answers = answers_finite(outputs_seen[0], labels, inputs.get("cu_seq_lens_q"))
            self._health = Health(answers, request.present, request.losses)
        else:
            weight = self._align_weight.of_evaluation()
            num_real = num_real_samples(self.accelerator, len(alignment["sample_counts"]))
            counts = alignment["counts"] - alignment["sample_counts"][num_real:].sum(dim=0)
            self._eval_metrics.add_batch(plain_loss, request, num_real)
            self._eval_counts = self._eval_counts.to(counts.device) + counts
        # with align_weight=0 nothing is added, not even 0 · L_att, which would reorder sums of gradients
        loss = plain_loss + weight * attention_loss if self._alignment.align_weight else plain_loss
        return (loss, without_attention_loss(outputs)) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's step. A loss that is not finite raises NotFiniteError, which names the sample.

        Testing the loss costs no extra synchronisation: the trainer waits for it here anyway, to filter what it logs.
        """
        self._divisor.look_ahead(model)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite():
            raise not_finite_error(
                self.state.global_step + 1, model, cast(ProcessorMixin, self.processing_class), inputs, self._health
            )
        if self.args.world_size > 1 and self.accelerator.sync_gradients and self._pretraining.is_on(self.state):
            self._pretraining.drop_gradients(model)
        return loss

    def _print_faults(self, faults: list[str]) -> None:
        """Print the first few faults of samples; `coverage` counts all."""
        new = [fault for fault in faults if fault not in self._printed_faults]
        for fault in new[: NUM_NAMED - len(self._printed_faults)]:
            self._printed_faults.add(fault)
            print(f"left out of a batch, or of its alignment: {fault}")

    def _normalised(self, total: Tensor, request: AlignmentRequest, training: bool, num_items_in_batch) -> Tensor:
        """Divide a weighted sum over words by the weight of the accumulated batch, or of an evaluation's batch."""
        if not training:
            return total / matched_weight(request).clamp_min(LEAST_WEIGHT)
        share = self._divisor.share(total, request)
        return share * self.current_gradient_accumulation_steps if self._is_divided_later(num_items_in_batch) else share

    def _is_divided_later(self, num_items_in_batch) -> bool:
        """Whether the trainer will divide this micro-batch's loss by the accumulation steps, by the trainer's rule."""
        if self.loss_is_scaled_for_ga is not None:
            return not self.loss_is_scaled_for_ga
        by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return not (by_items or self.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics of `lavender.training.metrics.Metrics` wherever the trainer logs its loss."""
        if "loss" in logs:
            logs |= self._train_metrics.take_steps(self.accelerator)
            if self._align_weight.varies:
                logs["align_weight"] = self._align_weight.last
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        """The trainer's evaluation, with the metrics of `lavender.training.metrics.Metrics` added."""
        self._eval_metrics.clear()
        self._eval_counts = torch.zeros_like(self._eval_counts)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        numbers = self._eval_metrics.take_batches(self.accelerator)
        counts = self._eval_counts.to(self.accelerator.device)
        self._eval_counts = self.accelerator.gather(counts[None]).sum(dim=0).cpu()
        metrics = cast(dict[str, float], output.metrics)
        if self._alignment.align_weight and f"{metric_key_prefix}_loss" in metrics and numbers:
            attention_loss = numbers["attention_loss"] if numbers["matched_words"] else 0.0
            numbers["loss"] = numbers["vlm_loss"] + self._align_weight.of_evaluation() * attention_loss
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in numbers.items()})
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Raise NotFiniteError for NaN, which the trainer ignores, and for a loss in which no word counts."""
        check_choice(metrics, self.args.metric_for_best_model, aligns=bool(self._alignment.align_weight))
        return super()._determine_best_metric(metrics, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also write the counts so far. The file that makes a checkpoint complete is written after this."""
        super()._save_rng_state(output_dir)
        write_counts(self.accelerator, self._counts, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        loaded = cast(nn.Module, self.model if model is None else model)
        if self._alignment.align_weight != 0:
            check_alignment_parts(resume_from_checkpoint, loaded)
        with types_kept(loaded):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._counts = read_counts(self.accelerator, self._counts, checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with saved_under_module_names(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)


@contextmanager
def _passed_on(model: nn.Module, request: AlignmentRequest) -> Iterator[list[Any]]:
    """Pass the request to the model's first forward inside; its output is appended to the list.

    TRL may run the model again to get logits; the request has been answered by then.
    """
    outputs: list[Any] = []

    def add_request(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs if outputs else kwargs | {"attention_request": request}

    def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
        if not outputs:
            outputs.append(output)

    # before the model's other hooks, which look for the request
    first = model.register_forward_pre_hook(add_request, with_kwargs=True, prepend=True)
    handles = first, model.register_forward_hook(keep_output)
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
