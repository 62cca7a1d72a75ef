"""The probe: measures on a few fixed samples, during training, whether the student looks where the teacher does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from trl import SFTTrainer

from lavender.alignment.examples import images_of
from lavender.alignment.objective import AlignmentRequest
from lavender.data.images import load_image
from lavender.drawing import downscaled, overlay_heat
from lavender.maps import map_agreement
from lavender.students.word_maps import evaluating, random_state_kept

HIGH_SHARE = 0.1
"""Share of a teacher's cells, the highest ones, in which `peak_hits` counts a hit."""
NUM_DRAWN = 4
_DRAWN_SIDE = 256  # pixels, of each of a drawing's three pictures


class OwnAttention(AlignmentRequest):
    """A request for the attention of the layers themselves, also where parallel projections are trained."""

    learned = False


class Seen(NamedTuple):
    """What a look at the samples gives.

    Attributes:
        student: attention of the student before any Aligner, (word, rows, cols).
        teacher: the teacher's maps, (word, rows, cols).
        losses: L_att of each word, (word,).
        map_shares: share of each word's attention on the picture that lies on its map, (word,).
    """

    student: Tensor
    teacher: Tensor
    losses: Tensor
    map_shares: Tensor


class Drawn(NamedTuple):
    """What is drawn of a sample: its first mapped word and that map's picture; and its number of mapped words."""

    word: str
    picture: Image.Image
    num_words: int


def peak_hits(student: Tensor, teacher: Tensor) -> float:
    """Share of words whose student map has its maximum in the tenth of the cells where the teacher's map is highest.

    Chance level is 0.1. Cells of equal height share their rank, so no map hits a constant one.

    Args:
        student, teacher: (word, rows, cols).
    """
    heights = teacher.flatten(1)
    at_peak = heights.gather(1, student.flatten(1).argmax(dim=1, keepdim=True))
    rank = (heights > at_peak).double().mean(dim=1) + (heights == at_peak).double().mean(dim=1) / 2
    return (rank < HIGH_SHARE).double().mean().item()


def choose(examples: Iterable[Any], collate: Callable[[list[Any]], Mapping[str, Any]], size: int) -> list[Any]:
    """The first `size` examples that have a mapped word."""
    return list(islice((example for example in examples if collate([example])["alignment"]["present"].any()), size))


def add_probe(
    trainer: Trainer, requests: Callable[[dict[str, Tensor]], list[AlignmentRequest]], examples: list[Any], every: int
) -> None:
    """Let a trainer measure these samples every `every` steps. Does nothing if a process has none.

    With FSDP or ZeRO a forward needs every process, so each gets as many samples as the process with the fewest.
    """
    sizes = trainer.accelerator.gather(torch.tensor([len(examples)], device=trainer.accelerator.device))
    size = int(cast(Tensor, sizes).min())
    if size:
        settings = {"use_cache": False} | ({"fused_lm_head": True} if isinstance(trainer, SFTTrainer) else {})
        trainer.add_callback(Probe(trainer, requests, examples[:size], every, settings))


class Probe(TrainerCallback):
    """Measures some samples before the first step, every `every` steps and after the last one.

    It logs four numbers:
    - `probe_map_agreement`, `probe_peak_hits` and `probe_attention_mass`, of the student's own attention: mean over
      heads and aligned layers, before any Aligner, and without the projections of "learn", which no export keeps.
    - `probe_attention_loss`, L_att as it is trained.

    Training is bit-identical with and without the probe: it runs in evaluation mode and restores the state of random
    numbers. Every process runs the forwards; the main process writes.

    Args:
        trainer: its model is measured, wrapped as it trains.
        requests: builds the requests from a batch's alignment tensors: one for the loss and, if its rows come from
            parallel projections, an `OwnAttention`.
        examples: samples of the data set, each with a mapped word.
        every: number of steps between two measurements.
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
        self._drawn = [self._first_word(example, collate([example])) for example in examples[:NUM_DRAWN]]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step == 0:  # a resumed run has measured already
            self.look()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.look()

    def look(self) -> None:
        """Run the samples through the current model, log the numbers and draw the maps."""
        trainer = self._trainer
        model = cast(torch.nn.Module, trainer.model_wrapped)
        should_log = trainer.control.should_log
        with random_state_kept(trainer.args.device), evaluating(model), torch.no_grad():
            parts = [self._see(model, batch) for batch in self._batches]
            seen = Seen(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
            numbers = {
                "probe_peak_hits": peak_hits(seen.student, seen.teacher),
                "probe_attention_mass": seen.map_shares.mean().item(),
                "probe_attention_loss": seen.losses.mean().item(),
            }
            agreement = map_agreement(seen.student, seen.teacher)
            if agreement is not None:
                numbers["probe_map_agreement"] = agreement
            trainer.log(numbers)  # in evaluation mode: in training mode TRL would reset its own metrics
        trainer.control.should_log = should_log  # `log` resets it, but the step's own numbers are still to be logged
        self._draw(seen)

    def _see(self, model: torch.nn.Module, batch: dict[str, Any]) -> Seen:
        inputs: dict[str, Any] = dict(self._trainer._prepare_inputs(batch))
        tensors = cast(dict[str, Tensor], inputs.pop("alignment"))
        requests = self._requests(tensors)
        for request in requests:
            model(**inputs, **self._settings, attention_request=request)
        own = requests[-1]
        maps = own.student_maps, tensors["targets"][tensors["present"]], requests[0].losses, own.map_shares
        return Seen(*(tensor.float().cpu() for tensor in maps))

    def _first_word(self, example: Mapping[str, Any], batch: Mapping[str, Any]) -> Drawn:
        alignment = batch["alignment"]
        picture = load_image(images_of(example)[int(alignment["word_pictures"][0, 0])], "a picture of the probe")
        return Drawn(alignment["words"][0][0], downscaled(picture, _DRAWN_SIDE), int(alignment["present"].sum()))

    def _draw(self, seen: Seen) -> None:
        """Write picture, teacher and student side by side to the trackers that take pictures."""
        writers = list(picture_writers(self._trainer))
        place, pictures = 0, {}
        for index, (word, picture, num_words) in enumerate(self._drawn if writers else ()):
            maps = seen.teacher[place], seen.student[place]
            pixels = [np.asarray(image) for image in (picture, *(overlay_heat(picture, heat) for heat in maps))]
            pictures[f"probe/{index} {word}: picture, teacher, student"] = np.concatenate(pixels, axis=1)
            place += num_words
        for write in writers:
            write(pictures, self._trainer.state.global_step)


def picture_writers(trainer: Trainer) -> Iterator[Callable[[dict[str, np.ndarray], int], None]]:
    """Functions that write pictures, uint8 (row, column, channel) by name, at a step: one per tracker that takes them.

    These are TensorBoard, W&B and Trackio, where `report_to` names them and this process reports.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
            yield partial(_to_tensorboard, callback.tb_writer)
        elif isinstance(callback, WandbCallback | TrackioCallback) and trainer.is_world_process_zero():
            yield partial(_to_run, callback._wandb if isinstance(callback, WandbCallback) else callback._trackio)


def _to_tensorboard(writer: Any, pictures: dict[str, np.ndarray], step: int) -> None:
    for name, pixels in pictures.items():
        writer.add_image(name, pixels, step, dataformats="HWC")


def _to_run(library: Any, pictures: dict[str, np.ndarray], step: int) -> None:
    """W&B and Trackio have the same calls; transformers logs the numbers with the same step."""
    library.log({name: library.Image(pixels) for name, pixels in pictures.items()} | {"train/global_step": step})
