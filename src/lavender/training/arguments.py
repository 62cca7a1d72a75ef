"""The settings of alignment, as fields of a trainer's arguments and as options of a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast, get_args

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig

from lavender.alignment.augment import Augment
from lavender.config import (
    DEFAULTS,
    AlignerActivation,
    AlignerForm,
    AlignerKind,
    AlignerNorm,
    AlignmentConfig,
    AttentionLoss,
    Attributes,
    Match,
    ParallelInit,
    PartOfSpeech,
    Pooling,
    Rows,
    Texts,
    WordTokens,
    name_of_loss,
)
from lavender.errors import ConfigError
from lavender.type_checks import check_ranges, check_type

# AlignmentArguments uses attributes of TrainingArguments; at run time it is combined with a class that has them
_ArgumentsLike = TrainingArguments if TYPE_CHECKING else object


AUGMENT: dict[str, float] = {"augment_flip": 0, "augment_crop": 0.1, "augment_resize": 0.1}
"""Settings of augmentation and the smallest value of each."""
_DEFAULT_WEIGHTS = ", ".join(f"{weight:g} with the loss {loss}" for loss, (weight, _) in DEFAULTS.items())


class NumberOrWord(argparse.Action):
    """A command line option that takes a number or a word, such as `--align_weight 3` or `--align_weight estimated`.

    HfArgumentParser gives each option a single type, so it would refuse one of the two.
    """

    number: type[float] = float

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **(settings | {"type": self._parse}))

    def _parse(self, text: str) -> float | str:
        try:
            return self.number(text)
        except ValueError:
            return text

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        is_word = isinstance(values, list) and len(values) == 1 and isinstance(values[0], str)
        setattr(namespace, self.dest, values[0] if is_word else values)


class IndicesOrWord(NumberOrWord):
    """A command line option that takes indices or a word, such as `--layers 1 3` or `--layers middle`."""

    number = int


@dataclass
class AlignmentArguments(_ArgumentsLike):
    """The settings of alignment as fields of a `transformers.TrainingArguments`.

    List this class before the trainer's own arguments, as `LavenderConfig` does with TRL's `SFTConfig`. `TrlParser`
    and `HfArgumentParser` read every field from the command line: `--layers 1 3`, `--align_weight 3`.

    Examples:
        >>> from dataclasses import dataclass
        >>> from transformers import TrainingArguments
        >>> from lavender.training.arguments import AlignmentArguments
        >>> @dataclass
        ... class MyArguments(AlignmentArguments, TrainingArguments):
        ...     pass

    Attributes:
        maps: folder of the map store that `lavender extract` wrote. A trainer can also get the open store as `maps=`.
        probe_size: number of samples on which the probe measures attention during training (docs/training.md); 0
            switches the probe off. They are the first samples with a mapped word of the evaluation set, or of the
            training set where there is no evaluation set.
        probe_steps: number of steps between two measurements. The probe also measures before the first step and after
            the last one.
        augment_flip: probability of mirroring a training picture, with its maps, from 0 (off) to 1. A sample whose
            texts have "left" or "right" is never mirrored.
        augment_crop: smallest share of its height and width that a random crop of a training picture keeps, from 0.1
            to 1 (off). A word is not aligned if more than half of its place is cut off.
        augment_resize: smallest factor by which a training picture is scaled, from 0.1 to 1 (off).

    All other fields are those of `lavender.config.AlignmentConfig`, which documents them. Those that only reproduce
    the paper: `align_weight="estimated"`, `attention_loss="published-sum"`, `align_switches`.

    Raises:
        ConfigError: a setting is of another type, out of its range, or contradicts another.
    """

    maps: str | None = field(default=None, metadata={"help": "Folder of the map store that `lavender extract` wrote."})
    align_weight: float | str | None = field(
        default=None,
        metadata={
            "help": "λ, the weight of the alignment loss. 0 is plain fine-tuning; estimated is the paper's App. C. The "
            f"default is {_DEFAULT_WEIGHTS}, else 2.",
            "action": NumberOrWord,
        },
    )
    pooling: Pooling = field(
        default=AlignmentConfig.pooling,
        metadata={"help": "How attention of many layers and heads becomes one map per word."},
    )
    texts: Texts = field(
        default=AlignmentConfig.texts,
        metadata={"help": "Turns whose words are aligned: the assistant's (answers), the user's (questions), or all."},
    )
    match: Match = field(
        default=AlignmentConfig.match,
        metadata={
            "help": "Which mapped words count: all (label), those that the student predicts (exact), or also those of "
            "which it predicts another form (root)."
        },
    )
    rows: Rows = field(
        default=AlignmentConfig.rows,
        metadata={"help": "Rows of an answer's word to align: those that predict it, those that read it, or both."},
    )
    tokens: WordTokens = field(
        default=AlignmentConfig.tokens, metadata={"help": "Whether all tokens of a word have rows, or only the first."}
    )
    parts_of_speech: list[str] | None = field(
        default=None,
        metadata={"help": f"Parts of speech to align, of {', '.join(get_args(PartOfSpeech))}. All by default."},
    )
    attributes: Attributes = field(
        default=AlignmentConfig.attributes,
        metadata={"help": "The map of an adjective: its own, or that of the noun that it describes."},
    )
    subjects_and_objects: bool = field(
        default=False, metadata={"help": "Align only heads of noun phrases that no preposition governs."}
    )
    weight_by_confidence: bool = field(
        default=False, metadata={"help": "Weigh each word by the confidence of the teacher's map."}
    )
    attention_loss: AttentionLoss = field(
        default=AlignmentConfig.attention_loss,
        metadata={
            "help": "What L_att compares: the student's own attention (mass, kl), or its Aligner's map (published, the "
            "paper's). published-sum is Eq. 9 as written."
        },
    )
    sharpen: float | None = field(
        default=None,
        metadata={"help": "Power to which the maps are raised. The default is 2 with the losses mass and kl, else 1."},
    )
    subtract_background: bool = field(default=False, metadata={"help": "Subtract each map's median."})
    word_share: float = field(
        default=AlignmentConfig.word_share,
        metadata={"help": "Share of a text's mapped words to align: the most confident, from 0 to 1."},
    )
    attention_forcing: float = field(
        default=AlignmentConfig.attention_forcing,
        metadata={"help": "Probability, at the first step, that a word's rows attend as its map says. It falls to 0."},
    )
    forcing_share: float = field(
        default=AlignmentConfig.forcing_share,
        metadata={"help": "Share of the steps over which the probability of attention_forcing falls to 0."},
    )
    layers: list[int] | str | None = field(
        default=None,
        metadata={
            "help": "Decoder layers to align: indices, or all, first, middle or last. All by default.",
            "action": IndicesOrWord,
            "nargs": "+",
        },
    )
    layer_share: float = field(
        default=AlignmentConfig.layer_share,
        metadata={"help": "Share of the layers that first, middle and last select, from 0 to 1."},
    )
    heads: list[int] | None = field(
        default=None, metadata={"help": "Indices of the attention heads to align in each layer. All by default."}
    )
    parallel_init: ParallelInit = field(
        default=AlignmentConfig.parallel_init, metadata={"help": "How the projections of pooling learn start."}
    )
    aligner: AlignerForm = field(default=AlignmentConfig.aligner, metadata={"help": "Depth of the Aligner."})
    aligner_kind: AlignerKind = field(default=AlignmentConfig.aligner_kind, metadata={"help": "Layers of the Aligner."})
    aligner_norm: AlignerNorm = field(
        default=AlignmentConfig.aligner_norm, metadata={"help": "Normalisation in the Aligner."}
    )
    aligner_activation: AlignerActivation = field(
        default=AlignmentConfig.aligner_activation, metadata={"help": "Activation in the Aligner."}
    )
    aligner_width: int = field(
        default=AlignmentConfig.aligner_width, metadata={"help": "Number of hidden channels of the Aligner."}
    )
    align_warmup: float = field(
        default=AlignmentConfig.align_warmup,
        metadata={"help": "Share of the steps, at the start, in which λ rises from 0."},
    )
    align_decay: float = field(
        default=AlignmentConfig.align_decay, metadata={"help": "Share of the steps, at the end, in which λ falls to 0."}
    )
    align_switches: int = field(
        default=AlignmentConfig.align_switches,
        metadata={"help": "How many times alignment is switched off or on, in equal parts of the run (§9)."},
    )
    aligner_pretraining: float = field(
        default=AlignmentConfig.aligner_pretraining,
        metadata={"help": "Share of the steps, at the start, in which the VLM is frozen and the Aligner trains."},
    )
    min_coverage: float = field(
        default=AlignmentConfig.min_coverage, metadata={"help": "Smallest share of samples that must have maps."}
    )

    probe_size: int = field(
        default=8, metadata={"help": "Number of samples on which the probe measures attention; 0 for no probe."}
    )
    probe_steps: int = field(default=100, metadata={"help": "Number of steps between two measurements of the probe."})

    augment_flip: float = field(
        default=0.0, metadata={"help": "Probability of mirroring a training picture, with its maps."}
    )
    augment_crop: float = field(
        default=1.0,
        metadata={"help": "Smallest share of its sides that a random crop of a training picture keeps, with its maps."},
    )
    augment_resize: float = field(
        default=1.0, metadata={"help": "Smallest factor by which a training picture is scaled."}
    )

    def augment(self) -> Augment | None:
        """What augments the pictures of training; None if nothing does."""
        if (self.augment_flip, self.augment_crop, self.augment_resize) == (0, 1, 1):
            return None
        return Augment(self.augment_flip, self.augment_crop, self.augment_resize, self.seed)

    def alignment(self) -> AlignmentConfig:
        """The settings of alignment alone, checked."""
        return AlignmentConfig(**{setting.name: getattr(self, setting.name) for setting in fields(AlignmentConfig)})

    def __post_init__(self) -> None:
        self.attention_loss = name_of_loss(self.attention_loss)
        alignment = self.alignment()
        self.align_weight, self.sharpen = alignment.align_weight, alignment.sharpen
        for name, least in (("probe_size", 0), ("probe_steps", 1)):
            check_type(name, getattr(self, name), int)
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)!r}", f"a number from {least} on", f"change {name}")
        for name in AUGMENT:
            check_type(name, getattr(self, name), float)
        check_ranges(self, *((name, low, 1) for name, low in AUGMENT.items()))
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16/gpu" not in str(error):
                raise
            raise ConfigError(
                "bf16, which is the default, without a GPU that computes in it",
                "such a GPU, or float32",
                "set bf16: false and use_cpu: true, in a script bf16=False and use_cpu=True, to train on the CPU",
            ) from error
        check_reports(cast("list[str]", self.report_to))
        accelerator = cast(AcceleratorConfig, self.accelerator_config)
        if accelerator.dispatch_batches:
            raise ConfigError(
                "accelerator_config={'dispatch_batches': True}, which splits a batch along each tensor's first axis",
                "batches that each process makes itself: the first axis of pixels may be patches, not samples",
                "leave dispatch_batches out",
            )
        accelerator.dispatch_batches = False  # accelerate's default for streams is True
        self.remove_unused_columns = False  # the collator needs pictures and conversations
        if self.activation_checkpointing:
            options = as_dict(self.activation_checkpointing_kwargs)
            if options.get("use_reentrant"):
                raise ConfigError(
                    "activation_checkpointing_kwargs={'use_reentrant': True}",
                    "non-reentrant checkpointing; the reentrant kind loses the attention's gradient silently",
                    "set use_reentrant to False",
                )
            # transformers keeps copies under the old names, which TRL still reads
            options["use_reentrant"] = False
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = options


def check_reports(names: Sequence[str]) -> None:
    """Check that the trackers of `report_to` are known and installed, before transformers needs them.

    Raises:
        ConfigError: an unknown name, or a missing package.
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
    """The options as a dict. TrainingArguments declares such fields as dict or str, and has parsed strings already."""
    assert not isinstance(options, str)
    return dict(options or {})
