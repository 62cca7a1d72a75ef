"""Checks before the first step: which samples the model refuses, and whether enough of the others have maps.

Every sample of a data set is checked, a share of them on each process, so that no sample ends the run at a late step.
Samples of a stream are checked as they arrive (`AlignmentCollator.drops`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from lavender.alignment.collator import AlignmentCollator
from lavender.alignment.coverage import Coverage
from lavender.alignment.examples import CUT, UNREADABLE, SampleError
from lavender.errors import ConfigError, DataError
from lavender.training.arguments import AlignmentArguments

NUM_READ = 256
"""Number of samples that are read in full, as training reads them, to measure coverage."""
NUM_NAMED = 10
_MANY = 5000  # samples; a longer check shows a progress bar


class Refused(NamedTuple):
    """A sample that is left out.

    Attributes:
        index: its index in the data set.
        reason: one of `lavender.alignment.examples.REFUSALS`.
        found: what is wrong with the sample, in words.
    """

    index: int
    reason: str
    found: str


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning: an IterableDataset of datasets or torch."""
    return isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset))


def leave_out_refused(
    dataset: Any, collator: AlignmentCollator, accelerator: Accelerator, with_bar: bool = False
) -> tuple[Any, list[Refused]]:
    """(data set without the samples that the model refuses, these samples). The main process prints a summary.

    Of a stream nothing is read: the collator is told to drop such samples as they arrive.
    """
    if dataset is None or is_stream(dataset):
        collator.drops |= dataset is not None
        return dataset, []
    refused = refused_of(dataset, collator, accelerator, with_bar)
    if accelerator.is_main_process:
        for line in summary(refused, len(dataset)):
            print(line)
    return without(dataset, refused), refused


def refused_of(
    dataset: Any, collator: AlignmentCollator, accelerator: Accelerator | PartialState, with_bar: bool = False
) -> list[Refused]:
    """The samples of a data set that the model refuses, in order. Every process must call this; all get the same list.

    Of each sample the chat template is rendered and the pictures' headers are read. Only samples whose length is close
    to `max_length` are processed in full, with their pixels.

    Raises:
        DataError: the model refuses every sample; or the data set as a whole cannot be used.
    """
    places = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    plain, refused_here, failure = _undecoded(dataset), [], None
    show = with_bar and accelerator.is_main_process and len(places) >= _MANY
    try:
        for index in tqdm(places, desc="checking samples", disable=not show, leave=False):
            fault = _fault(plain, dataset, index, collator)
            if fault is not None:
                refused_here.append(Refused(index, fault.reason, fault.got))
    except Exception as error:  # raised after the gather below: the other processes would deadlock in it
        failure = error
    shares = [(refused_here, failure)]
    if accelerator.num_processes > 1:
        shares = gather_object(shares)
    for _, error in shares:
        if error is not None:
            raise error
    refused = sorted(sample for refused_there, _ in shares for sample in refused_there)
    if refused and len(refused) == len(dataset):
        raise DataError(
            f"{len(refused)} samples, of which the model takes none; the first, {refused[0].index}: {refused[0].found}",
            "samples that the model takes",
            "set max_length=None, or raise it"
            if refused[0].reason == CUT
            else "repair what is named, or choose a model whose template and processor fit the data",
        )
    return refused


def without(dataset: Any, refused: list[Refused]) -> Any:
    """The data set without these samples; the same object if there are none."""
    if not refused:
        return dataset
    gone = {sample.index for sample in refused}
    kept = [index for index in range(len(dataset)) if index not in gone]
    return dataset.select(kept) if isinstance(dataset, datasets.Dataset) else Subset(dataset, kept)


def summary(refused: list[Refused], num_samples: int) -> list[str]:
    """Lines to print: how many samples were left out, for which reasons, and the first of them."""
    if not refused:
        return []
    reasons = Counter(sample.reason for sample in refused)
    lines = [f"left out {len(refused)} of {num_samples} samples that the model refuses:"]
    lines += [f"  {count} × {reason}" for reason, count in reasons.most_common()]
    lines += [f"  sample {sample.index}: {sample.found}" for sample in refused[:NUM_NAMED]]
    return lines + ([f"  and {len(refused) - NUM_NAMED} more"] if len(refused) > NUM_NAMED else [])


def counts_of(refused: list[Refused]) -> Tensor:
    """These samples as a batch's `counts` (`Coverage.counts`)."""
    return Coverage(len(refused), dropped=Counter(sample.reason for sample in refused)).counts()


def check_coverage(dataset: Any, collator: AlignmentCollator, least: float) -> Coverage:
    """Read some samples in full, the first ones of a stream, and stop if too few have maps.

    Returns:
        The coverage of these samples.

    Raises:
        DataError: a smaller share than `least` of those with a picture has maps.
    """
    found, faults = torch.zeros_like(Coverage().counts()), []
    step = 1 if is_stream(dataset) else max(1, len(dataset) // NUM_READ)
    for example in accepted(_first(dataset, step), collator):
        alignment = collator([example])["alignment"]
        found += alignment["counts"]
        faults += alignment["faults"]
    coverage = Coverage.of(found)
    if coverage.share < least:
        first = f"; the first, {faults[0]}" if faults else ""
        raise DataError(
            f"maps for {coverage.mapped_samples} of {coverage.samples} samples ({dict(coverage.dropped)}{first})",
            f"at least a share of {least}",
            "extract maps for this data set (pictures and answers must be the same), or lower min_coverage",
        )
    return coverage


def first_accepted(dataset: Any, collator: AlignmentCollator) -> Iterator[Any]:
    """The first samples of a data set that the model takes. Reading a stream here does not advance it for others."""
    return accepted(islice(_first(dataset, 1), NUM_READ), collator)


def accepted(examples: Iterable[Any], collator: AlignmentCollator) -> Iterator[Any]:
    """The examples that the model takes. Only those of a stream are checked: others were left out before."""
    return (example for example in examples if not collator.drops or collator.fault_of(example) is None)


def _first(dataset: Any, step: int) -> Iterable[Any]:
    """Every `step`-th sample of a data set, or the first samples of a stream."""
    if is_stream(dataset):
        return islice(dataset, NUM_READ)
    return (dataset[index] for index in range(0, len(dataset), step))


def _fault(plain: Any, dataset: Any, index: int, collator: AlignmentCollator) -> SampleError | None:
    try:
        example = plain[index]
    except Exception as error:  # the data set's own code and its decoders may raise anything
        got = f"a sample that the data set cannot give: {error}"
        return SampleError(got, "a sample", "repair it", reason=UNREADABLE)
    try:
        collator.screen.check(example)
        is_long = collator.screen.is_long(example)
    except SampleError as error:
        return error
    return collator.fault_of(dataset[index]) if is_long else None


class _Undecoded:
    """A data set's samples with their pictures still encoded, as `datasets` stores them."""

    def __init__(self, dataset: datasets.Dataset, columns: list[str]):
        self._rest = dataset.remove_columns(columns)
        self._pictures = dataset.select_columns(columns).with_format("arrow")

    def __getitem__(self, index: int) -> dict[str, Any]:
        pictures = {name: values[0] for name, values in self._pictures[index].to_pydict().items()}
        return dict(self._rest[index]) | pictures


def _undecoded(dataset: Any) -> Any:
    """The same samples without decoding their pictures, where the data set can give them so."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] is not None:
        return dataset
    columns = [
        name
        for name, feature in dataset.features.items()
        if isinstance(getattr(feature, "feature", feature), datasets.Image)
    ]
    return _Undecoded(dataset, columns) if columns else dataset


def refuse_in_plain_trainer(args: AlignmentArguments, collator: Any) -> None:
    """Raise ConfigError for what only SFTTrainer brings or handles: the collator, Liger without logits."""
    if collator is None:
        raise ConfigError(
            "no data_collator",
            "one that makes a batch of plain fine-tuning from `messages` and `images`",
            "pass data_collator=..., such as TRL's DataCollatorForVisionLanguageModeling(processor)",
        )
    liger = args.liger_kernel_config or {}
    if args.use_liger_kernel and liger.get("fused_linear_cross_entropy", True) and args.match == "exact":
        raise ConfigError(
            "match='exact' with Liger's fused cross-entropy, which makes no logits while training",
            "the model's predictions",
            "set match='label' or 'root', or liger_kernel_config={'fused_linear_cross_entropy': False}; or use "
            "LavenderTrainer, which needs no logits: TRL's own fused head says which tokens are the first choice",
        )
