"""Before the first step: which samples the model refuses, and whether enough of the others have maps.

All samples of a data set are looked at, each process at its share, so that none ends a run at a late step; samples of a
stream are looked at as they come (`AlignmentCollator.drops`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from lavender.alignment.collator import AlignmentCollator, Coverage
from lavender.alignment.examples import UNREADABLE, SampleError
from lavender.errors import ConfigError, DataError
from lavender.training.arguments import AlignmentArguments

NUM_READ = 256
"""How many samples are read as training will read them."""
NUM_NAMED = 10
_MANY = 5000  # samples, from which on a bar shows how far the look at them has come


class Refused(NamedTuple):
    """A sample that is left out: its index in the data set, one of `REFUSALS` as the reason, and what was found."""

    index: int
    reason: str
    found: str


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning."""
    return isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset))


def refused_of(
    dataset: Any, collator: AlignmentCollator, accelerator: Accelerator, with_bar: bool = False
) -> list[Refused]:
    """The samples of a data set that the model refuses, in order; the same on every process, and every one must call.

    For each sample the chat template is rendered and its pictures' headers are read. In full, with its pixels, only
    those are tried whose length is near `max_length`.

    Raises:
        DataError: no sample is left; or the data set as a whole is of another kind.
    """
    places = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    plain, own, failure = _undecoded(dataset), [], None
    show = with_bar and accelerator.is_main_process and len(places) >= _MANY
    try:
        for index in tqdm(places, desc="checking samples", disable=not show, leave=False):
            fault = _fault(plain, dataset, index, collator)
            if fault is not None:
                own.append(Refused(index, fault.reason, fault.got))
    except Exception as error:  # told to the others first, who would wait for ever
        failure = error
    shares = [(own, failure)]
    if accelerator.num_processes > 1:
        shares = gather_object(shares)
    for _, one in shares:
        if one is not None:
            raise one
    refused = sorted(one for own, _ in shares for one in own)
    if refused and len(refused) == len(dataset):
        raise DataError(
            f"{len(refused)} samples, of which the model takes none; the first, {refused[0].index}: {refused[0].found}",
            "samples that the model takes",
            "repair what is named, or choose a model whose template and processor fit the data",
        )
    return refused


def without(dataset: Any, refused: list[Refused]) -> Any:
    """The data set without these samples; the very same where there are none."""
    if not refused:
        return dataset
    gone = {one.index for one in refused}
    kept = [index for index in range(len(dataset)) if index not in gone]
    return dataset.select(kept) if isinstance(dataset, datasets.Dataset) else Subset(dataset, kept)


def told(refused: list[Refused], num_samples: int) -> list[str]:
    """Lines for a person: how many samples were left out for what, and the first of them."""
    if not refused:
        return []
    reasons = Counter(one.reason for one in refused)
    lines = [f"left out {len(refused)} of {num_samples} samples that the model refuses:"]
    lines += [f"  {count} × {reason}" for reason, count in reasons.most_common()]
    lines += [f"  sample {one.index}: {one.found}" for one in refused[:NUM_NAMED]]
    return lines + ([f"  and {len(refused) - NUM_NAMED} more"] if len(refused) > NUM_NAMED else [])


def counts_of(refused: list[Refused]) -> Tensor:
    """As a batch's `counts`: each of them once."""
    return Coverage(len(refused), dropped=Counter(one.reason for one in refused)).counts()


def check_coverage(dataset: Any, collator: AlignmentCollator, least: float) -> None:
    """Read some samples as training will, of a stream the first, and stop if too few have maps."""
    found, faults = torch.zeros_like(Coverage().counts()), []
    step = 1 if is_stream(dataset) else max(1, len(dataset) // NUM_READ)
    for example in taken(_first(dataset, step), collator):
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


def first_of(dataset: Any, collator: AlignmentCollator) -> Iterator[Any]:
    """The first samples of a data set that the model takes. A stream begins anew for whoever reads it next."""
    return taken(islice(_first(dataset, 1), NUM_READ), collator)


def taken(examples: Iterable[Any], collator: AlignmentCollator) -> Iterator[Any]:
    """Those that the model takes, of a stream's; of other data sets all are, since `without`."""
    return (one for one in examples if not collator.drops or collator.fault_of(one) is None)


def _first(dataset: Any, step: int) -> Iterable[Any]:
    """Samples from all over a data set, every `step`-th, or the first of a stream."""
    if is_stream(dataset):
        return islice(dataset, NUM_READ)
    return (dataset[index] for index in range(0, len(dataset), step))


def _fault(plain: Any, dataset: Any, index: int, collator: AlignmentCollator) -> SampleError | None:
    try:
        example = plain[index]
    except Exception as error:  # a data set's own code, and the decoders in it
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
        pictures = {name: own[0] for name, own in self._pictures[index].to_pydict().items()}
        return dict(self._rest[index]) | pictures


def _undecoded(dataset: Any) -> Any:
    """The same samples without decoding their pictures, where that can be had."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] is not None:
        return dataset
    columns = [
        name
        for name, feature in dataset.features.items()
        if isinstance(getattr(feature, "feature", feature), datasets.Image)
    ]
    return _Undecoded(dataset, columns) if columns else dataset


def refuse_in_plain_trainer(args: AlignmentArguments, collator: Any) -> None:
    """What SFTTrainer looks after itself."""
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
            "set match='label' or 'root', or liger_kernel_config={'fused_linear_cross_entropy': False}",
        )
