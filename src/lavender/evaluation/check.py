"""`lavender check`: can alignment help this model? What its words need is measured before any tuning.

Alignment pulls attention to where a word's thing is. That can help where the model could say the word if it
looked there alone, and does not. So the words of true answers are predicted three times: from the whole picture, from
the patches where the teacher sees the word, and from all others; the rest is replaced by the mean patch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

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
from lavender.students.word_maps import Reading, evaluating

SHOWS = 0.4  # a patch shows a word where the teacher's map has this share of its maximum
KEPT = ("whole", "there", "elsewhere")


@dataclass(frozen=True, eq=False)
class _Case:
    """One mapped word of one reading, the rows that predict it, and the teacher's map (rows, cols)."""

    reading: Reading
    word: Word
    map: Tensor


def check_model(
    model_path: str | Path, data: Path, maps: Path, limit: int = 64, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Mean loss of mapped words, nats a token, from each choice of patches, and what it means.

    `gain`: what an oracle of place would save, the loss from the whole picture less that from the patches `there`.
    `cost_without`: what taking those patches away costs. A gain near zero says that alignment has little to give; a
    cost near zero that this model does not store things where they are.

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
    _refuse_no_verdict(model_path, losses, dropped)
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


def _refuse_no_verdict(model_path: str | Path, losses: Mapping[str, Tensor], dropped: Counter[str]) -> None:
    """A verdict needs losses, and finite ones."""
    if not len(losses["whole"]):
        raise DataError(
            f"no mapped word that {model_path} could be asked for, {dict(dropped)} left out",
            "one at least",
            "see why they are left out, and check other data",
        )
    wrong = [kept for kept, own in losses.items() if not own.isfinite().all()]
    if wrong:
        raise NotFiniteError(
            f"NaN or infinity in the loss of {model_path} from the patches: {', '.join(wrong)}",
            "finite losses",
            "check the model's weights; one that was trained to NaN is of no use",
        )


def _cases(readings: Sequence[Reading], store: MapStore) -> list[_Case]:
    cases = []
    for reading in readings:
        known = store.get(image_id(reading.image), reading.answer)
        if known is not None:
            cases += [_Case(reading, word, one) for word, one in zip(known.words, known.maps, strict=True)]
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
    """Negative log-likelihood of each case's word, nats a token, for each choice of patches: (case,).

    Words that no row predicts are left out, counted in `dropped`.
    """
    adapter = adapter_for(model.config)
    if adapter.resampler(model) is not None:
        raise UnsupportedModelError(
            f"a model of type {model.config.model_type!r}, whose language model sees a resampler's latents",
            "one that sees patches, which lie somewhere in the picture",
            "check another model",
        )
    locator = WordLocator(processor, adapter)
    found: dict[str, list[Tensor]] = {kept: [] for kept in KEPT}
    with evaluating(model):
        for start in range(0, len(cases), batch_size):
            group = cases[start : start + batch_size]
            for kept, losses in _batch(model, processor, adapter, locator, group, dropped).items():
                found[kept].append(losses)
    return {kept: torch.cat(losses) for kept, losses in found.items()}


def _batch(
    model, processor, adapter: VlmAdapter, locator: WordLocator, cases: Sequence[_Case], dropped: Counter[str]
) -> dict[str, Tensor]:
    conversations = [case.reading.messages() for case in cases]
    inputs = processor(
        images=[[case.reading.image] for case in cases],
        text=[processor.apply_chat_template(one, tokenize=False) for one in conversations],
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    ).to(model.device)
    located = [
        locator.rows(
            conversations[index],
            [(1, case.reading.answer, [case.word])],
            inputs["input_ids"][index],
            inputs["attention_mask"][index],
            dropped,
        )
        for index, case in enumerate(cases)
    ]
    rows = {index: own[0][1] for index, own in enumerate(located) if own}
    sizes = [[(case.reading.image.height, case.reading.image.width)] for case in cases]
    layout = adapter.image_boxes(inputs, sizes, processor)
    there = torch.stack([_shows(case.map, box) for case, box in zip(cases, layout.boxes, strict=True)])
    real = layout.pictures >= 0
    losses = {}
    for kept, mask in zip(KEPT, (None, there[real], ~there[real]), strict=True):
        logits = logits_keeping(model, adapter, inputs, mask)
        losses[kept] = (
            torch.stack(
                [
                    -logits[index, list(own)]
                    .log_softmax(dim=-1)
                    .gather(1, inputs["input_ids"][index, [row + 1 for row in own]][:, None])
                    .mean()
                    for index, own in rows.items()
                ]
                or [torch.zeros(0)]
            )
            .flatten()
            .cpu()
        )
    return losses


def _shows(heat: Tensor, boxes: Tensor) -> Tensor:
    """Which image keys show the word: bool (key,)."""
    overlap = overlap_matrix(boxes.cpu(), (heat.shape[0], heat.shape[1]))
    seen = overlap @ heat.flatten() / overlap.sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return seen >= SHOWS * seen.max()


def logits_keeping(
    model: PreTrainedModel, adapter: VlmAdapter, inputs: Mapping[str, Tensor], kept: Tensor | None
) -> Tensor:
    """Logits in float32 with the image keys outside `kept` (all samples' keys in a row) replaced by their mean.

    A key is what stands at its position when the language model begins; where that sees pictures by cross-attention
    alone, what comes out of `image_states`.
    """
    keys = adapter.image_keys(inputs)

    def replaced(found: Tensor) -> Tensor:
        assert kept is not None
        mask = kept.to(found.device).reshape(*found.shape[:-1], 1)
        return torch.where(mask, found, found.flatten(0, -2).mean(dim=0))

    def replace_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return replaced(output)

    def replace_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        assert keys is not None
        states, real = kwargs["inputs_embeds"].clone(), keys >= 0
        samples, places = real.nonzero()[:, 0].to(states.device), keys[real].to(states.device)
        states[samples, places] = replaced(states[samples, places])
        given = kwargs | {"inputs_embeds": states}
        if kwargs.get("deepstack_visual_embeds") is not None:  # Qwen3-VL: states of earlier tower layers, for later
            given["deepstack_visual_embeds"] = [replaced(one) for one in kwargs["deepstack_visual_embeds"]]
        return args, given

    if kept is None:
        return model(**inputs).logits.float()
    if keys is None:
        handle = adapter.image_states(model).register_forward_hook(replace_output)
    else:
        handle = model.get_decoder().register_forward_pre_hook(replace_input, with_kwargs=True)
    try:
        return model(**inputs).logits.float()
    finally:
        handle.remove()
