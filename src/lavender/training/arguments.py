"""The settings of alignment beside those of a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig

from lavender.config import ATTENTION_LOSSES, PARTS_OF_SPEECH, POOLINGS, AlignmentConfig
from lavender.errors import ConfigError
from lavender.type_checks import check_type

# the settings lean on TrainingArguments' attributes; at run time the class they are put before brings them
_ArgumentsLike = TrainingArguments if TYPE_CHECKING else object


@dataclass
class AlignmentArguments(_ArgumentsLike):
    """The settings of alignment as fields of a `transformers.TrainingArguments`, before which this is put.

    Attributes:
        maps: folder of the map store that `lavender extract` wrote.
        probe_size: how many samples the probe looks at while training (docs/training.md); 0 for no probe. They are the
            first with a mapped word of the evaluation set, or of the training set where there is none.
        probe_steps: it looks before the first step, every so many steps, and after the last.
        all others: as in AlignmentConfig.
    """

    maps: str | None = field(default=None, metadata={"help": "Folder of the map store."})
    align_weight: float | str = field(
        default=AlignmentConfig.align_weight, metadata={"help": "λ; 0 is plain fine-tuning; or estimated."}
    )
    pooling: str = field(default=AlignmentConfig.pooling, metadata={"help": f"One of {POOLINGS}."})
    match: str = field(
        default=AlignmentConfig.match,
        metadata={"help": "label: all words; exact: those the student predicts; root: or another form of them."},
    )
    parts_of_speech: list[str] | None = field(
        default=None, metadata={"help": f"Mapped words to align, some of {PARTS_OF_SPEECH}; all by default."}
    )
    subjects_and_objects: bool = field(
        default=False, metadata={"help": "Align only heads of noun phrases that no preposition governs."}
    )
    weight_by_confidence: bool = field(default=False, metadata={"help": "Words count by the teacher's confidence."})
    attention_loss: str = field(
        default=AlignmentConfig.attention_loss, metadata={"help": f"One of {ATTENTION_LOSSES}."}
    )
    layers: list[int] | str | None = field(
        default=None, metadata={"help": "Decoder layers to align: indices, all, first, middle or last."}
    )
    layer_share: float = field(
        default=AlignmentConfig.layer_share, metadata={"help": "Share of the layers that first, middle, last are."}
    )
    heads: list[int] | None = field(default=None, metadata={"help": "Attention heads to align; all by default."})
    parallel_init: str = field(
        default=AlignmentConfig.parallel_init, metadata={"help": "Start of learn's projections: pretrained or random."}
    )
    aligner: str = field(default=AlignmentConfig.aligner, metadata={"help": "light, sim or deep."})
    aligner_kind: str = field(default=AlignmentConfig.aligner_kind, metadata={"help": "convolution or mlp."})
    aligner_norm: str = field(default=AlignmentConfig.aligner_norm, metadata={"help": "instance, batch, group, none."})
    aligner_activation: str = field(
        default=AlignmentConfig.aligner_activation, metadata={"help": "relu6 or leaky-relu."}
    )
    aligner_width: int = field(default=AlignmentConfig.aligner_width, metadata={"help": "Channels of the Aligner."})
    align_warmup: float = field(default=0.0, metadata={"help": "Share of the steps in which λ rises from 0."})
    align_decay: float = field(default=0.0, metadata={"help": "Share of the steps, at the end, in which λ falls to 0."})
    align_switches: int = field(default=0, metadata={"help": "How often alignment is switched off and on again."})
    aligner_pretraining: float = field(default=0.0, metadata={"help": "Share of the steps with a frozen VLM."})
    min_coverage: float = field(
        default=AlignmentConfig.min_coverage, metadata={"help": "Least share of samples that must have maps."}
    )

    probe_size: int = field(default=8, metadata={"help": "Samples of the probe; 0 for none."})
    probe_steps: int = field(default=100, metadata={"help": "Steps between two looks at the probe."})

    def alignment(self) -> AlignmentConfig:
        """The settings of alignment alone, checked."""
        return AlignmentConfig(**{one.name: getattr(self, one.name) for one in fields(AlignmentConfig)})

    def __post_init__(self) -> None:
        self.alignment()
        for name, least in (("probe_size", 0), ("probe_steps", 1)):
            check_type(name, getattr(self, name), int)
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)!r}", f"a number from {least} on", f"change {name}")
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16/gpu" not in str(error):
                raise
            raise ConfigError(
                "bf16, which is the default, without a GPU that computes in it",
                "such a GPU, or float32",
                "set bf16: false, and use_cpu: true to train on the CPU",
            ) from error
        check_reports(cast("list[str]", self.report_to))
        accelerator = cast(AcceleratorConfig, self.accelerator_config)
        if accelerator.dispatch_batches:
            raise ConfigError(
                "accelerator_config={'dispatch_batches': True}, which cuts every tensor of a batch by its first axis",
                "batches that each process makes itself: a picture's patches are no samples",
                "leave dispatch_batches out",
            )
        accelerator.dispatch_batches = False  # its default for streams is True
        self.remove_unused_columns = False  # the collator wants pictures and conversations, which no model takes
        if self.activation_checkpointing:
            options = as_dict(self.activation_checkpointing_kwargs)
            if options.get("use_reentrant"):
                raise ConfigError(
                    "activation_checkpointing_kwargs={'use_reentrant': True}",
                    "non-reentrant checkpointing; the reentrant kind loses the attention's gradient silently",
                    "set use_reentrant to False",
                )
            # transformers keeps the old names as mirrors, which TRL still reads
            options["use_reentrant"] = False
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = options


def check_reports(names: Sequence[str]) -> None:
    """See that what a run reports to is known and installed, which transformers finds amid its work.

    Raises:
        ConfigError: an unknown name, or a package that is missing.
    """
    known, installed = sorted(INTEGRATION_TO_CALLBACK), {*get_available_reporting_integrations(), "azure_ml", "flyte"}
    for name in names:
        if name not in known:
            raise ConfigError(f"report_to: {name}", f"none, or some of {known}", "correct it")
        if name not in installed:
            package = name.replace("_", "-")
            raise ConfigError(
                f"report_to: {name}, which is not installed",
                f"the package {package}",
                f"pip install {package}, or set report_to: none",
            )


def as_dict(options: dict[str, Any] | str | None) -> dict[str, Any]:
    """TrainingArguments declares such fields as dict or string, and has parsed strings by now."""
    assert not isinstance(options, str)
    return dict(options or {})
