"""What a model's words depend on: their loss from parts of a picture, and what the model is given at these parts.

Image keys that are left out are replaced by the mean key. Keys are what the text model sees of a picture: patches, or
the latents of a resampler. A latent shows what it attends to.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from lavender.alignment.losses import LEAST, prepared, share_on_map
from lavender.maps import Word
from lavender.students.base import VlmAdapter
from lavender.students.capture import AttentionRequest, capturing, row_tensors
from lavender.students.image_keys import KeyLayout, on_keys, to_grid, word_attention
from lavender.students.locate import WordLocator
from lavender.students.logits import logits_at
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, evaluating, processor_inputs, word_rows

SHOWS = 0.4
"""A key shows a word if the map's mean over the key's part of the picture is this share of the largest key's."""
VIEWS: dict[str, tuple[int, bool]] = {
    "there": (0, True),
    "elsewhere": (0, False),
    "candidates": (1, True),
    "control": (2, True),
}
"""What a word is predicted from, besides all keys: (index of the map in `Case.maps`, whether the keys that show it are
kept or left out)."""
FEATURES = ("there", "control", "whole")
"""The keys whose mean state is read."""


@dataclass(frozen=True, eq=False)
class Case:
    """A mapped word of an answered picture.

    Attributes:
        picture: the picture, its question and its answer.
        index: number of the picture, which words of one picture share.
        word: the word, in the answer.
        maps: (map, rows, cols). The first is the word's own, the second that of all places among which the word's row
            has to choose, the third, as a control, that of a word of another picture.
    """

    picture: AnsweredPicture
    index: int
    word: Word
    maps: Tensor

    @property
    def label(self) -> str:
        """What the word counts as: its dictionary form, lower case."""
        return (self.word.lemma or self.word.text).casefold()


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of some cases.

    Attributes:
        cases: those that were measured, in their order.
        losses: for "whole" and each view, −ln p of the word, in nats: (case,).
        features: for each of `FEATURES`, the mean state of the keys: (case, width).
        level, chance: the share of the model's attention that lies on the word's map, and on the control's: (case,).
        area: the share of the keys that show the word, (case,).
    """

    cases: list[Case]
    losses: dict[str, Tensor]
    features: dict[str, Tensor]
    level: Tensor
    chance: Tensor
    area: Tensor


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    cases: Sequence[Case],
    dropped: Counter[str],
    views: Mapping[str, tuple[int, bool]] = VIEWS,
    batch_size: int = 16,
) -> Measured | None:
    """Predict each case's word from parts of its picture. None if no row predicts any of them.

    Args:
        model, processor: the model and its processor.
        cases: words with their maps, all on one grid.
        dropped: counter of the reasons why words are left out. It is updated.
        views: what to predict the words from; see `VIEWS`.
        batch_size: words per forward.
    """
    adapter = adapter_for(model.config)
    locator = WordLocator(processor, adapter)
    batches = []
    with evaluating(model), capturing(model):
        for start in tqdm(range(0, len(cases), batch_size), desc="words", unit="batch", leave=False, disable=None):
            batch = list(cases[start : start + batch_size])
            measured = _measure_batch(model, processor, adapter, locator, batch, dropped, views)
            batches += [measured] if measured is not None else []
    return _joined(batches) if batches else None


def _measure_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    adapter: VlmAdapter,
    locator: WordLocator,
    cases: list[Case],
    dropped: Counter[str],
    views: Mapping[str, tuple[int, bool]],
) -> Measured | None:
    pictures = [replace(case.picture, words=(case.word,)) for case in cases]
    inputs = processor_inputs(processor, pictures).to(model.device, model.dtype)
    located = word_rows(locator, pictures, inputs, [dropped] * len(pictures))
    if any(not words for words in located):
        kept = [case for case, words in zip(cases, located, strict=True) if words]
        return _measure_batch(model, processor, adapter, locator, kept, Counter(), views) if kept else None
    rows = [words[0][1] for words in located]
    request, needed = _request(adapter, inputs, rows, model.device), sorted({row for word in rows for row in word})
    states: list[Tensor] = []
    with replaced_states(model, adapter, inputs, lambda given: states.append(given) or given):
        logits = logits_at(model, inputs, needed, attention_request=request)
    tensors = adapter.key_tensors(inputs, [[picture.size] for picture in pictures], processor)
    layout = KeyLayout(tensors["boxes"], tensors["pictures"], tensors.get("views"))
    maps = torch.stack([case.maps for case in cases])
    shows = keys_that_show(maps, layout, request.mixing)
    is_key = (layout.pictures >= 0).to(shows.device)
    losses = {"whole": _word_losses(logits, inputs, rows, needed)}
    for view, (index, keeps) in views.items():
        mask = shows[:, index] == keeps
        logits = logits_keeping(model, adapter, inputs, mask[is_key], needed)
        losses[view] = _word_losses(logits, inputs, rows, needed)
    level, chance = _levels(request, rows, layout, maps)
    masks = {"there": shows[:, 0] & is_key, "control": shows[:, 2] & is_key, "whole": is_key}
    features = {name: _mean_states(states[0], mask, is_key) for name, mask in masks.items()}
    area = (shows[:, 0] & is_key).sum(dim=1) / is_key.sum(dim=1)
    return Measured(cases, losses, features, level, chance, area.cpu())


def _request(
    adapter: VlmAdapter, inputs: Mapping[str, Tensor], rows: Sequence[tuple[int, ...]], device: torch.device
) -> AttentionRequest:
    positions = row_tensors([[word] for word in rows])["rows"].to(device)
    return AttentionRequest(positions, adapter.usable_layers(), adapter.image_keys(inputs))


def _levels(
    request: AttentionRequest, rows: Sequence[tuple[int, ...]], layout: KeyLayout, maps: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of each word's attention that lies on its map, and on the other picture's map: (case,) each."""
    stacked = request.stacked()
    shares = row_tensors([[word] for word in rows])["shares"].to(stacked)
    first = torch.zeros(len(rows), 1, dtype=torch.long)
    grid = (maps.shape[-2], maps.shape[-1])
    on_grid = to_grid(word_attention(stacked, shares), layout, first, grid, request.mixing)
    attention = on_grid.mean(dim=(0, 2))[:, 0].flatten(-2).float().cpu()
    heat = prepared(maps).flatten(-2)
    return share_on_map(attention, heat[:, 0]), share_on_map(attention, heat[:, 2])


def keys_that_show(maps: Tensor, layout: KeyLayout, mixing: Tensor | None = None) -> Tensor:
    """Which image keys show the words of maps: bool (case, map, key).

    Args:
        maps: (case, map, rows, cols) of samples of one picture each.
        layout, mixing: as for `lavender.students.image_keys.on_keys`.
    """
    maps = torch.cat([maps, torch.ones_like(maps[:, :1])], dim=1).to(layout.boxes if mixing is None else mixing)
    heat = on_keys(maps, layout, torch.zeros(maps.shape[:2], dtype=torch.long), mixing)
    heat = heat[:, :-1] / heat[:, -1:].clamp_min(LEAST)  # mean over the part of a key that is inside the picture
    return (heat >= SHOWS * heat.amax(dim=-1, keepdim=True)) & (heat > 0)


def _mean_states(states: Tensor, mask: Tensor, is_key: Tensor) -> Tensor:
    """The mean state of the chosen keys of each case, (case, width), on the CPU; those of all where none is chosen."""
    mask = torch.where(mask.any(dim=1, keepdim=True), mask, is_key)
    states = states.flatten(0, -2).float()
    counts = is_key.sum(dim=1).tolist()
    parts = zip(states.split(counts), mask[is_key].to(states.device).split(counts), strict=True)
    return torch.stack([own[chosen].mean(dim=0) for own, chosen in parts]).cpu()


def _word_losses(
    logits: Tensor, inputs: BatchFeature, rows: Sequence[tuple[int, ...]], computed: Sequence[int]
) -> Tensor:
    """−ln p of the tokens that each sample's rows predict, summed over them: (sample,), on the CPU.

    `computed` are the rows of `logits`.
    """
    losses, place_of = [], {row: place for place, row in enumerate(computed)}
    for sample, positions in enumerate(rows):
        tokens = inputs["input_ids"][sample, [position + 1 for position in positions]]
        own = logits[sample, [place_of[position] for position in positions]]
        losses.append(-own.log_softmax(dim=-1).gather(1, tokens[:, None]).sum())
    return torch.stack(losses).cpu()


def _joined(batches: Sequence[Measured]) -> Measured:
    def joined(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([tensors[name] for tensors in dicts]) for name in dicts[0]}

    return Measured(
        [case for batch in batches for case in batch.cases],
        joined([batch.losses for batch in batches]),
        joined([batch.features for batch in batches]),
        *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("level", "chance", "area")),
    )


def logits_keeping(
    model: PreTrainedModel,
    adapter: VlmAdapter,
    inputs: Mapping[str, Tensor],
    kept: Tensor | None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Logits in float32, (sample, row, vocabulary), with some image keys replaced by the mean of all.

    Args:
        model, adapter, inputs: the model, its family, and the processor's output for samples of one picture each.
        kept: bool (key,), the image keys of all samples in a row; False replaces a key. None replaces nothing.
        rows: the positions whose logits to return; None for all.
    """
    rows = range(inputs["input_ids"].shape[1]) if rows is None else rows
    if kept is None:
        return logits_at(model, inputs, rows)

    def keep(states: Tensor) -> Tensor:
        mask = kept.to(states.device).reshape(*states.shape[:-1], 1)
        return torch.where(mask, states, states.flatten(0, -2).mean(dim=0))

    with replaced_states(model, adapter, inputs, keep):
        return logits_at(model, inputs, rows)


@contextlib.contextmanager
def replaced_states(
    model: PreTrainedModel,
    adapter: VlmAdapter,
    inputs: Mapping[str, Tensor],
    replace_states: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """Inside the context the text model sees other states at the image keys.

    They are replaced in the output of the resampler if there is one, with cross-attention in that of `image_states`,
    else where the decoder begins.

    Args:
        model, adapter, inputs: the model, its family, and the processor's output.
        replace_states: maps the states of all image keys, (…, width), sample by sample, to the new ones.
    """
    keys, resampler = adapter.image_keys(inputs), adapter.resampler(model)

    def replace_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return replace_states(output)

    def replace_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        assert keys is not None
        return args, adapter.replace_image_states(kwargs, keys, replace_states)

    if resampler is not None:
        handle = resampler.register_forward_hook(replace_output)
    elif keys is None:
        handle = adapter.image_states(model).register_forward_hook(replace_output)
    else:
        handle = model.get_decoder().register_forward_pre_hook(replace_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
