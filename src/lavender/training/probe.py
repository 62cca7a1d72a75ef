"""A few fixed samples, looked at again and again while training: does the student look where the teacher does?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from lavender.alignment.collator import word_text
from lavender.alignment.examples import images_of
from lavender.alignment.objective import AlignmentRequest
from lavender.data.images import load_image
from lavender.drawing import downscaled, overlay_heat
from lavender.maps import map_agreement
from lavender.students.word_maps import evaluating, random_state_kept

HIGH_SHARE = 0.1
"""The share of a teacher's map that `peak_hits` calls high."""
NUM_DRAWN = 4
_DRAWN_SIDE = 256  # pixels, of each of a drawing's three pictures


class OwnAttention(AlignmentRequest):
    """Of the layers themselves, also where parallel projections answer while training."""

    learned = False


class Seen(NamedTuple):
    """Maps of some words, (word, rows, cols): the student's before any Aligner, the teacher's; and L_att, (word,)."""

    student: Tensor
    teacher: Tensor
    losses: Tensor


class Drawn(NamedTuple):
    """A sample's first mapped word, the picture that its map is of, and how many mapped words the sample has."""

    word: str
    picture: Image.Image
    num_words: int


def peak_hits(student: Tensor, teacher: Tensor) -> float:
    """Share of words whose student map is highest in the tenth of the cells where the teacher's is: 0.1 by chance.

    Maps are (word, rows, cols). Cells of equal height share their rank, so that nothing hits a flat map.
    """
    heights = teacher.flatten(1)
    at_peak = heights.gather(1, student.flatten(1).argmax(dim=1, keepdim=True))
    rank = (heights > at_peak).double().mean(dim=1) + (heights == at_peak).double().mean(dim=1) / 2
    return (rank < HIGH_SHARE).double().mean().item()


def choose(examples: Iterable[Any], collate: Callable[[list[Any]], Mapping[str, Any]], size: int) -> list[Any]:
    """The first `size` examples that have a mapped word."""
    return list(islice((one for one in examples if collate([one])["alignment"]["present"].any()), size))


class Probe(TrainerCallback):
    """Looks at the samples before the first step, every `every` steps and after the last.

    It logs `probe_map_agreement` and `probe_peak_hits`, of where the student itself looks (mean over heads and aligned
    layers, before any Aligner, and never through the projections of "learn", which no export keeps), and
    `probe_attention_loss`, L_att as it is trained. Training is the same to the bit with and without it: it runs in
    evaluation mode and puts back the state of random numbers. Every process runs the forwards, the main one writes.

    Args:
        trainer: whose model is looked at, wrapped as it trains.
        requests: makes of a batch's tensors the request of its alignment and, if its rows come from parallel
            projections, an `OwnAttention`.
        examples: of the data set, each with a mapped word.
        every: steps.
        settings: keyword arguments of every forward.
    """

    def __init__(
        self,
        trainer: Trainer,
        requests: Callable[[dict[str, Tensor]], list[AlignmentRequest]],
        examples: list[Any],
        every: int,
        settings: Mapping[str, Any],
    ):
        self._trainer, self._requests, self._every, self._settings = trainer, requests, every, settings
        step = trainer.args.per_device_eval_batch_size
        collate = cast(Callable[[list[Any]], dict[str, Any]], trainer.data_collator)
        self._batches = [collate(examples[start : start + step]) for start in range(0, len(examples), step)]
        self._drawn = [self._first_word(one, collate([one])) for one in examples[:NUM_DRAWN]]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step == 0:  # a resumed run has looked already
            self.look()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.look()

    def look(self) -> None:
        """Run the samples through the model as it is, log the numbers and draw."""
        trainer = self._trainer
        model = cast(torch.nn.Module, trainer.model_wrapped)
        should_log = trainer.control.should_log
        with random_state_kept(trainer.args.device), evaluating(model), torch.no_grad():
            parts = [self._see(model, batch) for batch in self._batches]
            seen = Seen(*(torch.cat(one) for one in zip(*parts, strict=True)))
            numbers = {
                "probe_peak_hits": peak_hits(seen.student, seen.teacher),
                "probe_attention_loss": seen.losses.mean().item(),
            }
            agreement = map_agreement(seen.student, seen.teacher)
            if agreement is not None:
                numbers["probe_map_agreement"] = agreement
            trainer.log(numbers)  # in evaluation mode, or TRL would empty its own numbers of training
        trainer.control.should_log = should_log  # `log` takes it that the step's own numbers are done with
        self._draw(seen)

    def _see(self, model: torch.nn.Module, batch: dict[str, Any]) -> Seen:
        inputs: dict[str, Any] = dict(self._trainer._prepare_inputs(batch))
        tensors = cast(dict[str, Tensor], inputs.pop("alignment"))
        requests = self._requests(tensors)
        for request in requests:
            model(**inputs, **self._settings, attention_request=request)
        maps = requests[-1].student_maps, tensors["targets"][tensors["present"]], requests[0].losses
        return Seen(*(one.float().cpu() for one in maps))

    def _first_word(self, example: Mapping[str, Any], batch: Mapping[str, Any]) -> Drawn:
        alignment = {name: batch["alignment"][name][0] for name in ("rows", "shares", "word_pictures")}
        processor = cast(ProcessorMixin, self._trainer.processing_class)
        word = word_text(processor.tokenizer, batch["input_ids"][0], alignment, 0)
        picture = load_image(images_of(example)[int(alignment["word_pictures"][0])], "a picture of the probe")
        return Drawn(word, downscaled(picture, _DRAWN_SIDE), int(batch["alignment"]["present"].sum()))

    def _draw(self, seen: Seen) -> None:
        """Picture, teacher and student side by side, for those who watch in TensorBoard."""
        callbacks = self._trainer.callback_handler.callbacks
        writers = [one.tb_writer for one in callbacks if isinstance(one, TensorBoardCallback) and one.tb_writer]
        place = 0
        for index, (word, picture, num_words) in enumerate(self._drawn if writers else ()):
            maps = seen.teacher[place], seen.student[place]
            pixels = [np.asarray(one) for one in (picture, *(overlay_heat(picture, one) for one in maps))]
            for writer in writers:
                writer.add_image(
                    f"probe/{index} {word}: picture, teacher, student",
                    np.concatenate(pixels, axis=1),
                    self._trainer.state.global_step,
                    dataformats="HWC",
                )
            place += num_words
