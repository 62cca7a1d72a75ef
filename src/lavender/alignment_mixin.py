"""What alignment adds to a trainer of the `transformers.Trainer` kind: its loss, normalised, metrics, guard and probe.

All mathematics is in `objective`; this module only carries tensors to it and its loss back. Losses
are normalised by the number of mapped words of the whole accumulated batch over all processes, so
batch 4 × accumulation 1 equals 1 × 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from lavender.alignment_data import AlignmentCollator, Coverage, SeveralStores, root_matcher
from lavender.arguments import AlignmentArguments
from lavender.errors import ConfigError, DataError
from lavender.guard import Health, answers_finite, fault
from lavender.metrics import Metrics
from lavender.objective import TRAINED_PARTS, AlignmentRequest, attach, is_alignment_part, without_attention_loss
from lavender.probe import OwnAttention, Probe, choose, random_state_kept
from lavender.processes import (
    check_batches,
    prepare_for_fsdp,
    read_counts,
    refuse_accelerator,
    refuse_model,
    refuse_settings,
    write_counts,
)
from lavender.stages import AlignerPretraining
from lavender.store import MapStore
from lavender.trainable import name_all_linear
from lavender.vlm.registry import adapter_for
from lavender.weighting import EstimatedWeight
from lavender.weights import spare_packing

NUM_COVERAGE_SAMPLES = 256
LEAST_WEIGHT = 1e-6  # of a batch's words; below it, their sum is 0

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
            _refuse_in_plain_trainer(args, kwargs.get("data_collator"))
        if peft_config is not None:
            name_all_linear(peft_config, model)
        self.maps = MapStore.open(str(args.maps)) if maps is None else maps
        config, adapter = args.alignment(), adapter_for(model.config)
        set_seed(args.seed)  # before the Aligner is drawn; the trainer sets it again before it draws anything
        self._alignment_layers, self._alignment = attach(model, config).layers, config
        self._train_metrics, self._eval_metrics = Metrics(), Metrics()
        self._counts = self._eval_counts = torch.zeros_like(Coverage().counts())
        self._last_align_weight = 0.0
        self._estimate = EstimatedWeight() if config.align_weight == "estimated" else None
        if self._estimate is not None:
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), self._estimate]
        self._root_matcher = root_matcher(processing_class) if config.match == "root" else None
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
        """What this training was on, counted: by all processes once it has ended. Before it there is nothing."""
        return Coverage.of(self._counts)

    @property
    def eval_coverage(self) -> Coverage:
        """The same of the last evaluation, of all processes."""
        return Coverage.of(self._eval_counts)

    def _read_ahead(self, collator: AlignmentCollator, args: AlignmentArguments) -> None:
        """Check the coverage of what is trained on and of what chooses the best checkpoint; choose the probe."""
        least = self._alignment.min_coverage
        if self.train_dataset is not None:
            self._check_coverage(self.train_dataset, collator, least)
        if (args.metric_for_best_model or "").endswith("attention_loss"):
            several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for dataset in filter(None, several.values()):
                self._check_coverage(dataset, collator, least)
        if args.probe_size:
            self._add_probe(collator, args)

    def _check_coverage(self, dataset: Any, collator: AlignmentCollator, least: float) -> None:
        """Read some samples as training will, of a stream the first, and stop if too few have maps."""
        found = torch.zeros_like(self._counts)
        for example in _some_of(dataset):
            found += collator([example])["alignment"]["counts"]
        coverage = Coverage.of(found)
        if coverage.share < least:
            raise DataError(
                f"maps for {coverage.mapped_samples} of {coverage.samples} samples ({dict(coverage.dropped)})",
                f"at least a share of {least}",
                "extract maps for this data set (pictures and answers must be the same), or lower min_coverage",
            )

    def _add_probe(self, collator: AlignmentCollator, args: AlignmentArguments) -> None:
        dataset = self.eval_dataset or self.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        if dataset is None:
            return
        examples = choose(islice(_each_of(dataset), NUM_COVERAGE_SAMPLES), collator, args.probe_size)
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

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        weight = sum((batch["alignment"]["weights"].sum() for batch in batch_samples), start=torch.zeros(()))
        if self.args.world_size > 1:
            weight = self.accelerator.gather(weight.to(device)[None]).sum()
            self._check_pictures(*(batch["alignment"]["pictures"] for batch in batch_samples))
        self._weight_in_batch = float(weight)
        return super()._get_num_items_in_batch(batch_samples, device)

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
        attention_loss = self._normalise(total, request, model.training, num_items_in_batch)
        if self._estimate is not None and model.training:
            cells = request.targets[0, 0].numel() if self._alignment.attention_loss == "min-max-sum" else 1
            self._estimate.add(total / cells, (request.weights * request.matched).sum())
        weight = self._align_weight(model.training)
        if model.training:
            parts = self.current_gradient_accumulation_steps
            shown = 1 / parts if self._is_divided_later(num_items_in_batch) else 1.0
            self._train_metrics.add_step(plain_loss * shown, attention_loss * shown, request, 1 / parts)
            self._counts = self._counts.to(alignment["counts"].device) + alignment["counts"]
            self._last_align_weight = weight
            # not the request, which holds attention rows: they shall be gone when the next batch comes
            self._health = Health(answers_finite(seen[0], labels), request.present, request.losses)
        else:
            self._eval_metrics.add_batch(plain_loss, attention_loss, request)
            self._eval_counts = self._eval_counts.to(alignment["counts"].device) + alignment["counts"]
        # without alignment nothing is added, not even 0 times something: that would reorder sums of gradients
        loss = plain_loss + weight * attention_loss if self._alignment.align_weight else plain_loss
        return (loss, without_attention_loss(outputs)) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer's own; a loss that is not finite stops training with an error that names the sample.

        Here the trainer waits for the loss anyway, to filter what it logs.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite():
            raise fault(
                self.state.global_step + 1, model, cast(ProcessorMixin, self.processing_class), inputs, self._health
            )  # fmt: skip
        if self.args.world_size > 1 and self.accelerator.sync_gradients and self._pretraining.is_on(self.state):
            self._pretraining.drop_gradients(model)
        return loss

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
        divided_later = self._is_divided_later(num_items_in_batch)
        return total * scale * (self.current_gradient_accumulation_steps if divided_later else 1)

    def _is_divided_later(self, num_items_in_batch) -> bool:
        """Whether the trainer will divide this micro-batch's loss by the accumulation steps: its own rule."""
        if self.loss_is_scaled_for_ga is not None:
            return not self.loss_is_scaled_for_ga
        by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return not (by_items or self.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the numbers of `lavender.metrics.Metrics` wherever the trainer logs its loss."""
        if "loss" in logs:
            logs |= self._train_metrics.take_steps(self.accelerator)
            config = self._alignment
            if self._estimate is not None or config.align_warmup or config.align_decay or config.align_switches:
                logs["align_weight"] = self._last_align_weight
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        """As the trainer's own, with the numbers of `lavender.metrics.Metrics` among its metrics."""
        self._eval_metrics.clear()
        self._eval_counts = torch.zeros_like(self._eval_counts)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        numbers = self._eval_metrics.take_batches(self.accelerator)
        counts = self._eval_counts.to(self.accelerator.device)
        self._eval_counts = self.accelerator.gather(counts[None]).sum(dim=0).cpu()
        metrics = cast(dict[str, float], output.metrics)
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in numbers.items()})
        return output

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


def _each_of(dataset: Any) -> Iterable[Any]:
    """The examples of a data set in order; a stream is begun anew, and begins anew for whoever reads it next."""
    if isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
        return dataset
    return (dataset[index] for index in range(len(dataset)))


def _some_of(dataset: Any) -> Iterable[Any]:
    """Examples from all over a data set, or the first of a stream."""
    if isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
        return islice(dataset, NUM_COVERAGE_SAMPLES)
    return (dataset[index] for index in range(0, len(dataset), max(1, len(dataset) // NUM_COVERAGE_SAMPLES)))


def _refuse_in_plain_trainer(args: AlignmentArguments, collator: Any) -> None:
    """What SFTTrainer looks after itself."""
    if collator is None:
        raise ConfigError(
            "no data_collator", "one that makes a batch of plain fine-tuning from `messages` and `images`",
            "pass data_collator=..., such as TRL's DataCollatorForVisionLanguageModeling(processor)",
        )  # fmt: skip
    liger = args.liger_kernel_config or {}
    if args.use_liger_kernel and liger.get("fused_linear_cross_entropy", True) and args.match == "exact":
        raise ConfigError(
            "match='exact' with Liger's fused cross-entropy, which makes no logits while training",
            "the model's predictions",
            "set match='label' or 'root', or liger_kernel_config={'fused_linear_cross_entropy': False}",
        )
