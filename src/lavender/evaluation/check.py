"""`lavender check`: can alignment help this model? Measures, before any tuning, what its words depend on.

Alignment moves attention to the place of a word. That can help if the model could predict the word from that place
alone, and does not. So the words of true answers are predicted three times: from the whole picture, from the patches
where the teacher's map shows the word, and from all other patches. Patches left out are replaced by the mean patch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from lavender.data.images import image_id
from lavender.data.samples import Samples, read_samples, readable
from lavender.data.store import MapStore
from lavender.errors import DataError, NotFiniteError, UnsupportedModelError
from lavender.evaluation.compare import left_out, readings_of, require_limit, spread
from lavender.maps import Word
from lavender.students.base import VlmAdapter
from lavender.students.image_keys import overlap_matrix
from lavender.students.loading import load_run
from lavender.students.locate import WordLocator
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, evaluating, processor_inputs, word_rows

SHOWS = 0.4
"""A patch shows a word if the teacher's map, averaged over the patch, has this share of its maximum over patches."""
KEPT = ("whole", "there", "elsewhere")
"""Which patches a word is predicted from: all, those that show it, the others."""


@dataclass(frozen=True, eq=False)
class _Case:
    """One mapped word of an answered picture, and the teacher's map of it, (rows, cols)."""

    picture: AnsweredPicture
    word: Word
    map: Tensor


def check_model(
    model_path: str | Path, data: Path, maps: Path, limit: int = 64, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Mean loss of mapped words, in nats per token, for each choice of patches.

    Args:
        model_path: a run folder, model folder or hub id.
        data: what `lavender.data.read_samples` reads.
        maps: map store with the teacher's maps of the answers.
        limit: number of samples to use, spread evenly over the data.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        Among others `loss` for each of `KEPT`, and:

        - `gain`: the loss from the whole picture minus that from the patches that show the word. Near zero, alignment
          can gain little.
        - `cost_without`: the loss from the other patches minus that from the whole picture. Near zero, this model does
          not store a thing in the patches where it is.

    Raises:
        NotFiniteError: a loss is NaN or infinite.
        DataError: no mapped word to ask for.
        ModelError: the model is missing or damaged.
    """
    require_limit(limit)
    store = MapStore.open(maps)
    read = read_samples(data).samples
    samples = readable(Samples(spread(read, limit))).samples
    model, processor = load_run(model_path, trust_remote_code=trust_remote_code)
    cases = _cases(readings_of(samples, store), store)
    dropped: Counter[str] = Counter()
    losses = word_losses(model, processor, cases, dropped)
    _check_losses(model_path, losses, dropped)
    means = {kept: losses[kept].mean().item() for kept in KEPT}
    gains = losses["whole"] - losses["there"]
    error = (gains.std() / len(gains) ** 0.5).item() if len(gains) > 1 else None
    return {
        "model": str(model_path),
        "samples": len(samples),
        "left_out": left_out(read),
        "words": len(gains),
        "dropped": dict(dropped),
        "loss": means,
        "gain": gains.mean().item(),
        "gain_standard_error": error,
        "cost_without": (losses["elsewhere"] - losses["whole"]).mean().item(),
    }


def _check_losses(model_path: str | Path, losses: Mapping[str, Tensor], dropped: Counter[str]) -> None:
    """Raise if there is no loss, or one that is not finite."""
    if not len(losses["whole"]):
        raise DataError(
            f"no mapped word that {model_path} could be asked for, {dict(dropped)} left out",
            "one at least",
            "see why they are left out, and check other data",
        )
    wrong = [kept for kept, values in losses.items() if not values.isfinite().all()]
    if wrong:
        raise NotFiniteError(
            f"NaN or infinity in the loss of {model_path} from the patches: {', '.join(wrong)}",
            "finite losses",
            "check the model's weights; one that was trained to NaN is of no use",
        )


def _cases(pictures: Sequence[AnsweredPicture], store: MapStore) -> list[_Case]:
    cases = []
    for picture in pictures:
        known = store.get(image_id(picture.image), picture.answer)
        if known is not None:
            cases += [_Case(picture, word, heat) for word, heat in zip(known.words, known.maps, strict=True)]
    if not cases:
        raise DataError(
            "no word with a map", "maps of this data's answers", "extract maps for this data set, or name its store"
        )
    return cases


@torch.inference_mode()
def word_losses(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    cases: Sequence[_Case],
    dropped: Counter[str],
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Negative log-likelihood of each case's word, in nats per token: for each of `KEPT`, (case,).

    Words that no row predicts are left out, and counted in `dropped`.

    Raises:
        UnsupportedModelError: a model with a resampler.
    """
    adapter = adapter_for(model.config)
    if adapter.resampler(model) is not None:
        raise UnsupportedModelError(
            f"a model of type {model.config.model_type!r}, whose language model sees a resampler's latents",
            "one that sees patches, which lie somewhere in the picture",
            "check another model",
        )
    locator = WordLocator(processor, adapter)
    losses: dict[str, list[Tensor]] = {kept: [] for kept in KEPT}
    with evaluating(model):
        for start in range(0, len(cases), batch_size):
            batch = cases[start : start + batch_size]
            for kept, batch_losses in _batch_losses(model, processor, adapter, locator, batch, dropped).items():
                losses[kept].append(batch_losses)
    return {kept: torch.cat(batches) for kept, batches in losses.items()}


def _batch_losses(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    adapter: VlmAdapter,
    locator: WordLocator,
    cases: Sequence[_Case],
    dropped: Counter[str],
) -> dict[str, Tensor]:
    pictures = [replace(case.picture, words=(case.word,)) for case in cases]
    inputs = processor_inputs(processor, pictures).to(model.device)
    located = word_rows(locator, pictures, inputs, [dropped] * len(pictures))
    rows = {index: words[0][1] for index, words in enumerate(located) if words}
    layout = adapter.image_boxes(inputs, [[picture.size] for picture in pictures], processor)
    shows = torch.stack([_shows(case.map, boxes) for case, boxes in zip(cases, layout.boxes, strict=True)])
    is_key = layout.pictures >= 0
    losses = {}
    for kept, mask in zip(KEPT, (None, shows[is_key], ~shows[is_key]), strict=True):
        logits = logits_keeping(model, adapter, inputs, mask)
        losses[kept] = _word_losses(logits, inputs, rows)
    return losses


def _word_losses(logits: Tensor, inputs: BatchFeature, rows: Mapping[int, tuple[int, ...]]) -> Tensor:
    """Mean negative log-likelihood of the tokens that each sample's `rows` predict: (sample with rows,), on the CPU."""
    losses = []
    for sample, positions in rows.items():
        tokens = inputs["input_ids"][sample, [position + 1 for position in positions]]
        losses.append(-logits[sample, list(positions)].log_softmax(dim=-1).gather(1, tokens[:, None]).mean())
    return torch.stack(losses).cpu() if losses else torch.zeros(0)


def _shows(heat: Tensor, boxes: Tensor) -> Tensor:
    """Which image keys show the word of a map (rows, cols): bool (key,)."""
    overlap = overlap_matrix(boxes.cpu(), (heat.shape[0], heat.shape[1]))
    means = overlap @ heat.flatten() / overlap.sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return means >= SHOWS * means.max()


def logits_keeping(
    model: PreTrainedModel, adapter: VlmAdapter, inputs: Mapping[str, Tensor], kept: Tensor | None
) -> Tensor:
    """Logits in float32, (sample, token, vocabulary), with some image keys replaced by the mean of all.

    The states are replaced where the decoder begins; with cross-attention, in the output of `image_states`.

    Args:
        model, adapter, inputs: the model, its family, and the processor's output.
        kept: bool (key,), the image keys of all samples in a row; False replaces a key. None replaces nothing.
    """
    if kept is None:
        return model(**inputs).logits.float()
    keys = adapter.image_keys(inputs)

    def replace_states(states: Tensor) -> Tensor:
        mask = kept.to(states.device).reshape(*states.shape[:-1], 1)
        return torch.where(mask, states, states.flatten(0, -2).mean(dim=0))

    def replace_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return replace_states(output)

    def replace_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        assert keys is not None
        return args, adapter.replace_image_states(kwargs, keys, replace_states)

    if keys is None:
        handle = adapter.image_states(model).register_forward_hook(replace_output)
    else:
        handle = model.get_decoder().register_forward_pre_hook(replace_input, with_kwargs=True)
    try:
        return model(**inputs).logits.float()
    finally:
        handle.remove()
