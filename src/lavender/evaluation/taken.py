"""Which samples all models take: training leaves out the others, and a comparison has to do so too."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import ProcessorMixin

from lavender.data.samples import Samples
from lavender.errors import DataError, LavenderError
from lavender.evaluation.compare import readings_of
from lavender.maps import Dropped
from lavender.model_files import one_line
from lavender.students.base import VlmAdapter
from lavender.students.locate import WordLocator
from lavender.students.word_maps import processor_inputs


def taken(samples: Samples, readers: Iterable[tuple[VlmAdapter, ProcessorMixin]]) -> Samples:
    """The samples that every processor turns into inputs in which the answer is found; the others are in `dropped`.

    Args:
        samples: from `lavender.data.samples.readable`, with one picture each.
        readers: the adapter and the processor of each model.

    Raises:
        DataError: no sample is left.
    """
    locators = [(processor, WordLocator(processor, adapter)) for adapter, processor in readers]
    kept, dropped = [], []
    for index, sample in enumerate(samples):
        try:
            for processor, locator in locators:
                ((reading, _),) = readings_of([sample], None)
                inputs = processor_inputs(processor, [reading])
                locator.rows_to_end(
                    reading.messages(), reading.turn, inputs["input_ids"][0], inputs["attention_mask"][0]
                )
        except Exception as error:  # of processors, chat templates and tokenizers, which raise many types
            reason = error.got if isinstance(error, LavenderError) else one_line(error)
            dropped.append(Dropped(sample.name, f"the model does not take it: {reason}"))
        else:
            kept.append(index)
    if not kept:
        got = f"{len(samples)} samples, of which no model takes one; the first, {dropped[0].what}: {dropped[0].reason}"
        raise DataError(got, "a sample that the model takes", "repair what is named, or name other data")
    chosen = tuple(samples.samples[index] for index in kept)
    identities = tuple(samples.identities[index] for index in kept)
    return Samples(chosen, samples.dropped + tuple(dropped), samples.outside, identities)
